"""Special functions in the precision of their argument (float32 or float64), and sums of a thread's own elements.

They use only exp and log: the vendors' device libraries have expm1, log1p and tanh, but the interpreter, which runs the
tests without a GPU, does not.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

SMALL: tl.constexpr = tl.constexpr(0.25)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
NEAR: tl.constexpr = tl.constexpr(0.6)  # bound of a difference in units of log2


@triton.jit
def expm1_small(x):
    """Return e^x − 1 for |x| ≤ SMALL by its Taylor series: relative error 5e-8 (float32), 1e-16 (float64)."""
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
def log2(x, CUDA: tl.constexpr):
    """Return log2 x for float32 x; on an NVIDIA GPU in one instruction, to 2⁻²² for x between ½ and 2."""
    return libdevice.fast_log2f(x) if CUDA else tl.log2(x)


@triton.jit
def quotient(a, b, CUDA: tl.constexpr):
    """Return a/b in float32; on an NVIDIA GPU in two instructions, to 2⁻²² for b between 2⁻¹²⁶ and 2¹²⁶."""
    return libdevice.fast_dividef(a, b) if CUDA else a / b


@triton.jit
def log1p(x):
    """Return log(1 + x) to full relative precision. Source: Kahan's correction log(u)·x/(u − 1), u = 1 + x rounded."""
    u = 1 + x
    rounded = u - 1
    return tl.where(rounded == 0, x, tl.log(u) * (x / tl.where(rounded == 0, 1, rounded)))


@triton.jit
def curve(u):
    """Return (x + e^−x − 1)/u² for x = u·ln 2, |u| < NEAR. Relative error in float32 9e-8 below 0.2 and 9e-7 at the end
    (minimax, weighted so that the rest of Σ u, which is of first order, does not show); in float64 1e-15."""
    if u.dtype == tl.float64:
        x = u * LN2
        r = 1 - x * (1 / 17)
        for i in tl.static_range(0, 14):
            r = 1 - x * r * (1 / (16 - i))
        return r * (0.5 * LN2 * LN2)
    else:
        r = 0.0001540717091670159 * u + -0.0013382452377045531
        r = r * u + 0.00961820276103466
        r = r * u + -0.05550396073239001
        return r * u + 0.2402265069591007


@triton.jit
def log1p_less(d):
    """Return log(1 + d) − d, which is of second order, to full relative precision; d > −1."""
    TERMS: tl.constexpr = 18 if d.dtype == tl.float64 else 9
    r = -d / TERMS + 1 / (TERMS - 1)
    for i in tl.static_range(2, TERMS - 1):
        r = 1 / (TERMS - i) - d * r
    return tl.where(tl.abs(d) < 0.1, -d * d * r, log1p(d) - d)


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
def along(x, block):
    """Return numbers per row [R], or per row and thread [R, LANES], reshaped to broadcast against a block."""
    if len(block.shape) == 2:
        return x[:, None]
    elif len(x.shape) == 1:
        return x[:, None, None, None]
    else:
        return x[:, None, :, None]


@triton.jit
def thread_sum(x):
    """Return the sum of each thread's own elements of a block: [R, J, LANES, VEC] → [R, LANES]."""
    return tl.sum(tl.sum(x, axis=3), axis=1)


@triton.jit
def thread_max(x):
    """Return the maximum of each thread's own elements of a block: [R, J, LANES, VEC] → [R, LANES]."""
    return tl.max(tl.max(x, axis=3), axis=1)


@triton.jit
def over_threads(xs):
    """Return the sums of a tuple's tensors [R, LANES] over the threads, as a tuple of [R]."""
    out = (tl.sum(xs[0], axis=1),)
    for i in tl.static_range(1, len(xs)):
        out += (tl.sum(xs[i], axis=1),)
    return out


@triton.jit
def added(a, b):
    """Return the elementwise sums of two tuples of tensors, as a tuple; where b ends early, a's stay as they are."""
    out = (a[0] + b[0],)
    for i in tl.static_range(1, len(a)):
        out += (a[i] + b[i] if i < len(b) else a[i],)
    return out
