"""What is installed: for `kdfast doctor` and for the record of a run. Imports nothing it asks about."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from kdfast._version import __version__

PACKAGES = ("torch", "triton", "numpy", "transformers", "datasets", "accelerate", "tokenizers", "safetensors")


def installed_version(name: str) -> str | None:
    """Return the version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the versions of kdfast, python and PACKAGES; None where a package is not installed."""
    packages = {name: installed_version(name) for name in PACKAGES}
    return {"kdfast": __version__, "python": platform.python_version(), **packages}
