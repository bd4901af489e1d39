"""Divergences on the device: one function each, shared by the row kernel and the tiled kernels.

With p the teacher's and q the student's probability of a token and g = log p − log q, each returns (f, a_p, a_q): the
summand, arranged so that it keeps its digits when p ≈ q, and its derivatives towards log p and log q. The gradient
towards logits at τ is (a − softmax·Σa)/τ. `kdfast.divergences` has the definitions and their sources; the tests hold
each function against the definition there.

To add one: its function, a branch in `terms`, a line in `ENTRIES`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import triton
import triton.language as tl

from kdfast.kernels.math import difference, expm1, log1p, weighted


@triton.jit
def forward_kl(p, q, g):
    """Σ p·g, plus q − p, which sums to zero and makes every summand of second order."""
    a_q = difference(p, q, g)
    a_p = weighted(p, g)
    return a_p + a_q, a_p, a_q


@triton.jit
def symmetric_kl(p, q, g, lam):
    """(1−λ)·KL(p‖q) + λ·KL(q‖p): ½ Σ (p − q)·g and, where λ is not ½, what is of third order or just as infinite."""
    d, by_p, by_q = difference(p, q, g), weighted(p, g), weighted(q, g)
    uneven = tl.where(tl.abs(g) < float("inf"), (0.5 - lam) * (by_p + by_q + 2 * d), 0)
    f = tl.where(d == 0, 0, -0.5 * d * g) + uneven
    return f, (1 - lam) * by_p - lam * d, (1 - lam) * d - lam * by_q


@triton.jit
def jsd(p, q, g, beta):
    """β·KL(p‖m) + (1−β)·KL(q‖m), m = β p + (1−β) q: log m/p for g ≥ 0 and log m/q for g < 0 are log1p of something
    small, and differ by g."""
    mixed = log1p(expm1(-tl.abs(g)) * tl.where(g >= 0, 1 - beta, beta))
    a_p = -beta * weighted(p, mixed + tl.maximum(-g, 0))
    a_q = (beta - 1) * weighted(q, mixed + tl.maximum(g, 0))
    return a_p + a_q, a_p, a_q


@triton.jit
def skew_kl(p, q, g, alpha):
    """KL(p‖m), m = α p + (1−α) q, plus (1−α)·(q − p), which sums to zero and makes every summand of second order.
    Where p < e⁻⁸⁰ q it counts for nothing, so that expm1(−g) may stop there; where q is 0, g may be NaN. m = p·(1 + x)
    stays above 0 also when rounded."""
    MOST: tl.constexpr = 1 - (2**-52 if g.dtype == tl.float64 else 2**-23)
    of_q = tl.minimum(1 - alpha, MOST)
    x = of_q * expm1(tl.minimum(tl.where(q > 0, -g, -80), 80))  # (m − p)/p
    r = x / (1 + x)  # (m − p)/m
    a_q = of_q * r * q
    a_p = p * (alpha * r - log1p(x))
    return a_p + a_q, a_p, a_q


@triton.jit
def total_variation(p, q, g):
    """½ Σ |p − q|, subgradient 0 where p = q."""
    d = difference(p, q, g)
    half = tl.where(d < 0, 0.5, tl.where(d > 0, -0.5, 0.0))
    return -half * d, half * p, -half * q


@triton.jit
def terms(DIVERGENCE: tl.constexpr, p, q, g, parameter):
    """Return (f, a_p, a_q) of the divergence of that name. parameter: its only number, or 0."""
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
    else:
        tl.static_assert(DIVERGENCE == "total_variation")
        f, a_p, a_q = total_variation(p, q, g)
    return f, a_p, a_q


@dataclass(frozen=True)
class Entry:
    """What the kernels know of a divergence besides `terms`, as one compile-time argument."""

    base: str = ""  # "t" or "s": a KL whose expectation is under that side; one pass over the logits suffices
    centred_p: bool = False  # Σ a_p is zero by construction
    centred_q: bool = False  # Σ a_q is
    name: str = ""


ENTRIES = {
    "forward_kl": Entry(base="t", centred_q=True),
    "reverse_kl": Entry(base="s", centred_p=True),
    **dict.fromkeys(("symmetric_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"), Entry()),
}


@lru_cache
def entry_of(name: str) -> Entry:
    """Return the entry of the divergence of that name, or of the "sparse" teacher that the kernels see in part only."""
    return replace(ENTRIES.get(name, Entry()), name=name)
