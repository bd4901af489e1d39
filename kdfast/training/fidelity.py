"""How near student and projected teacher are to the true teacher: what a falling KD loss alone does not show.

A projector can bring the KD loss to zero by turning the projected teacher into the student. Its KL to the true
teacher, through the teacher's own head, then stays where it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.frontend.checks import same_vocabulary
from kdfast.inputs import Head, SparseLogits
from kdfast.loss import fused_kd_loss


class Fidelity(NamedTuple):
    """0-d tensors, means over the targets at τ = 1."""

    kl_teacher_student: Tensor  # KL(true teacher ‖ student); of a cached one at most that: its tail is one category
    kl_teacher_projected: Tensor | None  # KL(true teacher ‖ its stand-in); None where there is none
    ce_projected: Tensor | None  # the stand-in's cross entropy on the labels


@torch.no_grad()
def fidelity(
    student: Head, projected: Head | None, teacher: Head | SparseLogits, targets: Tensor, **options: Any
) -> Fidelity | None:
    """Compare both with the teacher's own head; None where the vocabularies differ by more than padding.

    Args:
        student: the student's head.
        projected: what stands in for the teacher: the student's head over the projected hidden states, a probe's, or
            the compressed head; None where the teacher's own head is used.
        teacher: the teacher's own head, or its entries from a cache, at τ = 1.
        targets: (B, T); the rows that are not −100 are compared.
        options: engine, scratch_bytes, valid_vocab.
    """
    if isinstance(teacher, Head):
        vocab, theirs = student.weight.shape[0], teacher.weight.shape[0]
        if not same_vocabulary(vocab, theirs, options.get("valid_vocab")):
            return None

    kl_student, _ = _against(teacher, student, targets, options)
    if projected is None:
        return Fidelity(kl_student, None, None)
    return Fidelity(kl_student, *_against(teacher, projected, targets, options))


def _against(
    teacher: Head | SparseLogits, head: Head, targets: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(KL(teacher ‖ head), the head's cross entropy on the labels)."""
    result = fused_kd_loss(head, teacher, targets, temperature=1.0, return_metrics=True, **options)
    assert isinstance(result, tuple)
    return result[0], result[1].ce
