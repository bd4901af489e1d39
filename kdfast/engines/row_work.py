"""What the chunk loop asks of the row work, and what it gets: the same for every engine that works in chunks.

    work = RowWork(x, scale=, wanted=, stats=)      once
    work(rows, z_s, z_t, out)                       for each chunk

takes logits of the rows `rows` (a slice of x's tokens), raw products h·Wᵀ of shape (r, V), and fills
`stats[:, rows]` and the buffers in `out`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from kdfast.ops.planning import Wanted
from kdfast.ops.problem import Problem


class Buffers(NamedTuple):
    """Where the gradients of these rows go, each (r, V); None = not wanted."""

    student: Tensor | None
    teacher: Tensor | None
    anchor: Tensor | None  # a plane of its own for the anchor's part; None = it is added to the teacher's
    mix: Tensor | None  # (r,): `teacher` holds grad_t + mix·grad_s, orthogonal to grad_s; None = grad_t as it is
    bias: Tensor | None  # (V,) sum over rows of all that reaches the bias, accumulated here

    def part(self, rows: slice) -> Buffers:
        """Of some of the rows."""
        parts = [None if each is None else each[rows] for each in self[:4]]
        return Buffers(parts[0], parts[1], parts[2], parts[3], self.bias)


class RowWork(Protocol):
    """scale (): gradients are divided by it; stats (6, N)."""

    def __init__(self, x: Problem, *, scale: Tensor, wanted: Wanted, stats: Tensor) -> None: ...

    def __call__(self, rows: slice, z_s: Tensor, z_t: Tensor | None, out: Buffers) -> None: ...
