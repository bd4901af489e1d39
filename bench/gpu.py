"""What there is to measure on a machine with a GPU, in parts of under ten minutes.

    python bench/gpu.py [--part PART] [--out DIR] [--minutes 8] [--quick]

    correctness   pytest -m gpu
    loss          pytest bench/test_loss.py a workload at a time, test_accuracy.py; then bench/report.py has the tables
    step          pytest bench/test_step.py
    kernels       each Triton kernel alone: time, and bytes or operations a second
    counters      the same kernels under ncu: bytes from memory, hits in L2, active warps, instructions
    autotune      the search for block sizes
    sanitizer     compute-sanitizer's memcheck and racecheck on a small call of each Triton engine

A row is written to gpu-PART.json under --out as soon as it is known; to measure it again, delete that file. None is
begun after --minutes; the same command goes on from there. Nothing is timed where a test has failed. --quick is tiny
and runs without a GPU too, interpreted.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any
from unittest import mock

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # read by the first kernel
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--quick" in sys.argv:  # read by workloads
    os.environ["KDFAST_BENCH_QUICK"] = "1"

import measure
import records
from methods.ours import loss
from workloads import CUDA, PAIRS, WORKLOADS, Inputs, Workload

ENGINES = ("triton_chunked", "triton_tiled")
Row = dict[str, Any]


class Results(dict[str, Row]):
    """A part's rows by name, in a file that is complete whenever it is there."""

    def __init__(self, args: argparse.Namespace, part: str) -> None:
        self.path, self.deadline = args.out / f"gpu-{part}{'-quick' * args.quick}.json", args.deadline
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader") if CUDA else None
        versions = {"driver": driver, "cuda": torch.version.cuda, "triton": metadata.version("triton")}
        self.machine = measure.machine() | versions
        super().__init__(json.loads(self.path.read_text())["rows"] if self.path.exists() else {})

    def due(self, name: str) -> bool:
        """Not known yet, or cut short; and there is time."""
        late, known = time.monotonic() > self.deadline, self.get(name, {"status": 124}).get("status") != 124
        print(self.path.stem, name, "known" if known else "left for another run" if late else "…", flush=True)
        return not known and not late

    def add(self, name: str, row: Row) -> None:
        self[name] = row
        records.write(self.path, json.dumps({"machine": self.machine, "rows": self}, indent=1) + "\n")

    def command(self, *command: str) -> Row:
        """A command's status (124: it took too long) and the end of what it printed."""
        folders = (".", "tests/helpers", "tests", "bench")
        path = os.pathsep.join((*folders, os.environ.get("PYTHONPATH", "")))
        environment = {**os.environ, "PYTHONPATH": path, "KDFAST_BENCH_OUT": str(self.path.parent.resolve())}
        options = {"cwd": measure.ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        try:
            done = subprocess.run(command, timeout=max(1, self.deadline - time.monotonic()), **options)
            status, output = done.returncode, done.stdout
        except (subprocess.TimeoutExpired, FileNotFoundError) as problem:
            status, output = 124, getattr(problem, "stdout", None) or str(problem).encode()
        return {"command": " ".join(command), "status": status, "output": output.decode(errors="replace")[-100000:]}


CE = {"ce_weight": 0.5}
KERNELS = {  # launcher, options of the loss, with gradients, reads of each logit: 0 for the tiled engine's
    "row kernel, 1 read": ("solve_rows", CE, False, 1),
    "row kernel, KL alone": ("solve_rows", {}, True, 2),
    "row kernel, KL and CE": ("solve_rows", CE, True, 2),
    "row kernel, with metrics": ("solve_rows", CE | {"return_metrics": True}, True, 2),
    "row kernel, jsd": ("solve_rows", CE | {"divergence": "jsd"}, True, 3),
    "row kernel, skew_kl": ("solve_rows", CE | {"divergence": "skew_kl"}, True, 3),
    "row kernel, symmetric_kl": ("solve_rows", CE | {"divergence": "symmetric_kl"}, True, 3),
    "row kernel, total_variation": ("solve_rows", CE | {"divergence": "total_variation"}, True, 3),
    "statistics kernel": ("statistics", CE, False, 0),
    "gradient kernel, one slab": ("slab_gradients", CE, True, 0),
}
# bytes from memory, whether the second read of a logit finds it in L2, what keeps the multiprocessors waiting, and the
# warp instructions that `make aot` predicts
COUNTERS = [
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sector_hit_rate.pct",
    "smsp__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
]


def launch_of(inputs: Inputs, label: str) -> tuple[Callable[[], None], Row]:
    """The first such launch of a run, to be done again with its very arguments. `bytes`: if memory is read once."""
    launcher, options, backward, reads = KERNELS[label]
    module = importlib.import_module(f"kdfast.engines.triton_{'rows' if reads else 'tiled'}")
    with mock.patch.object(module, launcher, wraps=getattr(module, launcher)) as launch:
        with torch.set_grad_enabled(backward):
            value = loss(inputs, "triton_chunked" if reads else "triton_tiled", **options)
        if backward:
            (value[0] if isinstance(value, tuple) else value).backward()
    inputs.clear()
    arguments, keywords = launch.call_args_list[0]
    written = arguments[1 if reads else 2].student if backward else None  # `launch.Gradients`
    workload = inputs.workload
    whole = workload.tokens * workload.vocab
    logits = 2 * (arguments[0].z_s.numel() if reads else whole if written is None else written.numel())
    moved = logits * (4 * bool(reads) + (0 if written is None else written.element_size()))
    operations = 0 if reads else 2 * logits * workload.student_width
    row = {"reads": reads, "logits": logits, "bytes": moved, "operations": operations}
    return partial(getattr(module, launcher), *arguments, **keywords), row


def time_kernels(workload: Workload, rounds: int) -> dict[str, Row]:
    inputs = Inputs(workload)
    launches = {label: launch_of(inputs, label) for label in KERNELS}
    runs, rows = [run for run, _ in launches.values()], {label: row for label, (_, row) in launches.items()}
    for run in runs:
        run(), run()
    gpu = measure.known_gpu(str(measure.machine()["device"]))
    for row, seconds in zip(rows.values(), measure.alternate(runs, rounds), strict=True):
        median = statistics.median(seconds)
        row |= {"seconds": seconds, "flops": row["operations"] / median, "bytes_per_second": row["bytes"] / median}
        if gpu:
            row["of_bandwidth"], row["of_peak"] = row["bytes_per_second"] / gpu.copies, row["flops"] / gpu.products
    return rows


def launch_once(name: str, label: str) -> None:
    """What ncu looks at: one launch, of a kernel that is compiled and warm."""
    workload = next(workload for workload in WORKLOADS if str(workload) == name)
    run, _ = launch_of(Inputs(workload), label)
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def counters(results: Results, args: argparse.Namespace) -> None:
    """One process per kernel: ncu replays a launch for every group of counters."""
    if not shutil.which("ncu"):
        print(f"{results.path.stem}: ncu is not installed, no counters")
        return
    # clocks stay as they are; what is launched before is not looked at
    ncu = ["ncu", "--csv", "--clock-control", "none", "--profile-from-start", "off", "--metrics", ",".join(COUNTERS)]
    for workload in measured_alone():
        for label in KERNELS:
            if results.due(name := f"{workload}, {label}"):
                script = f"import gpu; gpu.launch_once({str(workload)!r}, {label!r})"
                row = results.command(*ncu, sys.executable, "-c", script)
                results.add(name, row | {"counters": read_counters(row["output"])})


def read_counters(output: str) -> dict[str, dict[str, str]]:
    """ncu's table, a line for each kernel and metric: {kernel: {metric: value and unit}}."""
    found: dict[str, dict[str, str]] = {}
    lines = [line for line in output.splitlines() if line.startswith('"')]
    for row in csv.DictReader(lines):
        kernel = found.setdefault(row["Kernel Name"], {})
        kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return found


def measured_alone() -> list[Workload]:
    """The workloads of which each kernel is measured alone."""
    dtype = WORKLOADS[0].dtype
    return [w for w in WORKLOADS if w.name in (*PAIRS, "wide") and w.teacher == "projected" and w.dtype == dtype]


def kernels(results: Results, args: argparse.Namespace) -> None:
    for workload in measured_alone():
        if results.due(str(workload)):
            results.add(str(workload), time_kernels(workload, args.rounds))


def correctness(results: Results, args: argparse.Namespace) -> None:
    """Tests that have passed are not run again."""
    passed = set(results.get("pytest", {}).get("passed", []))
    options = ["-m", "gpu", "-v", "--tb=short", "tests/gpu/test_gpu.py", *(f"--deselect={test}" for test in passed)]
    options += ["-n", "2"] if CUDA and util.find_spec("xdist") else []  # most of the time goes to compiling
    row = results.command(sys.executable, "-m", "pytest", *options)
    passed |= {a or b for a, b in re.findall(r"PASSED (tests/\S+)|(tests/\S+) PASSED", row["output"])}
    status = {5: 0}.get(row["status"], row["status"])  # 5: no test was left
    results.add("pytest", row | {"status": status, "passed": sorted(passed)})


def pytest_command(file: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "pytest", f"bench/{file}.py", "-q", "-s", "-W", "default", *options]


def loss_commands() -> dict[str, list[str]]:
    one_each = {str(workload): pytest_command("test_loss", "-k", str(workload)) for workload in WORKLOADS}
    return one_each | {"accuracy": pytest_command("test_accuracy")}


def search_commands() -> dict[str, list[str]]:
    """Under KDFAST_AUTOTUNE first launches search, and print rows for the table in kernels/block_sizes.py."""
    search = ["env", "KDFAST_AUTOTUNE=1", sys.executable]
    full = ["-m", "pytest", "-m", "gpu", "-s", "tests/gpu/test_gpu.py", "-k", "same_bits"]  # CE, biases and an anchor
    lean = ["bench/gpu.py", "--part", "kernels", "--out", "bench/results/autotuned"]
    return {"full": search + full, "lean": search + lean}


def sanitizer_commands() -> dict[str, list[str]]:
    """Each engine against float64 at a small size, first by itself, to compile. racecheck sees shared memory only."""
    call = "compare('cuda', p, (70, 1000, 64, 96), *two, ['{}'])"
    run = f"from gpu_checks import *; [{call} for p in ('bf16', 'fp32') for two in TWO]"
    under = {tool: ["compute-sanitizer", "--error-exitcode", "9", "--tool", tool] for tool in ("memcheck", "racecheck")}
    calls = {engine: [sys.executable, "-c", run.format(engine)] for engine in ENGINES}
    return {f"{engine} {tool}": under.get(tool, []) + calls[engine] for engine in ENGINES for tool in ("alone", *under)}


def run_commands(results: Results, args: argparse.Namespace, commands: dict[str, list[str]]) -> None:
    for name, command in commands.items():
        if results.due(name):
            results.add(name, results.command(*command))


def show(results: Results) -> bool:
    """Print what there is; whether nothing has failed."""
    fine = True
    for title, rows in results.items():
        print(f"\n{results.path.stem} {title}")
        if "status" in rows:
            fine &= rows["status"] == 0
            print(f"status {rows['status']}\n{rows.get('counters') or rows['output'][-600:]}")
            continue
        for name, row in rows.items():
            operations, moved = row["flops"] / 1e12, row["bytes_per_second"] / 1e9
            rate = f"{operations:.0f} TFLOP/s" if operations else f"{moved:.0f} GB/s"
            print(f"{name:<33}{1e3 * statistics.median(row['seconds']):10.3f} ms {rate}")
    return fine


def main() -> int:
    commands = {"loss": loss_commands(), "step": {"step": pytest_command("test_step")}}
    commands |= {"sanitizer": sanitizer_commands(), "autotune": search_commands()}
    parts = {"correctness": correctness, "kernels": kernels, "counters": counters}
    parts |= {name: partial(run_commands, commands=those) for name, those in commands.items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*parts, "all"], default="all")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "bench/results", help="where gpu-PART.json goes")
    parser.add_argument("--minutes", type=float, default=8, help="begin nothing new after")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    args.deadline, args.rounds = time.monotonic() + 60 * args.minutes, 2 if args.quick else 7
    args.out.mkdir(parents=True, exist_ok=True)
    every = {name: Results(args, name) for name in parts if args.part in (name, "all")}
    for name in every:
        parts[name](every[name], args)
        if name == "correctness" and every[name]["pytest"]["status"] not in (0, 124):
            every = {name: every[name]}
            break
    return 1 - min(map(show, every.values()))


if __name__ == "__main__":
    sys.exit(main())
