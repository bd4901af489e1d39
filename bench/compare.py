"""Every contender on one workload: checked against float64, then timed in turn, then its peak memory.

A row is {"missing": why} or

    operations, whole_logits, ours, floor
    errors           relative, of the value and of each gradient; none for a floor
    right            every gradient is within LIMITS of its dtype
    forward, step    seconds of every round: without gradients, and with the backward; what takes longer than PATIENCE
                     has one round of the latter, and no peak
    of_floor_a, _b   median of floor / method, round by round, of a step; of_floor_b_forward
    tokens_per_second, flops        of a step; operations the problem takes, not those the method makes
    peak_bytes       of a step, above inputs and gradients
"""

from __future__ import annotations

import gc
import statistics
import time
from contextlib import suppress
from typing import Any

import measure
import torch
from memory import peak_bytes
from methods import METHODS, Method, Run
from truth import Truth, errors, truth
from workloads import DEVICE, Inputs, Workload

Row = dict[str, Any]
# relative error of a gradient that counts as right. In bf16 the products' own rounding is 0.2–0.4%, and a projected
# teacher's hidden states are rounded to bf16 before the vocabulary product on a GPU
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}
PATIENCE = 30.0  # seconds: what takes longer for one step is not run again
FLOORS = {"of_floor_a": "floor A (whole products)", "of_floor_b": "floor B (our products)"}


def compare(workload: Workload, rounds: int) -> dict[str, Row]:
    """Rows by the method's name, in the order of METHODS."""
    torch.compiler.reset()  # or, after some sizes, compiled eager is eager
    inputs = Inputs(workload)
    exact = truth(inputs)
    rows: dict[str, Row] = {}
    runs: dict[str, tuple[Run, Run]] = {}
    for method in METHODS:
        rows[method.name] = row = check(method, inputs, exact)
        if not row.keys() & {"missing", "step"}:
            runs[method.name] = method.runs(inputs)
    del exact
    if DEVICE == "cuda":  # allocators and clocks settle; the check was a CPU's warm-up
        for forward, step in runs.values():
            forward(), step()
    for kind, index in (("forward", 0), ("step", 1)):
        seconds = measure.alternate([pair[index] for pair in runs.values()], rounds)
        for name, times in zip(runs, seconds, strict=True):
            rows[name][kind] = times
    for row in rows.values():
        if "step" in row:
            row |= figures(workload, row, rows)
    runs.clear()
    if DEVICE == "cpu":
        del inputs
        gc.collect()
    for method in METHODS:
        row = rows[method.name]
        if "forward" in row and not method.is_floor:
            with suppress(torch.OutOfMemoryError):
                row["peak_bytes"] = peak(method, workload, None if DEVICE == "cpu" else inputs)
    return rows


def check(method: Method, inputs: Inputs, exact: Truth) -> Row:
    """One step of it: errors, or why it cannot be timed."""
    if missing := method.missing(inputs.workload.teacher, inputs.device):
        return {"missing": missing}
    row: Row = {"operations": method.operations[inputs.workload.teacher]}
    row |= {"ours": method.ours, "floor": method.is_floor, "whole_logits": method.whole_logits}
    start = time.perf_counter()
    try:
        loss = method.runs(inputs)[1]()
    except Exception as problem:  # does not fit, does not compile, or the library fails
        inputs.clear()
        return {"missing": f"{type(problem).__name__}: {str(problem).strip()[:200]}"}
    if not method.is_floor:
        found = errors(inputs, loss, exact, cross_entropy=method.cross_entropy)
        limit = LIMITS[inputs.workload.dtype]
        row |= {"errors": found, "right": all(found[leaf] <= limit for leaf in inputs.leaves)}
        if DEVICE == "cpu" and (seconds := time.perf_counter() - start) > PATIENCE and not method.compiles:
            row["step"] = [seconds]
    inputs.clear()
    return row


def figures(workload: Workload, row: Row, rows: dict[str, Row]) -> Row:
    seconds = statistics.median(row["step"])
    found: Row = {"tokens_per_second": workload.tokens / seconds}
    found["flops"] = workload.operations(backward=True) / seconds
    for key, floor in FLOORS.items():
        for kind, name in (("step", key), ("forward", f"{key}_forward")):
            if kind in row and kind in rows[floor]:
                found[name] = measure.ratio(rows[floor][kind][: len(row[kind])], row[kind])
    return found


def peak(method: Method, workload: Workload, inputs: Inputs | None) -> int:
    """inputs: on a GPU, whose allocator tells exactly; None: a process of its own."""
    if inputs is None:
        return int(measure.in_fresh_process("memory", str(workload), method.name))
    found = peak_bytes(method, inputs)
    inputs.clear()
    return found
