"""The row work of the `torch` engine in the phases of `vocab_parallel.py`, in plain torch.

With m a slice's maximum, x = (z − m)/τ and e = exp(x), a slice tells of each row

    student   m, Σ e, its first argmax; at τ = 1 m, Σ e, Σ e·x and the label's logit, over all that the cross entropy
              sees
    teacher   the same of its logits; of a sparse teacher's bucket m and Σ e of the student's logits in it
    pair      of a KL under the side b, o being the other: G = Σ e_b·(x_b − x_o), D = Σ (e_o − e_b)
    entries   of a sparse teacher: the student's logits at those that are in the slice, 0 at the others

Slices are put together by moving their maxima to the largest; then KL = G/S_b + log1p(D/S_b), as in
`kdfast.kernels.online_softmax`, which has the same numbers for the kernels.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.divergences import ForwardKL, ReverseKL, difference, log_ratio, weighted
from kdfast.engines.chunk_loop import GradientBuffers
from kdfast.engines.torch_rows import add_bias_and_transform, blocks, centre, slope_of, times, write
from kdfast.ops import sparse
from kdfast.ops.planning import GradFlags
from kdfast.ops.problem import AGREEMENT, ANCHOR, CE, KD, STUDENT_ENTROPY, TEACHER_ENTROPY, Problem

LOWEST = -1e30  # below any logit, yet finite: the maximum of nothing


class Numbers(NamedTuple):
    """What a slice tells, each (r,); or of all slices (R, r)."""

    m_s: Tensor
    S_s: Tensor
    best_s: Tensor
    m_1: Tensor  # the student's at τ = 1
    S_1: Tensor
    E_1: Tensor
    target_s: Tensor
    m_t: Tensor
    S_t: Tensor
    best_t: Tensor
    S_t1: Tensor
    E_t1: Tensor
    target_t: Tensor
    G: Tensor
    D: Tensor


class Constants(NamedTuple):
    """What gradients need to know of the rows, each (r,)."""

    m_s: Tensor
    log_s: Tensor  # log Σ exp((z − m)/τ)
    m_t: Tensor
    log_t: Tensor
    gap: Tensor  # log_t − log_s, to more digits
    A_p: Tensor  # Σ a_p
    A_q: Tensor
    m_1: Tensor
    log_1: Tensor
    log_t1: Tensor
    inside: Tensor  # (K, r), or empty: gradients at a sparse teacher's entries
    outside: Tensor  # (r,): and of the others, as a multiple of their softmax


class TorchVocabParallelRows:
    """`kdfast.engines.vocab_parallel.VocabParallelRows` in plain torch."""

    def __init__(self, x: Problem, scale: Tensor, wanted: GradFlags, stats: Tensor) -> None:
        self.x, self.scale, self.wanted, self.stats = x, scale, wanted, stats
        self.tau = sparse.temperature(x) if x.sparse else x.temperature
        self.teacher = x.has_teacher and not x.sparse
        self.kl = isinstance(x.divergence, (ForwardKL, ReverseKL))
        self.second_pass = self.teacher and not self.kl
        self.labels, self.anchor_targets = x.local(x.labels), x.local(x.anchor_targets)

    # first pass

    def update(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> Tensor:
        parts = [
            self._fold(part, z_s[within], None if z_t is None else z_t[within]) for part, within in blocks(self.x, rows)
        ]
        return torch.cat(parts, dim=1)

    def _fold(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> Tensor:
        x = self.x
        add_bias_and_transform(z_s, x.bias, x.logit_scale, x.softcap)
        if z_t is not None:
            bias = x.bias if x.projected else x.teacher_bias
            add_bias_and_transform(z_t, bias, x.teacher_logit_scale, x.teacher_softcap)
        z_t = self._given(rows, z_t)
        zero = z_s.new_zeros(z_s.shape[0])
        shared = z_s[:, : x.kd_vocab]
        m_s, S_s, x_s, e_s = _side(shared, self.tau)
        found = Numbers(*[zero] * len(Numbers._fields))._replace(m_s=m_s, S_s=S_s, m_1=m_s)
        if x.want_metrics:
            found = found._replace(best_s=_argmax(shared) + x.vocab_start)
        if x.use_ce or x.want_metrics:
            m_1 = _maximum(z_s) if shared.shape[1] < z_s.shape[1] else m_s
            S_1, E_1 = self._at_one(z_s, m_1)
            found = found._replace(m_1=m_1, S_1=S_1, E_1=E_1)
        if x.use_ce:
            found = found._replace(target_s=self._target(z_s, self.labels, rows))
        entries = z_s.new_empty(0, z_s.shape[0])
        if x.sparse:
            entries, bucket = self._entries(rows, shared)
            if bucket is not None:
                found = found._replace(m_t=bucket[0], S_t=bucket[1])
        elif z_t is not None:
            m_t, S_t, x_t, e_t = _side(z_t, self.tau)
            found = found._replace(m_t=m_t, S_t=S_t)
            if x.want_metrics:
                found = found._replace(best_t=_argmax(z_t) + x.vocab_start)
            if x.use_anchor or x.want_metrics:
                S_t1, E_t1 = self._at_one(z_t, m_t)
                found = found._replace(S_t1=S_t1, E_t1=E_t1)
            if x.use_anchor:
                found = found._replace(target_t=self._target(z_t, self.anchor_targets, rows))
            if self.kl:
                b, o = ((x_t, e_t), (x_s, e_s)) if isinstance(x.divergence, ForwardKL) else ((x_s, e_s), (x_t, e_t))
                u = log_ratio(b[0], o[0])
                found = found._replace(G=weighted(b[1], u).sum(dim=-1), D=difference(b[1], o[1], u).sum(dim=-1))
        return torch.cat([torch.stack([each.to(zero.dtype) for each in found]), entries])

    def merge(self, rows: slice, states: Tensor) -> Constants:
        x, stats = self.x, self.stats
        entries = states[:, len(Numbers._fields) :].sum(dim=0)
        of = Numbers(*states[:, : len(Numbers._fields)].unbind(dim=1))
        m_s, move_s, r_s, S_s = _together(of.m_s, of.S_s, self.tau)
        m_t, move_t, r_t, S_t = _together(of.m_t, of.S_t, self.tau)
        log_s, log_t = S_s.log(), S_t.log()
        m_1, log_1 = m_s, log_s
        if x.use_ce or x.want_metrics:
            m_1, log_1, entropy = self._entropy(of.m_1, of.S_1, of.E_1)
            if x.want_metrics:
                stats[STUDENT_ENTROPY, rows] = entropy
        if x.use_ce:
            stats[CE, rows] = log_1 - (of.target_s.sum(dim=0) - m_1)
        best_s = _first_best(of.m_s, of.best_s)
        zero = torch.zeros_like(m_s)
        none = Constants(
            m_s, log_s, m_t, log_t, log_t - log_s, zero, zero, m_1, log_1, zero, zero.new_empty(0, len(zero)), zero
        )
        if x.sparse:
            if x.want_metrics:
                stats[AGREEMENT, rows] = (best_s == sparse.best(x)[rows]).to(stats.dtype)
            return self._solve_sparse(rows, none, entries)
        if not self.teacher:
            return none
        if x.use_anchor or x.want_metrics:
            _, log_t1, entropy = self._entropy(of.m_t, of.S_t1, of.E_t1)
            none = none._replace(log_t1=log_t1)
            if x.want_metrics:
                stats[TEACHER_ENTROPY, rows] = entropy
                stats[AGREEMENT, rows] = (best_s == _first_best(of.m_t, of.best_t)).to(stats.dtype)
        if x.use_anchor:
            stats[ANCHOR, rows] = none.log_t1 - (of.target_t.sum(dim=0) - m_t)
        if not self.kl:
            return none
        sides = (of.S_t, move_t, r_t, S_t), (of.S_s, move_s, r_s, S_s)
        if isinstance(x.divergence, ForwardKL):
            value, rise = _kl(of.G, of.D, *sides)
            constants = none._replace(gap=-rise, A_p=value)
        else:
            value, rise = _kl(of.G, of.D, *sides[::-1])
            constants = none._replace(gap=rise, A_q=value)
        stats[KD, rows] = value
        return constants

    # second pass

    def terms(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants) -> Tensor:
        """Σf, Σa_p, Σa_q."""
        found = []
        for part, within in blocks(self.x, rows):
            given = self._given(part, None if z_t is None else z_t[within])
            assert given is not None
            p, q, g = self._probabilities(z_s[within], given, constants, within)
            found.append(torch.stack([each.sum(dim=-1) for each in self.x.divergence.terms(p, q, g)]))
        return torch.cat(found, dim=1)

    def merge_terms(self, rows: slice, terms: Tensor, constants: Constants) -> Constants:
        value, A_p, A_q = terms.sum(dim=0)
        self.stats[KD, rows] = value + 0 * constants.gap  # a row whose logits are NaN has that in `gap`
        return constants._replace(A_p=A_p, A_q=A_q)

    # gradients

    def gradients(
        self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants, out: GradientBuffers
    ) -> None:
        for part, within in blocks(self.x, rows):
            teacher = None if z_t is None else z_t[within]
            self._gradients(part, within, z_s[within], teacher, constants, out.part(within))

    def _gradients(
        self, rows: slice, within: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants, out: GradientBuffers
    ) -> None:
        x, wanted = self.x, self.wanted
        kd, ce, anchor = (x.coefficients[:, rows] / self.scale)[:, :, None]
        slope_s = slope_of(z_s, x.softcap)
        slope_t = None if z_t is None else slope_of(z_t, x.teacher_softcap)
        z_t = self._given(rows, z_t)
        grad_s: Tensor | None = None
        grad_t: Tensor | None = None
        grad_a: Tensor | None = None
        if x.sparse and wanted.student:
            grad_s = self._sparse_gradient(rows, within, z_s[:, : x.kd_vocab], constants)
        elif z_t is not None and self.teacher and (wanted.student or wanted.teacher):
            divergence, factor = x.divergence, kd / x.temperature
            p, q, g = self._probabilities(z_s, z_t, constants, within)
            _, a_p, a_q = divergence.terms(p, q, g)
            if wanted.student:
                grad_s = times(centre(a_q, q, divergence.centred_q, constants.A_q[within]), factor)
            if wanted.teacher:
                grad_t = times(centre(a_p, p, divergence.centred_p, constants.A_p[within]), factor)
        if wanted.student and x.ce_term:
            whole = self._cross_entropy(z_s, constants.m_1[within], constants.log_1[within], self.labels, rows, ce)
            if grad_s is not None:
                whole[:, : grad_s.shape[1]] += grad_s
            grad_s = whole
        if z_t is not None and wanted.anchor:
            grad_a = self._cross_entropy(
                z_t, constants.m_t[within], constants.log_t1[within], self.anchor_targets, rows, anchor
            )
        write(x, wanted, out, (grad_s, grad_t, grad_a), slope_s, slope_t)

    def _probabilities(
        self, z_s: Tensor, z_t: Tensor, constants: Constants, within: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(p, q, g = log p − log q) at τ."""
        m_s, log_s, m_t, log_t, gap = (each[within, None] for each in constants[:5])
        x_s = (z_s[:, : self.x.kd_vocab] - m_s) / self.tau
        x_t = (z_t - m_t) / self.tau
        g = log_ratio(x_t, x_s).sub_(gap)
        g.masked_fill_(x_t.isneginf() & x_s.isneginf(), 0.0)
        return (x_t - log_t).exp_(), (x_s - log_s).exp_(), g

    def _cross_entropy(
        self, z: Tensor, m: Tensor, log: Tensor, targets: Tensor | None, rows: slice, coefficient: Tensor
    ) -> Tensor:
        """coefficient·(softmax − onehot). targets (N,): local."""
        grad = (z - m[:, None]).sub_(log[:, None]).exp_().mul_(coefficient)
        assert targets is not None
        index, here = targets[rows, None].clamp_min(0), targets[rows, None] >= 0
        if grad.shape[1]:
            grad.scatter_add_(1, index, torch.where(here, -coefficient, 0.0))
        return grad

    # a sparse teacher

    def _entries(self, rows: slice, z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(logits at the entries (K, r); maximum and Σ exp of the bucket, where there is one)."""
        index, here = self._here(rows)
        entries = torch.zeros_like(index, dtype=z.dtype)
        if z.shape[1]:
            entries = torch.where(here, z.gather(1, index), 0)
        excluded = sparse.excluded(self.x)
        if excluded is None:
            return entries.t(), None
        if z.shape[1]:
            # an entry without mass keeps its logit: its id is written with what some other entry there would write
            within = torch.where(excluded[rows], -inf, entries)
            z = scatter_here(z.clone(), index, here, within)
        m, S, _, _ = _side(z, self.tau)
        return entries.t(), (m, S)

    def _here(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(r, K): the entries' addresses in the slice, some valid one where they are elsewhere; which are not."""
        assert self.x.teacher_indices is not None
        local = self.x.local(self.x.teacher_indices[rows])
        assert local is not None
        here = (local >= 0) & (local < self.x.kd_vocab)
        return torch.where(here, local, 0), here

    def _solve_sparse(self, rows: slice, constants: Constants, entries: Tensor) -> Constants:
        found = sparse.between_passes(self.x, rows, entries.t(), constants[:4], self.scale)
        self.stats[KD, rows] = found.value
        return constants._replace(inside=found.inside.t(), outside=found.outside)

    def _sparse_gradient(self, rows: slice, within: slice, z: Tensor, constants: Constants) -> Tensor:
        bucket = self.x.teacher_tail == "bucket"
        m, log = (constants.m_t, constants.log_t) if bucket else (constants.m_s, constants.log_s)
        softmax = ((z - m[within, None]) / self.tau - log[within, None]).exp_()
        grad = times(softmax, constants.outside[within, None])
        if not grad.shape[1]:
            return grad
        index, here = self._here(rows)
        return scatter_here(grad, index, here, constants.inside[:, within].t())

    # helpers

    def _given(self, rows: slice, z_t: Tensor | None) -> Tensor | None:
        return z_t if self.x.teacher_logits is None else self.x.dense_teacher(rows).to(self.x.dtype)

    def _at_one(self, z: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        y = z - m[:, None]
        e = y.exp()
        return e.sum(dim=-1), weighted(e, y).sum(dim=-1) if self.x.want_metrics else torch.zeros_like(m)

    def _target(self, z: Tensor, targets: Tensor | None, rows: slice) -> Tensor:
        """(r,): the targets' logits, 0 where they are elsewhere. targets (N,): local."""
        assert targets is not None
        index = targets[rows, None]
        if not z.shape[1]:
            return z.new_zeros(z.shape[0])
        return torch.where(index >= 0, z.gather(1, index.clamp_min(0)), 0).squeeze(1)

    def _entropy(self, m: Tensor, S: Tensor, E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(maximum, log Σ exp, entropy) at τ = 1, of all slices."""
        largest, move, r, total = _together(m, S, torch.ones_like(self.tau))
        E = _scaled(r, E + move * S).sum(dim=0)
        return largest, total.log(), total.log() - E / total


def scatter_here(z: Tensor, index: Tensor, here: Tensor, values: Tensor) -> Tensor:
    """z[n, index_nk] = values_nk where here_nk, in place. Those form one run in each row, and equal addresses hold
    equal values: the others write once more what the nearest of the run does, or what is there, where it is empty."""
    K = index.shape[1]
    first = here.to(torch.int64).argmax(dim=1, keepdim=True)
    last = first + here.sum(dim=1, keepdim=True) - 1
    position = torch.arange(K, device=z.device).clamp(first, last.clamp_min(first))
    index, values = index.gather(1, position), values.gather(1, position)
    return z.scatter_(1, index, torch.where(last >= first, values, z.gather(1, index)))


def _maximum(z: Tensor) -> Tensor:
    return z.amax(dim=-1).clamp_min(LOWEST) if z.shape[1] else z.new_full(z.shape[:1], LOWEST)


def _argmax(z: Tensor) -> Tensor:
    return z.argmax(dim=-1) if z.shape[1] else torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)


def _side(z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(m, Σ e, x, e) of logits (r, v)."""
    m = _maximum(z)
    x = (z - m[:, None]) / tau
    e = x.exp()
    return m, e.sum(dim=-1), x, e


def _together(m: Tensor, S: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(largest maximum (r,), each slice's move to it over τ (R, r), the exponential of that, Σ e (r,))."""
    largest = m.amax(dim=0)
    move = (m - largest) / tau
    r = move.exp()
    return largest, move, r, _scaled(r, S).sum(dim=0)


def _scaled(r: Tensor, x: Tensor) -> Tensor:
    """r·x, and 0 where a slice counts for nothing next to another."""
    return torch.where(r == 0, 0.0, r * x)


def _first_best(m: Tensor, best: Tensor) -> Tensor:
    """(r,): the smallest id of the largest logit."""
    return torch.where(m == m.amax(dim=0), best, inf).amin(dim=0)


def _kl(
    G: Tensor,
    D: Tensor,
    base: tuple[Tensor, Tensor, Tensor, Tensor],
    other: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """(KL (r,) under the base, log S_o − log S_b); of a side each slice's Σ e, move, its exponential (R, r), and Σ e
    of all (r,)."""
    part_b, move_b, r_b, S_b = base
    _, move_o, r_o, S_o = other
    G = _scaled(r_b, G + (move_b - move_o) * part_b).sum(dim=0)
    rho = difference(r_b, r_o, move_b - move_o)
    d = (_scaled(r_o, D) + rho * part_b).sum(dim=0) / S_b
    rise = torch.where(d.abs() < 0.5, torch.log1p(d), S_o.log() - S_b.log())
    return G / S_b + rise, rise
