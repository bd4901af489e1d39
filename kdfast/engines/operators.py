"""The `torch.library` operators behind which every fused engine runs.

    kdfast::fused_kd            loss, statistics, and the needed gradients, computed in the forward
    kdfast::fused_kd_gradients  only the gradients, for a vector of upstream gradients (reduction="none")
    kdfast::finalize_gradient   saved gradient · (scale · upstream gradient) → the input's dtype
    kdfast::project             the projector of the tiled engine, hidden · Pᵀ + p

The arguments of the first two are the fields of `Problem`, in order. They include the flags of needed gradients, so a
compiled graph does only that work. Fake implementations give shapes and dtypes.

Tensors saved for backward are never written to, so a second backward gives the same gradients. `finalize_gradient` and
`fused_kd_gradients` *are* the backward; their own autograd raises, because second derivatives would be silently wrong.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_type_hints

import torch
from torch import Tensor

from kdfast.ops import autocast, matmul, transforms
from kdfast.ops.planning import grad_flags
from kdfast.ops.problem import Problem, Result

ENGINES = {  # modules that have run(Problem, rows of an earlier Result or None) -> Result
    "torch": "kdfast.engines.chunked",
    "triton_chunked": "kdfast.engines.chunked",
    "triton_tiled": "kdfast.engines.triton_tiled",
}

# The fields of Problem and their types in torch.library: `hidden: Tensor`, `softcap: float | None` and
# `valid_vocab: int` become the arguments "Tensor hidden, float? softcap, SymInt valid_vocab" of an operator's schema.
_TYPES = get_type_hints(Problem)
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    list[float]: "float[]",
    int: "SymInt",
    bool: "bool",
    str: "str",
}
_ARGUMENTS = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in _TYPES.items())
_TENSORS = [name for name, kind in _TYPES.items() if _SCHEMA_TYPES[kind].startswith("Tensor")]
_DIFFERENTIABLE = ("hidden", "weight", "bias", "teacher_hidden")  # also the names of Result fields and need_… flags


def _returning(tensors: int) -> str:
    return f"({', '.join(['Tensor'] * tensors)})"


def _values(problem: Problem) -> list[Any]:
    return [getattr(problem, name) for name in _TYPES]


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return (loss, stats) of `problem` from its engine; the loss is differentiable once."""
    result = Result(*fused_kd(*_values(problem)))
    return result.loss, result.stats


def _solve(problem: Problem, rows: Tensor | None = None) -> Result:
    engine = importlib.import_module(ENGINES[problem.engine])
    # kernels launch on the current device, which need not be the tensors'
    with torch.cuda.device_of(problem.hidden), autocast.disabled(problem.hidden.device), torch.no_grad():
        return engine.run(problem, rows)


@torch.library.custom_op(
    "kdfast::fused_kd", mutates_args=(), schema=f"({_ARGUMENTS}) -> {_returning(len(Result._fields))}"
)
def fused_kd(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the Result of Problem(*arguments)."""
    return tuple(_solve(Problem(*arguments)))


@fused_kd.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x = Problem(*arguments).forward_problem()
    N = x.hidden.shape[0]

    def empty(*shape: int, wanted: bool = True, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.empty(shape if wanted else (0,), device=x.hidden.device, dtype=dtype)

    return Result(
        loss=empty(N) if x.per_row else empty(),
        stats=empty(6, N),
        hidden=empty(*x.hidden.shape, wanted=x.need_hidden),
        weight=empty(*x.weight.shape, wanted=x.need_weight, dtype=x.weight_gradient_dtype),
        bias=empty(x.weight.shape[0], wanted=x.need_bias),
        teacher_hidden=empty(*x.hidden.shape, wanted=x.need_teacher_hidden),
        scale=empty(),
        rows=empty(x.row_constants, N, wanted=x.row_constants > 0),
    )


@torch.library.custom_op(
    "kdfast::fused_kd_gradients",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor rows, Tensor upstream) -> {_returning(len(_DIFFERENTIABLE))}",
)
def fused_kd_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of Σₙ upstreamₙ·lossₙ in the inputs' dtypes, empty where not needed.

    The last two arguments are the forward's Result.rows and upstream (N,)."""
    *values, rows, upstream = arguments
    x = Problem(*values)
    coefficients = torch.where(x.coefficients == 0, 0.0, x.coefficients * upstream)
    x = replace(x, coefficients=coefficients, want_metrics=False, per_row=False)
    if not any(grad_flags(x)):  # only a projector, whose gradient is zero by teacher_grad="none"
        return _where_needed(x, lambda like, name: like.new_zeros(like.shape))
    result = _solve(x, rows if rows.numel() else None)
    return _where_needed(x, lambda like, name: _finalize(getattr(result, name), result.scale, like))


@fused_kd_gradients.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    # contiguous, even if the inputs are not
    return _where_needed(Problem(*arguments[:-2]), lambda like, name: like.new_empty(like.shape))


def _where_needed(x: Problem, gradient: Callable[[Tensor, str], Tensor]) -> tuple[Tensor, ...]:
    """Return gradient(input, its name) for each input that needs one, and an empty tensor for the others."""
    return tuple(
        gradient(getattr(x, name), name) if getattr(x, f"need_{name}") else x.hidden.new_empty(0)
        for name in _DIFFERENTIABLE
    )


@torch.library.custom_op("kdfast::finalize_gradient", mutates_args=())
def finalize_gradient(saved: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """Return saved · factor in `like`'s dtype. `like` is the input itself: it shows autograd that the gradient depends
    on the inputs, so that a second derivative raises the error instead of treating the gradient as a constant."""
    return _finalize(saved, factor, like)


@finalize_gradient.register_fake
def _(saved: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(saved, dtype=like.dtype)


def _finalize(gradient: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    out = torch.empty_like(gradient, dtype=like.dtype)
    return torch.mul(gradient, factor, out=out)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, result = Problem(*inputs), Result(*output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.needed = tuple(name for name in _DIFFERENTIABLE if getattr(x, f"need_{name}"))
    ctx.per_row = x.per_row
    if x.per_row:
        without_tensors: dict[str, Any] = dict.fromkeys(_TENSORS)
        ctx.problem = replace(x, **without_tensors)
        ctx.save_for_backward(result.rows, *(getattr(x, name) for name in _TENSORS))
    else:
        wanted = [(getattr(result, name), getattr(x, name)) for name in ctx.needed]
        ctx.save_for_backward(result.scale, *(tensor for pair in wanted for tensor in pair))


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: dict[str, Tensor] = {}
    if upstream is not None:
        transforms.refuse("the upstream gradient", upstream, batches=ctx.per_row)
    if upstream is not None and ctx.per_row:
        rows, *saved = ctx.saved_tensors
        x = replace(ctx.problem, **dict(zip(_TENSORS, saved, strict=True)))
        gradients = dict(zip(_DIFFERENTIABLE, fused_kd_gradients(*_values(x), rows, upstream), strict=True))
    elif upstream is not None:
        scale, *saved = ctx.saved_tensors
        factor = scale * upstream
        for name, gradient, like in zip(ctx.needed, saved[::2], saved[1::2], strict=True):
            final = _is_final(gradient, factor, like)
            gradients[name] = gradient if final else finalize_gradient(gradient, factor, like)
    return tuple(gradients.get(name) if name in ctx.needed else None for name in _TYPES)


def _is_final(gradient: Tensor, factor: Tensor, like: Tensor) -> bool:
    """Return whether the saved gradient itself can be returned, as for `loss.backward()` in full precision, which saves
    a pass over dW and its memory. Only on a CPU, where reading is free; not while tracing or differentiating again; and
    only if autograd drops the saved tensor afterwards, since a later backward must not return a tensor that the caller
    already has."""
    looking = type(factor) is Tensor and factor.device.type == "cpu" and not torch.compiler.is_compiling()
    if not looking or torch.is_grad_enabled():
        return False
    if torch._C._autograd._get_current_graph_task_keep_graph():  # retain_graph, or outside a backward
        return False
    return gradient.dtype == like.dtype and bool(factor == 1)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "fused_kd_loss: second derivatives are not available on a fused engine, whose gradients are taken in the "
        "forward. Use engine='reference' (or drop create_graph=True)"
    )


fused_kd.register_autograd(_backward, setup_context=_save)
fused_kd_gradients.register_autograd(_no_second_derivative)
finalize_gradient.register_autograd(_no_second_derivative)


@torch.library.custom_op("kdfast::project", mutates_args=())
def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden (N, Ht) · weight (Hs, Ht)ᵀ + bias (Hs,), (N, Hs) in hidden's dtype. No gradient reaches `hidden`,
    the teacher's."""
    from kdfast.kernels import projector

    with torch.cuda.device_of(hidden):
        bias = None if bias is None else bias.contiguous()
        return projector.project(hidden, weight, bias, tf32=matmul.tf32(hidden.device))


@project.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0])


def _save_projection(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype


def _project_backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
    (hidden,) = ctx.saved_tensors
    weight = upstream.t() @ hidden if ctx.needs_input_grad[1] else None
    return None, weight, upstream.sum(dim=0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None


project.register_autograd(_project_backward, setup_context=_save_projection)
