"""A step beside a busy process, as on a machine that somebody uses; and two of our steps side by side.

    pytest bench/ -k loaded -s        the table, and bench/results/loaded-cpu.json

The busy process is single-threaded and of another login session (Linux shares the cores among sessions first), stopped
and continued: each contender is timed alone and beside it in every round, in turn. Side by side: steps per second of
two processes at once, each over that of one alone. Rounds: KDFAST_BENCH_ROUNDS (5). KDFAST_BENCH_QUICK=1: toy sizes.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import measure
import pytest
import records
import torch
from methods import BY_NAME
from workloads import CUDA, QUICK, WORKLOADS, Inputs, Workload

ROUNDS = int(os.environ.get("KDFAST_BENCH_ROUNDS") or 5)
SECONDS = 1.0 if QUICK else 15.0  # of steps side by side
OURS, PLAIN = "kdfast torch", "kdfast torch, KDFAST_COMPILE=0"
CONTENDERS = ("floor B (our products)", OURS, PLAIN, "eager", "eager, torch.compile")
CASES = [w for w in WORKLOADS if w.teacher == "head" and (QUICK or w.name in ("latency", "N256"))]


@contextmanager
def compiling(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KDFAST_COMPILE", "0" if name == PLAIN else "1")
        yield


def stepper(name: str, inputs: Inputs) -> Callable[[], object]:
    with compiling(name):
        _, step = BY_NAME[OURS if name == PLAIN else name].runs(inputs)
        step(), step()

    def run() -> None:
        with compiling(name):
            step()

    return run


@contextmanager
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes on one thread, in a session of its own; stopped at first."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def side_by_side(workload: Workload, name: str) -> list[float]:
    """Return the speed of each of two processes at once, over that of one."""

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", __file__, str(workload), name]
        path = os.pathsep.join([str(measure.ROOT), str(measure.ROOT / "bench")])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, start_new_session=True, **pipes)

    def speeds(number: int) -> list[float]:
        processes = [start() for _ in range(number)]
        for process in processes:
            assert process.stdout.readline().strip() == "ready"
        for process in processes:  # at once
            process.stdin.write("go\n")
            process.stdin.flush()
        return [float(process.communicate()[0]) for process in processes]

    alone = speeds(1)[0]
    return [speed / alone for speed in speeds(2)]


@pytest.mark.skipif(CUDA, reason="of a CPU's cores")
@pytest.mark.parametrize("workload", CASES, ids=str)
def test_loaded(workload: Workload) -> None:
    inputs = Inputs(workload)
    steps = {name: stepper(name, inputs) for name in CONTENDERS}
    alone: dict[str, list[float]] = {name: [] for name in steps}
    loaded: dict[str, list[float]] = {name: [] for name in steps}
    with busy() as process:
        for _ in range(ROUNDS):
            for times, wanted in ((alone, signal.SIGSTOP), (loaded, signal.SIGCONT)):
                process.send_signal(wanted)
                time.sleep(0.1)
                for name, step in steps.items():
                    times[name].append(measure.seconds_of(step))
    rows = {name: {"alone": alone[name], "loaded": loaded[name]} for name in steps}
    rows[OURS]["side_by_side"] = side_by_side(workload, OURS)
    machine = measure.machine()
    print(
        f"\n### Beside a busy process: {workload.sizes}, {workload.teacher}\n{machine['device']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, {machine['date']}; medians of {ROUNDS} rounds in turn\n\n"
        "| | alone | beside it | factor | two at once, each |\n|---|---|---|---|---|"
    )
    for name, row in rows.items():
        seconds, beside = statistics.median(row["alone"]), statistics.median(row["loaded"])
        factor = measure.ratio(row["loaded"], row["alone"])
        shares = ", ".join(f"{share:.0%}" for share in row.get("side_by_side", ()))
        print(f"| {name} | {seconds:.3f} s | {beside:.3f} s | {factor:.1f} | {shares} |")
    sizes = {"tokens": workload.tokens, "vocab": workload.vocab, "student_width": workload.student_width}
    records.add(
        "loaded", str(workload), {**sizes, "teacher_width": workload.teacher_width, "rounds": ROUNDS, "rows": rows}
    )


def main() -> None:
    """Print "ready", wait for a line, and print the steps per second of SECONDS."""
    workload = next(w for w in WORKLOADS if str(w) == sys.argv[1])
    step = stepper(sys.argv[2], Inputs(workload))
    print("ready", flush=True)
    sys.stdin.readline()
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + SECONDS:
        step()
        count += 1
    print(count / (time.perf_counter() - start))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
