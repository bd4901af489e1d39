"""What a cache is of, what lies where in its folder, and whether it is what was written.

cache.json              teacher, tokenizer, data, and how entries were taken: written first; what a cache is asked for
                        again, or is trained from, has to agree with it
factor/                 of hidden states, what makes logits of them, with shard.json and SHA256SUMS; before any shard
train-00000/ …          shards: a data set each (`datasets.load_from_disk` reads one), shard.json and SHA256SUMS
summary.json            sizes and speed; written last: with it the cache is complete
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
MARK = "shard.json"  # in a shard: which one of which cache it is
LOCK = ".lock"
FACTOR = "factor"  # the folder of what makes logits of hidden states
FORMATS = {"top_k": 1, "sample": 1, "hidden": 2}  # by method: what reads the second reads the first
SAMPLE_OF_A_TENSOR = 1024  # elements that a fingerprint of weights reads of each


class CacheError(ValueError):
    """A teacher cache that is damaged, incomplete, or of something else than it is used for."""


@contextmanager
def _damaged(path: Path, remedy: str) -> Iterator[None]:
    """Raise CacheError naming `path` where what it holds is not what was written."""
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
    sha256: str  # of all token ids in order, and where each sequence, and each document packed into one, ends

    @property
    def length(self) -> float:
        """Tokens of a sequence, their mean."""
        return self.tokens / self.sequences


@dataclass(frozen=True)
class Description:
    """All that decides what a cache holds."""

    teacher: str  # name or folder, as it was given
    teacher_sha256: str  # of its configuration and of evenly spaced elements of its weights
    teacher_dtype: str  # its hidden states' and its head's; logits are fp32
    tokenizer: str
    tokenizer_sha256: str  # of its tokens and their ids; "" where none was given
    vocab: int  # ids the teacher's head has
    valid_vocab: int | None
    method: str  # "top_k" | "sample" | "hidden"
    k: int  # ids kept per token, or drawn for it; coordinates at most
    temperatures: tuple[float, ...]  # besides 1: at which the tail's mass is kept; the one that ids are drawn at
    dtype: str  # of log-probabilities; of coordinates
    seed: int  # of ids that are drawn
    shard_sequences: int
    splits: dict[str, Split]
    source: dict[str, Any] | None = None  # where entries come from, if not from a model: "kind", and what it is
    max_kl: float | None = None  # of hidden states: what their rank is chosen by; None: k is the rank
    version: str = __version__
    format: int = 1

    @property
    def bytes_per_token(self) -> float:
        """Bytes of top-k entries, before anything around them; drawn ids, and coordinates by a KL, are at most this."""
        if self.method == "hidden":
            return self.k * np.dtype(self.dtype).itemsize + 2 * (self.dtype == "int8")
        id_bytes = np.dtype(id_type(self.vocab)).itemsize
        if self.method == "top_k":
            return self.k * (id_bytes + np.dtype(self.dtype).itemsize) + 4 * (1 + len(self.temperatures))
        return self.k * (id_bytes + np.dtype(count_type(self.k)).itemsize) + 2

    @property
    def usable_temperatures(self) -> tuple[float, ...]:
        """Temperatures that a KD term may be at; none in particular of hidden states, which serve all."""
        return (1.0,) * (self.method == "top_k") + self.temperatures

    def serves(self, temperature: float) -> bool:
        """Return whether a KD term may be at this temperature."""
        return self.method == "hidden" or temperature in self.usable_temperatures

    def write(self, folder: Path) -> None:
        write_text(folder / NAME, json.dumps(self._content(), indent=2, ensure_ascii=False) + "\n")

    def _content(self) -> dict[str, Any]:
        """Return what cache.json holds: of what format 1 did not have, what is not None."""
        later = ("source", "max_kl")
        return {name: value for name, value in asdict(self).items() if name not in later or value is not None}

    def _decisive(self) -> dict[str, Any]:
        """Return what decides what is in a cache: neither the version nor where a server or a file was."""
        content = {name: value for name, value in self._content().items() if name != "version"}
        if self.source is not None:
            content["source"] = {name: value for name, value in self.source.items() if name not in ("url", "name")}
        return content

    def mark(self, split: str, shard: int, factor: str = "") -> str:
        """Return what a shard carries, by which it is known for this one of a cache of this description.

        factor: the checksums of what its coordinates go through; "" of what is no coordinates.
        """
        content = self._decisive()
        if factor:
            content[FACTOR] = factor
        sum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps({"split": split, "shard": shard, "cache_sha256": sum}) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Return the description of the cache in `folder`. Raise CacheError where there is none that can be read."""
        path = folder / NAME
        if not path.exists():
            raise CacheError(f"{str(folder)!r} is no teacher cache: it has no {NAME}. `kdfast cache` makes one")
        with _damaged(path, "make the cache again, in another folder"):
            if not path.is_file():  # a pipe would be waited for
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
        """Return 'name: then X, now Y' of every field that decides what is in a cache, where the two differ."""
        then, now = self._decisive(), other._decisive()
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
    tokens_written: int  # by the call that finished it, which may have resumed an earlier one
    seconds: float  # for those
    tokens_per_second: float | None

    def __str__(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens/s"
        return f"{self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB, {self.bytes_per_token:.1f} bytes a token{speed}"


def is_complete(folder: Path) -> bool:
    """Return whether the cache in `folder` was finished."""
    return (folder / SUMMARY).is_file()


def read_summary(folder: Path) -> CacheSummary:
    """Return the summary of a finished cache. Raise CacheError where it is damaged."""
    with _damaged(folder / SUMMARY, "remove it, and `kdfast cache` writes it again"):
        summary = CacheSummary(**json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
        str(summary)  # of anything but numbers a TypeError or ValueError
        return summary


@dataclass(frozen=True)
class Shard:
    """The rows `sequences` of a split, in a folder of their own."""

    split: str
    number: int
    sequences: range
    tokens: float  # about
    folder: Path

    def find_damage(self, description: Description) -> str | None:
        """Return what is wrong with it, or None.

        Its own checksums do not tell it from another one in its place, nor whether cache.json is what it was.
        """
        if damage := checksums.find_damage(self.folder):
            return damage
        mark = self.folder / MARK
        if not mark.is_file() or mark.read_bytes() != self.mark(description).encode():
            other = f"{NAME} or {FACTOR}" if description.method == "hidden" else NAME
            return f"by its {MARK} it is another shard, or of a cache with another {other} than this folder's"
        return None

    def mark(self, description: Description) -> str:
        """Return what it carries. Coordinates are of the one factor that they were made with."""
        sums = self.folder.parent / FACTOR / checksums.NAME
        mine = self.folder.name != FACTOR and sums.is_file()
        return description.mark(self.split, self.number, sums.read_text(encoding="utf-8") if mine else "")


def factor_of(folder: Path) -> Shard:
    """Return the part of a cache of hidden states that is written first and makes logits of them."""
    return Shard(FACTOR, 0, range(0), 0, folder / FACTOR)


def shards(folder: Path, description: Description, split: str) -> Iterator[Shard]:
    """Yield the shards of a split, whether they are there or not."""
    whole, size = description.splits[split], description.shard_sequences
    for number, first in enumerate(range(0, whole.sequences, size)):
        sequences = range(first, min(first + size, whole.sequences))
        yield Shard(split, number, sequences, len(sequences) * whole.length, folder / f"{split}-{number:05d}")


def id_type(vocab: int) -> str:
    return "uint16" if vocab <= 2**16 else "int32"


def count_type(n: int) -> str:
    return "uint8" if n < 2**8 else "uint16"


def ids_of(dataset: Any, name: str = "dataset") -> Iterator[np.ndarray]:
    """Yield input_ids (T,) of every row, in order. Raise ValueError where a row has none; `name` is the argument's."""
    if len(dataset) and "input_ids" not in dataset[0]:
        raise ValueError(f"{name}: no input_ids; expected rows of token ids, as a tokenizer gives them")
    rows = (dataset[i]["input_ids"] for i in range(len(dataset)))
    if isinstance(dataset, Dataset):  # this column alone, and many rows at a time
        columns = dataset.select_columns(["input_ids"]).with_format("numpy").iter(batch_size=1000)
        rows = (ids for batch in columns for ids in batch["input_ids"])
    for ids in rows:
        yield np.asarray(ids, dtype=np.int64)


def describe_split(dataset: Any, name: str = "dataset") -> Split:
    """Return its size and the hash of its tokens. Raise ValueError where rows are missing or empty."""
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; expected rows with input_ids")
    sum, tokens = hashlib.sha256(), 0
    for ids in ids_of(dataset, name):
        sum.update(len(ids).to_bytes(8, "little"))
        sum.update(ids.astype("<i4").tobytes())
        if not len(ids):
            raise ValueError(f"{name} has a row without tokens; expected at least one in each")
        tokens += len(ids)
    if PACKED in dataset[0]:  # the same tokens, packed in another way, are other documents
        for row in dataset.select_columns([PACKED]) if isinstance(dataset, Dataset) else dataset:
            sum.update(np.asarray(lengths_of(row), dtype="<i4").tobytes())
    return Split(len(dataset), tokens, sum.hexdigest())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the hash of the tokens and their ids; "" where there is no tokenizer."""
    if tokenizer is None:
        return ""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(tokens, ensure_ascii=False).encode()).hexdigest()


@torch.no_grad()
def teacher_fingerprint(teacher: PreTrainedModel) -> str:
    """Return the hash of the configuration and of some elements of each tensor; seconds, whatever the model's size."""
    config = teacher.config.to_diff_dict()
    config.pop("transformers_version", None)  # of the one that reads it
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
