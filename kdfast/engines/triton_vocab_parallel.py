"""The row work of the `triton_chunked` engine in the steps of `vocab_parallel.py`: one launch per step.

Processes exchange the states of `kernels/online_softmax.py`, which the tiled engine's `combine` merges.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.engines import triton_sparse
from kdfast.engines.chunk_loop import GradientBuffers
from kdfast.engines.triton_rows import (
    bias_gradients,
    combine_states,
    count_of_states,
    heads_of,
    term_of,
    term_of_rows,
)
from kdfast.kernels import topk_teacher
from kdfast.kernels.launch import Gradients, Term
from kdfast.kernels.online_softmax import LOWEST, SIDE, STATE, TERMS, Side
from kdfast.kernels.row_kernel import Chunk, row_gradients, row_states, row_terms
from kdfast.kernels.tiled_forward import combine
from kdfast.ops import matmul
from kdfast.ops.planning import GradFlags, decorrelate
from kdfast.ops.problem import Problem

ARGMAX = Side._fields.index("argmax")


class Constants(NamedTuple):
    rows: Tensor  # (12, m): `RowConstants` of `kernels/online_softmax.py`, then `decorrelation`
    inside: Tensor | None = None  # (m, K): gradients at a sparse teacher's entries


class TritonVocabParallelRows:
    """`kdfast.engines.vocab_parallel.VocabParallelRows`, with Triton kernels."""

    def __init__(self, x: Problem, scale: Tensor, wanted: GradFlags, stats: Tensor) -> None:
        self.x, self.scale, self.wanted, self.stats = x, scale, wanted, stats
        self.heads, self.term, self.decorrelate = heads_of(x), term_of(x, scale), decorrelate(x)
        self.dtype = matmul.gradient_dtype(x.weight.dtype, x.weight.device)
        self.second_pass = self.heads.teacher and self.term.entry.base == ""

    def update(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> Tensor:
        x, m = self.x, rows.stop - rows.start
        states, term, entries = z_s.new_empty(count_of_states(x), m), self.term, None
        if x.sparse:
            products = z_s.new_zeros(triton_sparse.addresses(x, rows).shape)
            if x.valid_vocab:
                products = z_s.gather(1, triton_sparse.addresses(x, rows))
            entries = triton_sparse.own(x, rows, triton_sparse.entries(x, rows, products).z).t()
            term = replace(term, bits=triton_sparse.bits(x, rows))
        if x.valid_vocab:
            row_states(self._chunk(rows, z_s, z_t, term), states, decorrelate=self.decorrelate)
        else:
            empty_states(states)
        number_from(x, states)
        return states if entries is None else torch.cat([states, entries])

    def merge(self, rows: slice, states: Tensor) -> Constants:
        x = self.x
        constants = combine_states(x, self.term, rows, states, stats=self.stats, decorrelate=self.decorrelate)
        if not x.sparse:
            return Constants(constants)
        at = triton_sparse.entries_of(x, rows, states[:, count_of_states(x) :].sum(dim=0).t().contiguous())
        found = triton_sparse.solve(x, rows, at, constants, self.scale)
        triton_sparse.record(x, rows, found, self.stats)
        inside = triton_sparse.inside(x, rows, at, found, constants, self.scale, self.dtype)
        return Constants(triton_sparse.outside(x, found, constants), inside)

    def terms(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants) -> Tensor:
        out = z_s.new_zeros(TERMS.value, z_s.shape[0])
        if self.x.kd_vocab:
            chunk = self._chunk(rows, z_s, z_t, self.term)
            row_terms(chunk, out, constants=constants.rows, decorrelate=self.decorrelate)
        return out

    def merge_terms(self, rows: slice, terms: Tensor, constants: Constants) -> Constants:
        term, out = term_of_rows(self.term, rows), {"stats": self.stats[:, rows], "constants": constants.rows}
        combine(term, terms, None, **out, decorrelate=self.decorrelate, teacher=True, second=True)
        return constants

    def gradients(
        self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants, out: GradientBuffers
    ) -> None:
        if out.decorrelation is not None:
            out.decorrelation.copy_(constants.rows[-1])
        if not self.x.valid_vocab:
            return
        grads = Gradients.of(out.student, out.teacher, out.anchor, out.decorrelation)
        row_gradients(self._chunk(rows, z_s, z_t, self.term), grads, constants=constants.rows)
        if constants.inside is not None and out.student is not None and self.x.teacher_indices is not None:
            topk_teacher.write(out.student, self.x.teacher_indices[rows], constants.inside, self.x.vocab_start)
        bias_gradients(out, self.wanted)

    def _chunk(self, tokens: slice, z_s: Tensor, z_t: Tensor | None, term: Term) -> Chunk:
        heads = self.heads
        if not self.x.kd_vocab:  # the teacher's vocabulary ends before this slice; an empty tensor has no address
            heads, z_t = heads.student_alone(), None
        return Chunk(heads, term, z_s, z_t, width=z_s.stride(0), start=tokens.start)


def empty_states(states: Tensor) -> None:
    """Fill states (…, numbers, rows) with those of an empty vocabulary."""
    states.zero_()
    for first in (0, SIDE.value, STATE.value, STATE.value + SIDE.value):
        if first < states.shape[-2]:
            states[..., first, :] = LOWEST.value


def number_from(x: Problem, states: Tensor) -> None:
    """Turn the argmaxes in states (…, numbers, rows) into ids of the whole vocabulary."""
    if x.want_metrics and x.vocab_start:
        for side in (0, SIDE.value):
            states[..., side + ARGMAX, :] += x.vocab_start
