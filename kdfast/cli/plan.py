"""`kdfast plan`: what a loss will take, by method, before it is run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from dataclasses import dataclass
from typing import Any

import torch

from kdfast.cli.errors import UserError
from kdfast.plan import METHODS, Gpu, Shape, get_gpu, largest_tokens, operations, peak_bytes, predicted_seconds
from kdfast.plan.advice import Portion, fitting_portion, larger_portions, least_scratch, portion

UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "mb": 10**6, "gb": 10**9}
NOTES = """\
Predictions; no method has been measured on a GPU yet. Peak: the highest live bytes of one forward and backward above
inputs and gradients, a formula for each method, {held}.
* an estimate, see docs/planning.md. total: with inputs and gradients. largest N: where the total, and what else is
resident, fits. u(H) = 2·N·V·H operations. {time}
Not counted: cuBLAS workspace, fragmentation, NCCL buffers, the CUDA context. More: docs/planning.md"""
TIME = """Time: operations at {products:.0f} TFLOP/s, and the row work's
bytes at {copies:.2f} TB/s or its instructions; nothing overlaps, no launch gaps. {source}."""


@dataclass(frozen=True)
class Resident:
    """What lives on the device besides the loss: (what, bytes), and bytes that each token adds."""

    parts: list[tuple[str, int]]
    bytes_per_token: int
    note: str = ""

    @property
    def total(self) -> int:
        return sum(size for _, size in self.parts)


def add_arguments(parser: argparse.ArgumentParser, dtypes: tuple[str, ...]) -> None:
    parser.add_argument("--student", metavar="MODEL", help="hub name or folder: width, vocabulary and memory from it")
    parser.add_argument("--teacher", metavar="MODEL", help="the same of the teacher")
    parser.add_argument("--student-width", type=int, metavar="Hs", help="instead of --student")
    parser.add_argument("--teacher-width", type=int, metavar="Ht", help="instead of --teacher; neither: no teacher")
    parser.add_argument("--vocab", type=int, metavar="V", help="with --student-width")
    kind = "the teacher's logits: through a projector and the student's head, or its own head (default: %(default)s)"
    parser.add_argument("--kind", choices=("projected", "head"), default="projected", help=kind)
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="a step (default: %(default)s)")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="in the loss (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="any GPU, or a CPU")
    parser.add_argument("--gpu", help="a known one, such as H200, A100-80GB, RTX-4090: its memory, and times")
    parser.add_argument("--memory", metavar="SIZE", help="such as 24GiB (default: the GPU's)")
    parser.add_argument("--resident", default="0", metavar="SIZE", help="what else lives there (default: %(default)s)")
    parser.add_argument("--scratch-bytes", type=int, default=0, help="as in fused_kd_loss (default: the engine's)")
    models = parser.add_argument_group("with --student, for what else lives on the device")
    models.add_argument("--optimizer-bytes", type=int, default=8, help="a parameter: 8 = AdamW (default: %(default)s)")
    models.add_argument("--sequence-length", type=int, default=1024, help="of activations (default: %(default)s)")
    models.add_argument("--gradient-checkpointing", action="store_true", help="keep the layers' inputs alone")
    parser.add_argument("--json", action="store_true", help="the same for machines")


def plan(args: argparse.Namespace) -> int:
    if args.optimizer_bytes < 0 or args.sequence_length < 1:
        raise UserError(
            f"plan: --optimizer-bytes {args.optimizer_bytes}, --sequence-length {args.sequence_length}; expected bytes "
            "of optimizer state a parameter (0 or more), and a positive number of tokens"
        )
    try:
        gpu = None if args.gpu is None else get_gpu(args.gpu)
    except ValueError as error:
        raise UserError(f"plan: --{str(error).replace('=', ' ', 1)}, or give --memory alone") from error
    if gpu is not None and args.device == "cpu":
        raise UserError(f"plan: --gpu {args.gpu} with --device cpu; expected one of them: leave --gpu out")
    memory = parse_size("--memory", args.memory) if args.memory else int(gpu.memory_gib * 2**30) if gpu else None
    shape, resident = _problem(args)
    available = None if memory is None else memory - resident.total
    rows = [_row(name, shape, gpu, available, resident.bytes_per_token) for name in METHODS]
    rows = [row for row in rows if row["peak_bytes"] is not None]
    own = portion(shape)
    found: dict[str, Any] = {
        "shape": {**vars(shape), "dtype": args.dtype},
        "inputs_bytes": shape.inputs,
        "gradients_bytes": shape.gradients,
        "gpu": None if gpu is None else vars(gpu),
        "memory_bytes": memory,
        "resident": dict(resident.parts),
        "resident_bytes_per_token": resident.bytes_per_token,
        "methods": rows,
        "auto": own.engine,
        "portion": vars(own),
        "measured": False,
    }
    advice, details = _advice(shape, None if available is None else available - shape.tokens * resident.bytes_per_token)
    if args.json:
        print(json.dumps(found | details, indent=1))
        return 0
    _print(found, rows, gpu, resident)
    print(advice)
    held = "held against PyTorch's allocations and the resident set on a CPU" if shape.device == "cpu" else (
        "held against what the same code allocates without one"
    )  # fmt: skip
    time = TIME.format(products=gpu.products / 1e12, copies=gpu.copies / 1e12, source=gpu.source) if gpu else ""
    print("\n" + NOTES.format(held=held, time=time or "Times are predicted with --gpu."))
    return 0


def parse_size(argument: str, text: str) -> int:
    """ "24GiB", "24G", "512 MiB", "1e9" → bytes. G is GiB, GB is 10⁹."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    unit = match and (match[2] + "ib" if match[2] in ("k", "m", "g", "t") else match[2])
    if match is None or unit not in UNITS:
        raise UserError(f"plan: {argument} {text!r}; expected a number and a unit, such as 24GiB, 512MiB or 80GB")
    return int(float(match[1]) * UNITS[unit])


def _problem(args: argparse.Namespace) -> tuple[Shape, Resident]:
    """From models' names, or from widths."""
    widths = [args.student_width, args.teacher_width, args.vocab]
    parts = [("given with --resident", parse_size("--resident", args.resident))]
    per_token, note = 0, ""
    if args.student is None:
        if args.student_width is None or args.vocab is None:
            raise UserError(
                f"plan: --student-width {args.student_width}, --vocab {args.vocab}; expected both, or --student "
                "MODEL, such as --student-width 768 --vocab 50257 --teacher-width 1024"
            )
        if args.teacher is not None:
            raise UserError(f"plan: --teacher {args.teacher} with --student-width; expected --teacher-width beside it")
    else:
        if any(width is not None for width in widths):
            raise UserError(
                "plan: --student with --student-width, --teacher-width or --vocab; expected one or the other"
            )
        student, teacher = _models(args)
        widths = [student.width, None if teacher is None else teacher.width, student.vocab]
        parts += [
            ("student's parameters, fp32", 4 * student.parameters),
            ("their gradients, fp32", 4 * student.parameters),
            ("optimizer state", args.optimizer_bytes * student.parameters),
            ("autocast's copies of weights", student.autocast_bytes),
        ]
        if teacher is not None:
            size = teacher.parameters
            if args.kind == "head" and not teacher.head_tied:  # an input of the loss, counted there
                size -= teacher.width * teacher.vocab
            parts.append(("teacher's parameters, 16 bits", 2 * size))
            if teacher.vocab != student.vocab:
                note = (
                    f"the teacher's vocabulary is {teacher.vocab}: planned for the student's, as vocab='truncate' does"
                )
        per_token = student.activation_bytes
    try:
        shape = Shape(
            tokens=args.tokens,
            vocab=widths[2],
            student_width=widths[0],
            teacher_width=widths[1] or 0,
            dtype=getattr(torch, args.dtype),
            device=args.device,
            teacher="none" if widths[1] is None else args.kind,
            scratch_bytes=args.scratch_bytes,
        )
    except ValueError as error:
        raise UserError(f"plan: {error}") from error
    return shape, Resident([part for part in parts if part[1]], per_token, note)


def _models(args: argparse.Namespace) -> tuple[Any, Any]:
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "plan: --student needs transformers: pip install 'kdfast[train]', or give --student-width, "
            "--teacher-width and --vocab"
        )
    from kdfast.plan.models import describe

    try:
        student = describe(
            args.student, "--student", sequence_length=args.sequence_length, checkpointing=args.gradient_checkpointing
        )
        return student, None if args.teacher is None else describe(args.teacher, "--teacher")
    except ValueError as error:
        raise UserError(f"plan: {error}") from error


def _row(name: str, shape: Shape, gpu: Gpu | None, available: int | None, per_token: int) -> dict[str, Any]:
    peak = peak_bytes(name, shape)
    fits = None
    if peak is not None and available is not None:
        fits = largest_tokens(name, shape, available, bytes_per_token=per_token)
    return {
        "method": name,
        "label": METHODS[name].label,
        "peak_bytes": peak,
        "total_bytes": None if peak is None else peak + shape.inputs + shape.gradients,
        "largest_tokens": fits,
        "operations": str(operations(name, shape)),
        "seconds": None if gpu is None else predicted_seconds(name, shape, gpu),
        "how": METHODS[name].how,
        "estimate": METHODS[name].estimate,
    }


def _print(found: dict[str, Any], rows: list[dict[str, Any]], gpu: Gpu | None, resident: Resident) -> None:
    x = found["shape"]
    teacher = {"projected": f"Ht={x['teacher_width']}, projected", "head": f"Ht={x['teacher_width']}, its own head",
               "none": "no teacher"}[x["teacher"]]  # fmt: skip
    print(f"N={x['tokens']} V={x['vocab']} Hs={x['student_width']} {teacher}, {x['dtype']} on {x['device']}")
    print(f"inputs {_size(found['inputs_bytes'])}, gradients {_size(found['gradients_bytes'])}")
    if resident.note:
        print(resident.note)
    for what, size in resident.parts:
        print(f"{what}: {_size(size)}")
    if resident.bytes_per_token:
        activations = x["tokens"] * resident.bytes_per_token
        print(f"student's activations: {_size(activations)}, {resident.bytes_per_token / 1024:.0f} KiB a token")
    memory = found["memory_bytes"]
    fits = "" if memory is None else f"{'largest N':>12}"
    print(
        f"\n{'':29}{'peak':>11}{'total':>11}{fits}  {'operations':16}{'time':>9}" + (f" on {gpu.name}" if gpu else "")
    )
    for row in rows:
        most = "" if memory is None else f"{row['largest_tokens']:12}"
        time = "-" if row["seconds"] is None else f"{1e3 * row['seconds']:.1f} ms"
        label = row["label"] + " *" * row["estimate"]
        print(f"{label:29}{_size(row['peak_bytes']):>11}{_size(row['total_bytes']):>11}{most}  "
              f"{row['operations']:16}{time:>9}")  # fmt: skip
    if memory is not None:
        print(f"{'':29}{'':22}{'of ' + _size(memory):>12}")


def _advice(shape: Shape, available: int | None) -> tuple[str, dict[str, Any]]:
    """Which engine, with which scratch: text, and the same for machines. available: for this N."""
    now = portion(shape)
    of = {"triton_tiled": "slabs"}.get(now.engine, "chunks")
    lines = [f"\nauto takes {now.engine}: {now.passes} {of} with {_scratch(now)}, {_size(now.total_bytes)} in all."]
    details: dict[str, Any] = {"fitting": None, "larger": []}
    fitting = now if available is None else fitting_portion(shape, available)
    if available is not None and fitting is None:
        lines.append(f"N={shape.tokens} does not fit in the {_size(max(0, available))} that are left, whatever scratch "
                     "it gets: take fewer tokens a step (gradient accumulation).")  # fmt: skip
    elif fitting is not None and fitting != now:
        lines.append(f"It does not fit. KDFAST_SCRATCH_BYTES={fitting.scratch_bytes} (or scratch_bytes=) makes it "
                     f"{_size(fitting.total_bytes)}: {fitting.engine}, {_passes(fitting.passes)}.")  # fmt: skip
    elif available is not None:
        lines.append("It fits as it is: KDFAST_SCRATCH_BYTES need not be set.")
    if fitting is not None:
        details["fitting"] = vars(fitting)
    if fitting == now and now.engine != "triton_tiled":
        larger = larger_portions(shape, available if available is not None else 1 << 60)
        details["larger"] = [vars(one) for one in larger]
        lines += [f"KDFAST_SCRATCH_BYTES={one.scratch_bytes} would buy {_passes(one.passes)} over dW in place of "
                  f"{now.passes}, for {_size(one.total_bytes)}." for one in larger]  # fmt: skip
    if shape.device != "cpu" and now.engine == "triton_chunked":
        lines.append(f"Below {least_scratch(shape)} bytes of scratch auto changes to triton_tiled.")
    return "\n".join(lines), details


def _passes(count: int) -> str:
    return "1 pass" if count == 1 else f"{count} passes"


def _scratch(one: Portion) -> str:
    return f"{_size(one.scratch_bytes)} of scratch" if one.scratch_bytes else "the default scratch"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
