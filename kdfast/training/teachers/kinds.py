"""What a student learns from: a small class per kind of teacher.

The *surrogate* is the head that the student learns from instead of the teacher's own: the student's head over
projected hidden states, a probe's, or the compressed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.inputs import Head, Projected, Teacher
from kdfast.loss import fused_kd_loss
from kdfast.projector import LogitProjector
from kdfast.training.hf import head_shape
from kdfast.training.recipes import Recipe
from kdfast.training.teachers.entries import OWN_ENTRIES, CachedEntries, CachedStates


class Probe(LogitProjector):
    """A projector with its own head (V, Hs), which starts as the student's embedding; only the anchor trains it."""

    def __init__(self, teacher_width: int, embedding: Tensor, **options: Any) -> None:
        super().__init__(teacher_width, embedding.shape[1], **options)
        self.head = nn.Parameter(embedding.detach().to(self.weight.dtype).clone())


class Batch(NamedTuple):
    """One batch, as a kind of teacher reads it."""

    student: Head
    own: Head | None  # the teacher's own head, if it runs
    cached: CachedEntries | CachedStates | None
    targets: Tensor  # (B, T), −100 where nothing counts or the teacher has no position
    temperature: float | Tensor
    options: dict[str, Any]  # options of `fused_kd_loss`: engine, scratch_bytes, valid_vocab, num_items_in_batch
    items: int | Tensor | None = None  # the divisor of `targets` if some have no position; None: that in options


class KDTerms(NamedTuple):
    """Arguments of `fused_kd_loss` besides the recipe's numbers."""

    teacher: Teacher | None
    options: dict[str, Any]
    surrogate: Callable[[], Head] | None = None  # None if the teacher's own head is used, or there is no teacher
    anchor_loss: Tensor | None = None  # (), if the loss does not compute the anchor itself


class NoTeacher:
    """Learning from the text alone."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def make_projector(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> LogitProjector | None:
        """Return the trained part on the teacher's side, in fp32 or fp64; None if there is none."""
        return None

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        """Return the teacher of one batch; `part` is the model's projector, or its compressed or shared head."""
        return KDTerms(None, batch.options)


class OwnHead(NoTeacher):
    """Learning from the teacher's own head."""

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        return KDTerms(batch.own, batch.options)


class SharedTokens(NoTeacher):
    """Learning from the teacher's own head over the strings that both tokenizers have."""

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        assert part is not None
        return KDTerms(batch.own, {**batch.options, "kd_vocab_mask": part.mask})


class Cached(NoTeacher):
    """Learning from entries that the teacher's own head gave earlier."""

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        if batch.cached is None and batch.own is not None:  # an evaluation with a live teacher
            return KDTerms(batch.own, batch.options)
        if batch.cached is None:
            raise ValueError(
                "teacher_indices is None; recipe 'cached' learns from a teacher cache: train on "
                "TeacherCache(folder).dataset(split, blocks, temperature=…), whose rows have it"
            )
        if batch.cached.tail is None:
            raise ValueError(f"the batch has teacher_log_probs without teacher_log_tails: {OWN_ENTRIES}")
        return KDTerms(batch.cached.at(batch.temperature), batch.options)


class Compressed(NoTeacher):
    """Learning from the teacher's head as two thin factors, or from the whole head if no rank is close enough."""

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        assert batch.own is not None
        if part is None:
            return KDTerms(batch.own, batch.options)
        surrogate = part(batch.own.hidden)
        return KDTerms(surrogate, batch.options, lambda: surrogate)


class ThroughProjector(NoTeacher):
    """Learning from a projector followed by the student's own head."""

    def make_projector(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> LogitProjector | None:
        assert teacher is not None
        weight = student.get_output_embeddings().weight
        options = {
            "init": "normal" if self.recipe.projector_init == "normal" else "default",
            "device": weight.device,
            "dtype": torch.promote_types(weight.dtype, torch.float32),
        }
        projector = self._build(head_shape(teacher)[1], weight, options)
        return projector.requires_grad_(self.recipe.projector_resolve_steps == 0)

    def _build(self, teacher_width: int, weight: Tensor, options: dict[str, Any]) -> LogitProjector:
        return LogitProjector(teacher_width, weight.shape[1], **options)

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        assert batch.own is not None
        assert isinstance(part, LogitProjector)
        hidden = batch.own.hidden.to(part.weight.dtype)
        student, recipe = batch.student, self.recipe

        def surrogate() -> Head:  # only for evaluation: in training the engine projects
            return _detached(replace(student, hidden=part(hidden).to(student.hidden.dtype)))

        options = {**batch.options, "teacher_grad": recipe.teacher_grad, "anchor_weight": recipe.anchor_weight}
        if batch.items is not None and recipe.anchor_weight:  # the divisor in options divides all terms
            share = batch.options["num_items_in_batch"] / torch.as_tensor(batch.items).clamp(min=1)
            options["anchor_weight"] = recipe.anchor_weight * share
        options["anchor_targets"] = batch.targets
        return KDTerms(Projected(hidden, part.weight, part.bias), options, surrogate)


class ThroughProbe(ThroughProjector):
    """Learning from a projector and its own head, which learn from the labels alone."""

    def _build(self, teacher_width: int, weight: Tensor, options: dict[str, Any]) -> LogitProjector:
        return Probe(teacher_width, weight, **options)

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        assert batch.own is not None
        assert isinstance(part, Probe)
        student = batch.student
        hidden = part(batch.own.hidden.to(part.weight.dtype))
        surrogate = Head(hidden, part.head, logit_scale=student.logit_scale, softcap=student.softcap)
        options = batch.options if batch.items is None else {**batch.options, "num_items_in_batch": batch.items}
        anchor_loss = fused_kd_loss(surrogate, None, batch.targets, ce_weight=1.0, **options)
        assert isinstance(anchor_loss, Tensor)
        surrogate = _detached(surrogate)
        return KDTerms(surrogate, batch.options, lambda: surrogate, anchor_loss)


KINDS: dict[str, type[NoTeacher]] = {  # by `Recipe.teacher`
    "none": NoTeacher,
    "own_head": OwnHead,
    "shared_head": SharedTokens,
    "compressed_head": Compressed,
    "projected": ThroughProjector,
    "probe": ThroughProbe,
    "cached": Cached,
}


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, hidden=head.hidden.detach(), weight=head.weight.detach(), bias=bias)
