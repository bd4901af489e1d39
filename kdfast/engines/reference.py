"""The specification: eager, plain torch, gradients (of any order) by autograd. Whole logits, any dtype.

Logits are computed in fp32 (float64 for float64 inputs), whatever the inputs' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.problem import AGREEMENT, ANCHOR, CE, KD, STUDENT_ENTROPY, TEACHER_ENTROPY, Problem


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """(loss () or (N,), stats (6, N)) of `problem`."""
    with torch.autocast(problem.hidden.device.type, enabled=False):
        return _run(problem)


def _run(x: Problem) -> tuple[Tensor, Tensor]:
    off = ~x.active[:, None]  # whatever an inactive row holds, NaN included, must not reach a sum
    z_s = _logits(x, x.hidden.masked_fill(off, 0), x.weight, x.bias, x.logit_scale, x.softcap)
    rows: dict[int, Tensor] = {}  # statistic → (N,)
    if x.want_metrics:
        rows[STUDENT_ENTROPY] = _entropy(z_s)
    if x.use_ce:
        assert x.labels is not None
        rows[CE] = _cross_entropy(z_s, x.labels)

    if x.teacher_hidden is not None:
        h_t = x.teacher_hidden.masked_fill(off, 0)
        fixed_weight, fixed_bias = x.weight.detach(), None if x.bias is None else x.bias.detach()
        if x.teacher_weight is not None:
            z_t = _logits(x, h_t, x.teacher_weight, x.teacher_bias, x.teacher_logit_scale, x.teacher_softcap)
        elif x.teacher_grad == "full":
            z_t = _logits(x, h_t, x.weight, x.bias, x.logit_scale, x.softcap)
        else:
            h_kd = h_t if x.teacher_grad == "projector" else h_t.detach()
            z_t = _logits(x, h_kd, fixed_weight, fixed_bias, x.logit_scale, x.softcap)
        log_p = (z_t / x.temperature).log_softmax(-1)
        log_q = (z_s / x.temperature).log_softmax(-1)
        rows[KD] = x.divergence.pointwise(log_p, log_q).sum(-1)
        if x.use_anchor:
            assert x.anchor_targets is not None
            z_a = _logits(x, h_t, fixed_weight, fixed_bias, x.logit_scale, x.softcap)
            rows[ANCHOR] = _cross_entropy(z_a, x.anchor_targets)
        if x.want_metrics:
            rows[TEACHER_ENTROPY] = _entropy(z_t)
            rows[AGREEMENT] = (z_s.argmax(-1) == z_t.argmax(-1)).to(x.dtype)

    loss = torch.zeros(x.hidden.shape[0], device=x.hidden.device, dtype=x.dtype)
    for term in (KD, CE, ANCHOR):
        if term in rows:
            counts = x.coefficients[term] != 0
            loss = loss + torch.where(counts, x.coefficients[term] * torch.where(counts, rows[term], 0.0), 0.0)
    stats = torch.stack([rows.get(row, torch.zeros_like(loss)).detach() for row in range(6)])
    return (loss if x.per_row else loss.sum()), stats


def _logits(
    x: Problem, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """softcap·tanh(scale·(h Wᵀ + b)/softcap) over the valid vocabulary, (N, valid_vocab)."""
    z = hidden.to(x.dtype) @ weight[: x.valid_vocab].to(x.dtype).T
    if bias is not None:
        z = z + bias[: x.valid_vocab].to(x.dtype)
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    return -z.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def _entropy(z: Tensor) -> Tensor:
    """−Σ p log p with 0·log 0 = 0."""
    log_p = z.detach().log_softmax(-1)
    return -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
