"""Forward, and forward and backward, of the loss by every contender, in time and memory.

    pytest bench/test_loss.py -k "original and head"        one workload, seconds to minutes
    pytest bench/test_loss.py --benchmark-compare …         pytest-benchmark's own options work

The contenders of a workload are measured together, in turn (compare.py), when the first of them is asked for; what
pytest-benchmark is given are those rounds. Its columns, its JSON and its comparisons are of these times; the rest is in
each one's extra_info, in bench/results/, and in the tables of `python bench/report.py`.

Rounds: KDFAST_BENCH_ROUNDS (3; 7 on a GPU). KDFAST_BENCH_QUICK=1: toy sizes.
"""

from __future__ import annotations

import os
from functools import lru_cache

import pytest
import records
from clock import Replay
from compare import LIMITS, Row, compare
from methods import METHODS, Method
from workloads import CUDA, WORKLOADS, Workload

ROUNDS = int(os.environ.get("KDFAST_BENCH_ROUNDS") or (7 if CUDA else 3))


CLOCK = Replay()


@lru_cache(maxsize=1)
def measured(workload: Workload) -> dict[str, Row]:
    rows = compare(workload, ROUNDS)
    sizes = {"tokens": workload.tokens, "vocab": workload.vocab, "dtype": workload.precision}
    sizes |= {"student_width": workload.student_width, "teacher_width": workload.teacher_width}
    entry = {"workload": workload.name, "teacher": workload.teacher, **sizes, "rounds": ROUNDS, "rows": rows}
    records.add("loss", str(workload), entry)
    return rows


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("kind", ["forward", "step"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_loss(workload: Workload, kind: str, method: Method, benchmark) -> None:
    row = measured(workload)[method.name]
    if "missing" in row:
        pytest.skip(f"{method.name}: {row['missing']}")
    if kind not in row:
        pytest.skip(f"{method.name}: too slow to be run again, {row['step'][0]:.0f} s")
    benchmark.group = f"{workload.name}, teacher {workload.teacher}: {workload.sizes}, {kind}"
    benchmark.extra_info |= {key: value for key, value in row.items() if key not in ("forward", "step")}
    benchmark.pedantic(CLOCK.play(row[kind]), rounds=len(row[kind]))
    if method.ours:  # a peer whose gradients are wrong is shown as just that
        assert row["right"], f"gradients off by {row['errors']}, limit {LIMITS[workload.dtype]}"
