r"""A teacher given as K log-probabilities per token: the arithmetic over its entries, shared by all engines.

The support of a row is its K ids. Divergences are homogeneous of degree one in (p, q) (`without_teacher` refuses the
others), so an id without teacher mass contributes f(0, q) = q·f(0, 1). Everything outside the support adds
f(0, 1)·(1 − Σ_support q), and the gradient with respect to those logits is one number per row times the student's
softmax. So an engine passes over the student's logits as for a cross entropy, and all that involves the teacher has
size (rows, K):

    tail="renormalize"  p = softmax(log_probs/τ) over the support
    tail="none"         p = exp(log_probs), whatever their sum, at τ = 1
    tail="bucket"       K + 1 categories on both sides at τ = 1, the last with all the remaining mass; both sides are
                        then raised to the power 1/τ and normalized. Zero at any τ exactly where they agree at τ = 1.
    tail="renormalize_both"  the same, with nothing in the last category on either side

With `tempered` the log-probabilities are already at τ: those of the support are normalized as they are, and the K + 1
categories are masses at τ.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.divergences import Divergence, log_ratio
from kdfast.inputs import SparseLogits
from kdfast.ops.problem import KD, Problem
from kdfast.ops.transforms import has_values


class Support(NamedTuple):
    """The divergence and its gradient with respect to the student's logits, from (rows, K) arithmetic."""

    value: Tensor  # (r,)
    inside: Tensor  # (r, K): the gradient at the support's ids
    outside: Tensor  # (r,): elsewhere it is outside · exp(z/τ' − log-sum-exp), that of the rest if `has_rest`


def known(indices: Tensor, vocab: int, mask: Tensor | None) -> Tensor:
    """Return a mask shaped like `indices`, True for ids that the KD term covers: below `vocab`, and True in `mask`."""
    indices = indices.long()  # a narrower type would compare modulo its range
    inside = (indices >= 0) & (indices < vocab)
    return inside if mask is None else inside & mask[torch.where(inside, indices, 0)]


def prepare(
    indices: Tensor, log_probs: Tensor, vocab: int, dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ids, ascending in each row, and log-probabilities of raw entries, (N, K) each.

    Ids that are not `known` get log-probability −inf, which means no entry. Entries with the same id add up, and each
    then holds the sum, so that writing to their id twice writes the same value; `counted` tells which one counts.
    """
    inside = known(indices, vocab, mask)
    log_probs = torch.where(inside, log_probs.to(dtype), -inf)
    spare = 0 if mask is None else mask[:vocab].to(torch.uint8).argmax()  # an id that the KD term covers
    # contiguous, because kernels read them row by row
    indices, order = torch.where(inside, indices.long(), spare).contiguous().sort(dim=-1, stable=True)
    log_probs = log_probs.gather(-1, order)
    first = counted(indices)
    if indices.device.type == "cpu" and has_values(indices) and bool(first.all()):
        return indices, log_probs
    reach = 1
    while reach < indices.shape[-1]:  # sum each run into its first entry, over windows of 1, 2, 4, … entries
        same = indices[..., :-reach] == indices[..., reach:]
        more = torch.where(same, log_probs[..., reach:], -inf)
        these = log_probs[..., :-reach]
        these = torch.where(more > -inf, torch.logaddexp(these, more), these)  # logaddexp(−inf, −inf) has no derivative
        log_probs = torch.cat([these, log_probs[..., -reach:]], dim=-1)
        reach *= 2
    return indices, _of_the_first(first, log_probs)


def without_entries(teacher: SparseLogits, vocab: int, mask: Tensor | None = None) -> Tensor:
    """Return a mask (*,), True for rows in which a softmax over the entries would be 0/0."""
    there = known(teacher.indices, vocab, mask) & (teacher.log_probs != -inf)
    return ~there.any(dim=-1) & (teacher.tail in ("renormalize", "renormalize_both"))


def counted(indices: Tensor) -> Tensor:
    """Return a mask (N, K), True for the first of each run of equal ids; ids ascend in each row."""
    first = torch.ones_like(indices, dtype=torch.bool)
    first[..., 1:] = indices[..., 1:] != indices[..., :-1]
    return first


def _of_the_first(first: Tensor, values: Tensor) -> Tensor:
    """Return `values` (N, K) with each replaced by that of the first entry in its run."""
    position = torch.where(first, torch.arange(first.shape[-1], device=first.device), 0).cummax(dim=-1).values
    return values.gather(-1, position)


def log_tail(
    teacher: SparseLogits, indices: Tensor, log_probs: Tensor, vocab: int, mask: Tensor | None = None
) -> Tensor | None:
    """Return the log of the mass on none of the ids, (N,), −inf if there is none; None if the tail is not a category.
    indices, log_probs (N, K) come from `prepare`. Mass on ids from `vocab` on counts as elsewhere; mass on ids outside
    `mask` does not, and a given log_tail must not contain it."""
    if teacher.tail not in ("bucket", "renormalize_both"):
        return None
    if teacher.tail == "renormalize_both":
        return log_probs.new_full(log_probs.shape[:1], -inf)
    inside = known(teacher.indices, vocab, None)
    given = teacher.log_probs.double()
    if teacher.log_tail is not None:
        tail = teacher.log_tail.double()
        if mask is None:
            tail = torch.cat([tail[..., None], torch.where(inside, -inf, given)], dim=-1).logsumexp(dim=-1)
    else:
        p = torch.where(inside, given, -inf).exp()
        # each log p is rounded by eps/2 of itself, so the sum of p may be off by eps/2 · Σ p·|log p|
        eps = torch.finfo(teacher.log_probs.dtype).eps
        error = (eps / 2 * torch.special.entr(p).sum(dim=-1)).clamp_min(min(eps, 2.0**-23))
        tail = torch.maximum(1 - p.sum(dim=-1), error).log()
    ids = vocab if mask is None else mask[:vocab].sum()
    everything = (counted(indices) & (log_probs > -inf)).sum(dim=-1) == ids
    return tail.reshape(-1).to(log_probs.dtype).masked_fill(everything, -inf)


def temperature(x: Problem) -> Tensor:
    """Return τ' (), the temperature of the student's softmax over the vocabulary: 1 for categories that are not
    tempered, whose masses are those at τ = 1."""
    categories = x.teacher_log_tail is not None
    return torch.ones_like(x.temperature) if categories and not x.teacher_tempered else x.temperature


def excluded(x: Problem) -> Tensor | None:
    """Return a mask (N, K), True for entries whose ids are not in the rest; None if no rest is needed."""
    if not has_rest(x):
        return None
    log_probs = x.entries[1]
    return log_probs > -inf if x.teacher_tail == "bucket" else torch.ones_like(log_probs, dtype=torch.bool)


def has_rest(x: Problem) -> bool:
    """Return whether the log-sum-exp of the student's logits outside the support is needed. It gives their mass to full
    relative precision, which 1 − Σ q does not; divergences with `centred_q`, such as forward KL, do without."""
    return x.teacher_tail == "bucket" or (x.teacher_tail in ("renormalize", "none") and not x.divergence.centred_q)


def best(x: Problem) -> Tensor:
    """Return the teacher's most probable id in each row, (N,)."""
    indices, log_probs = x.entries
    return indices.gather(-1, log_probs.argmax(dim=-1, keepdim=True)).squeeze(-1)


def solve(
    x: Problem, rows: slice, z: Tensor, m: Tensor, norm: Tensor, rest: Tensor | None, coefficient: Tensor
) -> Support:
    """Return the divergence and gradients of the rows `rows` of `x`.

    z (r, K): the student's logits at the support; m (r,): any number; norm (r,): log Σ_V exp((z − m)/τ') with τ' from
    `temperature`; rest (r,): the same outside the support, or None; coefficient (r,).
    """
    if x.teacher_tail == "renormalize_both":  # must not depend on other logits, of which m may be one
        return _categories(x, rows, z, torch.zeros_like(norm), torch.full_like(norm, -inf), coefficient)
    z = z - m[:, None]
    if x.teacher_tail == "bucket" and rest is not None:
        return _categories(x, rows, z, norm, rest, coefficient)
    indices, log_p = (each[rows] for each in x.entries)
    divergence, first = x.divergence, counted(indices)
    log_q = z / x.temperature - norm[:, None]
    if x.teacher_tail == "renormalize":
        log_p = log_p if x.teacher_tempered else log_p / x.temperature
        log_p = log_p - torch.where(first, log_p, -inf).logsumexp(dim=-1, keepdim=True)
    p, q, (f, _, a_q) = divergence.solve(log_p.clone(), log_q, log_ratio(log_p, log_q))
    q_inside = torch.where(first, q, 0).sum(dim=-1)
    q_outside = (1 - q_inside).clamp_min(0) if rest is None else (rest - norm).exp()
    nothing, slope, added = without_teacher(divergence)
    value = torch.where(first, f, 0).sum(dim=-1) + nothing * q_outside
    if x.teacher_tail == "none":  # Σ (q − p) is zero only if p sums to one
        largest = torch.zeros_like(first).scatter(1, torch.where(first, log_p, -inf).argmax(-1, keepdim=True), True)
        value = value + added * torch.where(largest, log_p.expm1(), torch.where(first, p, 0)).sum(dim=-1)
    a_inside = torch.where(first, a_q, 0).sum(dim=-1)
    total, outside = a_inside + slope * q_outside, slope * q_inside - a_inside
    if divergence.centred_q and x.teacher_tail == "renormalize":
        total, outside = torch.zeros_like(total), torch.full_like(total, slope)
    inside = a_q - q * total[:, None]
    if rest is not None:
        outside = outside * q_outside
        inside = _less_the_others(q, inside, torch.where(first, inside, 0).masked_fill(q > 0.5, 0).sum(-1) + outside)
    factor = coefficient / x.temperature
    return _support(value, factor[:, None] * inside, factor * outside, coefficient)


def between_passes(x: Problem, rows: slice, z: Tensor, constants: Iterable[Tensor], scale: Tensor) -> Support:
    """Return `solve` with gradients divided by `scale`, given maxima and log-sum-exps of (z − m)/τ', (r,) each: m_s,
    log_s of the student and m_t, log_t of the rest. z (r, K): the student's logits at the support."""
    m_s, log_s, m_t, log_t = constants
    rest = (m_t - m_s) / temperature(x) + log_t if has_rest(x) else None
    return solve(x, rows, z, m_s, log_s, rest, x.coefficients[KD, rows] / scale)


def _categories(x: Problem, rows: slice, z: Tensor, norm: Tensor, rest: Tensor, coefficient: Tensor) -> Support:
    assert x.teacher_log_tail is not None
    indices, log_p = (each[rows] for each in x.entries)
    divergence = x.divergence
    within = counted(indices) & (log_p > -inf)
    z = z / temperature(x)
    power = x.temperature / temperature(x)

    def categories(entries: Tensor, last: Tensor) -> Tensor:
        return (torch.cat([entries.masked_fill(~within, -inf), last[:, None]], dim=-1) / power).log_softmax(-1)

    log_t = categories(log_p, x.teacher_log_tail[rows])
    log_s = categories(z - norm[:, None], rest - norm)
    p, s, (f, _, a_s) = divergence.solve(log_t, log_s, log_ratio(log_t, log_s))
    gradient = a_s if divergence.centred_q else a_s - s * a_s.sum(dim=-1, keepdim=True)
    gradient = _less_the_others(s, gradient, gradient.masked_fill(s > 0.5, 0).sum(dim=-1))
    gradient = gradient * (coefficient / x.temperature)[:, None]
    outside = gradient[:, -1]
    # every entry of a run gets the value of its first one; an entry without mass is part of the bucket
    inside = _of_the_first(counted(indices), gradient[:, :-1])
    in_bucket = torch.where(outside[:, None] == 0, 0, outside[:, None] * (z - rest[:, None]).exp())
    inside = torch.where(log_p > -inf, inside, in_bucket)
    value = f.sum(dim=-1) + 0 * (p[:, 0] + s[:, 0])  # a NaN logit makes its row NaN, which some terms turn into 0
    return _support(value, inside, outside, coefficient)


def _less_the_others(q: Tensor, gradient: Tensor, others: Tensor) -> Tensor:
    """Return gradient (r, K), replaced by −`others` (r,), minus the sum of all others, at the entry with most of the
    mass q. There the gradient is a small difference of numbers near 1."""
    return torch.where(q > 0.5, -others[:, None], gradient)


@lru_cache
def without_teacher(divergence: Divergence) -> tuple[float, float, float]:
    """Return f(0, 1) and a_q(0, 1) of `Divergence.terms`, and the multiple of q − p that it adds to the definition.

    Raises ValueError if f(0, 1) does not determine the sum over ids without teacher mass."""
    one = torch.ones((), dtype=torch.float64, device="cpu")  # not the default device: it is read here
    nothing, half = (float(divergence.terms(0 * one, q, -inf * one)[0]) for q in (one, one / 2))
    if not abs(nothing - 2 * half) <= 1e-9 * abs(nothing):
        raise ValueError(
            f"divergence={divergence!r} with a SparseLogits teacher without a bucket is infinite, or depends on each "
            "of the student's probabilities where the teacher has none. Pass tail='bucket' or 'renormalize_both', or a "
            "divergence that is finite there and homogeneous of degree one, such as forward_kl or skew_kl"
        )
    slope = float(divergence.terms(0 * one, one, -inf * one)[2])  # by index, since `terms` may return a plain tuple
    return nothing, slope, nothing - float(divergence.pointwise(-inf * one, 0 * one))


def _support(value: Tensor, inside: Tensor, outside: Tensor, coefficient: Tensor) -> Support:
    """Return the Support, with zero gradients in rows whose coefficient is 0, since those may hold anything."""
    counts = coefficient != 0
    return Support(value, torch.where(counts[:, None], inside, 0), torch.where(counts, outside, 0))
