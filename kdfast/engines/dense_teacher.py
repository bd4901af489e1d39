"""Dense teacher logits the caller made: read where they lie, a few rows at a time, whatever their strides."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops.problem import Problem


def given_rows(x: Problem, rows: slice) -> Tensor:
    """(r, kd_vocab) logits of `x`'s rows `rows`, in their own dtype."""
    logits, index = _indices(x, rows)
    return logits[..., : x.kd_vocab][index]


def offsets(x: Problem) -> Tensor:
    """(N,) int64: elements from the logits' first to the first of each token's row."""
    logits, index = _indices(x, slice(None))
    parts = [i * stride for i, stride in zip(index, logits.stride()[:-1], strict=True)]
    return torch.stack(parts).sum(dim=0)


def _indices(x: Problem, rows: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
    assert x.teacher_logits is not None
    assert x.teacher_rows is not None
    logits = x.teacher_logits if x.teacher_logits.dim() > 1 else x.teacher_logits[None]
    rest, index = x.teacher_rows[rows], []
    for size in reversed(logits.shape[:-1]):  # torch.unravel_index copies the sizes to the device, and waits
        index.append(rest % size)
        rest = rest // size
    return logits, tuple(index[::-1])
