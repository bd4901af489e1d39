"""SHA256SUMS: the last file of a checkpoint or shard, which reveals damage.

    <SHA-256 in hex>  model.safetensors    a line per file, as sha256sum writes it
    # 9 files                              the end, which a truncated list lacks

`sha256sum -c SHA256SUMS` checks it without kdfast. A parser would not notice a flipped bit in the weights. Unlisted
files, such as notes beside a checkpoint, are ignored.
"""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdfast.training.durable.atomic_io import write_text

NAME = "SHA256SUMS"
THREADS = 4  # files hashed at a time; hashing releases the interpreter's lock
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write(folder: Path) -> None:
    """List the current files of `folder` with their checksums."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / NAME]
    with ThreadPoolExecutor(THREADS) as pool:
        sums = list(pool.map(_sha256, paths))
    lines = [f"{sum}  {path.relative_to(folder).as_posix()}\n" for sum, path in zip(sums, paths, strict=True)]
    write_text(folder / NAME, "".join(lines) + _end(len(lines)))


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a folder, naming the file; None if it is as it was written."""
    special = (path for path in folder.rglob("*") if path.exists() and not path.is_file() and not path.is_dir())
    if pipe := next(special, None):  # opening one would block
        return f"{pipe.name} is no file"
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"it has no {NAME}, which is written last: it is not complete"
    except (OSError, UnicodeDecodeError) as error:
        return f"{NAME} cannot be read ({error})"
    *lines, end = text.splitlines(keepends=True) or [""]
    listed = [match.groups() for line in lines if (match := _LINE.fullmatch(line.rstrip("\n")))]
    if len(listed) != len(lines) or end != _end(len(lines)):
        return f"{NAME} is damaged: expected '<SHA-256>  <file>' lines, then '{_end(len(listed)).strip()}'"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_compare, [folder / name for _, name in listed], [sum for sum, _ in listed])
        return next((damage for damage in found if damage), None)


def _compare(path: Path, expected: str) -> str | None:
    try:
        sum = _sha256(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    if sum == expected:
        return None
    size = path.stat().st_size
    return f"{path.name} ({size} bytes) is damaged: its SHA-256 is {sum[:12]}…, expected {expected[:12]}… by {NAME}"


def _sha256(path: Path) -> str:
    sum = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            sum.update(piece)
    return sum.hexdigest()


def _end(files: int) -> str:
    return f"# {files} files\n"
