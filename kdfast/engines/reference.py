"""The specification: eager plain torch on full logits, with gradients of any order by autograd.

Logits are computed in fp32 (float64 for float64 inputs), whatever the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Container
from math import inf

import torch
from torch import Tensor

from kdfast.ops import autocast, collectives, sparse
from kdfast.ops.problem import AGREEMENT, ANCHOR, CE, KD, STUDENT_ENTROPY, TEACHER_ENTROPY, Problem


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the loss, () or (N,), and statistics (6, N) of `problem`."""
    with autocast.disabled(problem.hidden.device):
        return _run(problem)


def _run(x: Problem) -> tuple[Tensor, Tensor]:
    off = ~x.active[:, None]  # an inactive row's values, which may be NaN, must not reach a sum
    z_s = _through_the_students_head(x, x.hidden.masked_fill(off, 0), fixed=False)
    rows: dict[int, Tensor] = {}  # statistic → (N,)
    if x.want_metrics:
        rows[STUDENT_ENTROPY] = _entropy(z_s)
    if x.use_ce:
        assert x.labels is not None
        rows[CE] = _cross_entropy(z_s, x.labels)

    off_kd = _left_out(x)
    shared = _counted(x, _masked(z_s[:, : x.kd_size], off_kd))
    if x.sparse:
        rows[KD] = _sparse(x, shared)
        if x.want_metrics:
            rows[AGREEMENT] = (shared.argmax(-1) == sparse.best(x)).to(x.dtype)
    elif x.has_teacher:
        h_t = None if x.teacher_hidden is None else x.teacher_hidden.masked_fill(off, 0)
        z_t = _counted(x, _teacher_logits(x, h_t))
        of_kd = _masked(z_t, off_kd)
        log_p = _over(of_kd, x.teacher_temperature).log_softmax(-1)
        log_q = _over(shared, x.temperature).log_softmax(-1)
        rows[KD] = x.divergence.pointwise(log_p, log_q).sum(-1)
        if x.use_anchor:
            assert h_t is not None
            assert x.anchor_targets is not None
            rows[ANCHOR] = _cross_entropy(_through_the_students_head(x, h_t, fixed=True), x.anchor_targets)
        if x.want_metrics:
            rows[TEACHER_ENTROPY] = _entropy(z_t if x.projected else of_kd)
            rows[AGREEMENT] = (shared.argmax(-1) == of_kd.argmax(-1)).to(x.dtype)

    loss = torch.zeros(x.hidden.shape[0], device=x.hidden.device, dtype=x.dtype) + _no_gradient(x, rows)
    for term in (KD, CE, ANCHOR):
        if term in rows:
            counts = x.coefficients[term] != 0
            loss = loss + torch.where(counts, x.coefficients[term] * torch.where(counts, rows[term], 0.0), 0.0)
    stats = torch.stack([rows.get(row, torch.zeros_like(loss)).detach() for row in range(6)])
    return (loss if x.per_row else loss.sum()), stats


def _no_gradient(x: Problem, terms: Container[int]) -> Tensor:
    """Return a 0 that gives tensors which no term depends on a gradient of zero, if they require one."""
    asked = [x.teacher_hidden]
    if not any(term in terms for term in (KD, CE, ANCHOR)):  # with a term these have one, and W's is too large for two
        asked += [x.hidden, x.weight, x.bias]
    zero = torch.zeros((), device=x.hidden.device, dtype=x.dtype)
    return sum((t[:0].sum().to(x.dtype) for t in asked if t is not None and t.requires_grad), zero)


def _counted(x: Problem, z: Tensor) -> Tensor:
    """Return the KD term's logits (N, V), detached in rows that it does not count, which may hold anything."""
    return torch.where((x.coefficients[KD] != 0)[:, None], z, z.detach())


def _left_out(x: Problem) -> Tensor | None:
    """Return a mask (kd_size,), True for ids that kd_mask takes out of the KD term; None without one."""
    if x.kd_mask is None:
        return None
    here = x.kd_mask[None, : x.kd_vocab].to(x.dtype)
    return collectives.gather_from_group(here, x.group, x.vocab_start)[0] == 0


def _masked(z: Tensor, off: Tensor | None) -> Tensor:
    return z if off is None else z.masked_fill(off, -inf)


def _teacher_logits(x: Problem, hidden: Tensor | None) -> Tensor:
    """Return the teacher's logits (N, kd_size)."""
    if x.teacher_logits is not None:
        off = ~x.active[:, None]
        given = x.dense_teacher(slice(None)).to(x.dtype)
        return collectives.gather_from_group(given, x.group, x.vocab_start).masked_fill(off, 0)
    assert hidden is not None
    if x.teacher_weight is not None:
        head = (x.teacher_weight, x.teacher_bias, x.teacher_logit_scale, x.teacher_softcap)
        return _logits(x, hidden, *head, x.kd_vocab)
    if x.teacher_grad == "none":
        hidden = hidden.detach()
    return _through_the_students_head(x, hidden, fixed=x.teacher_grad != "full")


def _through_the_students_head(x: Problem, hidden: Tensor, *, fixed: bool) -> Tensor:
    """Return the student's head's logits (N, vocab_size) of `hidden`. fixed: no gradient reaches the head."""
    weight, bias = x.weight, x.bias
    if fixed:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return _logits(x, hidden, weight, bias, x.logit_scale, x.softcap, x.valid_vocab)


def _sparse(x: Problem, z: Tensor) -> Tensor:
    """Return the divergence (N,) of a teacher of K entries, made dense over the vocabulary plus, for a bucket, one more
    category."""
    nothing = torch.full_like(z, -inf, requires_grad=False).detach()
    log_p = nothing.scatter(1, *x.entries)
    within = log_p > -inf
    if x.teacher_tail == "bucket":
        assert x.teacher_log_tail is not None
        tau = sparse.temperature(x)  # the masses' temperature
        log_q = _over(z, tau).log_softmax(-1)
        empty = log_q.masked_fill(within, -inf).isneginf().all(dim=-1, keepdim=True)
        rest = log_q.masked_fill(within & ~empty, -inf).logsumexp(dim=-1, keepdim=True).masked_fill(empty, -inf)
        log_q = torch.cat([log_q.masked_fill(~within, -inf), rest], dim=-1)
        power = x.temperature / tau
        log_p = _over(torch.cat([log_p, x.teacher_log_tail[:, None]], dim=-1), power).log_softmax(-1)
        log_q = _over(log_q, power).log_softmax(-1)
    else:
        z = _over(z, x.temperature)
        if x.teacher_tail == "renormalize_both":
            z = z.masked_fill(~within & within.any(dim=-1, keepdim=True), -inf)  # all −inf would give NaN gradients
        if x.teacher_tail != "none":
            log_p = (log_p if x.teacher_tempered else _over(log_p, x.temperature)).log_softmax(-1)
        log_q = z.log_softmax(-1)
    return x.divergence.pointwise(log_p, log_q).sum(-1)


def _logits(
    x: Problem, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, vocab: int
) -> Tensor:
    """Return softcap·tanh(scale·(h Wᵀ + b)/softcap) of the first `vocab` entries, gathered from all processes."""
    hidden = collectives.copy_to_group(hidden, x.group)
    z = hidden.to(x.dtype) @ weight[:vocab].to(x.dtype).T
    if bias is not None:
        z = z + bias[:vocab].to(x.dtype)
    z = z * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return collectives.gather_from_group(z, x.group, x.vocab_start)


def _over(z: Tensor, tau: Tensor) -> Tensor:
    """Return z/τ, with a derivative with respect to τ that is 0 where z is −inf."""
    nothing = z == -inf
    return (z.masked_fill(nothing, 0) / tau).masked_fill(nothing, -inf)


def _cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    return -z.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def _entropy(z: Tensor) -> Tensor:
    """Return −Σ p log p with 0·log 0 = 0."""
    log_p = z.detach().log_softmax(-1)
    return -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
