"""The `torch` engine's row work on a CPU, compiled by inductor if there is a C++ compiler.

`TorchRows.gradients_of` is traced for any number of rows: one function per kind of problem (teacher, divergence, terms,
vocabulary), compiled when the first large one needs gradients. That takes seconds, which the log announces, and less
once inductor has it on disk. If it fails, a warning says so and plain torch does all the work. KDFAST_COMPILE=0 turns
it off. Sparse teachers and slices of the vocabulary always use plain torch.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import fields, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdfast.divergences import DIVERGENCES
from kdfast.engines.chunk_loop import GradientBuffers
from kdfast.ops import threads
from kdfast.ops.planning import on_cpu
from kdfast.ops.problem import PER_TOKEN

LEAST = 1 << 21  # smaller problems, in logits, are not compiled
BLOCK = 1 << 19  # logits a thread handles at a time, so that they stay in its cache between passes
READ = (
    "labels", "anchor_targets", "temperature", "teacher_temperature", "coefficients", "bias", "teacher_bias", "kd_mask",
)  # fmt: skip
ANY = {"scratch_bytes", "per_row", "need_hidden", "need_weight", "need_bias", "need_teacher_hidden"}  # not read here
OPTIONS: dict[str, Any] = {
    "realize_reads_threshold": 64,  # recompute what one pass needs from another instead of storing it
    "realize_opcount_threshold": 400,
    "cpp.dynamic_threads": True,
    "cpp_wrapper": True,  # runs without the interpreter's lock, so that blocks run on several threads
    "compile_threads": 1,  # start no compiler processes, which would stay
}
MADE_FOR = (2, 10)  # the oldest PyTorch version

logger = logging.getLogger(__name__)
_functions: dict[Any, Callable[..., Any]] = {}
_off: list[str] = []  # why this process compiles nothing
os.register_at_fork(after_in_child=lambda: _off.append("a forked process"))


def solve(solver: Any, rows: slice, z_s: Tensor, z_t: Tensor | None, out: GradientBuffers) -> bool:
    """Do the work of `solver`, a `TorchRows`, for the chunk `rows`; return False if the solver must do it itself."""
    x, m = solver.x, rows.stop - rows.start
    if m < 2 or not _is_for(solver) or _off or not _allowed():
        return False
    values = [getattr(x, field.name) for field in fields(x) if field.name not in ANY]
    key = (solver.wanted, *(each.dtype if isinstance(each, Tensor) else str(each) for each in values))
    function: Any = _functions.get(key)
    if function is None:
        logger.warning("kdfast: compiling this kind of loss takes some seconds (KDFAST_COMPILE=0: plain torch)")
    count = max(1, min(m // 2, -(-m * x.valid_vocab // BLOCK)))
    blocks = [slice(i * m // count, (i + 1) * m // count) for i in range(count)]

    def block(within: slice) -> None:
        part = slice(rows.start + within.start, rows.start + within.stop)
        teacher = None if z_t is None else z_t[within]
        _solve_block(function, solver, part, z_s[within], teacher, out.part(within))

    if function is None:
        try:
            function = _compiled(solver)
            block(blocks.pop(0))
        except Exception as error:  # what a compiler may raise
            _off.append(f"{type(error).__name__}: {error}")
            logger.warning("not compiled, plain torch does it: %s", _off[-1].partition("\n")[0])
            return False
        _functions[key] = function
    threads.map_on_threads(block, blocks)
    solver.sum_bias(out.bias, out.student, out.teacher)
    return True


def _is_for(solver: Any) -> bool:
    x = solver.x
    large = x.hidden.shape[0] * x.valid_vocab >= LEAST and on_cpu(x.hidden.device, x.engine) and any(solver.wanted)
    return large and not x.sparse and (not x.has_teacher or x.divergence_name in DIVERGENCES)


def _allowed() -> bool:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    off = os.environ.get("KDFAST_COMPILE") == "0" or multiprocessing.current_process().daemon
    return not off and version >= MADE_FOR


def _compiled(solver: Any) -> Callable[..., Any]:
    """Return a function of (z_s, z_t, scale, tensors) that writes gradients over the logits and returns statistics
    (6, r) and the anchor's gradient, if separate. tensors: those of `READ` that exist."""
    wanted, rows = solver.wanted, type(solver)
    empty = dict.fromkeys(field.name for field in fields(solver.x) if isinstance(getattr(solver.x, field.name), Tensor))
    template = replace(solver.x, **{name: torch.empty(0) for name in empty} | {"teacher_logits": None})

    def solve_rows(z_s: Tensor, z_t: Tensor | None, scale: Tensor, tensors: dict[str, Tensor]) -> Any:
        solver = rows(replace(template, **tensors), scale, wanted, z_s.new_zeros(6, z_s.shape[0]))
        given = None if z_t is None else z_t.clone()
        grad_s, grad_t, grad_a = solver.gradients_of(slice(None), z_s.clone(), given)
        if grad_a is not None and not wanted.anchor_apart:
            grad_t, grad_a = (grad_a if grad_t is None else grad_t + grad_a), None
        for z, grad in ((z_s, grad_s), (z_t, grad_t)):
            if z is not None and grad is not None:
                z.copy_(pad(grad, (0, z.shape[1] - grad.shape[1])))
        return solver.stats, grad_a

    # a code object of its own, since dynamo limits how often it compiles one
    code = solve_rows.__code__.replace(co_name=f"solve_rows_{len(_functions)}")
    function = FunctionType(code, solve_rows.__globals__, closure=solve_rows.__closure__)
    return torch.compile(function, fullgraph=True, options=OPTIONS)


def _solve_block(
    function: Callable[..., Any], solver: Any, rows: slice, z_s: Tensor, z_t: Tensor | None, out: GradientBuffers
) -> None:
    x = solver.x
    found = {name: getattr(x, name) for name in READ if getattr(x, name) is not None}
    tensors = {name: each[rows] if name in PER_TOKEN else each for name, each in found.items()}
    tensors["coefficients"] = x.coefficients[:, rows].contiguous()
    if x.teacher_logits is not None:
        z_t = x.dense_teacher(rows).to(x.dtype)
    # as tensors with memory of their own, or the compiler would check the two sides for overlap
    z_s, z_t = torch.from_dlpack(z_s), None if z_t is None else torch.from_dlpack(z_t)
    for name, tensor in {"z_s": z_s, "z_t": z_t, **tensors}.items():
        if tensor is not None and name in (*PER_TOKEN, "z_s", "z_t", "coefficients"):
            torch._dynamo.mark_dynamic(tensor, int(name == "coefficients"))
    solver.stats[:, rows], grad_a = function(z_s, z_t, solver.scale, tensors)
    if out.anchor is not None:
        out.anchor.copy_(grad_a)
    if out.teacher is not None and z_t is not None:
        out.teacher[:, z_t.shape[1] :].zero_()
