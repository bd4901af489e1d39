"""Sums over the columns of several tensors at once, [R, BLOCK] each → [R] each.

A sum across warps takes three barriers; one reduction of a tuple takes three for all of its members. The interpreter
would run its combine function element by element in Python, so there each sum is taken on its own.
"""

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


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
def sum2(x0, x1):
    if INTERPRETED:
        return tl.sum(x0, axis=1), tl.sum(x1, axis=1)
    else:
        return tl.reduce((x0, x1), 1, _add2)


@triton.jit
def sum3(x0, x1, x2):
    if INTERPRETED:
        return tl.sum(x0, axis=1), tl.sum(x1, axis=1), tl.sum(x2, axis=1)
    else:
        return tl.reduce((x0, x1, x2), 1, _add3)


@triton.jit
def sum7(x0, x1, x2, x3, x4, x5, x6):
    if INTERPRETED:
        return (
            tl.sum(x0, axis=1), tl.sum(x1, axis=1), tl.sum(x2, axis=1), tl.sum(x3, axis=1), tl.sum(x4, axis=1),
            tl.sum(x5, axis=1), tl.sum(x6, axis=1),
        )  # fmt: skip
    else:
        return tl.reduce((x0, x1, x2, x3, x4, x5, x6), 1, _add7)
