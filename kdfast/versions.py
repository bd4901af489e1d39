"""Installed versions, for `kdfast doctor` and for the record of a run. Looks packages up without importing them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from kdfast._version import __version__

PACKAGES = ("torch", "triton", "numpy", "transformers", "datasets", "accelerate", "tokenizers", "safetensors")


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the versions of kdfast, Python and PACKAGES; None for a package that is not installed."""
    packages = {name: installed_version(name) for name in PACKAGES}
    return {"kdfast": __version__, "python": platform.python_version(), **packages}
