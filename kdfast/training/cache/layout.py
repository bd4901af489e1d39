"""What lies where in a cache's folder, and whether it is what was written.

cache.json              what this is a cache of: description.py; written first
train-00000/ …          shards: a data set each (`datasets.load_from_disk` reads one), shard.json and SHA256SUMS
summary.json            sizes and speed; written last: with it the cache is complete
.lock                   held while the cache is being made
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdfast.training.cache.description import NAME, CacheError, Description
from kdfast.training.durable import checksums

SUMMARY = "summary.json"
MARK = "shard.json"  # in a shard: which one of which cache it is
LOCK = ".lock"


@dataclass(frozen=True)
class CacheSummary:
    tokens: int
    bytes: int  # of all files
    bytes_per_token: float
    tokens_written: int  # by the call that finished it, which may have gone on from an earlier one
    seconds: float  # for those
    tokens_per_second: float | None

    def __str__(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens/s"
        return f"{self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB, {self.bytes_per_token:.1f} bytes a token{speed}"


def is_complete(folder: Path) -> bool:
    return (folder / SUMMARY).is_file()


def read_summary(folder: Path) -> CacheSummary:
    try:
        summary = CacheSummary(**json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
        str(summary)  # of anything but numbers a TypeError or ValueError
        return summary
    except (OSError, ValueError, TypeError) as error:
        raise CacheError(
            f"{str(folder / SUMMARY)!r} is damaged ({error}); remove it, and `kdfast cache` writes it again"
        ) from error


@dataclass(frozen=True)
class Shard:
    """The rows `sequences` of a split, in a folder of their own."""

    split: str
    number: int
    sequences: range
    folder: Path

    def mark(self, description: Description) -> str:
        return description.mark(self.split, self.number)

    def find_damage(self, description: Description) -> str | None:
        """What is wrong with it, or None. Its own checksums do not tell it from another one in its place, nor whether
        cache.json is what it was."""
        if damage := checksums.find_damage(self.folder):
            return damage
        try:
            mark = (self.folder / MARK).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            mark = ""
        if mark != self.mark(description):
            return f"by its {MARK} it is another shard, or of a cache with another {NAME} than this folder's"
        return None


def shards(folder: Path, description: Description, split: str) -> Iterator[Shard]:
    sequences, size = description.splits[split].sequences, description.shard_sequences
    for number, first in enumerate(range(0, sequences, size)):
        yield Shard(split, number, range(first, min(first + size, sequences)), folder / f"{split}-{number:05d}")
