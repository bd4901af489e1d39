"""The row work of the `triton_chunked` engine: `row_kernel.py`, one launch per chunk, three for a sparse teacher.

Also turns a Problem into the arguments of the kernels' launchers, for all engines that use them.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kdfast.engines import triton_sparse
from kdfast.engines.chunk_loop import GradientBuffers
from kdfast.kernels import topk_teacher
from kdfast.kernels.launch import Gradients, Heads, Term
from kdfast.kernels.logit_gradients import add_column_sums
from kdfast.kernels.online_softmax import CONSTANTS, SIDE, STATE
from kdfast.kernels.row_kernel import Chunk, row_gradients, row_states, solve_rows
from kdfast.kernels.tiled_forward import combine
from kdfast.ops import matmul, sparse
from kdfast.ops.planning import GradFlags, grad_flags
from kdfast.ops.problem import Problem


class TritonRows:
    """The row work in Triton kernels, called as `chunked.ROWS` specifies."""

    def __init__(self, x: Problem, scale: Tensor, wanted: GradFlags, stats: Tensor) -> None:
        self.x, self.scale, self.wanted, self.stats = x, scale, wanted, stats
        self.heads, self.term = heads_of(x), term_of(x, scale)

    def __call__(self, rows: slice, z_s: Tensor, z_t: Tensor | None, out: GradientBuffers) -> None:
        # the chunk loop's scratch has whole padded rows
        chunk = Chunk(self.heads, self.term, z_s, z_t, width=z_s.stride(0), start=rows.start)
        if self.x.sparse:
            self._sparse(rows, chunk, out.student)
        else:
            grads = Gradients.of(out.student, out.teacher, out.anchor, out.decorrelation)
            solve_rows(chunk, grads, stats=self.stats)
        bias_gradients(out, self.wanted)

    def _sparse(self, rows: slice, chunk: Chunk, grad: Tensor | None) -> None:
        x, z = self.x, chunk.z_s
        assert x.teacher_indices is not None
        at = triton_sparse.entries(x, rows, z.gather(1, triton_sparse.addresses(x, rows)))
        states = z.new_empty(1, count_of_states(x), z.shape[0])
        with_bits = replace(chunk, term=replace(self.term, bits=triton_sparse.bits(x, rows)))
        row_states(with_bits, states, decorrelate=False)
        constants = combine_states(x, self.term, rows, states, stats=self.stats, decorrelate=False)
        found = triton_sparse.solve(x, rows, at, constants, self.scale)
        triton_sparse.record(x, rows, found, self.stats)
        if grad is None:
            return
        row_gradients(chunk, Gradients.of(grad), constants=triton_sparse.outside(x, found, constants))
        inside = triton_sparse.inside(x, rows, at, found, constants, self.scale, grad.dtype)
        topk_teacher.write(grad, at.indices, inside)


def count_of_states(x: Problem) -> int:
    """Return how many numbers per row `row_states` writes."""
    return STATE.value + SIDE.value * (x.truncated + x.further)


def combine_states(x: Problem, term: Term, rows: slice, states: Tensor, *, stats: Tensor, decorrelate: bool) -> Tensor:
    """Return constants and decorrelation (12, m) of the rows from states (slices, ≥ numbers, m); fill their stats."""
    constants = states.new_empty(CONSTANTS.value + 1, states.shape[-1])
    beyond = states[:, STATE.value : count_of_states(x)] if x.truncated else None
    teacher = x.teacher_hidden is not None or x.teacher_logits is not None or (x.sparse and sparse.has_rest(x))
    parts, out = states[:, : STATE.value], {"stats": stats[:, rows], "constants": constants}
    how = {"decorrelate": decorrelate, "teacher": teacher, "further": x.further}
    combine(term_of_rows(term, rows), parts, beyond, **out, **how)
    return constants


def term_of_rows(term: Term, rows: slice) -> Term:
    """Return the loss of some of the rows, as `combine` needs it."""
    return replace(term, active=term.active[rows], coefficients=term.coefficients[:, rows])


def bias_gradients(out: GradientBuffers, wanted: GradFlags) -> None:
    """Add a chunk's bias gradients to `out.bias`."""
    if out.bias is None:
        return
    if out.student is not None:
        weights = None if out.decorrelation is None else 1 - out.decorrelation
        add_column_sums(out.student, weights, out.bias)
    if wanted.teacher_to_weight and out.teacher is not None:
        add_column_sums(out.teacher, None, out.bias)


def heads_of(x: Problem) -> Heads:
    """Return the problem's heads, as arguments of the kernels' launchers."""
    bias = None if x.bias is None else x.bias.contiguous()
    own_bias = None if x.teacher_bias is None else x.teacher_bias.contiguous()
    return Heads(
        hidden=x.hidden,
        weight=x.weight,
        bias=bias,
        logit_scale=x.logit_scale,
        softcap=x.softcap,
        teacher_hidden=x.teacher_hidden,
        teacher_weight=x.teacher_weight,
        teacher_bias=bias if x.projected else own_bias,
        teacher_logit_scale=x.teacher_logit_scale,
        teacher_softcap=x.teacher_softcap,
        teacher_logits=x.teacher_logits,
        offsets=None if x.teacher_logits is None else x.dense_teacher_offsets(),
        vocab=x.valid_vocab,
        kd_vocab=x.kd_vocab,
        tf32=matmul.tf32(x.hidden.device),
        truncated=x.truncated,
        mask=x.kd_mask,
    )


def term_of(x: Problem, scale: Tensor) -> Term:
    """Return the problem's loss, as an argument of the kernels' launchers; scale () divides gradients."""
    want = grad_flags(x)  # also with per-row losses, whose statistics serve a later backward
    numbers = [*x.divergence_parameters, 0.0, 0.0]
    return Term(
        divergence="sparse" if x.sparse else x.divergence_name,
        parameter=numbers[0],
        second=numbers[1],
        temperature=sparse.temperature(x) if x.sparse else x.temperature,
        coefficients=x.coefficients,
        scale=scale,
        active=x.active,
        labels=x.local(x.labels) if x.use_ce else None,
        targets=x.local(x.anchor_targets) if x.use_anchor else None,
        ce_gradient=want.student and x.ce_term,
        teacher_gradient=want.teacher,
        anchor_gradient=want.anchor,
        metrics=x.want_metrics,
        teacher_temperature=None if x.sparse else x.teacher_temperature,
        precise=matmul.gradient_dtype(x.weight.dtype, x.weight.device) == x.dtype,
    )
