"""`cache_teacher`: run the teacher once over a data set, into shards that appear only when they are complete.

After an interruption it resumes after the last complete shard, and writes what it would have written.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import disable_progress_bars, enable_progress_bars
from datasets.utils.tqdm import are_progress_bars_disabled
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdfast.inputs import MOST_ENTRIES, Head, kind
from kdfast.ops import autocast
from kdfast.training.cache.description import (
    FORMATS,
    LOCK,
    MARK,
    NAME,
    SUMMARY,
    CacheError,
    CacheSummary,
    Description,
    Shard,
    Split,
    describe_split,
    factor_of,
    ids_of,
    is_complete,
    read_summary,
    shards,
    teacher_fingerprint,
    tokenizer_fingerprint,
)
from kdfast.training.cache.entries import TopK, draw, encode, table, top_k
from kdfast.training.cache.hidden import TOKENS_PER_WIDTH, CachedHead, solve_head
from kdfast.training.data.columns import MEDIA, media_columns
from kdfast.training.data.packing import PaddingCollator
from kdfast.training.data.rows import inputs_of_row
from kdfast.training.data.tokenizers import check_tokens, count_ids, own_tokenizer
from kdfast.training.durable import atomic_io, checksums, processes
from kdfast.training.durable.atomic_io import write_text
from kdfast.training.hf import (
    check_inputs,
    check_model,
    embedding_rows,
    head,
    head_shape,
    input_device,
    inputs_of,
    known_ids,
    run_backbone,
)

SHARD_TOKENS = 2**14, 2**20  # limits of the default; a shard costs a tenth of a second
INPUTS = ("input_ids", "attention_mask", "position_ids")
MAX_KL = 0.01  # nats, the default for hidden states, as in the recipe "compressed_head"
SEEDS = 2**32  # a sequence's seed: the run's times this, plus its place in the split


def cache_teacher(
    teacher: PreTrainedModel,
    splits: Mapping[str, Any],
    folder: str | Path,
    *,
    method: Literal["hidden", "sample", "top_k"] | None = None,
    k: int | None = None,
    rank: int | None = None,
    max_kl: float | None = None,
    temperatures: Sequence[float] = (2.0,),
    dtype: Literal["float16", "float32", "int8"] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    valid_vocab: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    shard_tokens: int | None = None,
    name: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> CacheSummary:
    """Run a teacher over `splits` and keep what a student learns from: its distribution at every token.

    Example:
        cache_teacher(teacher, {"train": train, "eval": held_out}, "caches/teacher", tokenizer=tokenizer)
        train = TeacherCache("caches/teacher").dataset("train", train, temperature=2.0)

    If `torch.distributed` is initialized, all processes must call it; each writes a share of the shards.

    Args:
        teacher: a causal `PreTrainedModel`, on the device where it runs, in its own dtype or under the caller's
            autocast.
        splits: name → data set (`len` and rows with input_ids), such as {"train": …, "eval": …}. Train on these same
            rows.
        folder: the cache's folder. A complete cache is left alone, an interrupted one completed.
        method: "top_k": the k most likely ids and the mass of all others. "sample": k ids drawn at random, counted.
            "hidden": `compress_head`'s coordinates of its hidden states, and one head for them. None: "top_k" if k is
            given, else "hidden".
        k: 1 to 1024, and for "top_k" at most the teacher's vocabulary; None = 64. Not used by "hidden".
        rank, max_kl: for "hidden", one of them: the number of coordinates, or the KL to the whole teacher, rounding
            included, that selects it; neither: MAX_KL. From the teacher's width on, the states are kept whole.
        temperatures: τ of later runs, besides τ = 1. "sample" draws at a single one; "hidden" serves all.
        dtype: of log-probabilities, None = float16; of coordinates, None = int8, with a scale per token.
        tokenizer: recorded, so that a run with other tokens is refused; must match the one saved with the teacher.
        valid_vocab: ids from here on are padding rows of the teacher's head, with probability 0. None = those that
            `tokenizer` has no ids for.
        seed: for drawing ids.
        batch_size: sequences at a time. Results do not depend on interruptions.
        shard_tokens: approximate tokens per shard; None = a 64th of all, 2^14 to 2^20.
        name: the teacher's name in the cache; None = as it was loaded.
        tell: called with lines that report progress.

    Raises:
        ValueError: an argument does not fit; it is named. CacheError, a ValueError: `folder` contains something else,
            with the differences named, or another call is at work on it.
        OSError: for example, the disk is full. Complete shards stay, and the same call resumes.
    """
    if not is_count(batch_size):
        raise ValueError(f"batch_size={batch_size!r} ({kind(batch_size)}); expected an int of at least 1")
    method = method or ("hidden" if k is None else "top_k")
    description = describe(
        teacher, splits, method=method, k=64 if k is None else k, rank=rank, max_kl=max_kl, temperatures=temperatures,
        dtype=dtype, tokenizer=tokenizer, valid_vocab=valid_vocab, seed=seed, shard_tokens=shard_tokens, name=name,
        tell=tell,
    )  # fmt: skip
    factor = factor_of(Path(folder))

    kept = cache(lambda: CachedHead.load(factor.folder))

    def begin() -> float:
        if description.method != "hidden":
            return description.bytes_per_token
        if not factor.folder.exists() or factor.find_damage(description):
            solved = solve_head(_some_text(teacher, next(iter(splits.values())), batch_size), description)
            _write_shard(factor, solved.save, description)
        tell(str(kept()))
        return replace(description, k=kept().rank).bytes_per_token

    def rows(dataset: Any, within: range) -> Iterator[dict[str, np.ndarray]]:
        for numbers, lengths, whole in _heads(teacher, dataset, within, batch_size):
            if description.method == "hidden":
                coordinates = kept().to(whole.hidden.device).coordinates(whole.hidden)
                yield from (encode(some, description) for some in coordinates.split(lengths))
            else:
                yield from _entries(whole, numbers, lengths, description)

    return fill(Path(folder), splits, description, rows, tell, begin)


def fill(
    folder: Path,
    splits: Mapping[str, Any],
    description: Description,
    rows: Callable[[Any, range], Iterator[dict[str, np.ndarray]]],
    tell: Callable[[str], None],
    begin: Callable[[], float] | None = None,
) -> CacheSummary:
    """Make, complete or find the cache for `description`. All processes call it; each writes its share.

    rows: yields the encoded entries of a data set's rows in a range, in order. begin: called first, by the first
    process; returns bytes per token, None = the description's.
    Raises CacheError and OSError as `cache_teacher` does, and what `rows` raises; complete shards stay.
    """
    tokens = sum(split.tokens for split in description.splits.values())
    lock = FileLock(folder / LOCK)  # held by the first process
    try:
        if processes.by_first(lambda: _claim(folder, description, lock)):
            return read_summary(folder)
        size = description.bytes_per_token if begin is None else processes.by_first(begin)
        at_most = "at most " if description.method == "sample" else ""
        total = f"{at_most}{tokens * size / 1e6:,.1f} MB, and headers of files"
        tell(f"{tokens:,} tokens, {at_most}{size:.0f} bytes each: {total}")
        start = time.perf_counter()
        written = sum(processes.by_all(lambda: _write_share(splits, folder, description, rows)))
        seconds = time.perf_counter() - start
        return processes.by_first(lambda: _finish(folder, tokens, written, seconds))
    finally:
        lock.release()


def describe(
    teacher: PreTrainedModel,
    splits: Mapping[str, Any],
    *,
    method: str,
    k: int = 1,
    rank: int | None = None,
    max_kl: float | None = None,
    temperatures: Sequence[float],
    dtype: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    valid_vocab: int | None,
    seed: int,
    shard_tokens: int | None,
    name: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Description:
    """Return the description of the cache that `cache_teacher` would make. Raise ValueError where it would."""
    check_model(teacher, "teacher")
    vocab, width = head_shape(teacher)
    dtype = dtype or ("int8" if method == "hidden" else "float16")
    if method == "hidden":
        _check_hidden(rank, max_kl, dtype)
        max_kl = MAX_KL if rank is None and max_kl is None else max_kl
        k, temperatures, seed = min(rank or width, width), (), 0  # nothing else decides what is kept
    if tokenizer is not None:
        check_tokens("tokenizer", tokenizer, own_tokenizer(teacher), valid_vocab)
        if valid_vocab is None and (ids := count_ids(tokenizer)) < vocab:
            valid_vocab = ids
            tell(f"valid_vocab={ids}: the teacher's head has {vocab} rows, the tokenizer {ids} ids")
    if method != "hidden":
        check_options(method, k, temperatures, dtype, vocab if valid_vocab is None else min(vocab, valid_vocab))
    for split, dataset in splits.items():
        row = dataset[0] if len(dataset) else {}
        check_inputs(teacher, "teacher", [name for name in INPUTS if name in row])
        _check_text_alone(split, dataset, inputs_of(teacher).difference(INPUTS))
        for i, text in enumerate(ids_of(dataset, f"splits[{split!r}]")):  # now, rather than after hours
            if text.size and not 0 <= text.min() <= text.max() < embedding_rows(teacher):
                inputs = PaddingCollator()([inputs_of_row(dataset[i], INPUTS)])
                known_ids(teacher, "teacher", inputs["input_ids"], inputs.get("attention_mask"))
    described, shard_sequences = describe_splits(splits, shard_tokens)
    return Description(
        teacher=name or str(teacher.name_or_path),
        teacher_sha256=teacher_fingerprint(teacher),
        teacher_dtype=str(_dtype(teacher)).removeprefix("torch."),
        tokenizer="" if tokenizer is None else str(tokenizer.name_or_path),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        vocab=vocab,
        valid_vocab=valid_vocab,
        method=method,
        k=k,
        temperatures=tuple(float(tau) for tau in temperatures if tau != 1 or method == "sample"),
        dtype=dtype,
        seed=seed,
        shard_sequences=shard_sequences,
        splits=described,
        max_kl=max_kl if method == "hidden" else None,
        format=FORMATS[method],
    )


def _check_text_alone(split: str, dataset: Any, read: Iterable[str] = ()) -> None:
    """Raise ValueError for a column that the teacher would read besides or instead of `input_ids`."""
    row = dataset[0] if len(dataset) else {}
    read = {*read, "teacher_input_ids"}
    if lost := [*media_columns(dataset), *(name for name in row if name in MEDIA or name in read)]:
        own = " (of teacher_prompt, privileged_context or teacher_prompt_template)" * (lost[0] == "teacher_input_ids")
        raise ValueError(
            f"splits[{split!r}] has {lost[0]}, and a cache is of text alone: the teacher would not be shown it{own}. "
            "Leave it out of the data, or train with a live teacher"
        )


def describe_splits(splits: Mapping[str, Any], shard_tokens: int | None) -> tuple[dict[str, Split], int]:
    """Return descriptions of the data sets and the sequences per shard. Raise ValueError for empty ones."""
    if shard_tokens is not None and not is_count(shard_tokens):
        raise ValueError(f"shard_tokens={shard_tokens!r} ({kind(shard_tokens)}); expected an int ≥ 1, or None")
    if not splits:
        raise ValueError("splits is empty; expected {name: data set}, such as {'train': …, 'eval': …}")
    for split, dataset in splits.items():
        _check_text_alone(split, dataset)
    described = {split: describe_split(dataset, f"splits[{split!r}]") for split, dataset in splits.items()}
    tokens = sum(split.tokens for split in described.values())
    least, most = SHARD_TOKENS
    shard_tokens = shard_tokens or min(max(tokens // 64, least), most)
    return described, max(1, int(shard_tokens // max(split.length for split in described.values())))


def _claim(folder: Path, description: Description, lock: FileLock) -> bool:
    """Claim the folder for this cache; return whether it is complete. Otherwise, the lock is held."""
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{str(folder)!r} is a file; name a new folder for the cache")
    if not is_complete(folder):
        if not (folder / NAME).exists():
            if folder.exists() and _holds_anything(folder):
                raise CacheError(
                    f"{str(folder)!r} holds files and no {NAME}; name an empty or a new folder for the cache"
                )
            folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise CacheError(
                f"{str(folder)!r} is being made by another process, which holds its {LOCK}; wait for it or end it"
            ) from error
        if not _holds_anything(folder):
            description.write(folder)
    if changed := Description.read(folder).differences(description):
        raise CacheError(
            f"{str(folder)!r} holds a teacher cache of something else ({'; '.join(changed)}). Name another folder, or "
            "remove that one"
        )
    if is_complete(folder):
        return True
    for left in folder.glob(f".*{atomic_io.INCOMPLETE}"):
        atomic_io.discard(left)
    return False


def _holds_anything(folder: Path) -> bool:
    """Return whether more is in the folder than a call leaves that ends before its first shard."""
    begun = (LOCK, NAME, f"{NAME}.tmp")
    return any(path.name not in begun for path in folder.iterdir())


def _write_share(
    splits: Mapping[str, Any],
    folder: Path,
    description: Description,
    rows_of: Callable[[Any, range], Iterator[dict[str, np.ndarray]]],
) -> int:
    """Write this process's missing shards; return their number of tokens."""
    mine = [shard for split in splits for shard in shards(folder, description, split)]
    mine = mine[processes.index() :: processes.count()]
    written, total = 0, sum(shard.tokens for shard in mine)
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="caching", disable=None) as progress:
        for shard in mine:
            if shard.folder.exists() and not shard.find_damage(description):
                progress.update(shard.tokens)
                continue
            rows, dataset = [], splits[shard.split]
            for i, row in zip(shard.sequences, rows_of(dataset, shard.sequences), strict=True):
                rows.append(row)
                tokens = len(dataset[i]["input_ids"])
                written += tokens
                progress.update(tokens)
            _write_shard(shard, partial(_save, rows), description)
    return written


@torch.no_grad()
def _heads(
    teacher: PreTrainedModel, dataset: Any, within: range, batch_size: int
) -> Iterator[tuple[range, list[int], Head]]:
    """Yield row numbers, row lengths and the teacher's head over their tokens, some rows at a time."""
    teacher.eval()
    dtype = _dtype(teacher)
    for at in range(0, len(within), batch_size):
        numbers = within[at : at + batch_size]
        batch = [dataset[i] for i in numbers]
        lengths = [len(row["input_ids"]) for row in batch]
        inputs = PaddingCollator()([inputs_of_row(row, INPUTS) for row in batch])
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        inputs["input_ids"], _ = known_ids(teacher, "teacher", inputs["input_ids"], inputs.get("attention_mask"))
        own = head(teacher, run_backbone(teacher, **inputs, use_cache=False).last_hidden_state)
        bias = None if own.bias is None else own.bias.to(dtype)
        hidden = own.hidden[real.to(own.hidden.device)].to(dtype)
        yield numbers, lengths, replace(own, hidden=hidden, weight=own.weight.to(dtype), bias=bias)


def _entries(whole: Head, numbers: range, lengths: list[int], x: Description) -> Iterator[dict[str, np.ndarray]]:
    """Yield the encoded entries of rows with these numbers and lengths."""
    if x.method == "top_k":
        largest = top_k(whole, x.k, x.temperatures, x.valid_vocab)
        for entries in zip(*(part.cpu().split(lengths) for part in largest), strict=True):
            yield encode(TopK(*entries), x)
        return
    (tau,) = x.temperatures
    for number, hidden in zip(numbers, whole.hidden.split(lengths), strict=True):
        generator = torch.Generator(hidden.device).manual_seed((x.seed * SEEDS + number) % 2**63)
        yield encode(draw(replace(whole, hidden=hidden), x.k, tau, generator, x.valid_vocab), x)


def _some_text(teacher: PreTrainedModel, dataset: Any, batch_size: int) -> Head:
    """Return the teacher's head over evenly spaced rows, with TOKENS_PER_WIDTH tokens per unit of its width."""
    _, width = head_shape(teacher)
    tokens = sum(len(ids) for ids in ids_of(dataset))
    step = max(1, tokens // (TOKENS_PER_WIDTH * width))
    pieces = [whole for _, _, whole in _heads(teacher, dataset, range(0, len(dataset), step), batch_size)]
    return replace(pieces[0], hidden=torch.cat([whole.hidden for whole in pieces]))


def _dtype(teacher: PreTrainedModel) -> torch.dtype:
    """Return the dtype that the teacher computes in: its own, or the caller's autocast's."""
    return autocast.dtype_of(input_device(teacher)) or teacher.get_output_embeddings().weight.dtype


def _save(rows: list[dict[str, np.ndarray]], folder: Path) -> None:
    Dataset(table(rows)).save_to_disk(folder, num_shards=1)


def _write_shard(shard: Shard, save: Callable[[Path], None], description: Description) -> None:
    staged = atomic_io.staging(shard.folder)
    shown = not are_progress_bars_disabled()
    disable_progress_bars()  # datasets would show one per shard
    try:
        save(staged)
        write_text(staged / MARK, shard.mark(description))
        checksums.write(staged)
        atomic_io.publish(staged, shard.folder, replace=True)
    except OSError:
        atomic_io.discard(staged)
        raise
    finally:
        if shown:
            enable_progress_bars()


def _finish(folder: Path, tokens: int, written: int, seconds: float) -> CacheSummary:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    summary = CacheSummary(tokens, size, size / tokens, written, seconds, written / seconds if written else None)
    write_text(folder / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")
    with contextlib.suppress(OSError):  # Windows refuses while the file is open
        (folder / LOCK).unlink()  # the next call finds the cache complete
    return summary


def _check_hidden(rank: int | None, max_kl: float | None, dtype: str) -> None:
    if dtype not in ("float16", "float32", "int8"):
        raise ValueError(f"dtype={dtype!r}; expected 'int8', 'float16' or 'float32'")
    if rank is not None and (max_kl is not None or not is_count(rank)):
        raise ValueError(f"rank={rank!r} and max_kl={max_kl}; expected an int ≥ 1, or max_kl in its place")
    if max_kl is not None and not max_kl > 0:
        raise ValueError(f"max_kl={max_kl!r}; expected a KL > 0 in nats")


def check_options(method: str, k: int, temperatures: Sequence[float], dtype: str, vocab: int) -> None:
    """Raise ValueError naming the argument that is impossible; `vocab` is the number of real ids."""
    if method not in ("top_k", "sample"):
        raise ValueError(f"method={method!r}; expected 'hidden', 'top_k' or 'sample'")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype!r}; expected 'float16' or 'float32'")
    most = min(MOST_ENTRIES, vocab) if method == "top_k" else MOST_ENTRIES
    if not is_count(k) or k > most:
        raise ValueError(f"k={k}; expected 1 to {most}, with {vocab} ids in the teacher's vocabulary")
    if not all(tau > 0 for tau in temperatures):
        raise ValueError(f"temperatures={tuple(temperatures)}; expected numbers > 0")
    if method == "sample" and len(temperatures) != 1:
        raise ValueError(f"temperatures={tuple(temperatures)}; expected one for method='sample', which draws ids at it")


def is_count(value: Any) -> bool:
    """Return whether the value is an int of at least 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
