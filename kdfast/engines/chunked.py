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
import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdfast import gemm
from kdfast.engines.row_work import Buffers, Wanted
from kdfast.problem import ANCHOR, Problem, Result

ROW_WORK = {"torch": "kdfast.engines.torch_rows", "triton_chunked": "kdfast.engines.triton_rows"}
CPU_SCRATCH = 128 << 20  # 316 tokens at V=50257: past that the products gain nothing
DEVICE_SCRATCH = 512 << 20
DEVICE_TOKENS = 1024  # fewer rows than this starve a GPU's matrix units
ALIGNMENT = 128  # elements a row of scratch is padded to
CPU_BLOCK = 1 << 17  # logits a CPU works on at a time (512 KB in fp32), so that the row work stays in cache


@dataclass(frozen=True)
class Plan:
    """Which gradients are wanted, and in what portions the work is done."""

    wanted: Wanted  # gradients of the logits
    anchor_apart: bool  # the KD term's dL/dz_t reaches W, so the anchor's must wait in a plane of its own
    mix: bool  # teacher rows are made orthogonal to student rows before they are rounded (torch_rows._decorrelate)
    gradient_dtype: torch.dtype
    tokens: int  # per chunk
    stride: int  # elements from one row of scratch to the next
    block: int  # rows per call of the row work


def run(x: Problem) -> Result:
    """Loss, statistics and scaled gradients of `x`."""
    if x.hidden.device.type != "cpu" or x.engine != "torch":
        return _run(x)
    # Looking at a mask is free on a CPU: rows that count for nothing are dropped, not multiplied by zero.
    index = x.active.nonzero().squeeze(1)
    return _run(x) if index.numel() == x.hidden.shape[0] else _spread(_run(_select(x, index)), index, x)


def _run(x: Problem) -> Result:
    N, H = x.hidden.shape
    V, device = x.valid_vocab, x.hidden.device
    plan = _plan(x)
    solve = importlib.import_module(ROW_WORK[x.engine]).solve
    scale = _scale(x)
    weight = x.weight[:V]
    stats = torch.zeros((6, N), device=device, dtype=x.dtype)
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
    anchor_plane = scratch(plan.tokens, plan.gradient_dtype) if plan.anchor_apart else None
    mix = planes.new_empty(plan.tokens) if plan.mix else None

    for start in range(0, N, plan.tokens):
        rows = slice(start, min(start + plan.tokens, N))
        m = rows.stop - start
        inputs, z_s, z_t = _logits(x, rows, weight, planes)
        g = gradients[: pairs * m]
        g_s, g_t = g[:m], g[m:] if pairs == 2 else None
        for b in range(0, m, plan.block):
            part = slice(b, min(b + plan.block, m))
            solve(
                x,
                slice(start + part.start, start + part.stop),
                z_s[part],
                None if z_t is None else z_t[part],
                scale=scale,
                wanted=plan.wanted,
                stats=stats,
                out=Buffers(
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

    terms = x.coefficients * stats[: ANCHOR + 1]
    loss = torch.where(x.coefficients == 0, 0.0, terms).sum(dim=0)
    return Result(loss if x.per_row else loss.sum(), stats, d_hidden, d_weight, d_bias, d_teacher, scale)


def _logits(x: Problem, rows: slice, weight: Tensor, planes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(inputs (m or 2m, H), z_s (m, V), z_t (m, V) or None) of one chunk: raw products, without bias."""
    dropped = x.hidden.device.type == "cpu" and x.engine == "torch"
    off = None if dropped else ~x.active[rows, None]
    m = rows.stop - rows.start
    student = _without(x.hidden[rows], off)
    if x.teacher_hidden is None:
        inputs, teacher = student, None
    else:
        teacher = _without(x.teacher_hidden[rows], off)
        inputs = torch.cat([student, teacher]) if x.projected else student
    z = planes[: inputs.shape[0]]
    gemm.logits(inputs, weight, z)
    if x.projected:
        return inputs, z[:m], z[m:]
    if teacher is None:
        return inputs, z, None
    assert x.teacher_weight is not None
    z_t = planes[m : 2 * m]
    gemm.logits(teacher, x.teacher_weight[: x.valid_vocab], z_t)
    return inputs, z, z_t


def _plan(x: Problem) -> Plan:
    needs_head = x.need_weight or x.need_bias
    full = x.projected and x.teacher_grad == "full"
    to_teacher = x.projected and x.teacher_grad != "none" and x.need_teacher_hidden
    dtype = gemm.gradient_dtype(x.weight.dtype, x.weight.device)
    N, V = x.hidden.shape[0], x.valid_vocab
    teacher_to_weight = full and needs_head
    wanted = Wanted(
        student=x.need_hidden or needs_head,
        teacher=to_teacher or teacher_to_weight,
        anchor=x.anchor_term and x.need_teacher_hidden,
        teacher_to_weight=teacher_to_weight,
    )
    anchor_apart = wanted.anchor and teacher_to_weight
    planes = 2 if x.teacher_hidden is not None else 1
    on_cpu = x.hidden.device.type == "cpu"
    stride = V if on_cpu and x.engine == "torch" else -(-V // ALIGNMENT) * ALIGNMENT
    per_token = stride * planes * x.dtype.itemsize
    if x.weight.dtype != x.dtype and any(wanted):
        per_token += stride * planes * x.weight.dtype.itemsize  # gradients in the dtype of the products
    if anchor_apart:
        per_token += stride * dtype.itemsize
    tokens = min(max(1, _budget(x, per_token) // per_token), max(1, N))
    tokens = -(-N // -(-N // tokens)) if N else 1  # chunks of equal size
    return Plan(
        wanted=wanted,
        anchor_apart=anchor_apart,
        mix=dtype != x.dtype and full and x.need_weight and (x.need_hidden or not x.need_teacher_hidden),
        gradient_dtype=dtype,
        tokens=tokens,
        stride=stride,
        block=max(1, CPU_BLOCK // V) if on_cpu and x.engine == "torch" else tokens,
    )


def _budget(x: Problem, per_token: int) -> int:
    """Bytes for one chunk: the argument, else KDFAST_SCRATCH_BYTES, else the device's default."""
    if x.scratch_bytes:
        return x.scratch_bytes
    setting = os.environ.get("KDFAST_SCRATCH_BYTES")
    if setting is not None:
        if not setting.isdecimal() or int(setting) == 0:
            raise ValueError(
                f"KDFAST_SCRATCH_BYTES={setting!r}; expected a positive number of bytes, such as 268435456"
            )
        return int(setting)
    if x.hidden.device.type == "cpu":
        return CPU_SCRATCH
    return max(DEVICE_SCRATCH, DEVICE_TOKENS * per_token)


def _scale(x: Problem) -> Tensor:
    """(): for 16-bit inputs the power of two at or below the largest coefficient, so that 1/N comes last; else 1."""
    one = torch.ones((), device=x.coefficients.device, dtype=x.dtype)
    if x.weight.dtype == x.dtype or x.coefficients.numel() == 0:
        return one
    largest = x.coefficients.abs().max()
    usable = (largest > 0) & largest.isfinite()
    return torch.ldexp(one, torch.frexp(torch.where(usable, largest, one)).exponent - 1)


def _zeros(wanted: bool, shape: tuple[int, ...], x: Problem) -> Tensor:
    return torch.zeros(shape if wanted else (0,), device=x.hidden.device, dtype=x.dtype)


def _without(hidden: Tensor, off: Tensor | None) -> Tensor:
    """Inactive rows as zeros: whatever they hold, NaN included, must not reach a sum."""
    return hidden if off is None else hidden.masked_fill(off, 0)


def _select(x: Problem, index: Tensor) -> Problem:
    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, index)

    return replace(
        x,
        hidden=x.hidden.index_select(0, index),
        teacher_hidden=rows(x.teacher_hidden),
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
