"""`kdfast plan`: the memory a loss will take with each engine, before it is run."""

from __future__ import annotations

import argparse
import json
import re
from math import inf
from typing import Any

import torch

from kdfast.cli.errors import UserError
from kdfast.plan import METHODS, Shape, largest_tokens, total_bytes
from kdfast.plan.advice import Portion, fitting_portion, larger_portions, portion
from kdfast.plan.models import Model, describe

UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "mb": 10**6, "gb": 10**9}
NOTES = """
Predictions; none has been measured on a GPU yet. Peak: the highest live bytes of one forward and backward above inputs
and gradients, a formula for each method, held against what the same code allocates without one. total: with inputs and
gradients. largest N: where the total, and what else is resident, fits. Not counted: workspace of the matrix library,
fragmentation, NCCL buffers, the CUDA context. More: docs/planning.md"""


def add_arguments(parser: argparse.ArgumentParser, dtypes: tuple[str, ...]) -> None:
    parser.add_argument("--student", metavar="MODEL", help="hub name or folder: width, vocabulary and memory from it")
    parser.add_argument("--teacher", metavar="MODEL", help="the same of the teacher")
    parser.add_argument("--student-width", type=int, metavar="Hs", help="instead of --student")
    parser.add_argument("--teacher-width", type=int, metavar="Ht", help="instead of --teacher; neither: no teacher")
    parser.add_argument("--vocab", type=int, metavar="V", help="with --student-width")
    kind = "the teacher's logits: through a projector and the student's head, or its own head (default: %(default)s)"
    parser.add_argument("--kind", choices=("projected", "head"), default="projected", help=kind)
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="per step (default: %(default)s)")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="in the loss (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="any GPU, or a CPU")
    parser.add_argument("--memory", metavar="SIZE", help="of the device, such as 24GiB: what fits, and how")
    parser.add_argument("--resident", default="0", metavar="SIZE", help="what else lives there (default: %(default)s)")
    parser.add_argument("--scratch-bytes", type=int, default=0, help="as in fused_kd_loss (default: the engine's)")
    models = parser.add_argument_group("with --student, for what else lives on the device")
    models.add_argument("--optimizer-bytes", type=int, default=8, help="per parameter (default: %(default)s, AdamW)")
    models.add_argument("--sequence-length", type=int, default=1024, help="of activations (default: %(default)s)")
    models.add_argument("--gradient-checkpointing", action="store_true", help="keep the layers' inputs alone")
    parser.add_argument("--json", action="store_true", help="the same for machines")


def plan(**options: Any) -> int:
    """Print the table and the advice; return the exit code. Takes what `add_arguments` declares."""
    args = argparse.Namespace(**options)
    if args.optimizer_bytes < 0 or args.sequence_length < 1:
        raise UserError(
            f"plan: --optimizer-bytes {args.optimizer_bytes}, --sequence-length {args.sequence_length}; expected bytes "
            "of optimizer state a parameter (0 or more), and a positive number of tokens"
        )
    memory = parse_size("--memory", args.memory) if args.memory else None
    shape, resident, per_token, note = _problem(args)
    left = None if memory is None else memory - sum(resident.values())
    methods = []
    for name in METHODS:
        if (total := total_bytes(name, shape)) is not None:
            most = None if left is None else largest_tokens(name, shape, left, bytes_per_token=per_token)
            peak = total - shape.inputs - shape.gradients
            methods.append({"method": name, "peak_bytes": peak, "total_bytes": total, "largest_tokens": most})
    own = portion(shape)
    available = 1 << 100 if left is None else left - shape.tokens * per_token
    fitting = fitting_portion(shape, available)
    larger = larger_portions(shape, available) if fitting == own and own.engine != "triton_tiled" else []
    found = {
        "shape": {**vars(shape), "dtype": args.dtype},
        "inputs_bytes": shape.inputs,
        "gradients_bytes": shape.gradients,
        "memory_bytes": memory,
        "resident": resident,
        "resident_bytes_per_token": per_token,
        "methods": methods,
        "auto": own.engine,
        "portion": vars(own),
        "fitting": fitting and vars(fitting),
        "larger": [vars(one) for one in larger],
        "measured": False,
    }
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found, note)
        print("\n" + "\n".join(_advice(shape.tokens, own, fitting, larger, None if memory is None else available)))
        print(NOTES)
    return 0


def _print(found: dict[str, Any], note: str) -> None:
    """Print the table."""
    x, memory, per_token = found["shape"], found["memory_bytes"], found["resident_bytes_per_token"]
    kind = {"projected": "Ht={}, projected", "head": "Ht={}, its own head", "none": "no teacher"}[x["teacher"]]
    width = kind.format(x["teacher_width"])
    print(f"N={x['tokens']} V={x['vocab']} Hs={x['student_width']} {width}, {x['dtype']} on {x['device']}")
    print(f"inputs {_size(found['inputs_bytes'])}, gradients {_size(found['gradients_bytes'])}{note}")
    for what, size in found["resident"].items():
        print(f"{what}: {_size(size)}")
    if per_token:
        print(f"student's activations: {_size(x['tokens'] * per_token)}, {per_token / 1024:.0f} KiB per token")
    print(f"\n{'':16}{'peak':>11}{'total':>11}" + ("" if memory is None else f"{'largest N':>12} of {_size(memory)}"))
    for row in found["methods"]:
        fits = "" if memory is None else f"{row['largest_tokens']:12}"
        print(f"{row['method']:16}{_size(row['peak_bytes']):>11}{_size(row['total_bytes']):>11}{fits}")


def parse_size(argument: str, text: str) -> int:
    """Return the bytes of "24GiB", "24G", "512 MiB" or "1e9". G is GiB, GB is 10⁹."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    unit = match and (match[2] + "ib" if match[2] in ("k", "m", "g", "t") else match[2])
    size = float(match[1]) * UNITS.get(unit or "", inf) if match else inf
    if not size < inf:
        raise UserError(f"plan: {argument} {text!r}; expected a number and a unit, such as 24GiB, 512MiB or 80GB")
    return int(size)


def _problem(args: argparse.Namespace) -> tuple[Shape, dict[str, int], int, str]:
    """Return the shape, {what else is resident: bytes}, bytes that each token adds, and a note."""
    student, teacher = _models(args)
    resident = {
        "given with --resident": parse_size("--resident", args.resident),
        "student's parameters, fp32": 4 * student.parameters,
        "their gradients, fp32": 4 * student.parameters,
        "optimizer state": args.optimizer_bytes * student.parameters,
        "autocast's copies of weights": student.autocast_bytes,
    }
    note = ""
    if teacher is not None:
        # a head of its own is an input of the loss, counted there
        head = teacher.width * teacher.vocab if args.kind == "head" and not teacher.head_tied else 0
        resident["teacher's parameters, 16 bits"] = 2 * (teacher.parameters - head)
        if teacher.vocab != student.vocab:
            note = f"\nthe teacher's vocabulary is {teacher.vocab}: planned for the student's (vocab='truncate')"
    try:
        shape = Shape(
            tokens=args.tokens,
            vocab=student.vocab,
            student_width=student.width,
            teacher_width=0 if teacher is None else teacher.width,
            dtype=getattr(torch, args.dtype),
            device=args.device,
            teacher="none" if teacher is None else args.kind,
            scratch_bytes=args.scratch_bytes,
        )
    except ValueError as error:
        raise UserError(f"plan: {error}") from error
    return shape, {what: size for what, size in resident.items() if size > 0}, student.activation_bytes, note


def _models(args: argparse.Namespace) -> tuple[Model, Model | None]:
    """Return student and teacher, by name; or by their widths, of no parameters."""
    widths = (args.student_width, args.teacher_width, args.vocab)
    if args.student is None:
        if args.student_width is None or args.vocab is None:
            raise UserError(
                f"plan: --student-width {args.student_width}, --vocab {args.vocab}; expected both, or --student "
                "MODEL, such as --student-width 768 --vocab 50257 --teacher-width 1024"
            )
        if args.teacher is not None:
            raise UserError(f"plan: --teacher {args.teacher} with --student-width; expected --teacher-width beside it")
        teacher = None if args.teacher_width is None else Model(args.teacher_width, args.vocab)
        return Model(args.student_width, args.vocab), teacher
    if any(width is not None for width in widths):
        raise UserError("plan: --student with --student-width, --teacher-width or --vocab; expected one or the other")
    kept = {"sequence_length": args.sequence_length, "checkpointing": args.gradient_checkpointing}
    try:
        student = describe(args.student, "--student", **kept)
        return student, None if args.teacher is None else describe(args.teacher, "--teacher")
    except ModuleNotFoundError as error:
        raise UserError(
            "plan: --student needs transformers: pip install 'kdfast[train]', or give --student-width, "
            "--teacher-width and --vocab"
        ) from error
    except ValueError as error:
        raise UserError(f"plan: {error}") from error


def _advice(
    tokens: int, own: Portion, fitting: Portion | None, larger: list[Portion], available: int | None
) -> list[str]:
    """Say which engine `auto` takes, and with which scratch N fits. available: bytes for this N, None = not known."""
    of = "slabs" if own.engine == "triton_tiled" else "chunks"
    scratch = f"{_size(own.scratch_bytes)} of scratch" if own.scratch_bytes else "the default scratch"
    lines = [f"auto takes {own.engine}: {own.passes} {of} with {scratch}, {_size(own.total_bytes)} in all."]
    if fitting is None:
        lines.append(f"N={tokens} does not fit in the {_size(max(0, available or 0))} that are left, whatever "
                     "scratch it gets: take fewer tokens a step (gradient accumulation).")  # fmt: skip
    elif fitting != own:
        lines.append(f"It does not fit. KDFAST_SCRATCH_BYTES={fitting.scratch_bytes} (or scratch_bytes=) makes it "
                     f"{_size(fitting.total_bytes)}: {fitting.engine}, {_passes(fitting.passes)}.")  # fmt: skip
    elif available is not None:
        lines.append("It fits as it is: KDFAST_SCRATCH_BYTES need not be set.")
    lines += [f"KDFAST_SCRATCH_BYTES={one.scratch_bytes} would buy {_passes(one.passes)} over dW in place of "
              f"{own.passes}, for {_size(one.total_bytes)}." for one in larger]  # fmt: skip
    return lines


def _passes(count: int) -> str:
    return "1 pass" if count == 1 else f"{count} passes"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
