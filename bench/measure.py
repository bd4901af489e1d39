"""Measuring: contenders in turn within one process for time, one fresh process each for memory."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import plan
import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()


def alternate(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of every run, `rounds` of each, in turn: a machine that slows down slows all of them. They are warm
    already; on a GPU a short one is run so many times in a row that they take some 20 ms."""
    repeats = [1 if not CUDA else max(1, min(50, int(0.02 / seconds_of(run)))) for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, repeat, times in zip(runs, repeats, seconds, strict=True):
            times.append(seconds_of(run, repeat))
    return seconds


def seconds_of(run: Callable[[], object], repeat: int = 1) -> float:
    """One run's, by the clock; on a GPU by events, the mean of `repeat`."""
    if not CUDA:
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - start) / repeat
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeat):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeat / 1e3


def ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """Median of base/other, round by round."""
    return statistics.median(a / b for a, b in zip(base, other, strict=True))


def peak_above_inputs(run: Callable[[], object]) -> int:
    """Bytes by which `run` raises the peak above what is there now: of this process's resident set, or on a GPU of
    what PyTorch's allocator has handed out."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):  # what was freed but kept by the C library is not in use
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def in_fresh_process(module: str, *arguments: str) -> str:
    """What `python -m module arguments…` prints last."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench")])}
    # glibc keeps freed blocks of up to 32 MiB, more or fewer from run to run: here they go back to the system at once
    environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def known_gpu(name: str) -> plan.Gpu | None:
    """Return the data sheet of the device PyTorch calls `name`; None where it is not among those known."""
    return next((gpu for gpu in plan.GPUS.values() if gpu.name.partition("-")[0] in name.split()), None)


def machine() -> dict[str, object]:
    """Where this was measured."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _status(key: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith(key))


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
