"""Divergences on the device: one function each, shared by the row kernel and the tiled kernels.

With p the teacher's and q the student's probability of a token and g = log p − log q, each returns (f, a_p, a_q): the
summand, arranged to keep its digits when p ≈ q, and its derivatives with respect to log p and log q. The gradient with
respect to logits at τ is (a − softmax·Σa)/τ. `kdfast.divergences` has the definitions and sources, against which tests
check each function.

To add a divergence, write its function, a branch in `terms` and a line in `ENTRIES`.

Gradients in 16 bits use `in_log2` if a divergence has it, which takes a third of the instructions.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import log

import numpy as np
import triton
import triton.language as tl

from kdfast.kernels.math import LN2, difference, expm1, log1p, log2, quotient, weighted


@triton.jit
def forward_kl(p, q, g):
    """Return f, a_p, a_q of Σ p·g. f includes q − p, which sums to zero and makes every summand of second order."""
    a_q = difference(p, q, g)
    a_p = weighted(p, g)
    return a_p + a_q, a_p, a_q


@triton.jit
def symmetric_kl(p, q, g, lam):
    """Return f, a_p, a_q of (1−λ)·KL(p‖q) + λ·KL(q‖p): ½ Σ (p − q)·g plus, for λ ≠ ½, a rest of third order or ∞."""
    d, by_p, by_q = difference(p, q, g), weighted(p, g), weighted(q, g)
    uneven = tl.where(tl.abs(g) < float("inf"), (0.5 - lam) * (by_p + by_q + 2 * d), 0)
    f = tl.where(d == 0, 0, -0.5 * d * g) + uneven
    return f, (1 - lam) * by_p - lam * d, (1 - lam) * d - lam * by_q


@triton.jit
def jsd(p, q, g, beta):
    """Return f, a_p, a_q of β·KL(p‖m) + (1−β)·KL(q‖m), m = β p + (1−β) q. log m/p for g ≥ 0 and log m/q for g < 0 are
    log1p of something small; they differ by g."""
    mixed = log1p(expm1(-tl.abs(g)) * tl.where(g >= 0, 1 - beta, beta))
    a_p = -beta * weighted(p, mixed + tl.maximum(-g, 0))
    a_q = (beta - 1) * weighted(q, mixed + tl.maximum(g, 0))
    return a_p + a_q, a_p, a_q


@triton.jit
def skew_kl(p, q, g, alpha):
    """Return f, a_p, a_q of KL(p‖m), m = α p + (1−α) q. f includes (1−α)·(q − p), which sums to zero and makes every
    summand of second order; a_q does not: no gradient would change, and it would be swamped where p ≪ q. Where
    p < e⁻⁸⁰ q nothing matters, so expm1(−g) may stop there; where q is 0, g may be NaN. m = p·(1 + x) stays above 0."""
    MOST: tl.constexpr = 1 - (2**-52 if g.dtype == tl.float64 else 2**-23)
    of_q = tl.minimum(1 - alpha, MOST)
    x = of_q * expm1(tl.minimum(tl.where(q > 0, -g, -80), 80))  # (m − p)/p
    s = 1 / (1 + x)  # p/m
    a_p = p * (alpha * x * s - log1p(x))
    return a_p + of_q * x * s * q, a_p, -of_q * s * q


@triton.jit
def total_variation(p, q, g):
    """Return f, a_p, a_q of ½ Σ |p − q|, with subgradient 0 where p = q."""
    d = difference(p, q, g)
    half = tl.where(d < 0, 0.5, tl.where(d > 0, -0.5, 0.0))
    return -half * d, half * p, -half * q


@triton.jit
def _over(number, end, start, g):
    """Return (end − start)/number where log end/start = number·g, which may be 0."""
    return tl.where(number == 0, weighted(start, g), difference(start, end, -number * g) / number)


@triton.jit
def alpha_beta(log_p, log_q, g, alpha, beta):
    """Return f, a_p, a_q of the α-β divergence: a_p = (p^(α+β) − p^α·q^β)/β, a_q with the sides exchanged. f is the
    difference of two of three such quotients over the largest of α, β, α+β; where that cancels, g²·p^α·q^β times the
    divided difference exp[0, x, y]."""
    NEAR: tl.constexpr = 2**-12 if g.dtype == tl.float64 else 2**-4
    neither, both = g != g, alpha + beta
    g = tl.where(neither, 0, g)
    log_p, log_q = tl.where(neither, 0, tl.maximum(log_p, -1e30)), tl.where(neither, 0, tl.maximum(log_q, -1e30))
    p, pq, q = tl.exp(both * log_p), tl.exp(alpha * log_p + beta * log_q), tl.exp(both * log_q)
    a_p, a_q, whole = _over(beta, p, pq, g), -_over(alpha, pq, q, g), _over(both, p, q, g)
    f = tl.where(tl.abs(alpha) > tl.abs(beta), (a_p - whole) / alpha, (whole + a_q) / beta)
    f = tl.where(alpha * beta >= 0, (a_p + a_q) / both, f)
    x, y = -alpha * tl.maximum(tl.minimum(g, 1e30), -1e30), beta * tl.maximum(tl.minimum(g, 1e30), -1e30)
    series = 0.5 + (x + y) / 6 + (x * x + x * y + y * y) / 24 + (x + y) * (x * x + y * y) / 120
    return tl.where(tl.maximum(tl.abs(x), tl.abs(y)) < NEAR, g * g * pq * series, f), a_p, a_q


@triton.jit
def terms(DIVERGENCE: tl.constexpr, p, q, g, log_p, log_q, parameter, second):
    """Return f, a_p, a_q of the divergence named DIVERGENCE. parameter, second: its numbers, or 0."""
    if DIVERGENCE == "forward_kl":
        f, a_p, a_q = forward_kl(p, q, g)
    elif DIVERGENCE == "reverse_kl":
        f, a_q, a_p = forward_kl(q, p, -g)
    elif DIVERGENCE == "symmetric_kl":
        f, a_p, a_q = symmetric_kl(p, q, g, parameter)
    elif DIVERGENCE == "jsd":
        f, a_p, a_q = jsd(p, q, g, parameter)
    elif DIVERGENCE == "skew_kl":
        f, a_p, a_q = skew_kl(p, q, g, parameter)
    elif DIVERGENCE == "skew_reverse_kl":
        f, a_q, a_p = skew_kl(q, p, -g, parameter)
    elif DIVERGENCE == "alpha_beta":
        f, a_p, a_q = alpha_beta(log_p, log_q, g, parameter, second)
    else:
        tl.static_assert(DIVERGENCE == "total_variation")
        f, a_p, a_q = total_variation(p, q, g)
    return f, a_p, a_q


CLOSE: tl.constexpr = tl.constexpr(0.4)  # largest |log2 p/q| for which a cubic is accurate
CLOSER: tl.constexpr = tl.constexpr(0.2)


@lru_cache
def series(name: str, b: float) -> tuple[float, ...]:
    """Return the coefficients of two cubics in u = log2 p/q, |u| < CLOSE (where logarithms would cancel), or zeros: for
    log2(m/q)/u, with m the mixture, and for f/(a·u), with a the factor in `in_log2`, to a relative error of 7e-6."""
    u = (CLOSER if name == "symmetric_kl" else CLOSE).value * np.polynomial.chebyshev.chebpts1(64)
    g = u * log(2)
    of_q = np.log1p(b * np.expm1(g))
    of_p = of_q - g
    if name == "jsd":
        f = (b * np.exp(g) * of_p + (1 - b) * of_q) / ((1 - b) * of_q)
    elif name in ("skew_kl", "skew_reverse_kl"):
        f = (of_p - np.expm1(of_p)) / (of_p + b * np.expm1(-of_p))
    elif name == "symmetric_kl":
        f = ((1 - b) * (g + np.expm1(-g)) - b * (np.expm1(-g) + g * np.exp(-g))) / u
    else:
        return (0.0,) * 8
    return tuple(np.polynomial.polynomial.polyfit(u, np.stack([of_q / g, f / u], 1), 3).T.ravel().tolist())


@triton.jit
def _cubic(c, FIRST: tl.constexpr, u):
    return ((c[FIRST + 3] * u + c[FIRST + 2]) * u + c[FIRST + 1]) * u + c[FIRST]


@triton.jit
def factors(NAME: tl.constexpr, b):
    """Return the factors by which f, a_p and a_q from `in_log2` must be multiplied."""
    k = b - 1
    if NAME == "jsd":
        return k * LN2, -b * LN2, k * LN2
    elif NAME == "skew_kl":
        return -1.0, -1.0, -k * k
    elif NAME == "skew_reverse_kl":
        return -1.0, -k * k, -1.0
    elif NAME == "total_variation":
        return 0.5, 0.5, -0.5
    else:
        return 1.0, 1.0, 1.0


@triton.jit
def in_log2(DIVERGENCE: tl.constexpr, x_p, x_q, c, b):
    """Return p, q, f, a_p/p and a_q/q for x_p = log2 p, x_q = log2 q; multiply the last three by `factors`. For the
    symmetric KL, whose quotients may be infinite, return a_p and a_q themselves. c: `series`."""
    NAME: tl.constexpr = DIVERGENCE.name
    if NAME == "symmetric_kl":
        p, q = tl.exp2(x_p), tl.exp2(x_q)
        u_p, u_q, d = tl.where(p > 0, x_p - x_q, 0), tl.where(q > 0, x_p - x_q, 0), q - p
        by_p, by_q = p * u_p, q * u_q
        a_p, a_q = ((1 - b) * LN2) * by_p - b * d, (1 - b) * d - (b * LN2) * by_q
        f = tl.where(tl.abs(x_p - x_q) < CLOSER, by_p * (u_p * _cubic(c, 4, u_p)), a_p + a_q)
        return p, q, f, a_p, a_q
    # masked logits and NaN become finite values without mass; if a NaN counts, the row's sums are NaN anyway
    x_p, x_q = tl.maximum(x_p, -300), tl.maximum(x_q, -300)
    p, q = tl.exp2(x_p), tl.exp2(x_q)
    if NAME == "total_variation":
        up, down = x_p > x_q, x_p < x_q
        sign = tl.where(up, 1.0, tl.where(down, -1.0, 0.0))
        return p, q, sign * (p - q), sign, sign
    if NAME == "skew_reverse_kl":
        p, q, x_p, x_q = q, p, x_q, x_p
    u = x_p - x_q
    near = tl.abs(u) < CLOSE
    m = b * p + ((1 - b) * q + 2.0**-120)
    of_q = tl.where(near, u * _cubic(c, 0, u), log2(m, DIVERGENCE.cuda) - x_q)  # log2 m/q
    of_p = of_q - u
    if NAME == "jsd":
        a_p, a_q = p * of_p, q * of_q
        f = tl.where(near, a_q * (u * _cubic(c, 4, u)), a_q + (b / (1 - b)) * a_p)
        return p, q, f, of_p, of_q
    of_q = quotient(p - q, m, DIVERGENCE.cuda)  # (p/m − 1)/(1 − b)
    of_p = LN2 * of_p + (b - b * b) * of_q
    a_p, a_q = p * of_p, q * of_q
    f = tl.where(near, a_p * (u * _cubic(c, 4, u)), a_p + ((1 - b) * (1 - b)) * a_q)
    if NAME == "skew_kl":
        return p, q, f, of_p, of_q
    return q, p, f, of_q, of_p


@dataclass(frozen=True)
class Entry:
    """Properties of a divergence besides `terms`, as one compile-time argument."""

    base: str = ""  # "t" or "s": a KL with that side's expectation, for which one pass over the logits suffices
    centred_p: bool = False  # Σ a_p is zero by construction
    centred_q: bool = False  # Σ a_q is zero by construction
    in_log2: bool = False  # `in_log2` supports it
    name: str = ""
    cuda: bool = False  # compiled for an NVIDIA GPU


ENTRIES = {
    "forward_kl": Entry(base="t", centred_q=True),
    "reverse_kl": Entry(base="s", centred_p=True),
    **dict.fromkeys(("symmetric_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"), Entry(in_log2=True)),
    "alpha_beta": Entry(),
}


@lru_cache
def entry_of(name: str, cuda: bool) -> Entry:
    """Return the entry of the divergence `name`, or of "sparse", a teacher that the kernels see only in part."""
    return replace(ENTRIES.get(name, Entry()), name=name, cuda=cuda)
