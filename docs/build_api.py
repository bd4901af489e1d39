"""Build the API pages into build/api/ with pdoc: `make api`, then open build/api/index.html.

The pages show what `__all__` of the three public modules lists. Besides what pdoc itself finds, the fields of a
dataclass show the help text of their metadata, or the comment beside them.
"""

import dataclasses
import importlib
import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import get_type_hints

import pdoc.doc
import pdoc.render
from markupsafe import Markup, escape

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("kdfast", "kdfast.training", "kdfast.plan")


def build(folder: Path) -> list[Path]:
    """Write one page per module and an index into `folder`; return their paths."""
    warnings.filterwarnings("ignore", "Error parsing type annotation", UserWarning)  # they are shown as written
    template = Path(__file__).with_name("api_template")
    pdoc.render.configure(template_directory=template, search=False, docformat="markdown")
    pdoc.render.env.filters["plain_text"] = plain_text
    modules = {name: load(name) for name in MODULES}
    pages = {f"{name.replace('.', '/')}.html": pdoc.render.html_module(page, modules) for name, page in modules.items()}
    pages["index.html"] = pdoc.render.html_index(modules)
    for name, html in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
    return [folder / name for name in pages]


def load(name: str) -> pdoc.doc.Module:
    """Return a module with its public names, each class with its documented members."""
    found = importlib.import_module(name)
    for public in found.__all__:
        setattr(found, public, getattr(found, public))  # pdoc doesn't call a module's __getattr__
    module = pdoc.doc.Module(found)
    for cls in module.classes:
        helps = field_helps(cls.obj)
        for member in cls.own_members:
            member.docstring = helps.get(member.name) or own_docstring(member)
            if member.name == "__init__" and (dataclasses.is_dataclass(cls.obj) or hasattr(cls.obj, "_fields")):
                member.docstring = ""  # of a NamedTuple, its names again
                member.signature_without_self = constructor(cls.obj)
        cls.own_members = [m for m in cls.own_members if m.docstring or m.name == "__init__"]
    return module


def constructor(cls: type) -> inspect.Signature:
    """Return the signature of a class with fields, without inherited ones such as those of TrainingArguments."""
    signature, types = inspect.signature(cls), get_type_hints(cls)
    own = [p for p in signature.parameters.values() if p.name in cls.__annotations__] or signature.parameters.values()
    kept = [p.replace(annotation=types[p.name]) for p in own]
    return signature.replace(parameters=kept, return_annotation=inspect.Signature.empty)


def own_docstring(member: pdoc.doc.Doc) -> str:
    """Return what the member itself says, not what it inherits from PyTorch or transformers."""
    return member.docstring if getattr(member.obj, "__doc__", "") or isinstance(member, pdoc.doc.Variable) else ""


def field_helps(cls: type) -> dict[str, str]:
    """Return {field: its help text, or the comment beside it}."""
    comments = re.findall(r"^    (\w+): [^#\n]+# (.+)$", inspect.getsource(cls).partition("    def ")[0], re.M)
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return dict(comments) | {f.name: f.metadata["help"] for f in fields if f.metadata.get("help")}


def plain_text(docstring: str) -> Markup:
    """Return a docstring as HTML that looks as it was written, names in backticks as code."""
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(docstring))))


if __name__ == "__main__":
    for path in build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "api"):
        print(path)
