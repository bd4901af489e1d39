"""`fused_kd_loss` with random arguments, right ones and wrong ones.

Right: a problem of tests/helpers/problems.py, which every engine has to solve as tests/helpers/agree.py demands, the reference engine
as tests/helpers/oracle.py, which shares no code with it. Wrong: one or two arguments of such a problem replaced by something
else, or spoiled; that must be a ValueError or TypeError that names an argument. Where it is taken it must mean
something: then it is in `MEANT`, and the engine has to give what the reference gives.
"""

# ruff: noqa: E501  (tables)

import random
import re
import warnings
from collections import namedtuple
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agree import agree
from fuzz.outcome import Finding, Outcome
from problems import F64, Problem, a_problem
from torch import Tensor

import kdfast
from kdfast import Head, Logits, Projected, SparseLogits, fused_kd_loss
from kdfast.inputs import Options

ROOT = Path(kdfast.__file__).parents[1]
ENGINES = {"torch": 12, "reference": 8, "triton_chunked": 1, "triton_tiled": 1}  # how often
SHARE_WRONG = 0.6
SOURCES = Head | Projected | Logits | SparseLogits
TINY, HUGE = 2.0**-126, 3.4e38  # of float32
NUMBERS = ("temperature", "kd_weight", "ce_weight", "anchor_weight", "num_items_in_batch")
FLAGS = ("return_metrics", "temperature_squared", "tempered")
TENSORS = ("hidden", "weight", "bias", "projector_weight", "projector_bias", "logits", "indices", "log_probs", "log_tail", "labels",
           "token_weights", "kd_token_weights", "anchor_targets", "kd_vocab_mask")  # fmt: skip
NAMES = [*(f.name for cls in (Head, Projected, Logits, SparseLogits) for f in fields(cls)), *Options.names(),
         "student", "teacher", "labels"]  # fmt: skip
Pair = namedtuple("Pair", "a b")

JUNK: dict[str, Any] = {
    "None": None, "True": True, "False": False, "0": 0, "1": 1, "-1": -1, "3": 3, "2**31": 2**31, "2**63": 2**63,
    "-2**70": -(2**70), "10**400": 10**400, "0.5": 0.5, "-0.5": -0.5, "1e-300": 1e-300, "1e300": 1e300,
    "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "1j": 1j, "''": "", "'2'": "2", "'mean'": "mean",
    "'none'": "none", "b''": b"x", "[]": [], "[1.0]": [1.0], "(2,)": (2,), "{}": {}, "object": object(),
    "Fraction": Fraction(1, 2), "Decimal": Decimal("0.5"), "np.float32": np.float32(0.5), "np.int64": np.int64(2),
    "np.bool": np.bool_(True), "np.nan": np.float64("nan"), "np.array": np.ones(3), "np.array 0-d": np.array(0.5),
    "0-d": torch.tensor(0.5), "0-d int": torch.tensor(2), "0-d bool": torch.tensor(True), "0-d nan": torch.tensor(torch.nan),
    "0-d negative": torch.tensor(-1.0), "0-d complex": torch.tensor(1j), "0-d meta": torch.ones((), device="meta"),
    "0-d grad": torch.tensor(0.5, requires_grad=True), "(1,)": torch.ones(1), "(0,)": torch.ones(0),
    "(1, 1)": torch.ones(1, 1), "parameter": torch.nn.Parameter(torch.ones(2, 3)), "type": float, "module": torch.nn.Linear(2, 3),
    "dtype": torch.float32, "device": torch.device("cpu"), "size": torch.Size([2]), "range": range(3), "lambda": len,
    "slice": slice(None), "pair": Pair(1, 2), "Logits": Logits(torch.ones(1, 3)), "Head of None": Head(None, None),  # type: ignore[arg-type]
    "fp8": torch.ones(2, 3).to(torch.float8_e4m3fn), "uint16": torch.ones(2, 3, dtype=torch.uint16),
}  # fmt: skip
SPOILED = {
    "row less": lambda t: t[1:], "column less": lambda t: t[..., 1:], "row more": lambda t: torch.cat([t, t[:1]]),
    "dim more": lambda t: t[None], "dim last": lambda t: t[..., None], "flat": lambda t: t.reshape(-1),
    "swapped": lambda t: t.transpose(-1, -2), "empty": lambda t: t[:0], "scalar": lambda t: t.reshape(-1)[0],
    "half": lambda t: t.half(), "bf16": lambda t: t.bfloat16(), "double": lambda t: t.double(), "float": lambda t: t.float(),
    "long": lambda t: t.nan_to_num().long(), "int8": lambda t: t.nan_to_num().to(torch.int8), "bool": lambda t: t != 0,
    "uint8": lambda t: t.nan_to_num().to(torch.uint8), "uint64": lambda t: t.nan_to_num().to(torch.int64).to(torch.uint64),
    "complex": lambda t: t.to(torch.complex64), "fp8": lambda t: t.float().to(torch.float8_e5m2),
    "meta": lambda t: t.to("meta"), "sparse": lambda t: t.detach().to_sparse(), "list": lambda t: t.tolist(),
    "numpy": lambda t: t.detach().float().numpy(), "sparse csr": lambda t: t.detach().to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t.detach().float().nan_to_num(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t.detach(), t.detach()]), "negative": lambda t: -t.abs() - 1,
    "nan": lambda t: torch.full_like(t, torch.nan), "inf": lambda t: torch.full_like(t, torch.inf),
    "huge": lambda t: torch.full_like(t, 1e4), "one nan": lambda t: _one(t, torch.nan), "one -inf": lambda t: _one(t, -torch.inf),
    "one inf": lambda t: _one(t, torch.inf), "one far": lambda t: _one(t, 120), "one -7": lambda t: _one(t, -7),
    "grad": lambda t: t.detach().clone().requires_grad_(), "grad of": lambda t: t.detach().clone().requires_grad_() * 1,
    "None": lambda t: None, "tuple": lambda t: (t,), "subclass": lambda t: t.detach().as_subclass(_Subclass),
    "expanded": lambda t: t[:1].expand_as(t), "parameter": lambda t: torch.nn.Parameter(t.detach()),
    "conj": lambda t: t.to(torch.complex64).conj(), "neg view": lambda t: torch._neg_view(t.detach().to(t.dtype if t.is_signed() else torch.float)),
}  # fmt: skip


class _Subclass(Tensor):
    pass


def _one(t: Tensor, value: float) -> Tensor:
    t = t.detach().clone()
    t.view(-1)[t.numel() // 2] = value
    return t


def attempt(seed: int) -> Outcome:
    chance = random.Random(f"interface {seed}")
    wrong = chance.random() < SHARE_WRONG
    engine = chance.choices(list(ENGINES), list(ENGINES.values()))[0]
    return _wrong(seed, engine, chance) if wrong else _right(seed, engine)


def draw(seed: int, simplest: frozenset[str] = frozenset(), asked: list[str] | None = None) -> Problem:
    """simplest: draws that take their first choice."""

    def one_of(what, *choices):
        if asked is not None:
            asked.append(what)
        return choices[0] if what in simplest else random.Random(f"{seed} {what}").choice(choices)

    problem = a_problem(one_of)
    loud = problem.std == 5.0 and problem.dtype == F64 and one_of("loud", False, True)  # logits of some thousands
    return replace(problem, std=500.0) if loud else problem


# Right ones


def _right(seed: int, engine: str) -> Outcome:
    what = f"right, {engine}"
    error = _disagreement(draw(seed), engine)
    if error is None:
        return Outcome(what, "agrees")
    problem, error = _simplified(seed, engine, error)
    return Outcome(what, "finding", Finding(error, f"agree({problem!r}, {engine!r})"))


def _disagreement(problem: Problem, engine: str) -> str | None:
    try:
        agree(problem, engine)
    except Exception as error:  # whatever it is: no problem here is to be refused
        return f"{type(error).__name__}: {error}"
    return None


def _simplified(seed: int, engine: str, error: str) -> tuple[Problem, str]:
    """Each draw in turn takes its simplest choice, and keeps it where the fault is still there."""
    asked: list[str] = []
    simplest: frozenset[str] = frozenset()
    draw(seed, simplest, asked)
    for what in asked:
        fewer = simplest | {what}
        try:
            still = _disagreement(draw(seed, fewer), engine)
        except Exception:  # a draw that another one has made impossible
            continue
        if still is not None:
            simplest, error = fewer, still
    return draw(seed, simplest), error


# Wrong ones


def _wrong(seed: int, engine: str, chance: random.Random) -> Outcome:
    problem = draw(seed)
    case = problem.case()
    arguments = {"student": case.student, "teacher": case.teacher, "labels": case.labels, **case.options}
    arguments |= {"engine": engine, "scratch_bytes": case.scratch, "return_metrics": chance.random() < 0.5,
                  "process_group": None, "vocab_start": None}  # fmt: skip
    arguments.setdefault("kd_vocab_mask", None)
    done = []
    for _ in range(chance.choice([1, 1, 1, 2])):
        if (spoiled := _spoil(arguments, chance)) is not None:
            done = [(path, how) for path, how in done if not path.startswith(spoiled[0])]
            done.append(spoiled)
    if not done:
        return Outcome("wrong", "nothing to spoil")
    text = "; ".join(f"{path}: {how}" for path, how in done)
    refused, result = _call(arguments)
    if isinstance(refused, Exception):
        found = _badly_refused(refused)
        if found:
            return Outcome("wrong", "finding", Finding(f"{text}: {found}", f"seed {seed}, {engine}"))
        return Outcome("wrong", "refused")
    found = _badly_taken(arguments, engine, result, done, problem.garbage)
    if found:
        return Outcome("wrong", "finding", Finding(f"{text}: {found}", f"seed {seed}, {engine}"))
    return Outcome("wrong", "meant something")


def _spoil(arguments: dict[str, Any], chance: random.Random) -> tuple[str, str] | None:
    """Replaces one argument, or a field of one; says which and by what."""
    paths = list(arguments)
    for name in ("student", "teacher"):
        if isinstance(arguments[name], SOURCES):
            # fields twice: they are what most calls are about
            paths += [f"{name}.{f.name}" for f in fields(arguments[name])] * 2
    path = chance.choice(paths)
    name, _, field = path.partition(".")
    before = _at(arguments, path)
    if isinstance(before, Tensor) and chance.random() < 0.7:
        how = chance.choice(list(SPOILED))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                after = SPOILED[how](before)
        except Exception:  # this tensor cannot be had like that
            return None
    else:
        how = chance.choice(list(JUNK))
        after = JUNK[how]
    arguments[name] = replace(arguments[name], **{field: after}) if field else after
    return path, how


def _call(arguments: dict[str, Any]) -> tuple[Exception | None, Any]:
    """(what it raised, [the loss, gradients])."""
    options = dict(arguments)
    try:
        found = fused_kd_loss(options.pop("student"), options.pop("teacher"), options.pop("labels"), **options)
        loss = found[0] if isinstance(found, tuple) else found
        leaves = _leaves(arguments) if loss.requires_grad else []
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True) if leaves else ()
        return None, [loss.detach(), *grads]
    except Exception as error:
        return error, None


def _leaves(arguments: dict[str, Any]) -> list[Tensor]:
    sources = [arguments[name] for name in ("student", "teacher") if isinstance(arguments[name], SOURCES)]
    tensors = [getattr(source, f.name) for source in sources for f in fields(source)]
    return [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]


def _badly_refused(error: Exception) -> str | None:
    said = f"{type(error).__name__}: {error}"[:300]
    if type(error) not in (ValueError, TypeError):
        return said
    if not re.search(rf"\b({'|'.join(NAMES)})\b", str(error)):
        return f"names no argument: {said}"
    if error.__traceback__ is not None and _raised_outside(error):
        return f"raised outside kdfast: {said}"
    return None


def _raised_outside(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and not Path(trace.tb_frame.f_code.co_filename).is_relative_to(ROOT)


def _badly_taken(
    arguments: dict[str, Any], engine: str, result: Any, done: list[tuple[str, str]], garbage: bool
) -> str | None:
    unmeant = [f"{path}: {how}" for path, how in done if not _meant(path.rpartition(".")[2], _at(arguments, path))]
    if unmeant:
        return f"silently taken ({', '.join(unmeant)})"
    refused, expected = _call({**arguments, "engine": "reference"})
    if refused is not None:
        return f"taken by {engine}, but not by the reference: {type(refused).__name__}: {refused}"[:300]
    taus = (arguments["temperature"], getattr(arguments["teacher"], "temperature", None) or 1.0)
    if not all(0.05 <= float(tau) <= 100 for tau in taus):
        return None  # τ² times a rounding, or logits past float32
    for ours, theirs in zip(result, expected, strict=True):
        if (ours is None) != (theirs is None):
            return f"of a gradient there is {ours}, of the reference's {theirs}"[:300]
        infinite = any(word in how for _, how in done for word in ("nan", "inf"))  # 0·∞, where nothing counts
        if ours is None or not (
            ours is result[0] or (not infinite and result[0].isfinite().all() and theirs.isfinite().all())
        ):
            continue  # of what is not finite, the loss says enough: gradients are as they come
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{tuple(ours.shape)} {ours.dtype}, the reference has {tuple(theirs.shape)} {theirs.dtype}"
        size = float(theirs.double().nan_to_num(0, 0, 0).norm())
        if not torch.allclose(ours.double(), theirs.double(), rtol=0.05, atol=0.05 * size + 1e-2, equal_nan=True):
            return f"the loss or a gradient is {ours}, the reference's {theirs}"[:300]
    # NaN in rows that do not count until another one is ignored; −inf that becomes +inf
    odd = garbage or any(word in how for _, how in done for word in ("nan", "inf", "huge", "neg"))
    odd |= any(path.endswith("logit_scale") for path, _ in done)  # 0 or below, times a logit of −inf
    if result[0].isnan().any() and not odd:
        return f"the loss is {result[0]}"[:300]
    return None


def _at(arguments: dict[str, Any], path: str) -> Any:
    name, _, field = path.partition(".")
    return getattr(arguments[name], field) if field else arguments[name]


def _meant(field: str, value: Any) -> bool:
    """Whether something else than a problem of tests/helpers/problems.py has there may be right."""
    if isinstance(value, Tensor):
        dense = value.layout == torch.strided and value.is_cpu and not (value.is_nested or value.is_quantized)
        if field in NUMBERS:
            return dense and value.dim() == 0 and _is_number(value.item(), field == "temperature")
        return dense and field in TENSORS  # what it must be like is said by how it is compared below
    if field in FLAGS:
        return isinstance(value, bool | np.bool_)
    if field in NUMBERS or field in ("logit_scale", "softcap"):
        optional = value is None and field in ("num_items_in_batch", "softcap", "temperature")  # the teacher's
        if field == "logit_scale" and isinstance(value, Real):  # of either sign, and 0 where it is as good as that
            return not isinstance(value, bool) and abs(value) <= HUGE
        return optional or _is_number(value, field in ("temperature", "softcap"))
    if field == "ignore_index":
        return isinstance(value, int | np.integer) and not isinstance(value, bool) and abs(value) < 2**63
    if field in ("valid_vocab", "scratch_bytes"):
        return value is None or (isinstance(value, int | np.integer) and 0 < value < 2**63)
    if value is None:
        return field in ("bias", "labels", "teacher", "projector_weight", "projector_bias", "anchor_targets",
                         "log_tail", "token_weights", "kd_token_weights", "process_group", "vocab_start", "kd_vocab_mask")  # fmt: skip
    return (field, value) in [("reduction", "mean"), ("reduction", "none"), ("teacher_grad", "none"), ("tail", "none")]


def _is_number(value: Any, positive: bool) -> bool:
    """That float32 can hold."""
    real = isinstance(value, int | float | Fraction | np.floating | np.integer) and not isinstance(value, bool)
    return real and (TINY <= value <= HUGE or (value == 0 and not positive))
