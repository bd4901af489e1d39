"""Buffers and products of the engines that work in chunks of tokens; `chunked.py` and `vocab_parallel.py` drive it.

For each chunk of m tokens, with student and projected rows stacked (they share W):

    logits            Z  (2m, V) = [h_s; h_p] · Wᵀ        one product, fp32                      2u
    row_solver        G  (2m, V) = dL/dZ                  in Z's memory if the dtype is the same
    weight_gradient   dW (V, H) += Gᵀ · [h_s; h_p]        one product, fp32; written by chunk 1  2u
    input_gradients   dX (2m, H) = G · W                  one product                            2u

Only needed products are computed: 6u with `teacher_grad="full"`, 5u for "projector", 4u for "none"; a teacher with its
own head costs 3u(Hs) + u(Ht); without gradients only the logits remain. The anchor's gradient must not reach W, so with
"full" it waits in a plane of its own until dW has been computed.

Memory beyond inputs and gradients: one chunk of logits, 2·V·4 bytes per token in fp32, and as many gradients in a
16-bit dtype, within `scratch_bytes`. On a GPU rows are padded to a multiple of 128 elements, so that products see an
aligned leading dimension for any V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pkgutil import resolve_name
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops import matmul, planning
from kdfast.ops.problem import PER_TOKEN, Problem, Result


class GradientBuffers(NamedTuple):
    """Buffers for the gradients of some rows' logits, (r, V) each; None = not needed."""

    student: Tensor | None
    teacher: Tensor | None
    anchor: Tensor | None  # a plane of its own for the anchor's part; None = add it to the teacher's
    decorrelation: Tensor | None  # (r,) = c: `teacher` gets grad_t + c·grad_s, orthogonal to grad_s; None = grad_t
    bias: Tensor | None  # (V,): accumulates the bias's gradient, a sum over rows

    def part(self, rows: slice) -> GradientBuffers:
        """Return the buffers for some of the rows."""
        parts = {name: None if each is None else each[rows] for name, each in self._asdict().items() if name != "bias"}
        return self._replace(**parts)


class Chunk(NamedTuple):
    rows: slice
    inputs: Tensor  # (m or 2m, H): hidden states, the factor of logits and dW
    z_s: Tensor  # (m, V): raw products, without bias
    z_t: Tensor | None  # (m, V)
    gradients: Tensor  # (m or 2m, V): buffer for the gradients of the logits

    @property
    def tokens(self) -> int:
        return self.rows.stop - self.rows.start


class ChunkLoop:
    """The steps of a chunk, for a driver that decides when to take each.

    row_classes: for each engine, the class that turns logits into gradients, as `pkgutil.resolve_name` reads it. It is
    constructed with (x, scale (), wanted, stats (6, N)), divides gradients by `scale` and writes statistics to `stats`.
    """

    def __init__(self, x: Problem, row_classes: Mapping[str, str]) -> None:
        (N, H), V, device = x.hidden.shape, x.valid_vocab, x.hidden.device
        self.x, self.wanted, self.scale = x, planning.grad_flags(x), planning.gradient_scale(x)
        self.weight = x.weight[:V]
        self.stats = torch.zeros((6, N), device=device, dtype=x.dtype)
        # on a CPU `on_active_rows` has dropped the inactive rows
        self.inactive = None if planning.on_cpu(device, x.engine) else ~x.active[:, None]
        self.row_solver = resolve_name(row_classes[x.engine])(x, self.scale, self.wanted, self.stats)

        self.teacher_input = x.need_teacher_hidden and (self.wanted.teacher or self.wanted.anchor)
        gradient = partial(planning.gradient_buffer, x)
        self.d_hidden = gradient(x.need_hidden, (N, H), N)
        self.d_weight = gradient(x.need_weight, x.weight.shape, V if N else 0)
        self.d_bias = gradient(x.need_bias, x.weight.shape[:1])
        self.d_teacher = gradient(x.need_teacher_hidden, (N, H), N if self.teacher_input else 0)

        self.sides = 2 if x.teacher_hidden is not None else 1
        per_token = planning.bytes_per_token(
            device,
            x.weight.dtype,
            x.largest if x.group else V,  # chunks are the same on all processes
            sides=self.sides,
            gradients=any(self.wanted),
            anchor_apart=self.wanted.anchor_apart,
            engine=x.engine,
            buffers=2 if x.group else 1,
        )
        # chunks must be the same on all processes, whose GPUs may differ
        processors = planning.multiprocessors(torch.device("meta") if x.group else device)
        dx = planning.InputGradient(x.need_hidden + self.teacher_input, H, processors)
        self.tokens = m = planning.chunk_tokens(N, per_token, device, x.scratch_bytes, dx)
        stride, narrow = planning.row_stride(V, device, x.engine), matmul.gradient_dtype(x.weight.dtype, device)

        def scratch(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, stride, device=device, dtype=dtype)[:, :V]

        overlapping = 2 if x.group and m < N else 1  # chunks whose logits exist at a time
        self.planes = [scratch(self.sides * m, x.dtype) for _ in range(overlapping)]
        self.narrow = scratch(self.sides * m, narrow) if narrow != x.dtype and any(self.wanted) else None
        self.anchor_plane = scratch(m, narrow) if self.wanted.anchor_apart else None
        self.decorrelation = self.stats.new_empty(m) if planning.decorrelate(x) else None

    def chunks(self) -> Iterator[slice]:
        """Return the slices of tokens, one per chunk."""
        return matmul.blocks(self.x.hidden.shape[0], self.tokens)

    def logits(self, rows: slice, buffer: int = 0) -> Chunk:
        """Multiply a chunk's hidden states with the heads."""
        x, planes, m = self.x, self.planes[buffer], rows.stop - rows.start

        def taken(*sides: Tensor) -> Tensor:
            here = [side[rows] for side in sides]
            if self.inactive is not None:
                return planning.active_rows(here, self.inactive[rows])
            return torch.cat(here) if len(here) > 1 else here[0]

        gradients = (planes if self.narrow is None else self.narrow)[: self.sides * m]
        teacher = x.teacher_hidden
        inputs = taken(x.hidden, teacher) if teacher is not None and x.projected else taken(x.hidden)
        if x.valid_vocab:
            matmul.logits(inputs, self.weight, planes[: inputs.shape[0]])
        if teacher is None:
            return Chunk(rows, inputs, planes[:m], None, gradients)
        z_t = planes[m : 2 * m, : x.kd_vocab]
        if x.teacher_weight is not None and x.kd_vocab:
            matmul.logits(taken(teacher), x.teacher_weight[: x.kd_vocab], z_t)
        return Chunk(rows, inputs, planes[:m], z_t, gradients)

    def buffers(self, chunk: Chunk) -> GradientBuffers:
        """Return the buffers for the gradients of the chunk's logits."""
        m, wanted = chunk.tokens, self.wanted
        return GradientBuffers(
            student=chunk.gradients[:m] if wanted.student else None,
            teacher=chunk.gradients[m:] if wanted.teacher or wanted.anchor else None,
            anchor=None if self.anchor_plane is None else self.anchor_plane[:m],
            decorrelation=None if self.decorrelation is None else self.decorrelation[:m],
            bias=self.d_bias[: self.x.valid_vocab] if self.x.need_bias else None,
        )

    def weight_gradient(self, chunk: Chunk) -> None:
        """Write or add the chunk's part of dW; then add the anchor's gradient, which can no longer reach W, to the
        teacher's."""
        x, m, g, inputs = self.x, chunk.tokens, chunk.gradients, chunk.inputs
        if x.need_weight:
            if self.decorrelation is not None:
                planning.decorrelate_inputs(inputs, self.decorrelation[:m])
            to_weight = slice(0, 2 * m if self.wanted.teacher_to_weight else m)
            if x.valid_vocab:
                d_weight = self.d_weight[: x.valid_vocab]
                matmul.weight_gradient(g[to_weight], inputs[to_weight], d_weight, add=chunk.rows.start > 0)
        if self.anchor_plane is not None:
            g[m:].add_(self.anchor_plane[:m])

    def input_gradients(self, chunk: Chunk) -> Tensor | None:
        """Return dX (m or 2m, H) of those of the student's and the teacher's rows that need it; None = neither."""
        x, m = self.x, chunk.tokens
        to_input = slice(0 if x.need_hidden else m, 2 * m if self.teacher_input else m)
        if to_input.start >= to_input.stop:
            return None
        d_inputs = self.stats.new_empty(to_input.stop - to_input.start, x.hidden.shape[1])
        if not x.valid_vocab:  # a slice of the vocabulary may be empty
            return d_inputs.zero_()
        matmul.input_gradient(chunk.gradients[to_input], self.weight, d_inputs)
        if self.teacher_input and self.decorrelation is not None:
            d_inputs[m:].addcmul_(self.decorrelation[:m, None], d_inputs[:m], value=-1)
        return d_inputs

    def store(self, rows: slice, d_inputs: Tensor | None) -> None:
        """Store dX of the chunk `rows`."""
        if d_inputs is None:
            return
        m = rows.stop - rows.start
        if self.x.need_hidden:
            self.d_hidden[rows] = d_inputs[:m]
        if self.teacher_input:
            self.d_teacher[rows] = d_inputs[-m:]

    def result(self) -> Result:
        """Return loss, statistics and gradients after the last chunk."""
        gradients = (self.d_hidden, self.d_weight, self.d_bias, self.d_teacher)
        return Result(planning.total(self.x, self.stats), self.stats, *gradients, self.scale, self.stats.new_empty(0))


def on_active_rows(x: Problem, run: Callable[[Problem], Result]) -> Result:
    """Return `run(x)`. On a CPU, where reading the mask is free, run only active rows and return zeros for the others;
    a GPU multiplies those by zero instead."""
    if not planning.on_cpu(x.hidden.device, x.engine):
        return run(x)
    N, index = x.hidden.shape[0], x.active.nonzero().squeeze(1)
    if index.numel() == N:
        return run(x)
    kept = {name: getattr(x, name) for name in PER_TOKEN}
    kept = {name: tensor.index_select(0, index) for name, tensor in kept.items() if tensor is not None}
    result = run(replace(x, **kept, coefficients=x.coefficients.index_select(1, index)))

    def spread(tensor: Tensor, dim: int = 0) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = N
        return tensor.new_zeros(shape).index_copy_(dim, index, tensor)

    return result._replace(
        loss=spread(result.loss) if x.per_row else result.loss,
        stats=spread(result.stats, 1),
        hidden=spread(result.hidden) if x.need_hidden else result.hidden,
        teacher_hidden=spread(result.teacher_hidden) if x.need_teacher_hidden else result.teacher_hidden,
    )
