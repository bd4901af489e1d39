"""`kdfast doctor`: what is installed, what it runs on, and whether another package called `kernels` is in the way."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from kdfast.cli.errors import UserError
from kdfast.engines import choose
from kdfast.ops.planning import InputGradient, multiprocessors
from kdfast.versions import PACKAGES, installed_version


def doctor(tokens: int, vocab: int, student_width: int, dtype: str, scratch_bytes: int | None = None) -> int:
    """Print the findings, and what `auto` picks for such a loss; return 1 if something will not work."""
    import kdfast

    numbers = {"tokens": tokens, "vocab": vocab, "student-width": student_width, "scratch-bytes": scratch_bytes}
    for name, value in numbers.items():
        if value is not None and value <= 0:
            raise UserError(f"doctor: --{name} {value}; expected a positive number")

    ours, theirs = _kernels()
    rows = {"kdfast": f"{kdfast.__version__}  {Path(kdfast.__file__).parent}"}
    rows["python"] = f"{platform.python_version()}  {platform.platform()}"
    rows |= {name: installed_version(name) or "not installed" for name in (*PACKAGES, "peft")}
    rows["torch"] = torch.__version__  # says which build it is: +cpu, +cu130
    rows |= {"kdfast.kernels": ours, "kernels": theirs}
    rows[f"\nFor N={tokens} tokens, V={vocab}, Hs={student_width}, {dtype}, a projected teacher, all gradients:"] = ""
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    for name, what in devices.items():
        device, budget = torch.device(name), scratch_bytes or 0
        dx = InputGradient(2, student_width, multiprocessors(device))
        choice = choose(device, getattr(torch, dtype), tokens=tokens, vocab=vocab, scratch_bytes=budget, dx=dx)
        chunks = "" if choice.tokens is None else f", {-(-tokens // choice.tokens)} chunks of {choice.tokens} tokens"
        rows[name] = f"{what}; engine auto is {choice.engine}{chunks} ({choice.why})"
    for name, what in rows.items():
        print(f"{name:15} {what}".rstrip())
    return 1 if ours.startswith("MISSING") or theirs.startswith("SHADOWED") else 0


def _kernels() -> tuple[str, str]:
    """Return what `kdfast.kernels` and `kernels` are, in capitals if that is wrong."""
    ours, theirs = _location("kdfast.kernels"), _location("kernels")
    try:
        expected = str(distribution("kernels").locate_file("kernels/__init__.py"))
    except PackageNotFoundError:
        expected = None
    if theirs != expected and (expected or str(theirs).endswith(".py")):  # installed packages precede folders
        theirs = f"SHADOWED: {theirs} is not Hugging Face's package; rename it, or take its folder off sys.path"
    return (
        ours or "MISSING: install kdfast again, or run from a whole checkout",
        theirs or "not installed (Hugging Face's package, which is optional)",
    )


def _location(name: str) -> str | None:
    """Return the file of a package, the folder of one without `__init__.py`, or None."""
    spec = importlib.util.find_spec(name)
    return spec.origin or next(iter(spec.submodule_search_locations or []), None) if spec else None
