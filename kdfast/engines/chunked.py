"""The engines `torch` and `triton_chunked`: chunks of tokens, gradients in the forward, no host synchronisation.

They differ in who turns logits into gradients (`ROW_WORK`); the products are the vendor's in both.

For each chunk of m tokens, with student and projected rows stacked (they share W):

    Z  (2m, V) = [h_s; h_p] · Wᵀ               one product, fp32                      2u
    G  (2m, V) = dL/dZ                          the row work, in Z's memory where the dtype is the same
    dX (2m, H) = G · W                          one product                            2u
    dW (V, H) += Gᵀ · [h_s; h_p]                one product, accumulated in fp32       2u

A product nobody wants the result of is not made: 6u with `teacher_grad="full"`, 5u for "projector", 4u for
"none"; a teacher with its own head costs 3u(Hs) + u(Ht); without gradients the logits alone. The anchor's gradient
must not reach W, so with "full" it waits in a plane of its own until dW has been taken.

Memory beyond inputs and gradients: one chunk of logits, (V·4 bytes)·2 per token in fp32 and as many gradients in a
16-bit dtype, within `scratch_bytes`. Rows are padded to 128 elements where a GPU reads them, so that its products see
an aligned leading dimension whatever V is.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdfast import gemm
from kdfast.engines.planning import (
    Wanted,
    active_rows,
    bytes_per_token,
    chunk_tokens,
    gradient_scale,
    mixes,
    on_cpu,
    row_stride,
    total,
    wanted,
)
from kdfast.engines.row_work import Buffers
from kdfast.problem import Problem, Result

ROW_WORK = {"torch": "kdfast.engines.torch_rows", "triton_chunked": "kdfast.engines.triton_rows"}
CPU_BLOCK = 1 << 17  # logits a CPU works on at a time (512 KB in fp32), so that the row work stays in cache


@dataclass(frozen=True)
class Plan:
    """Which gradients are wanted, and in what portions the work is done."""

    wanted: Wanted  # gradients of the logits
    mix: bool  # teacher rows are made orthogonal to student rows before they are rounded
    gradient_dtype: torch.dtype
    tokens: int  # per chunk
    stride: int  # elements from one row of scratch to the next
    block: int  # rows per call of the row work


def run(x: Problem, rows: Tensor | None = None) -> Result:
    """Loss, statistics and scaled gradients of `x`. rows: of no use here, statistics come with the logits."""
    x = x.of_the_forward()
    if not on_cpu(x.hidden.device, x.engine):
        return _run(x)
    # rows that count for nothing are dropped, not multiplied by zero
    index = x.active.nonzero().squeeze(1)
    return _run(x) if index.numel() == x.hidden.shape[0] else _spread(_run(_select(x, index)), index, x)


def _run(x: Problem) -> Result:
    N, H = x.hidden.shape
    V, device = x.valid_vocab, x.hidden.device
    plan = _plan(x)
    scale = gradient_scale(x)
    weight = x.weight[:V]
    stats = torch.zeros((6, N), device=device, dtype=x.dtype)
    work = importlib.import_module(ROW_WORK[x.engine]).Work(x, scale=scale, wanted=plan.wanted, stats=stats)
    d_hidden = _zeros(x.need_hidden, (N, H), x)
    d_weight = _zeros(x.need_weight, tuple(x.weight.shape), x)
    d_bias = _zeros(x.need_bias, (x.weight.shape[0],), x)
    d_teacher = _zeros(x.need_teacher_hidden, (N, H), x)
    teacher_input = x.need_teacher_hidden and (plan.wanted.teacher or plan.wanted.anchor)

    pairs = 2 if x.teacher_hidden is not None else 1

    def scratch(rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, plan.stride, device=device, dtype=dtype)[:, :V]

    planes = scratch(pairs * plan.tokens, x.dtype)
    narrow = plan.gradient_dtype != x.dtype and any(plan.wanted)
    gradients = scratch(pairs * plan.tokens, plan.gradient_dtype) if narrow else planes
    anchor_plane = scratch(plan.tokens, plan.gradient_dtype) if plan.wanted.anchor_apart else None
    mix = planes.new_empty(plan.tokens) if plan.mix else None

    for start in range(0, N, plan.tokens):
        rows = slice(start, min(start + plan.tokens, N))
        m = rows.stop - start
        inputs, z_s, z_t = _logits(x, rows, weight, planes)
        g = gradients[: pairs * m]
        g_s, g_t = g[:m], g[m:] if pairs == 2 else None
        for b in range(0, m, plan.block):
            part = slice(b, min(b + plan.block, m))
            work(
                slice(start + part.start, start + part.stop),
                z_s[part],
                None if z_t is None else z_t[part],
                Buffers(
                    g_s[part] if plan.wanted.student else None,
                    g_t[part] if g_t is not None and (plan.wanted.teacher or plan.wanted.anchor) else None,
                    None if anchor_plane is None else anchor_plane[part],
                    None if mix is None else mix[part],
                    d_bias[:V] if x.need_bias else None,
                ),
            )

        if x.need_weight:
            if mix is not None:
                inputs[:m] = torch.addcmul(inputs[:m].to(x.dtype), inputs[m:].to(x.dtype), mix[:m, None], value=-1)
            to_weight = slice(0, 2 * m if plan.wanted.teacher_to_weight else m)
            gemm.weight_gradient(g[to_weight], inputs[to_weight], d_weight[:V])
        if anchor_plane is not None and g_t is not None:
            g_t += anchor_plane[:m]
        to_input = slice(0 if x.need_hidden else m, 2 * m if teacher_input else m)
        if to_input.start < to_input.stop:
            d_inputs = gemm.input_gradient(g[to_input], weight, x.dtype)
            if x.need_hidden:
                d_hidden[rows] = d_inputs[:m]
            if teacher_input:
                d_teacher[rows] = d_inputs[-m:]
                if mix is not None:
                    d_teacher[rows] -= mix[:m, None] * d_inputs[:m]

    return Result(total(x, stats), stats, d_hidden, d_weight, d_bias, d_teacher, scale, stats.new_empty(0))


def _logits(x: Problem, rows: slice, weight: Tensor, planes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(inputs (m or 2m, H), z_s (m, V), z_t (m, V) or None) of one chunk: raw products, without bias."""
    dropped = on_cpu(x.hidden.device, x.engine)
    m = rows.stop - rows.start

    def taken(hidden: Tensor) -> Tensor:
        return hidden[rows] if dropped else active_rows(hidden[rows], x.active[rows])

    student = taken(x.hidden)
    if x.teacher_hidden is None:
        inputs, teacher = student, None
    else:
        teacher = taken(x.teacher_hidden)
        inputs = torch.cat([student, teacher]) if x.projected else student
    z = planes[: inputs.shape[0]]
    gemm.logits(inputs, weight, z)
    if x.projected:
        return inputs, z[:m], z[m:]
    if teacher is None:
        return inputs, z, None
    assert x.teacher_weight is not None
    z_t = planes[m : 2 * m, : x.kd_vocab]
    gemm.logits(teacher, x.teacher_weight[: x.kd_vocab], z_t)
    return inputs, z, z_t


def _plan(x: Problem) -> Plan:
    device, N, V = x.hidden.device, x.hidden.shape[0], x.valid_vocab
    want = wanted(x)
    per_token = bytes_per_token(
        device,
        x.weight.dtype,
        V,
        sides=2 if x.teacher_hidden is not None else 1,
        gradients=any(want),
        anchor_apart=want.anchor_apart,
        engine=x.engine,
    )
    tokens = chunk_tokens(N, per_token, device, x.scratch_bytes)
    return Plan(
        wanted=want,
        mix=mixes(x),
        gradient_dtype=gemm.gradient_dtype(x.weight.dtype, device),
        tokens=tokens,
        stride=row_stride(V, device, x.engine),
        block=max(1, CPU_BLOCK // V) if on_cpu(device, x.engine) else tokens,
    )


def _zeros(wanted: bool, shape: tuple[int, ...], x: Problem) -> Tensor:
    return torch.zeros(shape if wanted else (0,), device=x.hidden.device, dtype=x.dtype)


def _select(x: Problem, index: Tensor) -> Problem:
    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, index)

    return replace(
        x,
        hidden=x.hidden.index_select(0, index),
        teacher_hidden=rows(x.teacher_hidden),
        teacher_rows=rows(x.teacher_rows),
        teacher_indices=rows(x.teacher_indices),
        teacher_log_probs=rows(x.teacher_log_probs),
        labels=rows(x.labels),
        anchor_targets=rows(x.anchor_targets),
        coefficients=x.coefficients.index_select(1, index),
        active=x.active.index_select(0, index),
    )


def _spread(result: Result, index: Tensor, x: Problem) -> Result:
    """The inverse of `_select`: zeros in the rows that were left out."""
    N = x.hidden.shape[0]

    def rows(tensor: Tensor, dim: int = 0) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = N
        return tensor.new_zeros(shape).index_copy_(dim, index, tensor)

    return result._replace(
        loss=rows(result.loss) if x.per_row else result.loss,
        stats=rows(result.stats, 1),
        hidden=rows(result.hidden) if x.need_hidden else result.hidden,
        teacher_hidden=rows(result.teacher_hidden) if x.need_teacher_hidden else result.teacher_hidden,
    )
