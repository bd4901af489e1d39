"""What there is to measure on a machine with a GPU, in parts of under ten minutes.

    python bench/gpu.py [--part correctness|engines|peers|autotune|sanitizer|all] [--out DIR] [--minutes 8] [--quick]

    correctness   pytest -m gpu
    engines       forward (no_grad) and forward + backward of every engine, eager, compiled eager, two floors; kernels
    peers         TRL and Liger on the work they share with us: the teacher's own head, the student's gradients
    autotune      the search for block sizes
    sanitizer     compute-sanitizer's memcheck and racecheck on a small call of each Triton engine

A row is written to gpu-PART.json under --out as soon as it is known; to measure it again, delete that file. None is
begun after --minutes; the same command goes on from there. --quick is tiny and runs without a GPU too, interpreted.

Operations: u(H) = 2·N·V·H. TFLOP/s are of what the problem takes with nothing computed twice: 6u(Hs) projected,
3u(Hs) + u(Ht) with the teacher's own head, 2u and u + u forward. Floor B: the matrix products of the chunked loop in
scratch of the same shapes, nothing else. Floor A: the same operations unchunked, V padded to 128, where it fits. Peak
is above inputs and gradients. Before it is timed, a contender's gradient of 32 rows of hidden states is held against
float64. CUDA events, contenders in turn, median of the rounds, spread = slowest − fastest; normal inputs beyond the L2.
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
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any
from unittest import mock

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # read by the first kernel
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measure
from contenders import TEMPERATURE, Case, liger, trl

from kdfast import Head, Projected, fused_kd_loss, gemm
from kdfast.engines.planning import row_stride

# predictions are at: bf16 operations and bytes a second of an H200; operations of Triton's products, a guess
RATE, BANDWIDTH, TRITON_RATE = 790e12, 4.3e12, 0.6 * 790e12
LARGE = [(8192, 128256, 2048, 4096), (8192, 128256, 4096, 4096), (4096, 151936, 4096, 4096), (4096, 262144, 2304, 4096)]
SIZES = {  # N, V, Hs, Ht by the kind of teacher
    "projected": [(8192, 50257, 768, 1024), (256, 50257, 768, 1024), *LARGE],
    "head": [(2048, 151936, 4096, 4096), (8192, 151936, 4096, 4096)],
}
CUDA = torch.cuda.is_available()
Row = dict[str, Any]
Losses = dict[str, Callable[[Case], Any]]  # the loss is returned, or has done its backward itself


class Results(dict[str, Row]):
    """A part's rows by name, in a file that is complete whenever it is there."""

    def __init__(self, args: argparse.Namespace, part: str) -> None:
        self.path, self.deadline = args.out / f"gpu-{part}{'-quick' * args.quick}.json", args.deadline
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader") if CUDA else None
        versions = {"driver": driver, "cuda": torch.version.cuda, "triton": metadata.version("triton")}
        self.head = {"machine": measure.machine() | versions, "predicted_at": [RATE, BANDWIDTH, TRITON_RATE]}
        super().__init__(json.loads(self.path.read_text())["rows"] if self.path.exists() else {})

    def due(self, name: str) -> bool:
        """Not known yet, or cut short; and there is time."""
        late, known = time.monotonic() > self.deadline, self.get(name, {"status": 124}).get("status") != 124
        print(self.path.stem, name, "known" if known else "left for another run" if late else "…", flush=True)
        return not known and not late

    def add(self, name: str, row: Row) -> None:
        self[name] = row
        (temporary := self.path.with_suffix(".tmp")).write_text(json.dumps(self.head | {"rows": self}, indent=1) + "\n")
        temporary.replace(self.path)

    def command(self, *command: str) -> Row:
        """A command's status (124: it took too long) and the end of what it printed."""
        environment = {**os.environ, "PYTHONPATH": f".:tests:tests/engines:{os.environ.get('PYTHONPATH', '')}"}
        options = {"cwd": measure.ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        try:
            done = subprocess.run(command, timeout=max(1, self.deadline - time.monotonic()), **options)
            status, output = done.returncode, done.stdout
        except (subprocess.TimeoutExpired, FileNotFoundError) as problem:
            status, output = 124, getattr(problem, "stdout", None) or str(problem).encode()
        return {"command": " ".join(command), "status": status, "output": output.decode(errors="replace")[-100000:]}


def ours(case: Case, engine: str, divergence: str = "forward_kl") -> torch.Tensor:
    teacher = Projected(case.ht, case.P) if case.kind == "projected" else Head(case.ht, case.Wt)
    options = {"temperature": TEMPERATURE, "temperature_squared": False, "engine": engine, "divergence": divergence}
    return fused_kd_loss(Head(case.hs, case.W), teacher, **options)


def eager(case: Case) -> torch.Tensor:
    """What one writes without a library."""
    z_t = (case.ht @ case.P.T) @ case.W.T if case.kind == "projected" else case.ht @ case.Wt.T
    log_q, log_p = ((z / TEMPERATURE).log_softmax(-1) for z in (case.hs @ case.W.T, z_t))
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def liger_jsd(case: Case, triton: bool) -> None:
    """At β=0, which is forward KL: Liger's own implementation in Triton, or its chunked one compiled."""
    module, name = ("transformers", "LigerFusedLinearJSD") if triton else ("chunked_loss", "LigerFusedLinearJSDLoss")
    options = {"jsd_beta": 0.0} if triton else {"beta": 0.0, "weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
    loss = getattr(importlib.import_module(f"liger_kernel.{module}"), name)(temperature=TEMPERATURE, **options)
    loss(case.hs, case.W, case.ht, case.Wt, None if triton else case.labels).backward()


TRITON: Losses = {engine: partial(ours, engine=engine) for engine in ("triton_chunked", "triton_tiled")}
PEERS: Losses = {
    "TRL ChunkedDivergence": trl,
    "Liger JSD in eager chunks": liger,
    "Liger JSD in compiled chunks": partial(liger_jsd, triton=False),
    "Liger JSD in Triton": partial(liger_jsd, triton=True),
}


def floor(case: Case, calls: list[gemm.Call], *, whole: bool) -> Callable[[], None]:
    """The products `calls` and nothing else; whole: every row is there, so dW is complete and not added up."""
    device, V, most = case.hs.device, calls[0].vocab, max(call.rows for call in calls)
    normal, widths = partial(torch.randn, device=device), {call.width for call in calls}
    stride, dtypes = row_stride(V, device, "triton_chunked"), (torch.float32, gemm.gradient_dtype(case.dtype, device))
    z, g = (normal(most, stride, dtype=dtype)[:, :V] for dtype in dtypes)
    x, heads = ({H: normal(n, H, dtype=case.dtype) for H in widths} for n in (most, V))
    d_weight = torch.zeros(V, case.Hs, device=device)

    def run() -> None:
        for kind, rows, _, width in calls:
            if kind == "logits":
                gemm.logits(x[width][:rows], heads[width], z[:rows])
            elif kind == "input_gradient":
                gemm.input_gradient(g[:rows], heads[width], z.dtype)
            elif whole:
                gemm.input_gradient(g.t(), x[width], z.dtype)  # gᵀ·x: a product of the same kind
            else:
                gemm.weight_gradient(g[:rows], x[width][:rows], d_weight)

    return run


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Row]:
    """Each run alone, in turn, after two to warm up; on a GPU so many in a row that they take some 20 ms."""

    def milliseconds(run: Callable[[], Any], repeat: int = 1) -> float:
        if not CUDA:
            return 1e3 * measure.alternate([run], 1)[0][0]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeat):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeat

    for run in runs.values():
        run()
    pairs = [(run, max(1, min(50, int(20 / milliseconds(run))))) for run in runs.values()]
    every = zip(*([milliseconds(*pair) for pair in pairs] for _ in range(rounds)), strict=True)
    rows = ({"ms": statistics.median(t), "spread_ms": max(t) - min(t), "all_ms": t} for t in every)
    return dict(zip(runs, rows, strict=True))


def step(case: Case, loss: Callable[[Case], Any]) -> None:
    case.clear()
    if (value := loss(case)) is not None:
        value.backward()


def attempt(case: Case, loss: Callable[[Case], Any], exact: torch.Tensor, limit: float) -> Row:
    """A contender's error and peak, or why it is not timed."""
    try:
        step(case, loss)
        error = float((case.hs.grad[: len(exact)].double() - exact).norm() / exact.norm())
        case.clear()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() + sum(leaf.nbytes for leaf in case.leaves.values())
        step(case, loss)
        row = {"hidden_gradient_error": error, "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
        return row if error < limit else row | {"not_timed": f"gradient off by {error:.1%}"}
    except Exception as problem:  # not installed, does not fit, does not compile
        return {"not_timed": f"{type(problem).__name__}: {str(problem)[:200]}"}


def compare(case: Case, losses: Losses, rounds: int) -> dict[str, Row]:
    """Rows by contender, the floors among them."""
    exact = importlib.import_module("test_loss").exact_hidden_gradient(case, 32)
    limits = (1e-4, 1e-4) if case.dtype == torch.float32 else (1e-2, 5e-2)  # bf16 logits cost more than bf16 products
    rows = {name: attempt(case, loss, exact, limits[name not in TRITON]) for name, loss in losses.items()}
    able = {name: loss for name, loss in losses.items() if "not_timed" not in rows[name]}
    with gemm.record() as calls:
        step(case, able.get("triton_chunked", partial(ours, engine="torch")))
    runs: dict[str, Callable[[], Any]] = {"floor B": floor(case, calls, whole=False)}
    if case.kind == "projected":
        once = [gemm.Call(call.kind, 2 * case.N, -(-case.V // 128) * 128, case.Hs) for call in calls[:3]]
        with suppress(torch.OutOfMemoryError):
            runs["floor A"] = floor(case, once, whole=True)
    runs |= {name: partial(step, case, loss) for name, loss in able.items()}
    runs |= {f"{name}, forward": partial(torch.no_grad()(able[name]), case) for name in able if name not in PEERS}
    chunks = sum(call.kind == "weight_gradient" for call in calls)
    for name, row in timed(runs, rounds).items():
        operations = useful(case, backward=not name.endswith("forward"))
        row |= {"tflops": operations / row["ms"] / 1e9, "tokens_per_second": 1e3 * case.N / row["ms"]}
        rows[name] = rows.get(name, {}) | row | {"predicted_ms": predicted_ms(case, name, chunks)}
    return rows


def useful(case: Case, *, backward: bool) -> int:
    student = (3 if backward else 1) * case.Hs
    return 2 * case.N * case.V * (student + (student if case.kind == "projected" else case.Ht))


def predicted_ms(case: Case, name: str, chunks: int) -> float | None:
    """The floor; then the bytes of the row kernel and of adding up dW, or Triton's products. None: not predicted."""
    backward = not name.endswith("forward")
    seconds, logits = useful(case, backward=backward) / RATE, useful(case, backward=False)
    if name.startswith("triton_chunked"):
        row_bytes = 8 + backward * (4 if case.kind == "projected" else 2)
        seconds += case.V * (case.N * row_bytes + 12 * backward * chunks * case.Hs) / BANDWIDTH
    elif name.startswith("triton_tiled"):
        seconds += (1 + backward) * logits / TRITON_RATE - logits / RATE
    return 1e3 * seconds if name.startswith(("floor", "triton")) else None


KERNELS = {  # engine's module, launcher, divergence, with gradients, reads of each logit
    "row kernel, 1 read": ("triton_rows", "solve_rows", "forward_kl", False, 1),
    "row kernel, 2 reads": ("triton_rows", "solve_rows", "forward_kl", True, 2),
    "row kernel, 3 reads (jsd)": ("triton_rows", "solve_rows", "jsd", True, 3),
    "statistics kernel": ("triton_tiled", "statistics", "forward_kl", False, 0),
    "gradient kernel, one slab": ("triton_tiled", "slab_gradients", "forward_kl", True, 0),
}


def kernels(case: Case, rounds: int) -> dict[str, Row]:
    """Each kernel alone: the first launch of a run, again with its very arguments. `bytes`: if memory is read once."""
    runs, rows = {}, {}
    for label, (module, launcher, divergence, backward, reads) in KERNELS.items():
        module = importlib.import_module(f"kdfast.engines.{module}")
        loss = partial(ours, engine="triton_chunked" if reads else "triton_tiled", divergence=divergence)
        with mock.patch.object(module, launcher, wraps=getattr(module, launcher)) as launch:
            step(case, loss) if backward else torch.no_grad()(loss)(case)
        arguments, options = launch.call_args_list[0]
        runs[label] = partial(getattr(module, launcher), *arguments, **options)
        written = options["grad_s"] if backward else None
        logits = 2 * (arguments[2].numel() if reads else case.N * case.V if written is None else written.numel())
        moved = logits * (4 * bool(reads) + (0 if written is None else written.element_size()))
        operations = 0 if reads else 2 * logits * case.Hs
        predicted = 1e3 * max(moved / BANDWIDTH, operations / TRITON_RATE)
        rows[label] = {"reads": reads, "bytes": moved, "operations": operations, "predicted_ms": predicted}
    times = timed(runs, rounds).items()
    return {k: rows[k] | row | {"tflops": rows[k]["operations"] / row["ms"] / 1e9} for k, row in times}


def throughput(results: Results, args: argparse.Namespace, kind: str) -> None:
    compiled = torch.compile(eager, dynamic=False, backend="inductor" if CUDA else "eager")
    losses = TRITON | {"torch": partial(ours, engine="torch"), "eager": eager}
    losses |= PEERS if kind == "head" else {"compiled eager": compiled}
    for sizes in [(32, 333, 16, 24)] if args.quick else SIZES[kind]:
        if results.due(name := "N={} V={} Hs={} Ht={}".format(*sizes)):
            torch.compiler.reset()  # or, after some sizes, compiled eager is eager
            case = Case(kind, *sizes, *((torch.bfloat16, "cuda") if CUDA else (torch.float32, "cpu")))
            results.add(name, compare(case, losses, args.rounds))
            if kind == "projected" and not any("not_timed" in results[name][engine] for engine in TRITON):
                results.add(name, results[name] | kernels(case, args.rounds))


def correctness(results: Results, args: argparse.Namespace) -> None:
    """Tests that have passed are not run again."""
    passed = set(results.get("pytest", {}).get("passed", []))
    options = ["-m", "gpu", "-v", "--tb=short", "tests/test_gpu.py", *(f"--deselect={test}" for test in passed)]
    options += ["-n", "2"] if CUDA and util.find_spec("xdist") else []  # most of the time goes to compiling
    row = results.command(sys.executable, "-m", "pytest", *options)
    passed |= {a or b for a, b in re.findall(r"PASSED (tests/\S+)|(tests/\S+) PASSED", row["output"])}
    status = {5: 0}.get(row["status"], row["status"])  # 5: no test was left
    results.add("pytest", row | {"status": status, "passed": sorted(passed)})


def search_commands() -> dict[str, list[str]]:
    """Under KDFAST_AUTOTUNE first launches search, and print rows for the table in kernels/configurations.py."""
    search = ["env", "KDFAST_AUTOTUNE=1", sys.executable]
    full = ["-m", "pytest", "-m", "gpu", "-s", "tests/test_gpu.py", "-k", "same_bits"]  # CE, biases and an anchor
    lean = ["bench/gpu.py", "--part", "engines", "--out", "bench/results/autotuned"]
    return {"full": search + full, "lean": search + lean}


def sanitizer_commands() -> dict[str, list[str]]:
    """Each engine against float64 at a small size, first by itself, to compile. racecheck sees shared memory only."""
    call = "compare('cuda', p, (70, 1000, 64, 96), *two, ['{}'])"
    run = f"from test_gpu import *; [{call} for p in ('bf16', 'fp32') for two in TWO]"
    under = {tool: ["compute-sanitizer", "--error-exitcode", "9", "--tool", tool] for tool in ("memcheck", "racecheck")}
    calls = {engine: [sys.executable, "-c", run.format(engine)] for engine in TRITON}
    return {f"{engine} {tool}": under.get(tool, []) + calls[engine] for engine in TRITON for tool in ("alone", *under)}


def run_commands(results: Results, args: argparse.Namespace, commands: dict[str, list[str]]) -> None:
    for name, command in commands.items():
        if results.due(name):
            results.add(name, results.command(*command))


def show(results: Results) -> bool:
    """Print the tables; whether nothing of ours has failed."""
    fine = True
    columns = ("ms", "spread_ms", "predicted_ms", "tflops", "tokens_per_second", "peak_mib", "hidden_gradient_error")
    for title, rows in results.items():
        print(f"\n{results.path.stem} {title}")
        if "status" in rows:
            fine &= rows["status"] == 0
            print(f"status {rows['status']}\n{rows['output'][-600:]}")
            continue
        print(" " * 33 + "".join(f"{column:>11.9}" for column in columns) + "    floor B")
        for name, row in rows.items():
            fine &= not (name in TRITON and "not_timed" in row)
            cells = "".join(f"{row[c]:11.4g}" if row.get(c) else " " * 11 for c in columns)
            share = f"{rows['floor B']['ms'] / row['ms']:11.0%}" if "peak_mib" in row and "ms" in row else ""
            print(f"{name:<33}{cells}{share} {row.get('not_timed', '')}")
    return fine


def main() -> int:
    parts = {"correctness": correctness}
    parts |= {name: partial(throughput, kind=kind) for name, kind in (("engines", "projected"), ("peers", "head"))}
    commands = {"sanitizer": sanitizer_commands(), "autotune": search_commands()}
    parts |= {name: partial(run_commands, commands=commands[name]) for name in commands}
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
