"""The engine `triton_tiled`: logits live in registers; nothing of size N × V is ever written.

    statistics   kdfast.kernels.tiled_forward: row constants, losses, metrics       2u; 4u with a second pass
    then for each slab of the vocabulary, w entries wide:
    G  (2N, w)   kdfast.kernels.tiled_backward: logits recomputed, their gradients             2u
    dW (w, H)  = Gᵀ · [h_s; h_p]   one product, complete                                        2u
    dX (2N, H) += G · W            one product, accumulated in fp32                             2u

That is 8u, compared with the chunked engine's 6u. With per-row losses the forward stops after the statistics and keeps
12 numbers per row, from which the backward continues with the slabs: 8u again, as many as the chunked engine then.

Memory beyond inputs and gradients: a slab of gradients and its dW within `scratch_bytes`, dX in fp32, and one more dW
(in bf16 for bf16, else in fp32). A sparse teacher whose rest is needed takes one bit per entry of the vocabulary, N·V/8
bytes. Two runs give the same bits.

If each process has a slice of the vocabulary, their states are gathered once (twice if the divergence takes the
statistics twice), a sparse teacher's entries are summed once, and so is dX as a whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdfast.engines import triton_sparse
from kdfast.engines.triton_rows import heads_of, term_of
from kdfast.engines.triton_vocab_parallel import number_from
from kdfast.kernels import topk_teacher
from kdfast.kernels.block_sizes import row_of
from kdfast.kernels.launch import Gradients, Heads, Term
from kdfast.kernels.logit_gradients import add_column_sums
from kdfast.kernels.online_softmax import CONSTANTS, STATE, TERMS
from kdfast.kernels.tiled_backward import slab_gradients
from kdfast.kernels.tiled_forward import combine, config_of, partial_states, rest_of, statistics
from kdfast.ops import collectives, matmul
from kdfast.ops.planning import (
    active_rows,
    decorrelate,
    decorrelate_inputs,
    grad_flags,
    gradient_buffer,
    gradient_scale,
    slab_width,
    total,
)
from kdfast.ops.problem import Problem, Result


def run(x: Problem, rows: Tensor | None = None) -> Result:
    """Return loss, statistics and scaled gradients of `x`. rows: an earlier Result's, to use instead of statistics."""
    N, H = x.hidden.shape
    scale = gradient_scale(x)
    heads, term = heads_of(x), term_of(x, scale)
    stats = torch.zeros((6, N), device=x.hidden.device, dtype=x.dtype)
    fresh = rows is None
    if rows is None:
        rows = stats.new_empty(CONSTANTS.value + 1, N)
        bits = triton_sparse.bits(x, slice(None)) if x.sparse else None
        if x.group:
            _statistics_of_all(x, heads, replace(term, bits=bits), stats, rows)
        else:
            statistics(heads, replace(term, bits=bits), stats=stats, constants=rows, decorrelate=decorrelate(x))
    kept = rows if x.row_constants else stats.new_empty(0)
    values: Tensor | None = None
    if x.sparse:
        rows, values = _sparse(x, rows, scale, stats if fresh else None)

    now = x.forward_problem()
    want = grad_flags(now)
    d_hidden = gradient_buffer(x, now.need_hidden, (N, H), N)
    d_weight = gradient_buffer(x, now.need_weight, x.weight.shape, x.valid_vocab if N else 0, x.weight_gradient_dtype)
    d_bias = gradient_buffer(x, now.need_bias, x.weight.shape[:1])
    d_teacher = gradient_buffer(x, now.need_teacher_hidden, (N, H), N if want.teacher or want.anchor else 0)
    if any(want) and N:
        _gradients(now, heads, term, rows, values, d_hidden, d_weight, d_bias, d_teacher)
    return Result(total(x, stats), stats, d_hidden, d_weight, d_bias, d_teacher, scale, kept)


def _statistics_of_all(x: Problem, heads: Heads, term: Term, stats: Tensor, rows: Tensor) -> None:
    """Fill `stats` and `rows` as `statistics` does, if each process has a slice of the vocabulary: gather their partial
    states, then merge them alike on all. One gather, two if a second pass is needed."""
    N, how = x.hidden.shape[0], {"decorrelate": decorrelate(x)}
    second = heads.teacher and term.entry.base == ""
    if N == 0:
        return
    config = config_of(heads, term, lambda c: partial_states(heads, term, **how, config=c))
    out = {"stats": stats, "constants": rows, **how}

    def merged(parts: Tensor, term: Term, teacher: bool, second: bool = False) -> Tensor:
        """Return the state (state, N) merged over this process's splits, whose number differs between processes."""
        state = stats.new_empty(TERMS.value if second else STATE.value, N)
        combine(term, parts, None, **out, teacher=teacher, second=second, merged=state)
        return state

    parts, beyond = partial_states(heads, term, **how, config=config)
    states = [merged(parts, term, heads.teacher)]
    number_from(x, states[0])
    if beyond is not None:
        states.append(merged(beyond, rest_of(term, heads), teacher=heads.further))
    both = collectives.all_gather(torch.stack(states), x.group).wait()
    rest = None if beyond is None else both[:, 1]
    combine(term, both[:, 0], rest, **out, teacher=heads.teacher, further=heads.further)
    if second:
        parts, _ = partial_states(heads, term, **how, config=config, constants=rows)
        sums = merged(parts, term, True, second=True)
        combine(term, collectives.all_gather(sums, x.group).wait(), None, **out, teacher=True, second=True)


def _sparse(x: Problem, rows: Tensor, scale: Tensor, stats: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows' constants for a sparse teacher's gradients, and the gradients at its entries (N, K).
    stats: to be completed, if the statistics have just been computed."""
    assert x.teacher_indices is not None
    every = slice(None)
    products = x.coefficients.new_zeros(x.teacher_indices.shape)
    if x.valid_vocab:
        topk_teacher.support_logits(x.hidden, x.weight, triton_sparse.addresses(x, every), products)
    at = triton_sparse.entries(x, every, products)
    if x.group:
        z = triton_sparse.own(x, every, at.z)
        at = triton_sparse.entries_of(x, every, collectives.all_reduce(z, x.group).wait())
    found = triton_sparse.solve(x, every, at, rows, scale)
    if stats is not None:
        triton_sparse.record(x, every, found, stats)
    dtype = matmul.gradient_dtype(x.weight.dtype, x.weight.device)
    return triton_sparse.outside(x, found, rows), triton_sparse.inside(x, every, at, found, rows, scale, dtype)


def _gradients(
    x: Problem, heads: Heads, term: Term, rows: Tensor, entries: Tensor | None, d_hidden: Tensor, d_weight: Tensor,
    d_bias: Tensor, d_teacher: Tensor,
) -> None:  # fmt: skip
    """Fill the d_* buffers; entries (N, K): gradients at a sparse teacher's entries."""
    (N, _), V = x.hidden.shape, x.valid_vocab
    want, decorrelation = grad_flags(x), rows[-1] if decorrelate(x) else None
    if not x.kd_vocab:  # the teacher's vocabulary ends before this slice
        heads = heads.student_alone()
    teacher = want.teacher or want.anchor
    sides = want.student + teacher
    dtype = matmul.gradient_dtype(x.weight.dtype, x.weight.device)
    tile = row_of(x.weight.device, x.weight.element_size(), N).gradients.block_v
    # bytes per vocabulary entry: its gradients, and its row of dW in fp32 before rounding
    per_entry = N * (sides + want.anchor_apart) * dtype.itemsize + x.need_weight * x.hidden.shape[1] * x.dtype.itemsize
    width = slab_width(max(1, V), per_entry, tile, x.scratch_bytes)
    planes = torch.empty(sides + want.anchor_apart, N, width, device=x.hidden.device, dtype=dtype)
    inputs = _inputs(x, decorrelation) if x.need_weight else None
    to_weight = slice(0, 2 * N if want.teacher_to_weight else N)
    teacher_input = x.need_teacher_hidden and teacher
    to_input = slice(N if want.student and not x.need_hidden else 0, sides * N if teacher_input else N)
    d_inputs = x.coefficients.new_empty(max(0, to_input.stop - to_input.start), x.hidden.shape[1])
    if not V:
        d_inputs.zero_()

    for first in range(0, V, width):
        ids = slice(first, min(first + width, V))
        slab = planes[..., : ids.stop - first]
        grads = Gradients.of(
            slab[0] if want.student else None,
            slab[int(want.student)] if teacher else None,
            slab[-1] if want.anchor_apart else None,
        )
        slab_gradients(heads, term, grads, constants=rows, first=first, decorrelate=decorrelation is not None)
        if entries is not None and x.teacher_indices is not None:
            topk_teacher.write(slab[0], x.teacher_indices, entries, x.vocab_start + first)
        g = planes[:sides].flatten(0, 1)[:, : ids.stop - first]
        if inputs is not None:
            matmul.weight_gradient(g[to_weight], inputs[to_weight], d_weight[ids])
        if x.need_bias:
            add_column_sums(g[:N], None if decorrelation is None else 1 - decorrelation, d_bias[ids])
            if want.teacher_to_weight:
                add_column_sums(g[N:], None, d_bias[ids])
        if want.anchor_apart:
            slab[1].add_(slab[-1])
        if d_inputs.numel():
            matmul.input_gradient(g[to_input], x.weight[ids], d_inputs, add=first > 0)

    if teacher_input and decorrelation is not None and x.need_hidden:
        d_inputs[-N:].addcmul_(decorrelation[:, None], d_inputs[:N], value=-1)
    if x.group and d_inputs.numel():
        collectives.all_reduce(d_inputs, x.group).wait()
    if x.need_hidden:
        d_hidden.copy_(d_inputs[:N])
    if teacher_input:
        d_teacher.copy_(d_inputs[-N:])


def _inputs(x: Problem, decorrelation: Tensor | None) -> Tensor:
    """Return the factor [h_s − decorrelation·h_p; h_p] (2N, H) of dW; only h_s unless the teacher is projected."""
    teacher = [x.teacher_hidden] if x.projected and x.teacher_hidden is not None else []
    inputs = active_rows([x.hidden, *teacher], ~x.active[:, None])
    if decorrelation is not None:
        decorrelate_inputs(inputs, decorrelation)
    return inputs
