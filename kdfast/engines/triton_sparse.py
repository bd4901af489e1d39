"""Plain torch arithmetic on (rows, K) between statistics and gradients, for a teacher given by K entries per row.

constants (≥ 11, r) are the `RowConstants` of `kernels/online_softmax.py`: the student's maximum and log-sum-exp; in
place of the teacher's, those of the student's logits outside the support, if needed; and log Σ at τ = 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.engines.torch_rows import add_bias_and_transform, slope_of
from kdfast.kernels import topk_teacher
from kdfast.kernels.online_softmax import CONSTANTS, RowConstants
from kdfast.ops import sparse
from kdfast.ops.problem import AGREEMENT, CE, KD, Problem


class Entries(NamedTuple):
    """The student's logits at the teacher's entries."""

    indices: Tensor  # (r, K)
    z: Tensor  # (r, K)
    slope: Tensor | None  # (r, K): the softcap's; None = 1


def addresses(x: Problem, rows: slice) -> Tensor:
    """Return the entries' positions (r, K) in this process's slice of the vocabulary; 0 for those elsewhere."""
    return _local(x, rows).clamp_min(0) if x.group else _local(x, rows)


def _local(x: Problem, rows: slice) -> Tensor:
    """Return the entries' positions (r, K) in this process's slice; −1 for those elsewhere."""
    assert x.teacher_indices is not None
    local = x.local(x.teacher_indices[rows])
    assert local is not None
    return local


def entries(x: Problem, rows: slice, products: Tensor) -> Entries:
    """Return the entries, given products h·Wᵀ (r, K) at them, which are overwritten."""
    assert x.teacher_indices is not None
    bias = None if x.bias is None or not x.valid_vocab else x.bias[addresses(x, rows)]
    slope = add_bias_and_transform(products, bias, x.logit_scale, x.softcap)
    return Entries(x.teacher_indices[rows], products, slope)


def own(x: Problem, rows: slice, z: Tensor) -> Tensor:
    """Return z (r, K), with 0 at entries that are not in this process's slice."""
    return torch.where(_local(x, rows) >= 0, z, 0)


def entries_of(x: Problem, rows: slice, z: Tensor) -> Entries:
    """Return the entries, given the student's logits z (r, K) at them."""
    assert x.teacher_indices is not None
    return Entries(x.teacher_indices[rows], z, slope_of(z, x.softcap))


def bits(x: Problem, rows: slice) -> Tensor | None:
    """Return a bit mask (r, words) of the vocabulary's entries that are not in the rest; None if no rest is needed."""
    excluded = sparse.excluded(x)
    if excluded is None or x.teacher_indices is None:
        return None
    here = excluded[rows]
    if x.group:
        here = here & (_local(x, rows) >= 0)
    return topk_teacher.bits(addresses(x, rows), here, x.kd_vocab)


def solve(x: Problem, rows: slice, at: Entries, constants: Tensor, scale: Tensor) -> sparse.Support:
    """Return the divergence, and gradients divided by `scale`."""
    return sparse.between_passes(x, rows, at.z, constants[:4], scale)


def record(x: Problem, rows: slice, found: sparse.Support, stats: Tensor) -> None:
    """Complete `stats[:, rows]`, in which the kernel has stored the student's argmax as the agreement."""
    active = x.active[rows]
    stats[KD, rows] = torch.where(active, found.value, 0)
    if x.want_metrics:
        agreement = stats[AGREEMENT, rows] == sparse.best(x)[rows]
        stats[AGREEMENT, rows] = torch.where(active, agreement.to(stats.dtype), 0)


def outside(x: Problem, found: sparse.Support, constants: Tensor) -> Tensor:
    """Return the constants for a sparse teacher's gradients: in the teacher's place the softmax, in A_p its factor."""
    constants = constants.clone()
    row = RowConstants(*constants[: CONSTANTS.value])
    if not sparse.has_rest(x):
        row.m_t.copy_(row.m_s)
        row.log_S_t.copy_(row.log_S_s)
    row.A_p.copy_(found.outside)
    return constants


def inside(
    x: Problem, rows: slice, at: Entries, found: sparse.Support, constants: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the gradients (r, K) with respect to h·Wᵀ at the entries, including the cross entropy's, in `dtype`."""
    grad = found.inside
    if x.ce_term and x.labels is not None:
        row = RowConstants(*constants[: CONSTANTS.value])
        softmax = (at.z - row.m_s[:, None] - row.log_S1_s[:, None]).exp()
        onehot = (at.indices == x.labels[rows][:, None]).to(grad.dtype)
        coefficient = (x.coefficients[CE, rows] / scale)[:, None]
        grad = grad + torch.where(coefficient == 0, 0, coefficient * (softmax - onehot))
    grad = grad * x.logit_scale if at.slope is None else grad * at.slope * x.logit_scale
    grad = torch.where(x.active[rows][:, None], grad, 0)
    return (grad.clamp(-65504, 65504) if dtype == torch.float16 else grad).to(dtype)
