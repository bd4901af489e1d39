"""`kdfast doctor`: what is installed, what it runs on, and whether the two packages called `kernels` are apart."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from kdfast.cli.errors import UserError
from kdfast.engines import choose
from kdfast.versions import PACKAGES, installed_version


def doctor(tokens: int, vocab: int, dtype: str, scratch_bytes: int | None = None) -> int:
    """Print the findings, and what `auto` picks for such a loss; return 1 where something will not work."""
    import kdfast

    for name, value in (("--tokens", tokens), ("--vocab", vocab), ("--scratch-bytes", scratch_bytes)):
        if value is not None and value <= 0:
            raise UserError(f"doctor: {name} {value}; expected a positive number")

    print(f"kdfast          {kdfast.__version__}  {Path(kdfast.__file__).parent}")
    print(f"python          {platform.python_version()}  {platform.platform()}")
    for name in PACKAGES:
        print(f"{name:15} {installed_version(name) or 'not installed'}")

    print()
    print(f"For N={tokens} tokens, V={vocab}, {dtype}, a teacher, all gradients:")
    for device, what in _devices():
        choice = choose(
            device, getattr(torch, dtype), tokens=tokens, vocab=vocab, scratch_bytes=scratch_bytes or 0
        )
        chunks = "" if choice.tokens is None else f", {-(-tokens // choice.tokens)} chunks of {choice.tokens} tokens"
        print(f"{device!s:15} {what}; engine auto is {choice.engine}{chunks} ({choice.why})")

    ours, theirs, healthy = _kernels()
    print(f"\nkdfast.kernels  {ours}\nkernels         {theirs}")
    return 0 if healthy else 1


def _devices() -> Iterator[tuple[torch.device, str]]:
    yield torch.device("cpu"), f"{torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield torch.device("cuda", i), f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        yield torch.device("mps"), "Apple GPU"


def _kernels() -> tuple[str, str, bool]:
    """Return what `kdfast.kernels` is, what `kernels` is, and whether both are as they should be."""
    ours, theirs = _location("kdfast.kernels"), _location("kernels")
    try:
        expected = str(distribution("kernels").locate_file("kernels/__init__.py"))
    except PackageNotFoundError:
        expected = None

    if theirs == expected:
        described = theirs or "not installed (Hugging Face's package, which is optional)"
    elif expected is None and theirs is not None and not theirs.endswith(".py"):
        described = f"{theirs}, a plain folder, which any installed package of that name wins over"
    else:
        described = f"SHADOWED: {theirs} is not Hugging Face's package; rename it, or take its folder off sys.path"
    if ours is None:
        ours = "MISSING: install kdfast again, or run from a whole checkout"
    return ours, described, not (ours.startswith("MISSING") or described.startswith("SHADOWED"))


def _location(name: str) -> str | None:
    """Return the file of a package, the folder of one without `__init__.py`, None where there is neither."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or []), None)
