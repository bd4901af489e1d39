"""Files and folders that are complete or absent, even after a power failure.

A file is written beside its name, and a folder into a hidden one beside its name, then renamed. A rename alone survives
a killed process. At a power failure, however, the name can reach the disk before the content: so the content is flushed
first, then renamed, and then the folder that holds the name is flushed. A reader never sees half of a checkpoint or
cache shard, nor one that is being deleted.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

INCOMPLETE = ".incomplete"
REPLACED = f".old{INCOMPLETE}"


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` with `content`."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Force a file's content, or a folder's list of names, onto the disk."""
    if os.name == "nt":  # Windows has no such call for folders, nor for files open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Flush everything below `folder`, and the folder itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def staging(final: Path) -> Path:
    """Return where `final` is written until it is complete: beside it, under a name that no checkpoint has."""
    return _hidden(final, INCOMPLETE)


def publish(staged: Path, final: Path, *, replace: bool) -> None:
    """Move a complete folder to its name, durably.

    An existing `final` is replaced as a whole or, with `replace=False`, receives the files one by one, weights last.
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
    """Rename a folder to a hidden name, then remove it."""
    hidden = _hidden(final, f".deleted{INCOMPLETE}")
    discard(hidden)
    final.rename(hidden)
    discard(hidden)


def discard(folder: Path) -> None:
    """Remove a folder, or a file or link at its path, if there is one."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _hidden(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}{suffix}")
