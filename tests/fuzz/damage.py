"""What can happen to a file, drawn at random: flipped, cut, emptied, deleted, replaced, or other values in its JSON."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.5, 1e-320, 1e308, float("inf"),
    float("-inf"), float("nan"), "", " ", "0", "-1", "1e999", "nan", "true", "None", "auto", "é😀\u202e", "a\x00b",
    "x" * 5000, "../up", "/dev/null", "/dev/zero", "~", "a\nb", "{", "{}", "%s", "$HOME", [], [None], [1, 2], ["a"],
    [[]], {}, {"a": 1}, {"": None}, {"model_type": "gpt2"},
]  # fmt: skip


def bytes_of(chance: random.Random, content: bytes) -> tuple[str, bytes]:
    """(what was done, other bytes)."""
    how = chance.choice(["flip", "flip", "cut", "empty", "garbage", "append", "zeros", "repeat", "text"])
    content, size = bytearray(content), len(content)
    if how == "flip":
        for _ in range(chance.choice([1, 1, 1, 10])):
            if size:
                content[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del content[chance.choice([size // 2, max(0, size - 1), min(1, size), chance.randint(0, size)]) :]
    elif how == "empty":
        content.clear()
    elif how == "garbage":
        content[:] = chance.randbytes(chance.choice([1, 7, 8, 100, 5000]))
    elif how == "append":
        content += chance.choice([b"\n", b"\0" * 9, b"{}", chance.randbytes(20)])
    elif how == "zeros" and size:
        start = chance.randrange(size)
        stop = min(size, start + chance.choice([1, 8, 64, 4096]))
        content[start:stop] = bytes(stop - start)
    elif how == "repeat":
        content *= 2
    elif how == "text":
        content[:] = chance.choice([b"null", b"[]", b"{}", b"true", b"1", b'""', b"<html></html>", b"\xff\xfe{\0}\0"])
    return how, bytes(content)


def json_of(chance: random.Random, content: Any) -> tuple[str, Any]:
    """(what was done, the same but for one value somewhere)."""
    places = list(_places(content))
    if not places:
        return "replaced", chance.choice(JUNK)
    holder, key = chance.choice(places)
    how = chance.choice(["value", "value", "value", "gone", "added"])
    if how == "value":
        holder[key] = chance.choice(JUNK)
    elif how == "gone":
        del holder[key]
    elif isinstance(holder, dict):
        holder[chance.choice(["", "a", "__class__", "auto_map", "dtype"])] = chance.choice(JUNK)
    else:
        holder.append(chance.choice(JUNK))
    return f"{how} at {str(key)[:40]!r}", content


def _places(content: Any):
    """(holder, key) of every value in it."""
    for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
        yield content, key
        if isinstance(value, dict | list) and value:
            yield from _places(value)


def file(chance: random.Random, path: Path, others: list[Path] = ()) -> str:
    """Damages one file in place; says how."""
    hows = ["bytes", "bytes", "deleted", "folder", "link", "loop", "fifo"]
    if path.suffix in (".json", ".index"):
        hows += ["json"] * 6
    if others:
        hows.append("another's")
    how = chance.choice(hows)
    if how == "bytes":
        how, content = bytes_of(chance, path.read_bytes())
        path.write_bytes(content)
    elif how == "json":
        try:
            how, content = json_of(chance, json.loads(path.read_text()))
            path.write_text(json.dumps(content), errors="replace")
        except ValueError:  # damaged before
            path.write_bytes(b"{")
    elif how == "another's":
        path.write_bytes(chance.choice(others).read_bytes())
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
            (path / "inside").write_text("x")
        elif how == "link":
            path.symlink_to("nowhere")
        elif how == "loop":
            path.symlink_to(path.name)
        elif how == "fifo":
            os.mkfifo(path)
    return f"{path.name}: {how}"


def folder(chance: random.Random, path: Path, how: str, elsewhere: Path) -> None:
    """how: gone, emptied, a file, or a link, which may lead to where the folder is then: `elsewhere`."""
    if how == "a link":
        shutil.rmtree(elsewhere, ignore_errors=True)
        path.rename(elsewhere)
        path.symlink_to(chance.choice(["../elsewhere", "nowhere", "."]))
        return
    shutil.rmtree(path)
    if how == "emptied":
        path.mkdir()
    elif how == "a file":
        path.write_text("x")


def tried(damage, *arguments) -> str:
    """What `damage` did, or could not do where an earlier one had been at work."""
    try:
        return damage(*arguments)
    except OSError as error:
        return f"not done: {error.strerror}"


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
