"""Chooses a launch's configuration: the table's or, with KDFAST_AUTOTUNE=1, the fastest found on this GPU.

The search starts at the table's row and changes one field of the best so far by one step, until nothing is 2% better;
configurations that do not compile or fit are skipped. It runs once per kernel and row of the table, on the first launch
that needs it, prints the row to put into `kernels/block_sizes.py`, and its result is used until the process ends.
Nothing is written to disk. A new row is valid once `make aot` and the tests have passed with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import torch
import triton
from torch import Tensor

from kdfast.kernels.block_sizes import RowConfig, TileConfig, key_of, row_of

Config = RowConfig | TileConfig
STEPS: dict[str, tuple[int, ...]] = {
    "rows": (1, 2, 4),
    "block": (1024, 2048, 4096, 8192),
    "warps": (4, 8, 16),
    "block_n": (64, 128, 256),
    "block_v": (64, 128, 256),
    "block_h": (16, 32, 64, 128),
    "stages": (2, 3, 4),
    "parts": (1, 2, 4, 8),
}
BETTER = 0.98  # of the best time so far; smaller gains are noise
_found: dict[tuple[Any, ...], Config] = {}


def choose(kernel: str, operand: Tensor, N: int, launch: Callable[[Any], Any], widths: Sequence[int] = ()) -> Any:
    """Return the configuration of `kernel` (a field of the table's rows) for N tokens and operands like `operand`.

    launch(config) does the work once, and repeating it must change nothing; widths: what a product sums over."""
    row = row_of(operand.device, operand.element_size(), N)
    config = getattr(row, kernel)
    if config is None:
        kernel = "full" if kernel == "given" else "gradients"
        config = getattr(row, kernel)
    if any(width % config.block_h for width in widths):
        kernel, config = "odd", row.odd
    if os.environ.get("KDFAST_AUTOTUNE", "0") in ("", "0") or not operand.is_cuda:
        return config
    key = (*key_of(operand.device, operand.element_size(), N), kernel)
    if key not in _found:
        print(f"kdfast: searching {key}", flush=True)
        _found[key] = search(config, launch)
        name = torch.cuda.get_device_name(operand.device)
        verdict = "stands" if _found[key] == config else "is better so"
        print(f"kdfast: the row {key[:3]} {verdict}: {kernel}={_found[key]}  # {name}, {date.today()}", flush=True)
    return _found[key]


def neighbours(config: Config) -> Iterator[Config]:
    """Yield the configurations with one field one step up or down."""
    for name, steps in STEPS.items():
        value = getattr(config, name, None)
        if value in steps:
            at = steps.index(value)
            yield from (replace(config, **{name: steps[i]}) for i in (at - 1, at + 1) if 0 <= i < len(steps))


def _milliseconds(run: Callable[[], Any]) -> float:
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def search(
    start: Config, launch: Callable[[Any], Any], time: Callable[[Callable[[], Any]], float] = _milliseconds
) -> Any:
    """Return the fastest configuration reached from `start`; time(run) returns how long run() takes."""
    tried: dict[Config, float] = {}

    def measure(config: Config) -> float:
        if config not in tried:
            try:
                tried[config] = time(lambda: launch(config))
                print(f"  {tried[config]:9.3f} ms  {config}", flush=True)
            except Exception as error:  # out of shared memory, a shape the compiler refuses
                tried[config] = float("inf")
                print(f"       no run  {config}: {type(error).__name__}", flush=True)
        return tried[config]

    best = start
    while True:
        fastest = min(neighbours(best), key=measure)
        if measure(fastest) >= BETTER * measure(best):
            return best
        best = fastest
