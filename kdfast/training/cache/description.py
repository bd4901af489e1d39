"""cache.json: which teacher, tokenizer and data a cache is of, and how its entries were taken.

It is written first; what a cache is asked for again, or is trained from, has to agree with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdfast._version import __version__
from kdfast.training.durable.atomic_io import write_text

NAME = "cache.json"
FORMAT = 1
SAMPLE_OF_A_TENSOR = 1024  # elements that a fingerprint of weights reads of each


class CacheError(ValueError):
    """A teacher cache that is damaged, incomplete, or of something else than it is used for."""


@dataclass(frozen=True)
class Split:
    sequences: int
    tokens: int
    sha256: str  # of all token ids in order, and where each sequence ends

    @property
    def length(self) -> int:
        """Tokens of a sequence; all of a split have the same."""
        return self.tokens // self.sequences


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
    method: str  # "top_k" | "sample"
    k: int  # ids kept of a token, or drawn for it
    temperatures: tuple[float, ...]  # besides 1: at which the tail's mass is kept; the one that ids are drawn at
    dtype: str  # of log-probabilities
    seed: int  # of ids that are drawn
    shard_sequences: int
    splits: dict[str, Split]
    version: str = __version__
    format: int = FORMAT

    @property
    def bytes_per_token(self) -> float:
        """Of top-k entries, before anything around them; drawn ids are at most this."""
        id_bytes = np.dtype(id_type(self.vocab)).itemsize
        if self.method == "top_k":
            return self.k * (id_bytes + np.dtype(self.dtype).itemsize) + 4 * (1 + len(self.temperatures))
        return self.k * (id_bytes + np.dtype(count_type(self.k)).itemsize) + 2

    def write(self, folder: Path) -> None:
        write_text(folder / NAME, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    def mark(self, split: str, shard: int) -> str:
        """What a shard carries, by which it is known for this one of a cache of this description."""
        content = {name: value for name, value in asdict(self).items() if name != "version"}
        sum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps({"split": split, "shard": shard, "cache_sha256": sum}) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Raises CacheError where there is none, or none that can be understood."""
        path = folder / NAME
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise ValueError("it is no file")
            given = json.loads(path.read_text(encoding="utf-8"))
            if given["format"] != FORMAT:
                raise CacheError(
                    f"{str(folder)!r} is a teacher cache of format {given['format']}, written by kdfast "
                    f"{given['version']}; this one reads format {FORMAT}. Make it again with `kdfast cache`"
                )
            if given.keys() != {field.name for field in fields(cls)}:
                raise KeyError(*given.keys() ^ {field.name for field in fields(cls)})
            splits = {name: Split(**split) for name, split in given.pop("splits").items()}
            read = cls(**{**given, "splits": splits, "temperatures": tuple(given["temperatures"])})
            sizes = [read.vocab, read.k, read.shard_sequences]
            sizes += [size for split in splits.values() for size in (split.sequences, split.tokens)]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError("vocab, k, shard_sequences, or a split's sequences or tokens, is no positive number")
            return read
        except FileNotFoundError as error:
            raise CacheError(
                f"{str(folder)!r} is no teacher cache: it has no {NAME}. `kdfast cache` makes one"
            ) from error
        except CacheError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(
                f"{str(path)!r} is damaged ({type(error).__name__}: {error}); make the cache again, in another folder"
            ) from error

    def differences(self, other: Description) -> list[str]:
        """'name: then X, now Y' of every field that decides what is in a cache."""
        return [
            f"{field.name}: then {getattr(self, field.name)!r}, now {getattr(other, field.name)!r}"
            for field in fields(self)
            if field.name != "version" and getattr(self, field.name) != getattr(other, field.name)
        ]


def id_type(vocab: int) -> str:
    return "uint16" if vocab <= 2**16 else "int32"


def count_type(n: int) -> str:
    return "uint8" if n < 2**8 else "uint16"


def ids_of(dataset: Any, name: str = "dataset") -> Iterator[np.ndarray]:
    """input_ids (T,) of every row, in order. Raises ValueError where a row has none; `name` is the argument's."""
    missing = f"{name}: no input_ids; expected rows of token ids, as a tokenizer gives them"
    if isinstance(dataset, Dataset):  # this column alone, some rows at a time
        if "input_ids" not in dataset.column_names:
            raise ValueError(missing)
        columns = dataset.select_columns(["input_ids"]).with_format("numpy").iter(batch_size=1000)
        rows = (ids for batch in columns for ids in batch["input_ids"])
    else:
        if len(dataset) and "input_ids" not in dataset[0]:
            raise ValueError(missing)
        rows = (dataset[i]["input_ids"] for i in range(len(dataset)))
    for ids in rows:
        yield np.asarray(ids, dtype=np.int64)


def describe_split(dataset: Any, name: str = "dataset") -> Split:
    """Its size and the hash of its tokens. Raises ValueError naming the argument: no rows, or of different lengths."""
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; expected rows with input_ids")
    sum, lengths = hashlib.sha256(), set()
    for ids in ids_of(dataset, name):
        sum.update(len(ids).to_bytes(8, "little"))
        sum.update(ids.astype("<i4").tobytes())
        lengths.add(len(ids))
    if len(lengths) > 1 or not min(lengths):
        raise ValueError(
            f"{name} has rows of {min(lengths)} to {max(lengths)} tokens; expected blocks of one length, as packing or "
            "padding makes them"
        )
    return Split(len(dataset), len(dataset) * lengths.pop(), sum.hexdigest())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return ""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(tokens, ensure_ascii=False).encode()).hexdigest()


@torch.no_grad()
def teacher_fingerprint(teacher: PreTrainedModel) -> str:
    """Of the whole configuration's architecture and of some elements of each tensor; seconds, whatever its size."""
    config = teacher.config.to_diff_dict()
    config.pop("transformers_version", None)  # of whoever reads it
    sum = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLE_OF_A_TENSOR)
        some = flat[::step].contiguous().cpu()
        sum.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sum.update(some.view(torch.uint8).numpy().tobytes())
    return sum.hexdigest()
