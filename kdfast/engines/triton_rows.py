"""The row work of the `triton_chunked` engine: one launch a chunk, `kdfast.kernels.rows`."""

from __future__ import annotations

from torch import Tensor

from kdfast.engines.planning import Wanted
from kdfast.engines.row_work import Buffers
from kdfast.kernels.column_sums import add_column_sums
from kdfast.kernels.rows import solve_rows
from kdfast.problem import Problem


def solve(
    x: Problem,
    rows: slice,
    z_s: Tensor,
    z_t: Tensor | None,
    *,
    scale: Tensor,
    wanted: Wanted,
    stats: Tensor,
    out: Buffers,
) -> None:
    """Fill `stats[:, rows]` (6, N) and the gradient buffers of `x`'s rows `rows` from their logits."""
    bias = None if x.bias is None else x.bias.contiguous()
    own_bias = None if x.teacher_bias is None else x.teacher_bias.contiguous()
    solve_rows(
        z_s,
        z_t,
        width=z_s.stride(0),  # the chunk loop's scratch: whole padded rows
        start=rows.start,
        bias=bias,
        teacher_bias=bias if x.projected else own_bias,
        logit_scale=x.logit_scale,
        softcap=x.softcap,
        teacher_logit_scale=x.teacher_logit_scale,
        teacher_softcap=x.teacher_softcap,
        labels=x.labels if x.use_ce else None,
        targets=x.anchor_targets if x.use_anchor else None,
        active=x.active,
        coefficients=x.coefficients,
        temperature=x.temperature,
        scale=scale,
        divergence=x.divergence_name,
        parameter=x.divergence_parameters[0] if x.divergence_parameters else 0.0,
        ce_gradient=wanted.student and x.ce_term,
        teacher_gradient=wanted.teacher,
        anchor_gradient=wanted.anchor,
        metrics=x.want_metrics,
        stats=stats,
        grad_s=out.student,
        grad_t=out.teacher,
        grad_a=out.anchor,
        mix=out.mix,
    )
    if out.bias is None:
        return
    if out.student is not None:
        weights = None if out.mix is None else 1 - out.mix
        add_column_sums(out.student, weights, out.bias)
    if wanted.teacher_to_weight and out.teacher is not None:
        add_column_sums(out.teacher, None, out.bias)
