"""The `torch` engine's rows: logits of a few rows → losses, statistics, gradients, in plain torch.

z_s, z_t (m, V) are the raw products h·Wᵀ; they are overwritten. Gradients are those with respect to these products
(through temperature, softcap and logit_scale), divided by the problem's scale, in the dtype of their buffers. Buffers
may share memory with the logits, since nothing is read after the first write.

On a CPU each thread works on so few rows at a time that the dozen temporaries stay in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import Any, TypeVar

import torch
from torch import Tensor

from kdfast.divergences import log_ratio, weighted
from kdfast.engines import compiled_rows
from kdfast.engines.chunk_loop import GradientBuffers
from kdfast.ops import matmul, sparse, threads
from kdfast.ops.planning import GradFlags, on_cpu
from kdfast.ops.problem import AGREEMENT, ANCHOR, CE, KD, STUDENT_ENTROPY, TEACHER_ENTROPY, Problem

CPU_BLOCK = 1 << 16  # logits a CPU thread works on at a time (256 KB in fp32), so that they stay in its cache
ENTROPY = {CE: STUDENT_ENTROPY, ANCHOR: TEACHER_ENTROPY}  # the entropy of each cross entropy's logits

R = TypeVar("R")
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # for student, teacher and anchor, (r, ≤ V) each


class TorchRows:
    """The row work in plain torch, called as `chunked.ROWS` specifies."""

    def __init__(self, x: Problem, scale: Tensor, wanted: GradFlags, stats: Tensor) -> None:
        self.x, self.scale, self.wanted, self.stats = x, scale, wanted, stats
        self.targets = {CE: x.labels if x.use_ce else None, ANCHOR: x.anchor_targets if x.use_anchor else None}

    def __call__(self, rows: slice, z_s: Tensor, z_t: Tensor | None, out: GradientBuffers) -> None:
        if not compiled_rows.solve(self, rows, z_s, z_t, out):
            self.in_blocks(self._solve, rows, z_s, z_t, out)

    def in_blocks(
        self, solve: Callable[..., R], rows: slice, z_s: Tensor, z_t: Tensor | None, *of_rows: Any
    ) -> list[R]:
        """Return the results of `solve` for a few of a chunk's rows at a time. It gets their slice of all tokens, both
        sides' logits, and their part of each of `of_rows`, buffers or constants."""
        x, m, cpu = self.x, rows.stop - rows.start, on_cpu(self.x.hidden.device, self.x.engine)
        apart = [each._replace(bias=None) if cpu and isinstance(each, GradientBuffers) else each for each in of_rows]

        def block(within: slice) -> R:
            part = slice(rows.start + within.start, rows.start + within.stop)
            parts = (each.part(within) for each in apart)
            return solve(part, z_s[within], None if z_t is None else z_t[within], *parts)

        size = max(1, CPU_BLOCK // max(1, x.valid_vocab)) if cpu else m
        found = threads.map_on_threads(block, list(matmul.blocks(m, max(1, size))))
        for out in of_rows:  # sum over rows in their order, so that it does not depend on the threads
            if cpu and isinstance(out, GradientBuffers):
                self.sum_bias(out.bias, out.student, out.teacher)
        return found

    def coefficients(self, rows: slice) -> Tensor:
        """Return the coefficients (3, r, 1) of the terms' gradients."""
        return (self.x.coefficients[:, rows] / self.scale)[:, :, None]

    def transform(self, z_s: Tensor, z_t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Turn both sides' products into logits, in place; return the slopes of `add_bias_and_transform`."""
        x = self.x
        slope_s = add_bias_and_transform(z_s, x.bias, x.logit_scale, x.softcap)
        if z_t is None:
            return slope_s, None
        bias = x.bias if x.projected else x.teacher_bias
        return slope_s, add_bias_and_transform(z_t, bias, x.teacher_logit_scale, x.teacher_softcap)

    def teacher_logits(self, rows: slice, z_t: Tensor | None) -> Tensor | None:
        """Return z_t, or a `Logits` teacher's logits instead."""
        return z_t if self.x.teacher_logits is None else self.x.dense_teacher(rows).to(self.x.dtype)

    def _solve(self, rows: slice, z_s: Tensor, z_t: Tensor | None, out: GradientBuffers) -> None:
        self.write(out, self.gradients_of(rows, z_s, z_t))

    def gradients_of(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> Gradients:
        """Fill the statistics of `rows`; return the gradients with respect to the raw products."""
        x, wanted, stats = self.x, self.wanted, self.stats
        kd = self.coefficients(rows)[KD]
        slopes = self.transform(z_s, z_t)
        z_t = self.teacher_logits(rows, z_t)
        grad_s: Tensor | None = None
        grad_t: Tensor | None = None
        grad_a: Tensor | None = None
        shared = x.of_kd(z_s)
        theirs = z_t if z_t is None else x.of_kd(z_t)
        if x.sparse:
            stats[KD, rows], grad_s = self._sparse(rows, shared, kd[:, 0])
        elif theirs is not None:
            stats[KD, rows], grad_s, grad_t = self._divergence(shared, theirs, kd)
        if x.want_metrics and (x.sparse or theirs is not None):
            best = sparse.best(x)[rows] if theirs is None else theirs.argmax(dim=-1)
            stats[AGREEMENT, rows] = (shared.argmax(dim=-1) == best).to(stats.dtype)
        if x.use_ce or x.want_metrics:
            grad_s = add_shared(self._cross_entropy(rows, z_s, CE, wanted.student and x.ce_term), grad_s)
        seen = z_t if x.projected else theirs  # a projected teacher's cover the whole vocabulary, as the student's do
        if seen is not None and (x.use_anchor or x.want_metrics):
            grad_a = self._cross_entropy(rows, seen, ANCHOR, wanted.anchor)
        return self.chained((grad_s, grad_t, grad_a), slopes)

    def _divergence(self, z_s: Tensor, z_t: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (divergence (r,), coefficient·∂/∂z_s, coefficient·∂/∂z_t)."""
        x, divergence = self.x, self.x.divergence
        log_p, unknown_p = log_softmax(z_t, x.teacher_temperature)
        log_q, unknown_q = log_softmax(z_s, x.temperature)
        g = log_ratio(log_p, log_q)
        p, q, terms = divergence.solve(log_p, log_q, g)
        unknown = unknown_p | unknown_q  # a NaN on one side makes both sides' gradients NaN, if the row counts
        value = terms.f.sum(dim=-1).masked_fill_(unknown, nan)
        coefficient = coefficient.masked_fill(unknown[:, None] & (coefficient != 0), nan)
        by_s, by_t = coefficient / x.temperature, coefficient / x.teacher_temperature
        grad_s = times(center(terms.a_q, q, divergence.centred_q), by_s) if self.wanted.student else None
        grad_t = times(center(terms.a_p, p, divergence.centred_p), by_t) if self.wanted.teacher else None
        return value, grad_s, grad_t

    def _sparse(self, rows: slice, z: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (divergence (r,), coefficient·∂/∂z) for a sparse teacher."""
        x = self.x
        index = x.entries[0][rows]
        # clamped, because in a row of only −inf the differences would be NaN
        m = z.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)
        entries, z = z.gather(1, index), z - m
        scaled = z / sparse.temperature(x)
        softmax = scaled.exp()
        total = softmax.sum(dim=-1)
        rest: Tensor | None = None
        excluded = sparse.excluded(x)
        if excluded is not None:
            # an entry without mass writes back its id's logit
            scaled.scatter_(1, index, torch.where(excluded[rows], -inf, (entries - m) / sparse.temperature(x)))
            rest = scaled.logsumexp(dim=-1)
        found = sparse.solve(x, rows, entries, m[:, 0], total.log(), rest, coefficient)
        if not self.wanted.student:
            return found.value, None
        if rest is None:
            softmax.div_(total[:, None])
        else:
            softmax = torch.exp(scaled.sub_(rest[:, None]), out=softmax)
        return found.value, times(softmax, found.outside[:, None]).scatter_(1, index, found.inside)

    def _cross_entropy(self, rows: slice, z: Tensor, term: int, gradient: bool) -> Tensor | None:
        """Fill the statistics at τ = 1 of the logits of `term`, CE or ANCHOR; return coefficient·(softmax − onehot)
        (r, V) if `gradient`."""
        log_q, _ = log_softmax(z)
        targets = self.targets[term]
        index = None if targets is None else targets[rows, None]
        if index is not None:
            self.stats[term, rows] = -log_q.gather(1, index).squeeze(1)
        if not (self.x.want_metrics or gradient):
            return None
        q = log_q.exp()
        if self.x.want_metrics:
            self.stats[ENTROPY[term], rows] = -weighted(q, log_q).sum(dim=-1)
        if not gradient or index is None:
            return None
        coefficient = self.coefficients(rows)[term]
        return add_at(q.mul_(coefficient), index, -coefficient)

    def chained(self, gradients: Gradients, slopes: tuple[Tensor | None, Tensor | None]) -> Gradients:
        """Turn gradients with respect to logits into those of the raw products, in place. slopes: from `transform`."""
        (grad_s, grad_t, grad_a), (slope_s, slope_t), x = gradients, slopes, self.x
        _chain(grad_s, slope_s, x.logit_scale)
        _chain(grad_t, slope_t, x.teacher_logit_scale)
        _chain(grad_a, slope_t, x.teacher_logit_scale)
        return gradients

    def write(self, out: GradientBuffers, gradients: Gradients) -> None:
        """Write some rows' gradients into their buffers."""
        grad_s, grad_t, grad_a = gradients
        self.sum_bias(out.bias, grad_s, grad_t)
        if out.anchor is None and grad_a is not None:
            grad_t, grad_a = grad_a if grad_t is None else grad_t.add_(grad_a), None
        if out.decorrelation is not None:
            assert grad_s is not None
            assert grad_t is not None
            out.decorrelation.copy_(_decorrelate(grad_s, grad_t))
        for buffer, grad in ((out.student, grad_s), (out.teacher, grad_t), (out.anchor, grad_a)):
            if buffer is not None:
                _fill(buffer, grad)

    def sum_bias(self, bias: Tensor | None, grad_s: Tensor | None, grad_t: Tensor | None) -> None:
        for grad in (grad_s, grad_t if self.wanted.teacher_to_weight else None):
            if bias is not None and grad is not None:
                bias[: grad.shape[1]].add_(grad.sum(dim=0))


def add_bias_and_transform(z: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor | None:
    """Turn z into softcap·tanh(logit_scale·(z + bias)/softcap), in place; return d/dz ÷ logit_scale, or None for 1.

    bias: shaped like z, or with z's columns and more."""
    if bias is not None:
        z += bias[..., : z.shape[1]]
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is None:
        return None
    z.div_(softcap).tanh_()
    slope = 1 - z * z
    z.mul_(softcap)
    return slope


def slope_of(z: Tensor, softcap: float | None) -> Tensor | None:
    """Return the slope of `add_bias_and_transform` from logits that have been transformed."""
    return None if softcap is None else 1 - (z / softcap).square_()


def log_softmax(z: Tensor, tau: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return log softmax(z/τ), and a mask (r,) of rows that are NaN, as a single NaN logit makes them."""
    if not torch.compiler.is_compiling():
        log_q = (z if tau is None else z / tau).log_softmax(dim=-1)
        return log_q, log_q[:, 0].isnan()
    shifted = z - z.amax(dim=-1, keepdim=True)  # written out, passes over the logits can be shared
    shifted = shifted if tau is None else shifted * (1 / tau)
    norm = shifted.exp().sum(dim=-1, keepdim=True).log()
    return shifted - norm, norm[:, 0].isnan()


def add_at(grad: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Return grad (r, V) with values (r, 1) added at index (r, 1), in place."""
    if not torch.compiler.is_compiling():
        return grad.scatter_add_(1, index, values)
    here = torch.arange(grad.shape[1], device=grad.device) == index  # can be fused with other passes
    return grad + torch.where(here, values, 0.0)


def times(grad: Tensor, factor: Tensor) -> Tensor:
    """Return grad·factor, in place, with ∞·0 = 0: an infinite divergence must not reach rows with weight 0."""
    zero = factor == 0
    grad.mul_(factor)
    if grad.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(zero.any()):
        return grad
    return grad.masked_fill_(zero, 0.0)


def center(a: Tensor, softmax: Tensor, centred: bool) -> Tensor:
    """Return a − softmax·Σa, in place; at the entry with most mass, where that cancels, minus the sum of the others."""
    if centred:
        return a
    if torch.compiler.is_compiling():
        a, most = a - softmax * a.sum(dim=-1, keepdim=True), softmax > 0.5
        others = a.masked_fill(most, 0.0).sum(dim=-1, keepdim=True)
        return torch.where(most, torch.where(others.abs() < torch.finfo(a.dtype).tiny, 0.0, -others), a)
    most = softmax.argmax(dim=-1, keepdim=True)
    a.addcmul_(softmax, a.sum(dim=-1, keepdim=True), value=-1).scatter_(-1, most, 0)
    others = a.sum(dim=-1, keepdim=True)  # a subnormal sum has too few digits
    return a.scatter_(-1, most, torch.where(others.abs() < torch.finfo(a.dtype).tiny, 0, -others))


def add_shared(whole: Tensor | None, shared: Tensor | None) -> Tensor | None:
    """Return the sum, in place, of a gradient over the whole vocabulary and one over its first ids."""
    if whole is None or shared is None:
        return shared if whole is None else whole
    whole[:, : shared.shape[1]] += shared
    return whole


def _fill(buffer: Tensor, grad: Tensor | None) -> None:
    """Write a gradient, saturated for float16, and zeros beyond its width."""
    width = 0 if grad is None else grad.shape[1]
    if grad is not None:
        buffer[:, :width].copy_(grad.clamp_(-65504, 65504) if buffer.dtype == torch.float16 else grad)
    buffer[:, width:].zero_()


def _chain(grad: Tensor | None, slope: Tensor | None, logit_scale: float) -> None:
    """Turn a gradient with respect to logits into that of the raw products h·Wᵀ + b, in place."""
    if grad is None:
        return
    if slope is not None:
        grad.mul_(slope[:, : grad.shape[1]])
    if logit_scale != 1.0:
        grad.mul_(logit_scale)


def _decorrelate(grad_s: Tensor, grad_t: Tensor) -> Tensor:
    """Add c·grad_s to grad_t, which makes it orthogonal to grad_s; return c (r,).

    Near convergence grad_t ≈ −grad_s and h_p ≈ h_s, so dW = grad_sᵀ·h_s + grad_tᵀ·h_p is a difference of nearly equal
    products. Rounding each gradient to 16 bits leaves an error many times that of rounding dW. The same sum is
    grad_sᵀ·(h_s − c·h_p) + (grad_t + c·grad_s)ᵀ·h_p, in which both factors are small before they are rounded. By
    Pythagoras no rounding error grows, for any rows.
    """
    square = (grad_s * grad_s).sum(dim=-1)
    dot = (grad_s * grad_t).sum(dim=-1)
    c = torch.where(square > 0, -dot / square, 0.0)
    grad_t.addcmul_(grad_s, c[:, None])
    return c
