"""The `torch` engine's rows in the phases of `vocab_parallel.py`, in plain torch.

With m a slice's maximum, x = (z − m)/τ and e = exp(x), a process sends these numbers of its slice for each row:

    student   m, Σ e, the first argmax; at τ = 1 m, Σ e, Σ e·x and the label's logit, over the cross entropy's ids
    teacher   the same for its logits; for a sparse teacher's bucket, m and Σ e of the student's logits in it
    pair      for a KL with side b's expectation, o the other side: G = Σ e_b·(x_b − x_o), D = Σ (e_o − e_b)
    entries   for a sparse teacher: the student's logits at the entries in this slice, 0 at the others

Slices are merged by moving their maxima to the largest one; then KL = G/S_b + log1p(D/S_b), as in
`kdfast.kernels.online_softmax`, which has the same numbers for the kernels.
"""

from __future__ import annotations

from math import inf, nan
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdfast.divergences import difference, log_ratio, weighted
from kdfast.engines.chunk_loop import GradientBuffers
from kdfast.engines.torch_rows import ENTROPY, TorchRows, add_shared, slope_of, times
from kdfast.ops import sparse
from kdfast.ops.planning import GradFlags
from kdfast.ops.problem import AGREEMENT, ANCHOR, CE, KD, Problem

LOWEST = -1e30  # below any logit, yet finite: the maximum of no logits


class Side(NamedTuple):
    """One side's numbers from one slice, (r,) each, or from all slices, (R, r)."""

    m: Tensor
    S: Tensor
    best: Tensor
    m_1: Tensor  # at τ = 1, where more ids may count; else m
    S_1: Tensor
    E_1: Tensor
    target: Tensor


class State(NamedTuple):
    """Both sides, the pair, and a sparse teacher's entries (K, r), from one slice, or from all with R before r."""

    student: Side
    teacher: Side
    G: Tensor
    D: Tensor
    entries: Tensor

    def packed(self, further: bool) -> Tensor:
        """Return the state as one tensor (15 + K, r); 16 + K with the teacher's m_1, if it is not m."""
        numbers = [*self.student, *self.teacher[:3], *self.teacher[4:], self.G, self.D]
        numbers += [self.teacher.m_1] * further
        return torch.cat([torch.stack([each.to(self.G.dtype) for each in numbers]), self.entries])

    @classmethod
    def of_all(cls, states: Tensor, further: bool) -> State:
        """Return the state from gathered tensors (R, 15 + K, r). entries (K, r) are summed: each is in one slice."""
        count = 15 + further
        numbers = states[:, :count].unbind(dim=1)
        m_1 = numbers[15] if further else numbers[7]
        student, teacher = Side._make(numbers[:7]), Side._make((*numbers[7:10], m_1, *numbers[10:13]))
        return cls(student, teacher, numbers[13], numbers[14], states[:, count:].sum(dim=0))


class Constants(NamedTuple):
    """The numbers per row that gradients need, (r,) each."""

    m_s: Tensor
    log_s: Tensor  # log Σ exp((z − m)/τ)
    m_t: Tensor
    log_t: Tensor
    gap: Tensor  # log_t − log_s, with more digits
    A_p: Tensor  # Σ a_p
    A_q: Tensor
    D_p: Tensor  # the gradient at an entry with most of p's mass, where a_p − p·A_p cancels; NaN = not known
    D_q: Tensor
    m_1: Tensor
    log_1: Tensor
    m_t1: Tensor
    log_t1: Tensor
    inside: Tensor  # (K, r), or empty: gradients at a sparse teacher's entries
    outside: Tensor  # (r,): the factor of the softmax in the others' gradients

    def part(self, rows: slice) -> Constants:
        """Return the constants of some of the rows."""
        return Constants(*(each[..., rows] for each in self))


class Merged(NamedTuple):
    """Merged maxima and sums of slices."""

    m: Tensor  # (r,)
    move: Tensor  # (R, r): (each slice's maximum − m)/τ
    r: Tensor  # (R, r): exp(move)
    S: Tensor  # (r,)


class TorchVocabParallelRows(TorchRows):
    """`kdfast.engines.vocab_parallel.VocabParallelRows`, in plain torch."""

    def __init__(self, x: Problem, scale: Tensor, wanted: GradFlags, stats: Tensor) -> None:
        super().__init__(x, scale, wanted, stats)
        self.tau = sparse.temperature(x) if x.sparse else x.temperature
        self.tau_t = self.tau if x.sparse else x.teacher_temperature  # a bucket consists of the student's logits
        self.teacher = x.has_teacher and not x.sparse
        self.kl = x.divergence_name in ("forward_kl", "reverse_kl")
        self.forward_kl = x.divergence_name == "forward_kl"
        self.second_pass = self.teacher and not self.kl
        self.targets = {term: x.local(targets) for term, targets in self.targets.items()}

    # first pass

    def update(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> Tensor:
        return torch.cat(self.in_blocks(self._packed, rows, z_s, z_t), dim=1)

    def _packed(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> Tensor:
        return self._state(rows, z_s, z_t).packed(self.x.further)

    def _state(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> State:
        x = self.x
        self.transform(z_s, z_t)
        z_t = self.teacher_logits(rows, z_t)
        shared = x.of_kd(z_s)
        student, x_s, e_s = self._side(rows, shared, z_s, CE, self.tau)
        zero = z_s.new_zeros(z_s.shape[0])
        state = State(student, Side(*[zero] * 7), zero, zero, z_s.new_empty(0, z_s.shape[0]))
        if x.sparse:
            return self._sparse_state(rows, shared, state)
        if z_t is None:
            return state
        theirs = x.of_kd(z_t)
        teacher, x_t, e_t = self._side(rows, theirs, z_t if x.projected else theirs, ANCHOR, self.tau_t)
        if not self.kl:
            return state._replace(teacher=teacher)
        (x_b, e_b), (x_o, e_o) = ((x_t, e_t), (x_s, e_s)) if self.forward_kl else ((x_s, e_s), (x_t, e_t))
        u = log_ratio(x_b, x_o)
        G, D = weighted(e_b, u).sum(dim=-1), difference(e_b, e_o, u).sum(dim=-1)
        return state._replace(teacher=teacher, G=G, D=D)

    def _side(self, rows: slice, z: Tensor, z_1: Tensor, term: int, tau: Tensor) -> tuple[Side, Tensor, Tensor]:
        """Return a side's numbers, and x and e at τ, for logits z (r, v); `term`, CE or ANCHOR, uses z_1 (r, ≥ v)."""
        metrics, targets = self.x.want_metrics, self.targets[term]
        m, S, x, e = _exponentials(z, tau)
        zero = torch.zeros_like(m)
        side = Side(m, S, _argmax(z) + self.x.vocab_start if metrics else zero, m, zero, zero, zero)
        if targets is not None or metrics:
            m_1 = _maximum(z_1) if self.x.truncated else m
            y = z_1 - m_1[:, None]
            e_1 = y.exp()
            side = side._replace(m_1=m_1, S_1=e_1.sum(dim=-1))
            if metrics:
                side = side._replace(E_1=weighted(e_1, y).sum(dim=-1))
        if targets is not None and z_1.shape[1]:
            index = targets[rows, None]
            target = torch.where(index >= 0, z_1.gather(1, index.clamp_min(0)), 0).squeeze(1)
            side = side._replace(target=target)  # 0 where the target is elsewhere
        return side, x, e

    def merge(self, rows: slice, states: Tensor) -> Constants:
        x, stats, of = self.x, self.stats, State.of_all(states, self.x.further)
        student = _merged(of.student.m, of.student.S, self.tau)
        teacher = _merged(of.teacher.m, of.teacher.S, self.tau_t)
        log_s, log_t = student.S.log(), teacher.S.log()
        m_1, log_1 = student.m, log_s
        if x.use_ce or x.want_metrics:
            m_1, log_1 = self._merge_at_one(rows, of.student, CE)
        zero = torch.zeros_like(log_s)
        constants = Constants(
            m_s=student.m, log_s=log_s, m_t=teacher.m, log_t=log_t, gap=log_t - log_s, A_p=zero, A_q=zero,
            D_p=zero + nan, D_q=zero + nan, m_1=m_1, log_1=log_1, m_t1=teacher.m, log_t1=zero,
            inside=zero.new_empty(0, len(zero)), outside=zero,
        )  # fmt: skip
        if x.want_metrics and x.has_teacher:
            best = sparse.best(x)[rows] if x.sparse else _first_best(of.teacher)
            stats[AGREEMENT, rows] = (_first_best(of.student) == best).to(stats.dtype)
        if x.sparse:
            found = sparse.between_passes(x, rows, of.entries.t(), constants[:4], self.scale)
            stats[KD, rows] = found.value
            return constants._replace(inside=found.inside.t(), outside=found.outside)
        if self.teacher and (x.use_anchor or x.want_metrics):
            m_t1, log_t1 = self._merge_at_one(rows, of.teacher, ANCHOR)
            constants = constants._replace(m_t1=m_t1, log_t1=log_t1)
        if not self.teacher or not self.kl:
            return constants
        base = (of.teacher.S, teacher, student) if self.forward_kl else (of.student.S, student, teacher)
        value, rise = _kl(of.G, of.D, *base)
        stats[KD, rows] = value
        size = value.abs() + (student.m / self.tau).abs() + (teacher.m / self.tau_t).abs()
        if self.forward_kl:
            return constants._replace(gap=-rise, A_p=value, D_p=_sure(log_t, size))
        return constants._replace(gap=rise, A_q=value, D_q=_sure(log_s, size))

    def _merge_at_one(self, rows: slice, side: Side, term: int) -> tuple[Tensor, Tensor]:
        """Return all slices' maximum and log Σ exp at τ = 1; fill the statistics of `term`, CE or ANCHOR."""
        whole = _merged(side.m_1, side.S_1, torch.ones_like(self.tau))
        log = whole.S.log()
        if self.x.want_metrics:
            E = _scaled(whole.r, side.E_1 + whole.move * side.S_1).sum(dim=0)
            self.stats[ENTROPY[term], rows] = log - E / whole.S
        if self.targets[term] is not None:
            self.stats[term, rows] = log - (side.target.sum(dim=0) - whole.m)
        return whole.m, log

    # second pass

    def terms(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants) -> Tensor:
        """Return Σf, Σa_p, Σa_q, then Σa_p and Σp without the entry that has most of p's mass, and so for q: (7, r)."""
        return torch.cat(self.in_blocks(self._terms, rows, z_s, z_t, constants), dim=1)

    def _terms(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants) -> Tensor:
        given = self.teacher_logits(rows, z_t)
        assert given is not None
        p, q, (f, a_p, a_q) = self.x.divergence.solve(*self._logarithms(z_s, given, constants))
        less = [each.masked_fill(of > 0.5, 0) for of, a in ((p, a_p), (q, a_q)) for each in (a, of)]
        return torch.stack([each.sum(dim=-1) for each in (f, a_p, a_q, *less)])

    def merge_terms(self, rows: slice, terms: Tensor, constants: Constants) -> Constants:
        value, A_p, A_q, less_a_p, less_p, less_a_q, less_q = terms.sum(dim=0)
        self.stats[KD, rows] = value + 0 * constants.gap  # `gap` is NaN if the row's logits are
        return constants._replace(A_p=A_p, A_q=A_q, D_p=A_p * less_p - less_a_p, D_q=A_q * less_q - less_a_q)

    # gradients

    def gradients(
        self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants, out: GradientBuffers
    ) -> None:
        self.in_blocks(self._gradients, rows, z_s, z_t, constants, out)

    def _gradients(
        self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Constants, out: GradientBuffers
    ) -> None:
        x, wanted = self.x, self.wanted
        kd = self.coefficients(rows)[KD]
        slopes = slope_of(z_s, x.softcap), None if z_t is None else slope_of(z_t, x.teacher_softcap)
        z_t = self.teacher_logits(rows, z_t)
        grad_s: Tensor | None = None
        grad_t: Tensor | None = None
        grad_a: Tensor | None = None
        if x.sparse and wanted.student:
            grad_s = self._sparse_gradient(rows, x.of_kd(z_s), constants)
        elif z_t is not None and (wanted.student or wanted.teacher):
            divergence = x.divergence
            p, q, (_, a_p, a_q) = divergence.solve(*self._logarithms(z_s, z_t, constants))
            if wanted.student:
                a_q = a_q if divergence.centred_q else _center(a_q, q, constants.A_q, constants.D_q)
                grad_s = times(a_q, kd / self.tau)
            if wanted.teacher:
                a_p = a_p if divergence.centred_p else _center(a_p, p, constants.A_p, constants.D_p)
                grad_t = times(a_p, kd / self.tau_t)
        if wanted.student and x.ce_term:
            grad_s = add_shared(self._softmax_less_onehot(rows, z_s, constants.m_1, constants.log_1, CE), grad_s)
        if z_t is not None and wanted.anchor:
            grad_a = self._softmax_less_onehot(rows, z_t, constants.m_t1, constants.log_t1, ANCHOR)
        self.write(out, self.chained((grad_s, grad_t, grad_a), slopes))

    def _softmax_less_onehot(self, rows: slice, z: Tensor, m: Tensor, log: Tensor, term: int) -> Tensor:
        """Return coefficient·(softmax − onehot) for the CE or ANCHOR term."""
        coefficient, targets = self.coefficients(rows)[term], self.targets[term]
        assert targets is not None
        grad = (z - m[:, None]).sub_(log[:, None]).exp_().mul_(coefficient)
        index, here = targets[rows, None].clamp_min(0), targets[rows, None] >= 0
        if grad.shape[1]:
            grad.scatter_add_(1, index, torch.where(here, -coefficient, 0.0))
        return grad

    def _logarithms(self, z_s: Tensor, z_t: Tensor, constants: Constants) -> tuple[Tensor, Tensor, Tensor]:
        """Return (log p, log q, g = log p − log q) at τ."""
        m_s, log_s, m_t, log_t, gap = (each[:, None] for each in constants[:5])
        x_s = (self.x.of_kd(z_s) - m_s) / self.tau
        x_t = (self.x.of_kd(z_t) - m_t) / self.tau_t
        g = log_ratio(x_t, x_s).sub_(gap)
        g.masked_fill_(x_t.isneginf() & x_s.isneginf(), 0.0)
        return x_t - log_t, x_s - log_s, g

    # a sparse teacher

    def _sparse_state(self, rows: slice, z: Tensor, state: State) -> State:
        """Return `state` with the logits at the entries and, if needed, the bucket."""
        index = self._entries_here(rows)
        entries = torch.zeros_like(index, dtype=z.dtype)
        if z.shape[1]:
            entries = torch.where(index < z.shape[1], z.gather(1, index.clamp_max(z.shape[1] - 1)), 0)
        state = state._replace(entries=entries.t())
        excluded = sparse.excluded(self.x)
        if excluded is None:
            return state
        # an entry without mass writes back its id's logit
        m, S, _, _ = _exponentials(_scattered(z, index, torch.where(excluded[rows], -inf, entries)), self.tau)
        return state._replace(teacher=state.teacher._replace(m=m, S=S))

    def _entries_here(self, rows: slice) -> Tensor:
        """Return the entries' positions (r, K) in the slice; one past its end for those elsewhere."""
        local = self.x.local(self.x.entries[0][rows])
        assert local is not None
        return torch.where((local >= 0) & (local < self.x.kd_vocab), local, self.x.kd_vocab)

    def _sparse_gradient(self, rows: slice, z: Tensor, constants: Constants) -> Tensor:
        rest = sparse.has_rest(self.x)
        m, log = (constants.m_t, constants.log_t) if rest else (constants.m_s, constants.log_s)
        softmax = ((z - m[:, None]) / self.tau - log[:, None]).exp_()
        grad = times(softmax, constants.outside[:, None])
        return _scattered(grad, self._entries_here(rows), constants.inside.t())


def _scattered(z: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Return z (r, v) with `values` at `index`, (r, K) each. Index v writes nothing; equal ones have equal values."""
    return pad(z, (0, 1)).scatter_(1, index, values)[:, :-1]


def _sure(log: Tensor, size: Tensor) -> Tensor:
    """Return D for a KL, whose single pass cannot compute it: NaN, but 0 if one entry has all the mass and KL and
    logits over τ are so large that a − softmax·A would be mere rounding."""
    return torch.where((log == 0) & (size > 256), 0.0, nan)


def _center(a: Tensor, softmax: Tensor, total: Tensor, most: Tensor) -> Tensor:
    """Return a − softmax·total, but `most`, unless NaN, at an entry with most of the mass. total, most (r,)."""
    a.addcmul_(softmax, total[:, None], value=-1)
    return torch.where((softmax > 0.5) & ~most[:, None].isnan(), most[:, None], a)


def _maximum(z: Tensor) -> Tensor:
    return z.amax(dim=-1).clamp_min(LOWEST) if z.shape[1] else z.new_full(z.shape[:1], LOWEST)


def _argmax(z: Tensor) -> Tensor:
    return z.argmax(dim=-1) if z.shape[1] else torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)


def _exponentials(z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return m, Σ e, x and e for logits (r, v)."""
    m = _maximum(z)
    x = (z - m[:, None]) / tau
    e = x.exp()
    return m, e.sum(dim=-1), x, e


def _merged(m: Tensor, S: Tensor, tau: Tensor) -> Merged:
    """Merge slices' maxima and sums (R, r)."""
    largest = m.amax(dim=0)
    move = (m - largest) / tau
    r = move.exp()
    return Merged(largest, move, r, _scaled(r, S).sum(dim=0))


def _scaled(r: Tensor, x: Tensor) -> Tensor:
    """Return r·x, and 0 where r is 0 because another slice's maximum is far larger."""
    return torch.where(r == 0, 0.0, r * x)


def _first_best(side: Side) -> Tensor:
    """Return the smallest id (r,) that has the largest logit."""
    return torch.where(side.m == side.m.amax(dim=0), side.best, inf).amin(dim=0)


def _kl(G: Tensor, D: Tensor, S_b: Tensor, base: Merged, other: Merged) -> tuple[Tensor, Tensor]:
    """Return KL (r,) with the base's expectation, and log S_o − log S_b. S_b (R, r): each slice's Σ e of the base."""
    G = _scaled(base.r, G + (base.move - other.move) * S_b).sum(dim=0)
    rho = difference(base.r, other.r, base.move - other.move)
    d = (_scaled(other.r, D) + rho * S_b).sum(dim=0) / base.S
    rise = torch.where(d.abs() < 0.5, torch.log1p(d), other.S.log() - base.S.log())
    return G / base.S + rise, rise
