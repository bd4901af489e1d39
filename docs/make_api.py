"""docs/api/ from the docstrings: `make api`. What is there is what `help()` shows, as Markdown.

    loss.md       kdfast.__all__
    training.md   kdfast.training.__all__, and KDConfig's fields
    plan.md       kdfast.plan.__all__
    cli.md        `kdfast … --help`

Docstrings are plain text: sections (Args, Returns, Raises) become lists; indented lines and aligned columns stay as
they are, in a fence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
from pathlib import Path
from typing import Any, ForwardRef
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "api"
PAGES = {
    "loss": ("kdfast", "The loss, and what goes with it: `kdfast`"),
    "training": ("kdfast.training", "Runs: `kdfast.training`"),
    "plan": ("kdfast.plan", "Planning: `kdfast.plan`"),
}
COMMANDS = ("", "distill", "cache", "data", "report", "demo", "plan", "doctor")
SECTIONS = ("Args", "Attributes", "Returns", "Raises")


def pages() -> dict[str, str]:
    """{file name: text}."""
    made = {f"{name}.md": _module(module, title) for name, (module, title) in PAGES.items()}
    return made | {"cli.md": _commands()}


def public(module: str) -> dict[str, Any]:
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in found.__all__ if not name.startswith("__")}


def _module(module: str, title: str) -> str:
    lines = [f"# {title}", "", "From the docstrings, by `make api`.", ""]
    objects = public(module)
    lines += [", ".join(f"[`{name}`](#{name.lower()})" for name in objects), ""]
    for name, value in objects.items():
        lines += [f"## {name}", "", *_object(name, value)]
    return "\n".join(lines).rstrip() + "\n"


def _object(name: str, value: Any) -> list[str]:
    if not callable(value):
        return [f"A `{type(value).__name__}`: {', '.join(f'`{key}`' for key in value)}.", ""]
    lines = ["```text", _signature(name, value), "```", "", *markdown(inspect.getdoc(value) or "")]
    if inspect.isclass(value):
        lines += _fields(value) if dataclasses.is_dataclass(value) else []
        lines += _commented(value)
        ours = [cls for cls in value.__mro__ if cls.__module__.startswith("kdfast")]
        for method, function in {name: member for cls in ours[::-1] for name, member in vars(cls).items()}.items():
            if inspect.isfunction(function) and function.__doc__ and not method.startswith("_"):
                called, title = (name, f"{name}(…)") if method == "forward" else (method, f"{name}.{method}")
                lines += [f"### {title}", "", "```text", _signature(called, function), "```", ""]
                lines += markdown(inspect.getdoc(function) or "")
    return lines


def _signature(name: str, value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, BaseException):
        return name
    found = inspect.signature(value)
    kept = [p for p in found.parameters.values() if p.name != "self"]
    if len(kept) > 60:  # TrainingArguments'
        return f"{name}(output_dir, …)"
    parts, keyword_only = [], False
    for p in kept:
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
        keyword_only = p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        annotation = "" if p.annotation is p.empty else f": {_annotation(p.annotation)}"
        equals = " = " if annotation else "="
        parts.append(
            f"{stars}{p.name}{annotation}" + ("" if p.default is p.empty else f"{equals}{_default(p.default)}")
        )
    constructed = inspect.isclass(value) or found.return_annotation is found.empty
    returns = "" if constructed else f" -> {_annotation(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returns}"])


def _default(value: Any) -> str:
    """A function has an address in its repr, another every time."""
    return "…" if " at 0x" in repr(value) else repr(value)


def _annotation(given: Any) -> str:
    if isinstance(given, ForwardRef):
        given = given.__forward_arg__
    text = given if isinstance(given, str) else getattr(given, "__name__", str(given))
    return text.replace("torch.", "")


def _fields(value: Any) -> list[str]:
    """Of a dataclass whose fields say what they are."""
    own = set(value.__annotations__)
    helped = [f for f in dataclasses.fields(value) if f.name in own and f.metadata.get("help")]
    if not helped:
        return []
    rows = [f"| `{f.name}` | `{f.default!r}` | {f.metadata['help'].replace('|', chr(92) + '|')} |" for f in helped]
    return ["| field | default | |", "|---|---|---|", *rows, ""]


def _commented(value: Any) -> list[str]:
    """Fields that a comment beside them explains."""
    found = re.findall(r"^    (\w+): [^#\n]+# (.+)$", inspect.getsource(value).partition("    def ")[0], re.M)
    return [*(f"- `{name}`: {_escaped(comment)}" for name, comment in found), ""] if found else []


def markdown(doc: str) -> list[str]:
    """A docstring as Markdown."""
    lines: list[str] = []
    section = None
    for block in re.split(r"\n{2,}", doc):
        heading = re.match(r"(\w+):\n", block)
        if heading and heading.group(1) in SECTIONS:
            section = heading.group(1)
            lines += [f"**{section}**", ""]
            block = block[heading.end() :]
            lines += [*_entries(block, section), ""]
        elif re.search(r"^ {4}|\S {2,}\S", block, re.M):
            lines += ["```text", inspect.cleandoc(block) if block.startswith("    ") else block, "```", ""]
        else:
            lines += [_escaped(block), ""]
    return lines


def _entries(block: str, section: str) -> list[str]:
    """`name: what it is`, further lines indented."""
    block = inspect.cleandoc("\n" + block)
    entries = re.split(r"\n(?=\S)", block)
    if section == "Returns":
        return [_escaped(block)]
    found = []
    for entry in entries:
        name, colon, rest = entry.partition(": ")
        rest = re.sub(r"\s*\n\s*", " ", rest)
        found.append(f"- `{name}`: {_escaped(rest)}" if colon and "\n" not in name else f"- {_escaped(entry)}")
    return found


def _escaped(text: str) -> str:
    """Stars outside of code are stars."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"(?<![*\w])\*(?!\w+\*)|[<|]", r"\\\g<0>", part) for part in parts
    )


def _commands() -> str:
    lines = ["# The command line: `kdfast`", "", "What `--help` prints, by `make api`.", ""]
    for command in COMMANDS:
        words = ["kdfast", *([command] if command else [])]
        lines += [f"## {' '.join(words)}", "", "```text", _help(command), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _help(command: str) -> str:
    """What argparse prints, or ours where a subcommand has keys in place of options."""
    from kdfast.cli.main import main as kdfast

    with patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"), contextlib.redirect_stdout(io.StringIO()) as said:
        os.environ.pop("XDG_CACHE_HOME", None)
        with contextlib.suppress(SystemExit):
            kdfast([command, "--help"] if command else ["--help"])
    return said.getvalue().rstrip()


def main() -> None:
    made = pages()  # before what is there goes
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"docs/api/{name}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
