"""`import_log_probs`: a teacher cache from log-probabilities that were made elsewhere, in a file or a data set."""

from __future__ import annotations

import glob
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from kdfast.inputs import MOST_ENTRIES
from kdfast.training.cache.description import CacheError, CacheSummary, Description, Split, tokenizer_fingerprint
from kdfast.training.cache.entries import encode
from kdfast.training.cache.formats import SUM, Listed, Position, check_texts, fit, leads, read_row, rows_in, to_top_k
from kdfast.training.cache.write import check_options, describe_splits, fill
from kdfast.training.data.rows import lengths_of
from kdfast.training.data.tokenizers import count_ids
from kdfast.training.durable import processes
from kdfast.training.durable.errors import first_line
from kdfast.training.hf import IGNORE_INDEX

LOOKED_AT = 64  # rows that show how positions are aligned, and whether decoded tokens are the tokenizer's
SURE = 3.0  # standard errors by which the tokens must show it
LINES = {".jsonl", ".json", ".ndjson"}


def import_log_probs(
    source: Any,
    splits: Mapping[str, Any],
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    k: int | None = None,
    temperatures: Sequence[float] = (),
    dtype: Literal["float16", "float32"] = "float16",
    logprobs_field: str | None = None,
    logprobs_temperature: float = 1.0,
    shard_tokens: int | None = None,
    name: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> CacheSummary:
    """Make a teacher cache from log-probabilities in a file or data set, without a teacher.

    Example:
        import_log_probs("vllm.jsonl", {"train": rows}, "caches/teacher", tokenizer=tokenizer)

    Entries are found by their tokens, so rows may be in any order. Log-probabilities at τ = 1, with the log of the
    remaining mass, serve only τ = 1. Those that axolotl has renormalized (target_logprobs) serve any temperature.

    Args:
        source: JSON lines (a file or a glob; .gz too), parquet, a folder that `save_to_disk` wrote, a data set's name,
            or rows in memory. Its columns are vLLM's `prompt_logprobs`, SGLang's `input_top_logprobs` and
            `input_token_logprobs`, or axolotl's `logprobs` or `target_logprobs`, beside input_ids, prompt_token_ids,
            messages or text.
        splits: name → data set of rows with input_ids to train on, as in `cache_teacher`. A row may be one of the
            source's, truncated; each document of a packed row is looked for.
        folder: the cache's folder. A complete cache is left alone, an interrupted one completed.
        tokenizer: the teacher's and the text's; compared with decoded tokens, if there are any.
        k: entries kept per token, the most likely, at most 1024; None = as many as there are.
        temperatures: τ of later runs, for renormalized entries; others serve τ = 1.
        dtype: dtype of the log-probabilities.
        logprobs_field: the column's name, if it is another.
        logprobs_temperature: the kd_temperature with which target_logprobs were prepared.
        shard_tokens, name, tell: as in `cache_teacher`.

    Raises CacheError, a ValueError naming the file and the row: unknown layout, entries of another text, vocabulary or
    position, a value that is not a log-probability, or missing rows; and as `cache_teacher` does.
    """
    described, shard_sequences = describe_splits(splits, shard_tokens)
    wanted = {split: list(_documents(dataset)) for split, dataset in splits.items()}
    longest = max(length for documents in wanted.values() for _, _, length in documents)
    read: list[Source] = []
    processes.by_all(lambda: read.append(Source(source, tokenizer, logprobs_field, longest)))
    (found,) = read
    if logprobs_temperature != 1 and not found.renormalized:
        raise CacheError(
            f"logprobs_temperature={logprobs_temperature:g}, and {found.name} has log-probabilities that leave a tail, "
            "which would not be known at the run's temperature; expected 1"
        )
    for split, documents in wanted.items():
        if lost := [n for n, key, _ in documents if key not in found.places]:
            raise CacheError(
                f"{found.name} has no entries for {len({*lost})} of {len(splits[split])} rows of splits[{split!r}], "
                f"the first of them row {lost[0]}. Expected the same tokens, special ones too: the text, tokenizer, "
                "chat template and max_length that the entries were made with"
            )
    vocab = count_ids(tokenizer)
    k = min(found.most, MOST_ENTRIES, vocab) if k is None else k
    taus = tuple(float(tau) for tau in temperatures if tau != 1) if found.renormalized else ()
    description = describe(
        {"kind": "file", "name": found.name, "layout": found.layout, "sha256": found.sha256, "whole": found.whole},
        name or found.name, tokenizer, k, taus, dtype, described, shard_sequences,
    )  # fmt: skip
    tell(f"{found.name}: {found.layout}, at most {found.most} entries a token"
         + ", renormalized: of other ids nothing is known" * found.renormalized)  # fmt: skip

    def rows(dataset: Any, within: range) -> Iterator[dict[str, np.ndarray]]:
        for i in within:
            where = f"{found.name}, for row {i} of the text"
            parts = [found.entries(ids) for ids in documents_of(dataset[i])]
            if not found.whole:
                _check_targets(dataset[i], [position for part in parts for position in part], where)
            renormalized = (1 + len(taus)) * found.renormalized
            yield encode_row(parts, where, description, renormalized=renormalized, temperature=logprobs_temperature)

    return fill(Path(folder), splits, description, rows, tell)


def describe(
    source: dict[str, Any],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    k: int,
    temperatures: tuple[float, ...],
    dtype: str,
    splits: dict[str, Split],
    shard_sequences: int,
) -> Description:
    """Return the description of a cache without a teacher at hand. Raise ValueError for numbers that are impossible."""
    vocab = count_ids(tokenizer)
    check_options("top_k", k, temperatures, dtype, vocab)
    return Description(
        teacher=name, teacher_sha256="", teacher_dtype="", tokenizer=str(tokenizer.name_or_path),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer), vocab=vocab, valid_vocab=vocab, method="top_k", k=k,
        temperatures=temperatures, dtype=dtype, seed=0, shard_sequences=shard_sequences, splits=splits, source=source,
    )  # fmt: skip


def documents_of(row: Mapping[str, Any]) -> list[list[int]]:
    """Return the tokens of each document packed into a row."""
    ids = np.asarray(row["input_ids"]).tolist()
    ends = np.cumsum([0, *([n for n in lengths_of(dict(row)) if n > 0] or [len(ids)])])
    return [ids[start:end] for start, end in itertools.pairwise(ends)]


def encode_row(
    parts: Iterable[Sequence[Position | None]], where: str, description: Description, **options: Any
) -> dict[str, np.ndarray]:
    """Return a cache's row with the entries after each token of each document."""
    positions = [position for part in parts for position in part]
    return encode(to_top_k(positions, where, description.vocab, description.k, **options), description)


class Source:
    """The rows of a file or data set, and where each text's entries are.

    It is read once here. Everything that can be checked without the text is; a CacheError names the row.

    longest: the most tokens in a row of the text.
    """

    def __init__(self, source: Any, tokenizer: PreTrainedTokenizerBase, field: str | None, longest: int) -> None:
        self.name, self.rows = _open(source)
        self.tokenizer, self.field = tokenizer, field
        self.places: dict[bytes, tuple[int, int, int]] = {}  # (row, choice, tokens)
        self.ahead, self.renormalized, self.most = False, False, 0
        looked = [each for n in range(min(len(self.rows), LOOKED_AT)) for each in self._listed(n)]
        if not looked:
            raise CacheError(f"{self.name} is empty; expected rows with log-probabilities")
        self.layout, self.whole = looked[0].layout, looked[0].whole
        self._look(looked)
        content = hashlib.sha256()
        for n in range(len(self.rows)):
            content.update(repr(self.rows[n]).encode())
            for choice, listed in enumerate(self._listed(n)):
                if listed.layout != self.layout:
                    raise CacheError(f"{self._row(n)} has {listed.layout}, and earlier ones {self.layout}")
                tokens, positions = fit(listed, self._row(n), ahead=self.ahead)
                self.most = max([self.most, *(len(x.ids) for x in positions if x is not None)])
                for end in {len(tokens), len(tokens) - 1, longest}:  # a server generates a token; rows may be truncated
                    if 0 < end <= len(tokens):
                        self.places.setdefault(_key(tokens[:end]), (n, choice, end))
        self.sha256 = content.hexdigest()

    def entries(self, tokens: list[int]) -> list[Position | None]:
        """Return the entries after each of a document's tokens; None if there are none, as after the last."""
        n, choice, end = self.places[_key(tokens)]
        _, positions = fit(self._listed(n)[choice], self._row(n), ahead=self.ahead)
        return [*positions[1 : end + 1], *[None] * (end + 1 - len(positions))]

    def _row(self, n: int) -> str:
        return f"{self.name}, row {n}"

    def _listed(self, n: int) -> list[Listed]:
        where = self._row(n)
        return [read_row(one, where, self.tokenizer, self.field) for one in rows_in(self.rows[n], where)]

    def _look(self, looked: list[Listed]) -> None:
        """Find out how positions are aligned and whether they sum to 1. Raise CacheError for other alignments."""
        for listed in looked:
            check_texts(listed, self.name, self.tokenizer)
        if not all(listed.known for listed in looked):
            lead = np.concatenate([leads(*fit(listed, self.name)) for listed in looked])
            sure = lead.sum() / max(np.sqrt((lead**2).sum()), 1e-9)
            self.ahead = self.layout == "target_logprobs" and sure > SURE
            if self.layout == "target_logprobs" and abs(sure) <= SURE:
                raise CacheError(
                    f"{self.name}: its tokens do not tell whether target_logprobs are of each token or of the one "
                    "after it, and axolotl's versions differ. Import the column they were prepared of (logprobs)"
                )
            if self.layout != "target_logprobs" and sure > SURE:
                raise CacheError(
                    f"{self.name}: {self.layout} is shifted: entries make the token after theirs likelier. Expected at "
                    "each token those that predict it"
                )
        if self.layout == "target_logprobs":
            given = (x for listed in looked for x in listed.positions if x is not None)
            self.renormalized = all(abs(sum(map(exp, map(float, x.log_probs))) - 1) < SUM for x in given)


def _open(source: Any) -> tuple[str, Sequence[Any]]:
    """Return a source's name and rows: mappings, or lines of JSON. Raise CacheError if it has none."""
    if not isinstance(source, str | Path):
        return "source", source
    path, name = Path(source).expanduser(), str(source)
    files = sorted(map(str, path.glob("*"))) if path.is_dir() else [str(path)] if path.exists() else []
    files = files or sorted(glob.glob(str(path)))
    kinds = {Path(file.removesuffix(".gz")).suffix for file in files}
    try:
        if path.is_dir() and any((path / each).exists() for each in ("state.json", "dataset_dict.json")):
            data = load_from_disk(str(path))
        elif kinds and kinds <= LINES:
            return name, load_dataset("text", data_files=files, split="train")["text"]
        elif files:
            data = load_dataset("parquet", data_files=files, split="train")
        else:
            data = load_dataset(name)
    except Exception as error:  # of many classes: no such file, truncated, no data set of that name
        raise CacheError(
            f"{name!r} cannot be read ({first_line(error)}); expected JSON lines, parquet, a folder that save_to_disk "
            "wrote, or a data set's name"
        ) from error
    return name, data if isinstance(data, Dataset) else concatenate_datasets([*data.values()])


def _documents(dataset: Any) -> Iterator[tuple[int, bytes, int]]:
    for n in range(len(dataset)):
        yield from ((n, _key(ids), len(ids)) for ids in documents_of(dataset[n]))


def _key(tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes()).digest()


def _check_targets(row: Mapping[str, Any], positions: Sequence[Position | None], where: str) -> None:
    """Raise CacheError if a token is a target but has no entries."""
    labels, start = list(row.get("labels", row["input_ids"])), 0
    for ids in documents_of(row):
        for t in range(start, start + len(ids) - 1):
            if positions[t] is None and labels[t + 1] != IGNORE_INDEX:
                raise CacheError(
                    f"{where}, has no entries for token {t + 1}, which is trained on. Expected labels of -100 there "
                    "(completion_only_loss, assistant_only_loss), or entries of all tokens"
                )
        start += len(ids)
