"""`cache_teacher`: the teacher over a data set, once, into shards that appear only when they are complete.

    cache.json              what this is a cache of: description.py; written first
    train-00000/ …          shards: a data set each (`datasets.load_from_disk` reads one), shard.json and SHA256SUMS
    summary.json            sizes and speed; written last: with it the cache is complete

A killed `cache_teacher` goes on after the last complete shard, and what it writes is what it would have written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import disable_progress_bars, enable_progress_bars
from datasets.utils.tqdm import are_progress_bars_disabled
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdfast import autocast
from kdfast.training import folders, manifest
from kdfast.training.cache import rows
from kdfast.training.cache.description import (
    NAME,
    CacheError,
    Description,
    describe_split,
    teacher_fingerprint,
    tokenizer_fingerprint,
)
from kdfast.training.cache.entries import TopK, draw, top_k
from kdfast.training.files import write_text
from kdfast.training.heads import backbone, check_model, head, head_shape
from kdfast.validation import MOST_ENTRIES

SUMMARY = "summary.json"
MARK = "shard.json"  # in a shard: which one of which cache it is
SHARD_TOKENS = 2**20
SEEDS = 2**32  # a sequence's own: the run's times this, and its place in the split


@dataclass(frozen=True)
class CacheSummary:
    tokens: int
    bytes: int  # of all files
    bytes_per_token: float
    tokens_written: int  # by the process that finished it, which may have gone on from an earlier one
    seconds: float  # for those
    tokens_per_second: float | None

    def __str__(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens/s"
        return f"{self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB, {self.bytes_per_token:.1f} bytes a token{speed}"


def cache_teacher(
    teacher: PreTrainedModel,
    splits: Mapping[str, Any],
    folder: str | Path,
    *,
    method: Literal["top_k", "sample"] = "top_k",
    k: int = 64,
    temperatures: Sequence[float] = (2.0,),
    dtype: Literal["float16", "float32"] = "float16",
    tokenizer: PreTrainedTokenizerBase | None = None,
    valid_vocab: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    shard_tokens: int = SHARD_TOKENS,
    name: str | None = None,
    process_index: int = 0,
    processes: int = 1,
    wait_for_all: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda text: None,
) -> CacheSummary:
    """Keep of the teacher's distribution, for every token of `splits`, what a student is trained on.

    Args:
        teacher: a causal `PreTrainedModel`, on the device it is to run on. It runs in its own dtype, or under the
            autocast of the caller, as a live one does.
        splits: name → data set (`len` and rows with input_ids, all of a split of one length), such as {"train": …,
            "eval": …}. Training goes over these same rows.
        folder: of the cache. A complete one is left alone, an interrupted one completed.
        method: "top_k": the k most likely ids and the mass of all others. "sample": k ids drawn at random, counted.
        k: 1 to 1024, and at most the teacher's vocabulary for "top_k".
        temperatures: τ of the runs to come; entries serve τ = 1 besides. One alone for "sample": ids are drawn there.
        dtype: of log-probabilities.
        tokenizer: its tokens are noted, so that a run with another one is refused.
        valid_vocab: ids ≥ this are padding rows of the teacher's head: probability 0.
        seed: of what is drawn.
        batch_size: sequences at once; results do not depend on how often the work was interrupted.
        shard_tokens: about how many go into one shard.
        name: what the teacher is called in the cache; None = as it was loaded.
        process_index, processes, wait_for_all: of several processes each writes its share of the shards; the last is
            a barrier.
        tell: takes lines for whoever looks on.

    Raises:
        ValueError: an argument that does not fit, naming it. CacheError, one of those: `folder` holds a cache of
            something else; what differs is named.
        OSError: as on a full disk. What is complete stays, and the same call goes on from it.
    """
    folder = Path(folder)
    vocab, _ = head_shape(teacher)
    _check(method, k, temperatures, dtype, vocab if valid_vocab is None else min(vocab, valid_vocab))
    check_model(teacher, "teacher")
    lengths = {split: _length(split, dataset) for split, dataset in splits.items()}
    description = Description(
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
        shard_sequences=max(1, shard_tokens // max(lengths.values())),
        splits={split: describe_split(dataset) for split, dataset in splits.items()},
    )
    if process_index == 0:
        _claim(folder, description)
    wait_for_all()
    if (folder / SUMMARY).is_file():
        return read_summary(folder)
    tokens = sum(split.tokens for split in description.splits.values())
    at_most = "at most " if method == "sample" else ""
    tell(f"{tokens:,} tokens, {at_most}{description.bytes_per_token:.0f} bytes each: {at_most}"
         f"{tokens * description.bytes_per_token / 1e9:,.2f} GB")  # fmt: skip

    start, written = time.perf_counter(), 0
    teacher.eval()
    with tqdm(total=tokens, unit=" tokens", unit_scale=True, desc="caching", disable=None) as progress:
        for split, dataset in splits.items():
            for shard in range(shards(description, split)):
                first = shard * description.shard_sequences
                within = range(first, min(first + description.shard_sequences, len(dataset)))
                final = shard_folder(folder, split, shard)
                mine = shard % processes == process_index
                if mine and (not final.exists() or find_damage(folder, description, split, shard)):
                    encoded = []
                    for row in _rows(teacher, dataset, within, description, batch_size):
                        encoded.append(row)
                        progress.update(lengths[split])
                    _write_shard(final, rows.table(encoded), description.mark(split, shard))
                    written += len(within) * lengths[split]
                else:
                    progress.update(len(within) * lengths[split])
    seconds = time.perf_counter() - start
    wait_for_all()
    summary = _summary(folder, tokens, written, seconds)
    if process_index == 0:
        write_text(folder / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")
    wait_for_all()
    return summary


def read_summary(folder: Path) -> CacheSummary:
    try:
        summary = CacheSummary(**json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
        str(summary)  # of anything but numbers a TypeError or ValueError
        return summary
    except (OSError, ValueError, TypeError) as error:
        raise CacheError(
            f"{str(folder / SUMMARY)!r} is damaged ({error}); remove it, and `kdfast cache` writes it again"
        ) from error


def shards(description: Description, split: str) -> int:
    return -(-description.splits[split].sequences // description.shard_sequences)


def shard_folder(folder: Path, split: str, shard: int) -> Path:
    return folder / f"{split}-{shard:05d}"


@torch.no_grad()
def _rows(
    teacher: PreTrainedModel, dataset: Any, within: range, description: Description, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    device = teacher.get_output_embeddings().weight.device
    for start in range(within.start, within.stop, batch_size):
        batch = [dataset[i] for i in range(start, min(start + batch_size, within.stop))]
        inputs = {
            key: torch.as_tensor(np.stack([np.asarray(row[key]) for row in batch]), device=device)
            for key in ("input_ids", "attention_mask", "position_ids")
            if key in batch[0]
        }
        own = head(teacher, backbone(teacher)(**inputs, use_cache=False).last_hidden_state)
        dtype = _dtype(teacher)
        bias = None if own.bias is None else own.bias.to(dtype)
        whole = replace(own, hidden=own.hidden.to(dtype), weight=own.weight.to(dtype), bias=bias)
        if description.method == "top_k":
            largest = top_k(whole, description.k, description.temperatures, description.valid_vocab)
            for entries in zip(*(part.cpu() for part in largest), strict=True):
                yield rows.encode_top_k(TopK(*entries), description)
            continue
        for i, hidden in enumerate(whole.hidden):
            generator = torch.Generator(device).manual_seed((description.seed * SEEDS + start + i) % 2**63)
            (tau,) = description.temperatures
            found = draw(replace(whole, hidden=hidden), description.k, tau, generator, description.valid_vocab)
            yield rows.encode_drawn(found, description)


def _dtype(teacher: PreTrainedModel) -> torch.dtype:
    weight = teacher.get_output_embeddings().weight
    return autocast.dtype_of(weight.device) or weight.dtype


def find_damage(folder: Path, description: Description, split: str, shard: int) -> str | None:
    """What is wrong with a shard, or None. Its own checksums do not tell it from another one in its place, nor whether
    cache.json is what it was."""
    path = shard_folder(folder, split, shard)
    if damage := manifest.find_damage(path):
        return damage
    try:
        mark = (path / MARK).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        mark = ""
    if mark != description.mark(split, shard):
        return f"by its {MARK} it is another shard, or of a cache with another {NAME} than this folder's"
    return None


def _write_shard(final: Path, table: Any, mark: str) -> None:
    staged = folders.staging(final)
    shown = not are_progress_bars_disabled()
    disable_progress_bars()  # of datasets: one a shard
    try:
        Dataset(table).save_to_disk(staged, num_shards=1)
        write_text(staged / MARK, mark)
        manifest.write(staged)
        folders.publish(staged, final, replace=True)
    except OSError:
        folders.discard(staged)
        raise
    finally:
        if shown:
            enable_progress_bars()


def _claim(folder: Path, description: Description) -> None:
    """Make the folder this cache's own, or find that it is."""
    if not (folder / NAME).exists():
        if folder.exists() and any(folder.iterdir()):
            raise CacheError(f"{str(folder)!r} holds files and no {NAME}; name an empty or a new folder for the cache")
        folder.mkdir(parents=True, exist_ok=True)
        description.write(folder)
    if changed := Description.read(folder).differences(description):
        raise CacheError(
            f"{str(folder)!r} holds a teacher cache of something else ({'; '.join(changed)}). Name another folder, or "
            "remove that one"
        )
    for left in folder.glob(f".*{folders.INCOMPLETE}"):
        folders.discard(left)


def _summary(folder: Path, tokens: int, written: int, seconds: float) -> CacheSummary:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return CacheSummary(tokens, size, size / tokens, written, seconds, written / seconds if written else None)


def _length(split: str, dataset: Any) -> int:
    if len(dataset) == 0:
        raise ValueError(f"splits[{split!r}] is empty; expected rows with input_ids")
    return len(dataset[0]["input_ids"])


def _check(method: str, k: int, temperatures: Sequence[float], dtype: str, vocab: int) -> None:
    if method not in ("top_k", "sample"):
        raise ValueError(f"method={method!r}; expected 'top_k' or 'sample'")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype!r}; expected 'float16' or 'float32'")
    most = min(MOST_ENTRIES, vocab) if method == "top_k" else MOST_ENTRIES
    if not 1 <= k <= most:
        raise ValueError(f"k={k}; expected 1 to {most}, with {vocab} ids in the teacher's vocabulary")
    if not all(tau > 0 for tau in temperatures):
        raise ValueError(f"temperatures={tuple(temperatures)}; expected numbers > 0")
    if method == "sample" and len(temperatures) != 1:
        raise ValueError(f"temperatures={tuple(temperatures)}; expected one for method='sample', which draws ids at it")
