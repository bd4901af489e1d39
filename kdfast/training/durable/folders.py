"""Folders that appear only when they are complete, and go at once.

Written to a hidden folder beside, flushed to the disk and renamed: whoever looks for checkpoints, or for shards of a
teacher cache, never sees half of one, nor of one that is being deleted.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kdfast.training.durable.atomic_io import flush, flush_all

INCOMPLETE = ".incomplete"
REPLACED = f".old{INCOMPLETE}"


def staging(final: Path) -> Path:
    """Where `final` is written until it is complete: beside it, under a name no one takes for a checkpoint."""
    return _hidden(final, INCOMPLETE)


def publish(staged: Path, final: Path, *, replace: bool) -> None:
    """Move a complete folder to its name, durably.

    A `final` that exists is replaced whole, or (`replace=False`) receives the files one by one, weights last.
    """
    flush_all(staged)
    if not final.exists():
        staged.rename(final)
    elif replace:
        old = _hidden(final, REPLACED)
        discard(old)
        final.rename(old)
        staged.rename(final)
        flush(final.parent)
        discard(old)
    else:
        for path in sorted(staged.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, final / path.name)
        staged.rmdir()
        flush(final)
    flush(final.parent)


def delete(final: Path) -> None:
    """Out of sight first."""
    hidden = _hidden(final, f".deleted{INCOMPLETE}")
    discard(hidden)
    final.rename(hidden)
    discard(hidden)


def discard(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:  # what somebody has put in its place
        folder.unlink(missing_ok=True)


def _hidden(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}{suffix}")
