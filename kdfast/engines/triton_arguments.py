"""A Problem as the kernels' launchers want it: the heads that make logits, and the loss that is taken of them."""

from __future__ import annotations

from torch import Tensor

from kdfast.kernels.launch import Heads, Term
from kdfast.ops import matmul, sparse
from kdfast.ops.planning import grad_flags
from kdfast.ops.problem import Problem


def heads_of(x: Problem) -> Heads:
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
    )


def term_of(x: Problem, scale: Tensor) -> Term:
    want = grad_flags(x)  # with per-row losses too: what the statistics must know of a later backward
    return Term(
        divergence="sparse" if x.sparse else x.divergence_name,
        parameter=x.divergence_parameters[0] if x.divergence_parameters else 0.0,
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
    )
