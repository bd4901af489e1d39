"""What there is to measure on a machine with a GPU, in parts of under ten minutes.

    python bench/gpu.py [--part PART] [--out DIR] [--minutes 8] [--quick]

    correctness   pytest -m gpu
    loss          pytest bench/test_loss.py a workload at a time, test_accuracy.py; then bench/report.py has the tables
    step          pytest bench/test_step.py
    kernels       each Triton kernel alone: time, and bytes or operations a second
    autotune      the search for block sizes
    sanitizer     compute-sanitizer's memcheck and racecheck on a small call of each Triton engine

A row is written to gpu-PART.json under --out as soon as it is known; to measure it again, delete that file. None is
begun after --minutes; the same command goes on from there. --quick is tiny and runs without a GPU too, interpreted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
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


KERNELS = {  # engine's module, launcher, divergence, with gradients, reads of each logit
    "row kernel, 1 read": ("triton_rows", "solve_rows", "forward_kl", False, 1),
    "row kernel, 2 reads": ("triton_rows", "solve_rows", "forward_kl", True, 2),
    "row kernel, 3 reads (jsd)": ("triton_rows", "solve_rows", "jsd", True, 3),
    "statistics kernel": ("triton_tiled", "statistics", "forward_kl", False, 0),
    "gradient kernel, one slab": ("triton_tiled", "slab_gradients", "forward_kl", True, 0),
}


def time_kernels(workload: Workload, rounds: int) -> dict[str, Row]:
    """Each kernel alone: the first launch of a run, again with its very arguments. `bytes`: if memory is read once."""
    inputs, runs, rows = Inputs(workload), {}, {}
    for label, (module, launcher, divergence, backward, reads) in KERNELS.items():
        module = importlib.import_module(f"kdfast.engines.{module}")
        engine = "triton_chunked" if reads else "triton_tiled"
        with mock.patch.object(module, launcher, wraps=getattr(module, launcher)) as launch:
            with torch.set_grad_enabled(backward):
                value = loss(inputs, engine, divergence)
            if backward:
                value.backward()
        inputs.clear()
        arguments, options = launch.call_args_list[0]
        runs[label] = partial(getattr(module, launcher), *arguments, **options)
        written = arguments[1 if reads else 2].student if backward else None  # `launch.Gradients`
        tokens, vocab = workload.tokens, workload.vocab
        logits = 2 * (arguments[0].z_s.numel() if reads else tokens * vocab if written is None else written.numel())
        moved = logits * (4 * bool(reads) + (0 if written is None else written.element_size()))
        operations = 0 if reads else 2 * logits * workload.student_width
        rows[label] = {"reads": reads, "bytes": moved, "operations": operations}
    for run in runs.values():
        run(), run()
    gpu = measure.known_gpu(str(measure.machine()["device"]))
    for row, seconds in zip(rows.values(), measure.alternate([*runs.values()], rounds), strict=True):
        median = statistics.median(seconds)
        row |= {"seconds": seconds, "flops": row["operations"] / median, "bytes_per_second": row["bytes"] / median}
        if gpu:
            row["of_bandwidth"], row["of_peak"] = row["bytes_per_second"] / gpu.copies, row["flops"] / gpu.products
    return rows


def kernels(results: Results, args: argparse.Namespace) -> None:
    for workload in WORKLOADS:
        wanted = workload.name in PAIRS and workload.teacher == "projected"
        if wanted and workload.dtype == WORKLOADS[0].dtype and results.due(str(workload)):
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
            print(f"status {rows['status']}\n{rows['output'][-600:]}")
            continue
        for name, row in rows.items():
            operations, moved = row["flops"] / 1e12, row["bytes_per_second"] / 1e9
            rate = f"{operations:.0f} TFLOP/s" if operations else f"{moved:.0f} GB/s"
            print(f"{name:<33}{1e3 * statistics.median(row['seconds']):10.3f} ms {rate}")
    return fine


def main() -> int:
    commands = {"loss": loss_commands(), "step": {"step": pytest_command("test_step")}}
    commands |= {"sanitizer": sanitizer_commands(), "autotune": search_commands()}
    parts = {"correctness": correctness, "kernels": kernels}
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
    return 1 - min(map(show, every.values()))


if __name__ == "__main__":
    sys.exit(main())
