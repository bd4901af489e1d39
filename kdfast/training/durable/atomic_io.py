"""Files and folders that are complete or not there, after a loss of power too.

A file is written beside its name, a folder into a hidden one beside its name. A rename alone survives a killed process.
When the power goes, a name can reach the disk before the content behind it: so the content is flushed first, then
renamed, and then the folder that holds the name is flushed. A reader never sees half of a checkpoint or of a shard of a
teacher cache, nor of one that is being deleted.
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
    """Put a file's content, or a folder's list of names, onto the disk itself."""
    if os.name == "nt":  # has no such call for folders, nor for files open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Flush everything below `folder`, and itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def staging(final: Path) -> Path:
    """Return where `final` is written until it is complete: beside it, under a name that is no checkpoint's."""
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
    """Hide a folder, then remove it."""
    hidden = _hidden(final, f".deleted{INCOMPLETE}")
    discard(hidden)
    final.rename(hidden)
    discard(hidden)


def discard(folder: Path) -> None:
    """Remove a folder, or a file or link in its place, if there is one."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _hidden(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}{suffix}")
