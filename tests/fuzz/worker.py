"""The process that tries cases one after the other, and tells what each came to."""

import importlib
import time
from pathlib import Path

import interpreter  # noqa: F401  # before any kernel
import own_warnings
import torch


def work(kind, folder, seed, most, seconds, pipe) -> None:
    """Outcomes of `kind`'s cases from `seed` on through `pipe`, then None."""
    torch.set_num_threads(1)
    module = importlib.import_module(f"fuzz.{kind}")
    own_warnings.are_errors()
    attempt = module.attempt if kind == "interface" else module.Cases(Path(folder)).attempt
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end and (most is None or done < most):
        pipe.send(attempt(seed + done))
        done += 1
    pipe.send(None)
