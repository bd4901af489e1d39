"""What the chunk loop asks of the row work, and what it gets: the same for every engine that works in chunks.

    solve(x, rows, z_s, z_t, *, scale, wanted, stats, out)

takes logits of the rows `rows` (a slice of x's tokens), raw products h·Wᵀ of shape (r, V), and fills
`stats[:, rows]` and the buffers in `out`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Buffers(NamedTuple):
    """Where the gradients of these rows go, each (r, V); None = not wanted."""

    student: Tensor | None
    teacher: Tensor | None
    anchor: Tensor | None  # a plane of its own for the anchor's part; None = it is added to the teacher's
    mix: Tensor | None  # (r,): `teacher` holds grad_t + mix·grad_s, orthogonal to grad_s; None = grad_t as it is
    bias: Tensor | None  # (V,) sum over rows of all that reaches the bias, accumulated here
