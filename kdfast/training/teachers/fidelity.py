"""How close a run is to its teacher.

A projector can bring the KD loss to zero by turning the projected teacher into the student. What reveals this is
`Fidelity`, the surrogate's KL to the true teacher, which evaluation measures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.inputs import Head, SparseLogits, same_vocabulary
from kdfast.loss import fused_kd_loss


class Fidelity(NamedTuple):
    """The distance of student and surrogate from the true teacher: 0-d tensors, means over the targets at τ = 1."""

    kl_teacher_student: Tensor  # KL(true teacher ‖ student); a lower bound for a cache, whose tail is one category
    kl_teacher_projected: Tensor | None = None  # KL(true teacher ‖ surrogate); None without one
    ce_projected: Tensor | None = None  # the surrogate's cross entropy on the labels


@torch.no_grad()
def fidelity(
    student: Head, surrogate: Head | None, teacher: Head | SparseLogits, targets: Tensor, **options: Any
) -> Fidelity | None:
    """Return the fidelity of student and surrogate to the teacher's own head, or to its cached entries at τ = 1.

    None if the vocabularies differ by more than padding, unless vocab="truncate" ends both where the smaller one ends.
    Compares the rows of `targets` (B, T) that are not −100. options: engine, scratch_bytes, valid_vocab, vocab,
    kd_vocab_mask (which then limits the comparison to its ids).
    """
    if isinstance(teacher, Head):
        vocab, theirs = student.weight.shape[0], teacher.weight.shape[0]
        if not same_vocabulary(vocab, theirs, options.get("valid_vocab"), options.get("vocab", "error")):
            return None
    kl_student, _ = fused_kd_loss(student, teacher, targets, temperature=1.0, return_metrics=True, **options)
    if surrogate is None:
        return Fidelity(kl_student)
    kl, metrics = fused_kd_loss(surrogate, teacher, targets, temperature=1.0, return_metrics=True, **options)
    return Fidelity(kl_student, kl, metrics.ce)
