"""The engines `torch` and `triton_chunked`: chunks of tokens, gradients in the forward, no host synchronisation.

They differ in who turns logits into gradients (`ROW_WORK`); the products are the vendor's in both.

For each chunk of m tokens, with student and projected rows stacked (they share W):

    Z  (2m, V) = [h_s; h_p] · Wᵀ               one product, fp32                      2u
    G  (2m, V) = dL/dZ                          the row work, in Z's memory where the dtype is the same
    dX (2m, H) = G · W                          one product                            2u
    dW (V, H) += Gᵀ · [h_s; h_p]                one product, accumulated in fp32       2u

A product nobody wants the result of is not made: 6u with `teacher_grad="full"`, 5u for "projector", 4u for
"none"; a teacher with its own head costs 3u(Hs) + u(Ht); without gradients the logits alone. The anchor's gradient
must not reach W, so with "full" it waits in a plane of its own until dW has been taken. Where each process has a slice
of the vocabulary, `sliced.py` takes the same steps in another order, with collectives between.

Memory beyond inputs and gradients: one chunk of logits, (V·4 bytes)·2 per token in fp32 and as many gradients in a
16-bit dtype, within `scratch_bytes`. Rows are padded to 128 elements where a GPU reads them, so that its products see
an aligned leading dimension whatever V is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.engines import vocab_parallel
from kdfast.engines.row_work import Buffers
from kdfast.ops import matmul
from kdfast.ops.planning import (
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
from kdfast.ops.problem import Problem, Result

SLICED_WORK = {"torch": "kdfast.engines.torch_vocab_parallel", "triton_chunked": "kdfast.engines.triton_vocab_parallel"}
ROW_WORK = {"torch": "kdfast.engines.torch_rows", "triton_chunked": "kdfast.engines.triton_rows"}


@dataclass(frozen=True)
class Plan:
    """Which gradients are wanted, and in what portions the work is done."""

    wanted: Wanted  # gradients of the logits
    mix: bool  # teacher rows are made orthogonal to student rows before they are rounded
    gradient_dtype: torch.dtype
    tokens: int  # per chunk
    buffers: int  # chunks whose logits are there at a time
    stride: int  # elements from one row of scratch to the next


def run(x: Problem, rows: Tensor | None = None) -> Result:
    """Loss, statistics and scaled gradients of `x`. rows: of no use here, statistics come with the logits."""
    x = x.of_the_forward()
    if not on_cpu(x.hidden.device, x.engine):
        return _run(x)
    # rows that count for nothing are dropped, not multiplied by zero
    index = x.active.nonzero().squeeze(1)
    return _run(x) if index.numel() == x.hidden.shape[0] else _spread(_run(_select(x, index)), index, x)


def _run(x: Problem) -> Result:
    loop = Loop(x)
    if x.group:
        vocab_parallel.run(loop)
    else:
        for rows in loop.chunks():
            chunk = loop.logits(rows)
            loop.work(rows, chunk.z_s, chunk.z_t, loop.buffers(chunk))
            loop.weight_gradient(chunk)
            loop.store(rows, loop.input_gradients(chunk))
    return loop.result()


class Chunk(NamedTuple):
    rows: slice
    inputs: Tensor  # (m or 2m, H): what the logits, and dW, are products of
    z_s: Tensor  # (m, V): raw products, without bias
    z_t: Tensor | None  # (m, V)
    gradients: Tensor  # (m or 2m, V): where those of the logits go

    @property
    def tokens(self) -> int:
        return self.rows.stop - self.rows.start


class Loop:
    """The chunks' buffers and products. Who drives it decides when each step is taken."""

    def __init__(self, x: Problem) -> None:
        N, H = x.hidden.shape
        self.x, self.plan, self.scale = x, _plan(x), gradient_scale(x)
        self.weight = x.weight[: x.valid_vocab]
        self.stats = torch.zeros((6, N), device=x.hidden.device, dtype=x.dtype)
        module = importlib.import_module((SLICED_WORK if x.group else ROW_WORK)[x.engine])
        self.work = module.Work(x, scale=self.scale, wanted=self.plan.wanted, stats=self.stats)
        self.d_hidden = _zeros(x.need_hidden, (N, H), x)
        self.d_weight = _zeros(x.need_weight, tuple(x.weight.shape), x)
        self.d_bias = _zeros(x.need_bias, (x.weight.shape[0],), x)
        self.d_teacher = _zeros(x.need_teacher_hidden, (N, H), x)
        self.teacher_input = x.need_teacher_hidden and (self.plan.wanted.teacher or self.plan.wanted.anchor)

        plan = self.plan
        self.pairs = 2 if x.teacher_hidden is not None else 1
        self.planes = [self._scratch(self.pairs * plan.tokens, x.dtype) for _ in range(plan.buffers)]
        narrow = plan.gradient_dtype != x.dtype and any(plan.wanted)
        self.narrow = self._scratch(self.pairs * plan.tokens, plan.gradient_dtype) if narrow else None
        self.anchor_plane = self._scratch(plan.tokens, plan.gradient_dtype) if plan.wanted.anchor_apart else None
        self.mix = self.stats.new_empty(plan.tokens) if plan.mix else None

    def _scratch(self, rows: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(rows, self.plan.stride, device=self.x.hidden.device, dtype=dtype)
        return out[:, : self.x.valid_vocab]

    def chunks(self) -> Iterator[slice]:
        N = self.x.hidden.shape[0]
        for start in range(0, N, self.plan.tokens):
            yield slice(start, min(start + self.plan.tokens, N))

    def logits(self, rows: slice, buffer: int = 0) -> Chunk:
        x, planes = self.x, self.planes[buffer]
        m = rows.stop - rows.start
        dropped = on_cpu(x.hidden.device, x.engine)

        def taken(hidden: Tensor) -> Tensor:
            return hidden[rows] if dropped else active_rows(hidden[rows], x.active[rows])

        gradients = (planes if self.narrow is None else self.narrow)[: self.pairs * m]
        student = taken(x.hidden)
        if x.teacher_hidden is None:
            inputs, teacher = student, None
        else:
            teacher = taken(x.teacher_hidden)
            inputs = torch.cat([student, teacher]) if x.projected else student
        z = planes[: inputs.shape[0]]
        if x.valid_vocab:
            matmul.logits(inputs, self.weight, z)
        if x.projected:
            return Chunk(rows, inputs, z[:m], z[m:], gradients)
        if teacher is None:
            return Chunk(rows, inputs, z, None, gradients)
        assert x.teacher_weight is not None
        z_t = planes[m : 2 * m, : x.kd_vocab]
        if x.kd_vocab:
            matmul.logits(teacher, x.teacher_weight[: x.kd_vocab], z_t)
        return Chunk(rows, inputs, z, z_t, gradients)

    def buffers(self, chunk: Chunk) -> Buffers:
        m, want = chunk.tokens, self.plan.wanted
        g_s, g_t = chunk.gradients[:m], chunk.gradients[m:] if self.pairs == 2 else None
        return Buffers(
            g_s if want.student else None,
            g_t if want.teacher or want.anchor else None,
            None if self.anchor_plane is None else self.anchor_plane[:m],
            None if self.mix is None else self.mix[:m],
            self.d_bias[: self.x.valid_vocab] if self.x.need_bias else None,
        )

    def weight_gradient(self, chunk: Chunk) -> None:
        """Also adds the anchor's gradient to the teacher's, now that it can no longer reach W."""
        x, m, g, inputs = self.x, chunk.tokens, chunk.gradients, chunk.inputs
        if x.need_weight:
            if self.mix is not None:
                mixed = torch.addcmul(inputs[:m].to(x.dtype), inputs[m:].to(x.dtype), self.mix[:m, None], value=-1)
                inputs[:m] = mixed
            to_weight = slice(0, 2 * m if self.plan.wanted.teacher_to_weight else m)
            if x.valid_vocab:
                matmul.weight_gradient(g[to_weight], inputs[to_weight], self.d_weight[: x.valid_vocab])
        if self.anchor_plane is not None and self.pairs == 2:
            g[m:] += self.anchor_plane[:m]

    def input_gradients(self, chunk: Chunk) -> Tensor | None:
        """(m or 2m, H): of the student's and of the teacher's rows, what is wanted of them; None = nothing is."""
        x, m = self.x, chunk.tokens
        to_input = slice(0 if x.need_hidden else m, 2 * m if self.teacher_input else m)
        if to_input.start >= to_input.stop:
            return None
        if not x.valid_vocab:  # a slice of the vocabulary may be empty
            return self.stats.new_zeros(to_input.stop - to_input.start, x.hidden.shape[1])
        d_inputs = matmul.input_gradient(chunk.gradients[to_input], self.weight, x.dtype)
        if self.teacher_input and self.mix is not None:
            d_inputs[m:] -= self.mix[:m, None] * d_inputs[:m]
        return d_inputs

    def store(self, rows: slice, d_inputs: Tensor | None) -> None:
        if d_inputs is None:
            return
        m = rows.stop - rows.start
        if self.x.need_hidden:
            self.d_hidden[rows] = d_inputs[:m]
        if self.teacher_input:
            self.d_teacher[rows] = d_inputs[-m:]

    def result(self) -> Result:
        x, stats = self.x, self.stats
        gradients = (self.d_hidden, self.d_weight, self.d_bias, self.d_teacher)
        return Result(total(x, stats), stats, *gradients, self.scale, stats.new_empty(0))


def _plan(x: Problem) -> Plan:
    device, N, V = x.hidden.device, x.hidden.shape[0], x.valid_vocab
    want = wanted(x)
    most = x.largest if x.group else V  # chunks are the same on all processes
    per_token = bytes_per_token(
        device,
        x.weight.dtype,
        most,
        sides=2 if x.teacher_hidden is not None else 1,
        gradients=any(want),
        anchor_apart=want.anchor_apart,
        engine=x.engine,
        buffers=2 if x.group else 1,
    )
    tokens = chunk_tokens(N, per_token, device, x.scratch_bytes)
    return Plan(
        wanted=want,
        mix=mixes(x),
        gradient_dtype=matmul.gradient_dtype(x.weight.dtype, device),
        tokens=tokens,
        buffers=2 if x.group and tokens < N else 1,
        stride=row_stride(V, device, x.engine),
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
