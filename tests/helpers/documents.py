"""What the documents hold that can be tried: code, output, errors, commands, links.

In README.md, CONTRIBUTING.md, CHANGELOG.md, docs/**/*.md and the README.md of kernels/, examples/,
tests/fuzz/ and tests/peers/

    ```python                 is run; the blocks of a file share their names, in order
    ```text after it          is what it prints, or the error it ends with ("ValueError: …"); … stands for anything
    ```sh                     commands, each looked at on its own
    <!-- run: …code… -->      code that readers do not see, run where it stands: small models, random tensors
    <!-- long -->             the code of this file takes longer: `make test-all` runs it, `make test` does not
    <!-- needs: MODULE -->    before code for a package that may not be installed: left out then, as the test says
    <!-- file: PATH -->       before what a file of that name holds (test_extending.py writes it)
    <!-- not run: why -->     before a python block that cannot be tried here
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^ *(`{3,})(\w*)[^\n]*\n(.*?)^ *\1 *$", re.M | re.S)
_COMMENT = re.compile(r"<!--\s*(not run|run|long|needs|file)\b:?(.*?)-->", re.S)


@dataclass(frozen=True)
class Block:
    language: str  # of a fence; "run", "not run", "needs", "file" or "long" of a comment
    text: str
    line: int  # of its first line of text
    start: int  # where it lies in the file
    stop: int


@cache
def pages() -> list[str]:
    """Paths from the root."""
    docs = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
    folders = (f"{folder}/README.md" for folder in ("kernels", "examples", "tests/fuzz", "tests/peers"))
    return ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *docs, *folders]


@cache
def source(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Fences and comments, in order."""
    text = source(page)
    fences = [_block(text, m.group(2), m, 3) for m in _FENCE.finditer(text)]
    comments = [_block(text, m.group(1), m, 2) for m in _COMMENT.finditer(text)]
    outside = [c for c in comments if not any(f.start < c.start < f.stop for f in fences)]
    return sorted([*fences, *outside], key=lambda block: block.start)


def prose(page: str) -> str:
    """The page without its fences: what has links and headings."""
    return _FENCE.sub("", source(page))


def commands(page: str) -> list[tuple[int, str]]:
    """(line, command) of every ```sh block, lines that go on joined, remarks and output left out."""
    found = []
    for block in blocks(page):
        if block.language != "sh":
            continue
        joined = ""
        for offset, line in enumerate(block.text.splitlines()):
            without_remark = re.sub(r"(^|\s)#.*", "", line)
            joined = f"{joined} {without_remark}".strip()
            if joined.endswith("\\"):
                joined = joined[:-1].strip()
            elif joined:
                found.append((block.line + offset, joined))
                joined = ""
    return found


def matches(said: str, came: str) -> bool:
    """Whether a page says what came. White space is of no account: a page breaks lines where it must."""
    words = [re.escape(word).replace("…", ".*") for word in said.split()]
    return re.fullmatch(r"\s+".join(words), came.strip(), re.S) is not None


def _block(text: str, language: str, match: re.Match[str], group: int) -> Block:
    inside = match.group(group)
    indent = len(match.group(0)) - len(match.group(0).lstrip(" ")) if group == 3 else 0
    if indent:
        inside = re.sub(rf"^ {{1,{indent}}}", "", inside, flags=re.M)
    line = text.count("\n", 0, match.start(group)) + 1
    return Block(language, inside, line, match.start(), match.end())
