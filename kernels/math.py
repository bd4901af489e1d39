"""Special functions for the kernels, in the precision of their argument (float32 or float64).

Written with exp and log alone: the vendors' device libraries have expm1, log1p and tanh, but the interpreter that runs
the tests without a GPU does not.
"""

import triton
import triton.language as tl

SMALL: tl.constexpr = tl.constexpr(0.25)


@triton.jit
def expm1_small(x):
    """e^x − 1 for |x| ≤ SMALL, by its Taylor series: relative error 5e-8 (float32), 1e-16 (float64)."""
    TERMS: tl.constexpr = 13 if x.dtype == tl.float64 else 6
    r = 1 + x * (1 / TERMS)
    for i in tl.static_range(1, TERMS - 1):
        r = 1 + x * r * (1 / (TERMS - i))
    return x * r


@triton.jit
def difference(a, b, log_ratio):
    """b − a to full relative precision, where log_ratio = log a − log b."""
    return tl.where(tl.abs(log_ratio) < SMALL, a * expm1_small(-log_ratio), b - a)


@triton.jit
def expm1(x):
    """e^x − 1 for any x."""
    return tl.where(tl.abs(x) < SMALL, expm1_small(x), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """log(1 + x) to full relative precision. Source: Kahan's correction of log(u)·x/(u − 1), u = 1 + x rounded."""
    u = 1 + x
    rounded = u - 1
    return tl.where(rounded == 0, x, tl.log(u) * (x / tl.where(rounded == 0, 1, rounded)))


@triton.jit
def tanh(x):
    """(tanh x, 1 − tanh² x), both to full relative precision."""
    minus = expm1(-2 * tl.abs(x))
    plus = minus + 2
    t = -minus / plus
    return tl.where(x < 0, -t, t), 4 * (minus + 1) / (plus * plus)


@triton.jit
def weighted(p, x):
    """p·x with 0·∞ = 0."""
    return tl.where(p > 0, p * x, 0)
