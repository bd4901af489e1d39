"""Special functions in the precision of their argument (float32 or float64), and several sums in one reduction.

Written with exp and log alone: the vendors' device libraries have expm1, log1p and tanh, but the interpreter that runs
the tests without a GPU does not.
"""

import triton
import triton.language as tl

SMALL: tl.constexpr = tl.constexpr(0.25)
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def expm1_small(x):
    """Return e^x − 1 for |x| ≤ SMALL, by its Taylor series: relative error 5e-8 (float32), 1e-16 (float64)."""
    TERMS: tl.constexpr = 13 if x.dtype == tl.float64 else 6
    r = 1 + x * (1 / TERMS)
    for i in tl.static_range(1, TERMS - 1):
        r = 1 + x * r * (1 / (TERMS - i))
    return x * r


@triton.jit
def difference(a, b, log_ratio):
    """Return b − a to full relative precision, where log_ratio = log a − log b."""
    return tl.where(tl.abs(log_ratio) < SMALL, a * expm1_small(-log_ratio), b - a)


@triton.jit
def expm1(x):
    """Return e^x − 1 for any x."""
    return tl.where(tl.abs(x) < SMALL, expm1_small(x), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """Return log(1 + x) to full relative precision. Source: Kahan's correction log(u)·x/(u − 1), u = 1 + x rounded."""
    u = 1 + x
    rounded = u - 1
    return tl.where(rounded == 0, x, tl.log(u) * (x / tl.where(rounded == 0, 1, rounded)))


@triton.jit
def tanh(x):
    """Return (tanh x, 1 − tanh² x), both to full relative precision."""
    minus = expm1(-2 * tl.abs(x))
    plus = minus + 2
    t = -minus / plus
    return tl.where(x < 0, -t, t), 4 * (minus + 1) / (plus * plus)


@triton.jit
def weighted(p, x):
    """Return p·x, where 0·∞ = 0."""
    return tl.where(p > 0, p * x, 0)


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add7(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6


@triton.jit
def sums(xs, TOGETHER: tl.constexpr = True):
    """Return the sums over the columns of 2, 3 or 7 tensors, [R, BLOCK] → [R], as a tuple; not TOGETHER: of any number.

    A sum across warps takes three barriers; one reduction of a tuple takes three for all of its members. In the
    interpreter, which would run the combine function element by element in Python, each sum is taken on its own."""
    if INTERPRETED or not TOGETHER:
        out = (tl.sum(xs[0], axis=1),)
        for i in tl.static_range(1, len(xs)):
            out += (tl.sum(xs[i], axis=1),)
        return out
    elif len(xs) == 2:
        return tl.reduce(xs, 1, _add2)
    elif len(xs) == 3:
        return tl.reduce(xs, 1, _add3)
    else:
        tl.static_assert(len(xs) == 7)
        return tl.reduce(xs, 1, _add7)


@triton.jit
def added(a, b):
    """Return the elementwise sums of two tuples of tensors, as a tuple; what b is too short for stays as it is in a."""
    out = (a[0] + b[0],)
    for i in tl.static_range(1, len(a)):
        out += (a[i] + b[i] if i < len(b) else a[i],)
    return out
