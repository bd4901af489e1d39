"""Writing so that a file or folder is complete or not there, after a loss of power too.

A rename alone survives a killed process. When the power goes, a name can reach the disk before the content behind it:
so the content is flushed first, then renamed, and then the folder that holds the name is flushed.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path`: written beside it, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """A file's content, or a folder's list of names, onto the disk itself."""
    if os.name == "nt":  # has no such call for folders, nor for files open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Everything below `folder`, and itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)
