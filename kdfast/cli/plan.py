"""`kdfast plan`: the memory that a loss will need with each engine, before it runs."""

from __future__ import annotations

import argparse
import json
import os
import re
from math import inf
from typing import Any

import torch

from kdfast.cli.errors import UserError
from kdfast.plan import METHODS, Shape, largest_tokens, total_bytes
from kdfast.plan.memory import fitting_portion, portion
from kdfast.plan.models import Model, describe
from kdfast.plan.price import price_per_token

UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "mb": 10**6, "gb": 10**9}
KINDS = {
    "projected": "a teacher {:,} wide through a projector",
    "head": "a teacher {:,} wide with its own head",
    "none": "no teacher",
}
NOTES = """
Predictions; none has been measured on a GPU yet. peak: the highest live bytes of one forward and backward above inputs
and gradients. total: with both. Not counted: the models' activations, which take far more per token than the loss;
models that aren't named; workspace of the matrix library, fragmentation, NCCL, the CUDA context.
More: docs/performance.md"""


def add_arguments(parser: argparse.ArgumentParser, dtypes: tuple[str, ...]) -> None:
    parser.add_argument(
        "--student", metavar="MODEL", help="student, a hub name or folder: its sizes and memory are read"
    )
    parser.add_argument("--teacher", metavar="MODEL", help="the same for the teacher")
    parser.add_argument(
        "--student-width", type=int, metavar="Hs", help="the student's hidden size, in place of --student"
    )
    parser.add_argument(
        "--teacher-width", type=int, metavar="Ht", help="the teacher's, in place of --teacher; with neither, no teacher"
    )
    parser.add_argument("--vocab", type=int, metavar="V", help="size of the vocabulary, with --student-width")
    kind = "teacher's logits by a projector and the student's head, or by its own head (default: %(default)s)"
    parser.add_argument("--kind", choices=("projected", "head"), default="projected", help=kind)
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens per step (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=dtypes, default="bfloat16", help="dtype of the loss's inputs (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="a GPU, or a CPU (default: %(default)s)"
    )
    parser.add_argument("--memory", metavar="SIZE", help="the device's memory, such as 24GiB: say what fits in it")
    parser.add_argument(
        "--resident", default="0", metavar="SIZE", help="memory already in use there (default: %(default)s)"
    )
    scratch = "fused_kd_loss's scratch_bytes (default: the engine's)"
    state = "optimizer state per parameter (default: %(default)s, AdamW's)"
    parser.add_argument("--scratch-bytes", type=int, default=0, metavar="BYTES", help=scratch)
    parser.add_argument("--optimizer-bytes", type=int, default=8, metavar="BYTES", help=state)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")


def plan(**options: Any) -> int:
    """Print the table and advice; return the exit code. Options are those that `add_arguments` declares."""
    args = argparse.Namespace(**options)
    try:
        memory = parse_size("--memory", args.memory) if args.memory else None
        student, teacher = _models(args)
        widths = (student.width, 0 if teacher is None else teacher.width)
        kind: Any = "none" if teacher is None else args.kind
        dtype = getattr(torch, args.dtype)
        valid = _valid_vocab(args, student, teacher) if args.teacher and teacher else None
        shape = Shape(args.tokens, student.vocab, *widths, dtype, args.device, kind, args.scratch_bytes)
        resident = _resident(args, student, teacher)
    except ValueError as error:
        raise UserError(f"plan: {error}") from error
    left = None if memory is None else max(0, memory - sum(resident.values()))
    methods = []
    for name in METHODS:
        if (total := total_bytes(name, shape)) is not None:
            most = None if left is None else largest_tokens(name, shape, left)
            peak = total - shape.inputs - shape.gradients
            methods.append({"method": name, "peak_bytes": peak, "total_bytes": total, "largest_tokens": most})
    own, fitting = portion(shape), fitting_portion(shape, inf if left is None else left)
    found = {
        "shape": {**vars(shape), "dtype": args.dtype},
        "teacher_vocab": None if teacher is None else teacher.vocab,
        "valid_vocab": valid,
        "inputs_bytes": shape.inputs,
        "gradients_bytes": shape.gradients,
        "memory_bytes": memory,
        "resident": resident,
        "times_lm_only": _prices(student, teacher),
        "left_bytes": left,
        "methods": methods,
        "auto": own.engine,
        "portion": vars(own),
        "fitting": fitting and vars(fitting),
        "measured": False,
    }
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 0


def _models(args: argparse.Namespace) -> tuple[Model, Model | None]:
    """Return student and teacher by name, or by their widths, without parameters. Raise ValueError for neither."""
    widths = {name: getattr(args, name) for name in ("student_width", "vocab", "teacher_width")}
    if args.student is not None and set(widths.values()) == {None}:
        student = describe(args.student, "--student")
        return student, None if args.teacher is None else describe(args.teacher, "--teacher")
    if args.student is not None or args.teacher is not None or None in (args.student_width, args.vocab):
        given = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in widths.items())
        raise ValueError(
            f"--student {args.student}, --teacher {args.teacher}, {given}; expected one or the other: models by "
            "name, or all of --student-width 768 --vocab 50257 and, with a teacher, --teacher-width 1024"
        )
    teacher = None if args.teacher_width is None else Model(args.teacher_width, args.vocab)
    return Model(args.student_width, args.vocab), teacher


def _prices(student: Model, teacher: Model | None) -> dict[str, float]:
    """Return {recipe: cost of training on a token, relative to LM only} for two models by name."""
    if student.size is None or teacher is None or teacher.size is None:
        return {}
    from kdfast.training.recipes import RECIPES

    names = ("cached", "compressed_head", "teacher_head", "projector")
    rank = min(student.width, teacher.width)
    return {name: price_per_token(RECIPES[name], student.size, teacher.size, rank=rank).ratio for name in names}


def _valid_vocab(args: argparse.Namespace, student: Model, teacher: Model) -> int | None:
    """Return the number of ids of one tokenizer that two heads pad differently; None if they do not, or if unknown."""
    from kdfast.training.data.tokenizers import own_tokenizer, shared_ids

    ours, theirs = (own_tokenizer(os.path.expanduser(name), local=False) for name in (args.student, args.teacher))
    ids = shared_ids("--teacher", ours, theirs, min(student.vocab, teacher.vocab))
    return None if teacher.vocab == student.vocab else ids


def _resident(args: argparse.Namespace, student: Model, teacher: Model | None) -> dict[str, int]:
    """Return {what else is on the device: bytes}, as Trainer keeps it with bf16=True."""
    if args.optimizer_bytes < 0:
        raise ValueError(f"--optimizer-bytes {args.optimizer_bytes}; expected bytes per parameter, 0 or more")
    resident = {
        "given with --resident": parse_size("--resident", args.resident),
        "student's parameters, fp32": 4 * student.parameters,
        "their gradients, fp32": 4 * student.parameters,
        "optimizer state": args.optimizer_bytes * student.parameters,
    }
    if teacher is not None:
        # an untied head is an input of the loss, counted there
        head = teacher.width * teacher.vocab if args.kind == "head" and not teacher.head_tied else 0
        resident["teacher's parameters, 16 bits"] = max(0, 2 * (teacher.parameters - head))
    return {what: size for what, size in resident.items() if size}


def parse_size(argument: str, text: str) -> int:
    """Return the number of bytes in "24GiB", "24G", "512 MiB" or "1e9". G is GiB, GB is 10⁹."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    unit = match and (match[2] + "ib" if match[2] in ("k", "m", "g", "t") else match[2])
    size = float(match[1]) * UNITS.get(unit or "", inf) if match else inf
    if not size < inf or (not unit and 0 < size < 2**20):  # "80" means 80 GB
        raise ValueError(f"{argument} {text!r}; expected a number and a unit, such as 24GiB, 512MiB or 80GB")
    return int(size)


def _text(found: dict[str, Any]) -> str:
    """Return the table and advice as text."""
    x, own, fitting, left = found["shape"], found["portion"], found["fitting"], found["left_bytes"]
    teacher = KINDS[x["teacher"]].format(x["teacher_width"])
    lines = [
        f"{x['tokens']:,} tokens, a vocabulary of {x['vocab']:,}, a student {x['student_width']:,} wide, {teacher}; "
        f"{x['dtype']} on {x['device']}",
        f"inputs {_size(found['inputs_bytes'])}, gradients {_size(found['gradients_bytes'])}",
        *(f"{what}: {_size(size)}" for what, size in found["resident"].items()),
    ]
    if prices := ", ".join(f"{name} {times:.2f}" for name, times in found["times_lm_only"].items()):
        rank = min(x["student_width"], x["teacher_width"])
        lines.append(f"operations of training on a token, times LM only's: {prices} (compressed at rank {rank})")
    if found["teacher_vocab"] not in (None, x["vocab"]):
        valid, theirs = found["valid_vocab"], found["teacher_vocab"]
        known = f"valid_vocab={valid}, their tokenizer's ids" if valid else "valid_vocab, if they have one tokenizer"
        lines.append(f"the teacher's head has {theirs} rows: planned for the student's; a run takes {known}")
    largest = "" if left is None else f"   most tokens in {_size(found['memory_bytes'])}"
    lines.append(f"\n{'':16}{'peak':>11}{'total':>11}{largest}")
    width = len(largest)
    for row in found["methods"]:
        largest = "" if left is None else f"{row['largest_tokens']:{width},}"
        lines.append(f"{row['method']:16}{_size(row['peak_bytes']):>11}{_size(row['total_bytes']):>11}{largest}")
    scratch = f"{_size(own['scratch_bytes'])} of scratch" if own["scratch_bytes"] else "the default scratch"
    lines.append(f"\nauto takes {_divided(own)} with {scratch}, {_size(own['total_bytes'])} in all.")
    if fitting is None:
        lines.append(f"{x['tokens']:,} tokens do not fit in the {_size(left)} that are left, whatever the scratch: "
                     "take fewer tokens per step (gradient accumulation).")  # fmt: skip
    elif fitting != own:
        lines.append(f"It does not fit. KDFAST_SCRATCH_BYTES={fitting['scratch_bytes']} (or scratch_bytes=) makes it "
                     f"{_size(fitting['total_bytes'])}: {_divided(fitting)}.")  # fmt: skip
    elif left is not None:
        lines.append("It fits as it is: KDFAST_SCRATCH_BYTES need not be set.")
    return "\n".join((*lines, NOTES))


def _divided(found: dict[str, Any]) -> str:
    what = "slab" if found["engine"] == "triton_tiled" else "chunk"
    return f"{found['engine']}: {found['passes']} {what}{'' if found['passes'] == 1 else 's'}"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
