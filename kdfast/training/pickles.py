"""No file of a checkpoint runs code when it is read.

Weights are safetensors. What Trainer keeps besides (optimizer, scheduler, scaler, random states) are pickles, which it
reads with `weights_only=True`: tensors, numbers and containers, and nothing that could be called. Here they are looked
at before anything is loaded, so that an error names the file. Tensors' data is not read for that.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals  # NumPy's random state, which Trainer allows too

SUFFIXES = (".pt", ".pth", ".bin")
_GLOBAL = re.compile(r"GLOBAL\s+([\w.]+)")


def find_refused(folder: Path) -> str | None:
    """The first pickle below `folder` that is not plain data, and what is wrong with it; or None."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES and (reason := _refuse(path)):
            return f"{path.name} {reason}"
    return None


def _refuse(path: Path) -> str | None:
    try:
        with safe_globals():
            torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # of many classes: unpickling, the zip format, the file system
        return explain(error)
    return None


def explain(error: Exception) -> str:
    """What `torch.load(weights_only=True)` found; its own text advises to turn that off."""
    if named := _GLOBAL.search(str(error)):
        return f"would run {named[1]} when read; expected tensors, numbers and containers alone"
    if isinstance(error, pickle.UnpicklingError):
        return "holds more than tensors, numbers and containers, and is not read"
    return f"cannot be read: {str(error).strip().splitlines()[0].rstrip('.')}"
