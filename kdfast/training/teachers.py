"""What stands behind a recipe's KD term and its anchor, for one batch.

The *stand-in* is the head that the student learns from in place of the teacher's own: the student's over projected
hidden states, a probe's, or the compressed one. Its fidelity is what evaluation measures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from kdfast.inputs import Head, Projected, SparseLogits, Teacher
from kdfast.loss import fused_kd_loss
from kdfast.projector import LogitProjector

if TYPE_CHECKING:
    from kdfast.training.model import DistillationModel


class Probe(LogitProjector):
    """A projector with a head of its own (V, Hs), trained by the anchor alone: a teacher that no student can move.

    The head starts as the student's embedding.
    """

    def __init__(self, teacher_width: int, embedding: Tensor, **options: Any) -> None:
        super().__init__(teacher_width, embedding.shape[1], device=embedding.device, **options)
        self.head = nn.Parameter(embedding.detach().to(self.weight.dtype).clone())


class Terms(NamedTuple):
    """Arguments of `fused_kd_loss` beside the recipe's numbers."""

    teacher: Teacher | None
    options: dict[str, Any]
    stand_in: Head | None  # None where the teacher's own head is the teacher, or there is none
    anchor_loss: Tensor | None  # (), where the anchor is no part of the loss's own computation


def kd_terms(
    model: DistillationModel,
    student: Head,
    teacher: Head | SparseLogits | None,
    targets: Tensor,
    items: int | Tensor | None,
) -> Terms:
    """Args: `teacher` is its own head over this batch, or entries of a cache; `targets` (B, T); `items` the divisor of
    every term, or None."""
    recipe = model.recipe
    options = {**model.loss_options, "num_items_in_batch": items}
    if recipe.teacher == "none":
        return Terms(None, options, None, None)
    if recipe.teacher == "cached":
        if not isinstance(teacher, SparseLogits):
            raise ValueError(
                "teacher_indices is None; recipe 'cached' learns from a teacher cache: train on "
                "TeacherCache(folder).dataset(split, blocks, temperature=…), whose rows have it"
            )
        return Terms(teacher, options, None, None)
    assert isinstance(teacher, Head)
    if recipe.teacher == "own_head":
        return Terms(teacher, options, None, None)
    if recipe.teacher == "compressed_head":
        if model.compressed_head is None:  # no rank was near enough
            return Terms(teacher, options, None, None)
        stand_in = model.compressed_head(teacher.hidden)
        return Terms(stand_in, options, stand_in, None)

    projector = model.logit_projector
    assert projector is not None
    hidden = teacher.hidden.to(projector.weight.dtype)
    projected = projector(hidden)
    if isinstance(projector, Probe):
        stand_in = Head(projected, projector.head, logit_scale=student.logit_scale, softcap=student.softcap)
        shared = {name: options[name] for name in ("engine", "scratch_bytes", "valid_vocab", "num_items_in_batch")}
        anchor_loss = fused_kd_loss(stand_in, None, targets, ce_weight=1.0, **shared)
        assert isinstance(anchor_loss, Tensor)
        stand_in = _detached(stand_in)
        return Terms(stand_in, options, stand_in, anchor_loss)
    stand_in = _detached(replace(student, hidden=projected.to(student.hidden.dtype)))
    options["teacher_grad"], options["anchor_weight"] = recipe.teacher_grad, recipe.anchor_weight
    return Terms(Projected(hidden, projector.weight, projector.bias), options, stand_in, None)


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, hidden=head.hidden.detach(), weight=head.weight.detach(), bias=bias)
