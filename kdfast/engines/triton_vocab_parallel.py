"""The row work of the `triton_chunked` engine in the phases of `vocab_parallel.py`: one launch each.

What slices tell each other are the states of `kernels/online_softmax.py`, which the tiled engine's `combine` merges.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.engines import triton_sparse
from kdfast.engines.chunk_loop import GradientBuffers
from kdfast.engines.triton_arguments import heads_of, term_of
from kdfast.engines.triton_rows import bias_gradients
from kdfast.kernels import topk_teacher
from kdfast.kernels.launch import Term
from kdfast.kernels.online_softmax import LOWEST, PAIR, ROWS, SIDE, TERMS
from kdfast.kernels.row_kernel import solve_rows
from kdfast.kernels.tiled_forward import combine
from kdfast.ops import matmul
from kdfast.ops.planning import GradFlags, decorrelate
from kdfast.ops.problem import Problem

STATE = 2 * SIDE.value + PAIR.value
BEST = (4, SIDE.value + 4)  # of a state's numbers, ids in the slice


class Constants(NamedTuple):
    rows: Tensor  # (10, m): of `kernels/online_softmax.py`, then `mix`
    inside: Tensor | None = None  # (m, K): gradients at a sparse teacher's entries


class TritonVocabParallelRows:
    """`kdfast.engines.vocab_parallel.VocabParallelRows` on the device."""

    def __init__(self, x: Problem, scale: Tensor, wanted: GradFlags, stats: Tensor) -> None:
        self.x, self.scale, self.wanted, self.stats = x, scale, wanted, stats
        self.heads, self.term, self.decorrelate = heads_of(x), term_of(x, scale), decorrelate(x)
        self.dtype = matmul.gradient_dtype(x.weight.dtype, x.weight.device)
        self.second_pass = self.heads.teacher and self.term.entry.base == ""

    def update(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> Tensor:
        x, m = self.x, rows.stop - rows.start
        count = STATE + (SIDE.value if x.truncated else 0)
        states, term, entries = z_s.new_empty(count, m), self.term, None
        if x.sparse:
            products = z_s.new_zeros(triton_sparse.addresses(x, rows).shape)
            if x.valid_vocab:
                products = z_s.gather(1, triton_sparse.addresses(x, rows))
            entries = triton_sparse.own(x, rows, triton_sparse.entries(x, rows, products).z).t()
            term = replace(term, bits=triton_sparse.bits(x, rows))
        if x.valid_vocab:
            self._launch(rows, z_s, z_t, term, phase="fold", states=states, mixes=self.decorrelate)
        else:
            empty_states(states)
        number_from(x, states)
        return states if entries is None else torch.cat([states, entries])

    def merge(self, rows: slice, states: Tensor) -> Constants:
        x = self.x
        constants = Constants(states.new_empty(ROWS.value + 1, states.shape[-1]))
        parts = states[:, :STATE].contiguous()
        beyond: Tensor | None = None
        if x.truncated:  # the student's side alone, which is all that is read of it
            beyond = torch.zeros_like(parts)
            beyond[:, : SIDE.value] = states[:, STATE : STATE + SIDE.value]
        self._combine(rows, parts, beyond, constants)
        if not x.sparse:
            return constants
        at = triton_sparse.entries_of(x, rows, states[:, STATE:].sum(dim=0).t().contiguous())
        found = triton_sparse.solve(x, rows, at, constants.rows, self.scale)
        triton_sparse.record(x, rows, found, self.stats)
        inside = triton_sparse.inside(x, rows, at, found, constants.rows, self.scale, self.dtype)
        return Constants(triton_sparse.outside(x, found, constants.rows), inside)

    def terms(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants) -> Tensor:
        out = z_s.new_zeros(TERMS.value, z_s.shape[0])
        if self.x.kd_vocab:
            self._launch(
                rows, z_s, z_t, self.term, phase="terms", rows=constants.rows, states=out, mixes=self.decorrelate
            )
        return out

    def merge_terms(self, rows: slice, terms: Tensor, constants: Constants) -> Constants:
        self._combine(rows, terms, None, constants, second=True)
        return constants

    def gradients(
        self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants, out: GradientBuffers
    ) -> None:
        if out.decorrelation is not None:
            out.decorrelation.copy_(constants.rows[-1])
        if not self.x.valid_vocab:
            return
        grads = {"grad_s": out.student, "grad_t": out.teacher, "grad_a": out.anchor, "mix": out.decorrelation}
        self._launch(rows, z_s, z_t, self.term, phase="gradients", rows=constants.rows, **grads)
        if constants.inside is not None and out.student is not None and self.x.teacher_indices is not None:
            topk_teacher.write(out.student, self.x.teacher_indices[rows], constants.inside, self.x.vocab_start)
        bias_gradients(out, self.wanted)

    def _launch(self, tokens: slice, z_s: Tensor, z_t: Tensor | None, term: Term, **how: Any) -> None:
        heads = self.heads
        if not self.x.kd_vocab:  # the teacher's vocabulary has ended before this slice; an empty tensor has no address
            heads, z_t = heads.student_alone(), None
        chunk = {"width": z_s.stride(0), "start": tokens.start, "stats": self.stats}
        solve_rows(heads, term, z_s, z_t, **chunk, **{"grad_s": None, **how})

    def _combine(
        self, rows: slice, parts: Tensor, beyond: Tensor | None, constants: Constants, second: bool = False
    ) -> None:
        term = replace(self.term, active=self.term.active[rows], coefficients=self.term.coefficients[:, rows])
        combine(
            term,
            parts,
            beyond,
            stats=self.stats[:, rows],
            rows=constants.rows,
            mix=self.decorrelate,
            teacher=self.heads.teacher or self.x.teacher_tail == "bucket",
            second=second,
        )


def empty_states(states: Tensor) -> None:
    """Those of no entries, (…, numbers, rows)."""
    states.zero_()
    for first in (0, SIDE.value, STATE):
        if first < states.shape[-2]:
            states[..., first, :] = LOWEST.value


def number_from(x: Problem, states: Tensor) -> None:
    """The argmaxes as ids of the whole vocabulary."""
    if x.want_metrics and x.vocab_start:
        for best in BEST:
            states[..., best, :] += x.vocab_start
