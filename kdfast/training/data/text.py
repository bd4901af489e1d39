"""Text as fixed-length blocks of token ids, through the `datasets` library and its cache.

A source is a file, a glob, a folder, or a data set's name. JSON, JSON lines, CSV and parquet give a document per row
(`text_column`); any other file is plain text and one document, with its line breaks. Documents are tokenized without
special tokens, each ends with the end-of-text token, and their stream is cut into blocks of `max_length`. Nothing is
padded, so every position of a block counts, and a block may begin inside a document. `labels` equal `input_ids`;
nothing is shifted here. The rest of every 1000 documents, less than one block, is dropped. chat.py has other rows, and
text whose documents are kept apart.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdfast.inputs import did_you_mean
from kdfast.training.data.columns import media_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
TEXTS = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js"}
TEXT_TYPES = ("string", "large_string", "string_view", "null")  # of a text column; the last if all values are missing
LONGEST_PIECE = 100_000  # most characters per tokenizer call: bounds its memory and keeps its threads busy


class DataError(ValueError):
    """The error raised when an argument's data is missing, empty, or not what the argument says."""


def columns_of(dataset: Any) -> list[str]:
    """Return the names of a data set's columns; for a stream that does not know them, its first row's."""
    return list(dataset.column_names or next(iter(dataset), ()))


def map_rows(dataset: Any, function: Callable[..., Any], desc: str, num_proc: int | None = None, **options: Any) -> Any:
    """Return `dataset.map(function, **options)`; a stream accepts no progress bar and no processes."""
    if hasattr(dataset, "__len__"):
        options |= {"desc": desc, "num_proc": num_proc}
    return dataset.map(function, **options)


def check_text_only(argument: str, dataset: Any, columns: list[str]) -> None:
    """Raise DataError for a column that tokenizing text would lose: images, or a teacher's entries."""
    if media := media_columns(dataset):
        raise DataError(
            f"{argument} has the column {media[0]!r}, which holds more than text, and only text is read here. Leave "
            "the column out of the data; to train on it, use KDTrainer with a collator that makes the model's inputs"
        )
    if "teacher_indices" in columns:
        raise DataError(
            f"{argument} has a column 'teacher_indices', which is lost where text is tokenized. Remove it, or "
            "train on rows of tokens with a teacher's entries in Python: KDTrainer(…, KDConfig(teacher_tail=…))"
        )


def load_blocks(
    argument: str,
    documents: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    text_column: str = "text",
    num_proc: int | None = None,
) -> Any:
    """Pack documents into blocks of `max_length` ids, columns `input_ids` and `labels`; errors name `argument`."""
    columns = columns_of(documents)
    if text_column not in columns:
        raise DataError(
            f"{argument} has no column {text_column!r}; its columns are {', '.join(columns)}. "
            f"Set text_column{did_you_mean(text_column, columns)}"
        )
    if max_length is None:
        raise DataError("max_length=None; expected the number of tokens of a block of text, or packing=False")
    check_text_only(argument, documents, columns)
    feature = (documents.features or {}).get(text_column)
    if feature is not None and (kind := str(getattr(feature, "dtype", "no text"))) not in TEXT_TYPES:
        raise DataError(f"{argument}: its column {text_column!r} holds {kind}, expected text. Set text_column.")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token, which closes every document here. "
            "Set its eos_token and save it again."
        )

    def pack(batch: dict[str, list[str | None]]) -> dict[str, Any]:
        pieces = [list(_pieces(text or "")) for text in batch[text_column]]
        flat = [piece for document in pieces for piece in document]
        ids = iter(tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"] if flat else [])
        stream: list[int] = []
        for document in pieces:
            for _ in document:
                stream += next(ids)
            stream.append(tokenizer.eos_token_id)
        n_blocks = len(stream) // max_length
        blocks = list(np.array(stream[: n_blocks * max_length], dtype=np.int32).reshape(n_blocks, max_length))
        return {"input_ids": blocks, "labels": blocks}

    options = {"batched": True, "batch_size": 1000, "remove_columns": columns}
    blocks = map_rows(documents, pack, f"Tokenizing {argument}", num_proc, **options)
    if hasattr(blocks, "__len__") and len(blocks) == 0:
        raise DataError(
            f"{argument} holds {len(documents)} document(s) and not one full block of max_length={max_length} "
            "tokens. Give it more text, or lower max_length."
        )
    return blocks


def read_files(argument: str, source: str, *, streaming: bool = False) -> Any:
    """Return the documents of a file, a folder (files of a known kind, at any depth) or a glob, in sorted order."""
    from datasets import load_dataset

    try:
        files = _files(Path(source).expanduser())
    except (OSError, RuntimeError) as error:  # the name is too long, or a home folder does not exist
        raise DataError(f"{argument}: {source!r} cannot be read: {error}") from error
    if not files:
        raise DataError(f"{argument}: {source!r} does not exist, or is a folder or pattern without a readable file")
    if not any(p.stat().st_size for p in files):
        raise DataError(f"{argument}: {source!r} is empty")

    kinds = {TABLES.get(p.suffix, "text") for p in files}
    if len(kinds) > 1:
        mixed = " and ".join(sorted(kinds))
        raise DataError(f"{argument}: {source!r} mixes {mixed} files; name one kind, as in '*.txt'")
    kind = kinds.pop()
    if kind == "json" and (strange := next((p for p in files if not _holds_rows(p)), None)):
        raise DataError(f"{argument}: {str(strange)!r} is no JSON of rows; expected it to begin with {{ or [")
    options = {"sample_by": "document", "encoding_errors": "replace"} if kind == "text" else {}
    try:
        return load_dataset(kind, data_files=[str(p) for p in files], split="train", streaming=streaming, **options)
    except Exception as error:  # `datasets` wraps its reader's errors: malformed JSON, not a parquet file, ...
        raise DataError(f"{argument}: {source!r} could not be read as {kind}: {error.__cause__ or error}") from error


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in TEXTS | TABLES.keys())
    if path.exists():
        return [path]
    return sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())


def _holds_rows(path: Path) -> bool:
    """Return whether JSON begins with rows. (If it begins with null, pyarrow's reader dies with SIGSEGV.)"""
    with path.open("rb") as file:
        start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start[:1] in (b"{", b"[", b"")


def read_dataset(
    argument: str, name: str, config: str | None = None, split: str = "train", *, streaming: bool = False
) -> Any:
    """Return the documents of one split of a named data set, from the hub or a local folder."""
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # missing name, unknown configuration or split, no network: all say what, none say where
        raise DataError(f"{argument}: data set {name!r}, configuration {config!r}, split {split!r}: {error}") from error


def hold_out(blocks: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Split blocks into (training, evaluation): the last `fraction`, at least one block, is held out."""
    n_eval = max(1, int(len(blocks) * fraction))
    if n_eval >= len(blocks):
        raise DataError(
            f"eval_fraction={fraction} leaves nothing to train on: there are {len(blocks)} block(s), and {n_eval} "
            "would be held out. Give more text, lower max_length, or name an eval_file."
        )
    parts = blocks.train_test_split(test_size=n_eval, shuffle=False)
    return parts["train"], parts["test"]


def _pieces(text: str) -> Iterator[str]:
    """Yield `text` in pieces of at most LONGEST_PIECE characters, cut at line ends if there are any."""
    start = 0
    while start < len(text):
        stop = start + LONGEST_PIECE
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def check_positions(which: str, model: PreTrainedModel, length: int | None, what: str = "max_length={}") -> None:
    """Raise DataError if rows of `length` tokens exceed the model's positions; `what` describes them."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length is not None and length > limit:
        raise DataError(f"{what.format(length)} is more than the {limit} positions the {which} has; lower max_length")
