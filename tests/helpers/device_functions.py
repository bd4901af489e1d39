"""A GPU's approximate functions, in Triton's interpreter, whose own are exact to rounding.

    exp2   ex2.approx.ftz: relative error up to 2⁻²², none at 0; below 2⁻¹²⁶ nothing
    exp    the same of x·log₂e, which is rounded first; keeps what is below 2⁻¹²⁶
    log2   lg2.approx.ftz: error up to 2⁻²² between ½ and 2, relative outside
    a / b  div.full: up to two units in the last place, exact for a power of two

float64 is as exact as before, and so are natural logarithms, which are libdevice's. Within its bound an error is a hash
of the argument's bits: the same for the same argument, as of a table, and unrelated to that of its neighbour.
"""

import numpy as np

ERROR = 2.0**-22


def install(monkeypatch):
    """Let every kernel compute so for the rest of a test."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name, function in {"exp": exp, "exp2": exp2, "log2": log2}.items():
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", unary(function))
    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", lambda self, a, b: self.binary_op(a, b, divide))


def unary(function):
    return lambda self, argument: self.unary_op(argument, function)


def exp2(x, flush=True):
    if x.dtype != np.float32:
        return np.exp2(x)
    y = (np.exp2(x.astype(np.float64)) * (1 + ERROR * noise(x) * (x != 0))).astype(np.float32)
    return np.where(y < 2.0**-126, np.float32(0), y) if flush else y


def exp(x):
    return np.exp(x) if x.dtype != np.float32 else exp2(x * np.float32(np.log2(np.e)), flush=False)


def log2(x):
    y = np.log2(x.astype(np.float64))
    return (y + ERROR * noise(x) * np.where((x > 0.5) & (x < 2), 1, y)).astype(np.float32)


def divide(a, b):
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.divide(a, b)
    if exact.dtype != np.float32:
        return exact
    inexact = np.abs(np.frexp(b)[0]) != 0.5
    return (exact.astype(np.float64) * (1 + ERROR / 2 * noise(exact) * inexact)).astype(np.float32)


def noise(x):
    """Return numbers in [−1, 1), one per element of x, float32."""
    bits = np.ascontiguousarray(x).view(np.uint32).reshape(np.shape(x))
    return ((bits * np.uint32(2654435761)) >> np.uint32(8)) / 2.0**23 - 1
