"""What a cache was made from, the layout of its folder, and checks that it is what was written.

cache.json              teacher, tokenizer, data, and how entries were taken: written first; a later call to the same
                        folder, or a run that learns from it, must agree with it
factor/                 for hidden states: the head that makes logits of them, with shard.json and SHA256SUMS
train-00000/ …          shards: a data set each (`datasets.load_from_disk` reads one), shard.json and SHA256SUMS
summary.json            sizes and speed; written last, so a cache that has it is complete
.lock                   held while the cache is being made
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdfast._version import __version__
from kdfast.training.data.rows import PACKED, lengths_of
from kdfast.training.durable import checksums
from kdfast.training.durable.atomic_io import write_text
from kdfast.training.hf import fetch

NAME = "cache.json"
SUMMARY = "summary.json"
MARK = "shard.json"  # in a shard: its number and its cache
LOCK = ".lock"
FACTOR = "factor"  # the folder of the head of hidden states
FORMATS = {"top_k": 1, "sample": 1, "hidden": 2}  # by method; code that reads format 2 reads format 1
SAMPLE_OF_A_TENSOR = 1024  # elements per weight tensor that the fingerprint reads


class CacheError(ValueError):
    """A teacher cache that is damaged, incomplete, or made for something else."""


@contextmanager
def _damaged(path: Path, remedy: str) -> Iterator[None]:
    """Turn an error while reading `path` into a CacheError that names it."""
    try:
        yield
    except CacheError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{str(path)!r} is damaged ({type(error).__name__}: {error}); {remedy}") from error


@dataclass(frozen=True)
class Split:
    sequences: int
    tokens: int
    sha256: str  # of all token ids in order, with the ends of sequences and of documents packed into them

    @property
    def length(self) -> float:
        """Return the mean number of tokens per sequence."""
        return self.tokens / self.sequences

    def __repr__(self) -> str:
        return f"{self.sequences:,} rows, {self.tokens:,} tokens, sha256 {self.sha256[:8]}…"


@dataclass(frozen=True)
class Description:
    """Everything that decides what a cache contains."""

    teacher: str  # name or folder, as given
    teacher_sha256: str  # of its configuration and of evenly spaced elements of its weights
    teacher_dtype: str  # of its hidden states and head; logits are fp32
    tokenizer: str
    tokenizer_sha256: str  # of its tokens and their ids; "" without a tokenizer
    vocab: int  # number of ids of the teacher's head
    valid_vocab: int | None
    method: str  # "top_k" | "sample" | "hidden"
    k: int  # ids kept or drawn per token; the most coordinates
    temperatures: tuple[float, ...]  # besides 1: those with the tail's mass; for drawn ids, theirs
    dtype: str  # of log-probabilities or coordinates
    seed: int  # for drawing ids
    shard_sequences: int
    splits: dict[str, Split]
    source: dict[str, Any] | None = None  # the source of entries that no model made: "kind", and details
    max_kl: float | None = None  # for hidden states: the KL that selects their rank; None: k is the rank
    version: str = __version__
    format: int = 1

    @property
    def bytes_per_token(self) -> float:
        """Return the bytes per token of top-k entries, without overhead; an upper bound for other methods."""
        if self.method == "hidden":
            return self.k * np.dtype(self.dtype).itemsize + 2 * (self.dtype == "int8")
        id_bytes = np.dtype(id_type(self.vocab)).itemsize
        if self.method == "top_k":
            return self.k * (id_bytes + np.dtype(self.dtype).itemsize) + 4 * (1 + len(self.temperatures))
        return self.k * (id_bytes + np.dtype(count_type(self.k)).itemsize) + 2

    @property
    def usable_temperatures(self) -> tuple[float, ...]:
        """Return the temperatures that a KD term may have; empty for hidden states, which serve all."""
        return (1.0,) * (self.method == "top_k") + self.temperatures

    def serves(self, temperature: float) -> bool:
        """Return whether a KD term may have this temperature."""
        return self.method == "hidden" or temperature in self.usable_temperatures

    def write(self, folder: Path) -> None:
        write_text(folder / NAME, json.dumps(self._content(), indent=2, ensure_ascii=False) + "\n")

    def _content(self) -> dict[str, Any]:
        """Return the contents of cache.json; fields that format 1 lacks are left out if None."""
        later = ("source", "max_kl")
        return {name: value for name, value in asdict(self).items() if name not in later or value is not None}

    def _decisive(self) -> dict[str, Any]:
        """Return the fields that decide what is in a cache; not the version, nor the place of a server or file."""
        content = {name: value for name, value in self._content().items() if name != "version"}
        if self.source is not None:
            content["source"] = {name: value for name, value in self.source.items() if name not in ("url", "name")}
        return content

    def mark(self, split: str, shard: int, factor: str = "") -> str:
        """Return the mark of a shard, which ties it to its place in a cache with this description.

        factor: the checksums of the head of its coordinates; "" for other methods.
        """
        content = self._decisive()
        if factor:
            content[FACTOR] = factor
        sum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps({"split": split, "shard": shard, "cache_sha256": sum}) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Return the description of the cache in `folder`. Raise CacheError if there is none that can be read."""
        path = folder / NAME
        if not path.exists():
            raise CacheError(f"{str(folder)!r} is no teacher cache: it has no {NAME}. `kdfast cache` makes one")
        with _damaged(path, "make the cache again, in another folder"):
            if not path.is_file():  # reading a pipe would block
                raise ValueError("it is no file")
            given = json.loads(path.read_text(encoding="utf-8"))
            if given["format"] not in FORMATS.values():
                raise CacheError(
                    f"{str(folder)!r} is a teacher cache of format {given['format']}, written by kdfast "
                    f"{given['version']}; this one reads formats up to {max(FORMATS.values())}. Make it again with "
                    "`kdfast cache`"
                )
            given = {"source": None, "max_kl": None} | given
            if given.keys() != {field.name for field in fields(cls)}:
                raise KeyError(*given.keys() ^ {field.name for field in fields(cls)})
            splits = {name: Split(**split) for name, split in given.pop("splits").items()}
            read = cls(**{**given, "splits": splits, "temperatures": tuple(given["temperatures"])})
            sizes = [read.vocab, read.k, read.shard_sequences]
            sizes += [size for split in splits.values() for size in (split.sequences, split.tokens)]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError("vocab, k, shard_sequences, or a split's sequences or tokens, is no positive number")
            return read

    def differences(self, other: Description) -> list[str]:
        """Return 'name: then X, now Y' for every decisive field in which the two differ."""
        then, now = self._decisive(), other._decisive()
        if then["splits"] != now["splits"]:  # which decide the rows per shard
            then["shard_sequences"] = now["shard_sequences"]
        return [
            f"{field.name}: then {getattr(self, field.name)!r}, now {getattr(other, field.name)!r}"
            for field in fields(self)
            if then.get(field.name) != now.get(field.name)
        ]


@dataclass(frozen=True)
class CacheSummary:
    tokens: int
    bytes: int  # of all files
    bytes_per_token: float
    tokens_written: int  # by the call that finished the cache, perhaps after an earlier one
    seconds: float  # of that call
    tokens_per_second: float | None

    def __str__(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens/s"
        return f"{self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB, {self.bytes_per_token:.1f} bytes a token{speed}"


def is_complete(folder: Path) -> bool:
    """Return whether the cache in `folder` is complete."""
    return (folder / SUMMARY).is_file()


def read_summary(folder: Path) -> CacheSummary:
    """Return the summary of a complete cache. Raise CacheError if it is damaged."""
    with _damaged(folder / SUMMARY, "remove it, and `kdfast cache` writes it again"):
        summary = CacheSummary(**json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
        str(summary)  # raises TypeError or ValueError for anything but numbers
        return summary


@dataclass(frozen=True)
class Shard:
    """The rows `sequences` of a split, in their own folder."""

    split: str
    number: int
    sequences: range
    tokens: float  # approximately
    folder: Path

    def find_damage(self, description: Description) -> str | None:
        """Return what is wrong with the shard, or None.

        Its checksums alone would not reveal a shard of another cache in its place, or a changed cache.json.
        """
        if damage := checksums.find_damage(self.folder):
            return damage
        mark = self.folder / MARK
        if not mark.is_file() or mark.read_bytes() != self.mark(description).encode():
            other = f"{NAME} or {FACTOR}" if description.method == "hidden" else NAME
            return f"by its {MARK} it is another shard, or of a cache with another {other} than this folder's"
        return None

    def mark(self, description: Description) -> str:
        """Return the shard's mark; coordinates belong to the one head that they were made with."""
        sums = self.folder.parent / FACTOR / checksums.NAME
        mine = self.folder.name != FACTOR and sums.is_file()
        return description.mark(self.split, self.number, sums.read_text(encoding="utf-8") if mine else "")


def factor_of(folder: Path) -> Shard:
    """Return the part of a cache of hidden states that makes logits of them, and is written first."""
    return Shard(FACTOR, 0, range(0), 0, folder / FACTOR)


def shards(folder: Path, description: Description, split: str) -> Iterator[Shard]:
    """Yield all shards of a split, whether or not they exist."""
    whole, size = description.splits[split], description.shard_sequences
    for number, first in enumerate(range(0, whole.sequences, size)):
        sequences = range(first, min(first + size, whole.sequences))
        yield Shard(split, number, sequences, len(sequences) * whole.length, folder / f"{split}-{number:05d}")


def id_type(vocab: int) -> str:
    return "uint16" if vocab <= 2**16 else "int32"


def count_type(n: int) -> str:
    return "uint8" if n < 2**8 else "uint16"


def ids_of(dataset: Any, name: str = "dataset") -> Iterator[np.ndarray]:
    """Yield input_ids (T,) of every row, in order. Raise ValueError, naming the argument `name`, if one has none."""
    if len(dataset) and "input_ids" not in dataset[0]:
        raise ValueError(f"{name}: no input_ids; expected rows of token ids, as a tokenizer gives them")
    rows = (dataset[i]["input_ids"] for i in range(len(dataset)))
    if isinstance(dataset, Dataset):  # reads only this column, many rows at a time
        columns = dataset.select_columns(["input_ids"]).with_format("numpy").iter(batch_size=1000)
        rows = (ids for batch in columns for ids in batch["input_ids"])
    for ids in rows:
        yield np.asarray(ids, dtype=np.int64)


def describe_split(dataset: Any, name: str = "dataset") -> Split:
    """Return a data set's size and the hash of its tokens. Raise ValueError if rows are missing or empty."""
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; expected rows with input_ids")
    sum, tokens = hashlib.sha256(), 0
    for ids in ids_of(dataset, name):
        sum.update(len(ids).to_bytes(8, "little"))
        sum.update(ids.astype("<i4").tobytes())
        if not len(ids):
            raise ValueError(f"{name} has a row without tokens; expected at least one in each")
        tokens += len(ids)
    if PACKED in dataset[0]:  # the same tokens packed differently are other documents
        for row in dataset.select_columns([PACKED]) if isinstance(dataset, Dataset) else dataset:
            sum.update(np.asarray(lengths_of(row), dtype="<i4").tobytes())
    return Split(len(dataset), tokens, sum.hexdigest())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the hash of the tokenizer's tokens and ids; "" for None."""
    if tokenizer is None:
        return ""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(tokens, ensure_ascii=False).encode()).hexdigest()


@torch.no_grad()
def teacher_fingerprint(teacher: PreTrainedModel) -> str:
    """Return the hash of the configuration and some elements of each tensor; takes seconds for any model size."""
    config = teacher.config.to_diff_dict()
    config.pop("transformers_version", None)  # the version that reads it, not the one that wrote it
    sum = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        if tensor.is_meta:  # offloaded
            module, _, key = name.rpartition(".")
            (tensor,) = fetch(teacher.get_submodule(module), key)
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLE_OF_A_TENSOR)
        some = flat[::step].contiguous().cpu()
        sum.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sum.update(some.view(torch.uint8).numpy().tobytes())
    return sum.hexdigest()
