"""One teacher of a run: whether it fits the student, its own head over a batch, and what the student learns from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.inputs import Head, same_vocabulary
from kdfast.training.adapters import adapted_layer
from kdfast.training.data.columns import MEDIA
from kdfast.training.data.tokenizers import other_vocabulary
from kdfast.training.hf import (
    check_inputs,
    check_model,
    head,
    head_shape,
    inputs_of,
    known_ids,
    placeholders,
    run_backbone,
)
from kdfast.training.initialization.layers import find_misfit
from kdfast.training.recipes import Recipe
from kdfast.training.teachers.kinds import KINDS, Batch, KDTerms


class TeacherOutput(NamedTuple):
    """What a teacher that runs gives for a batch."""

    own: Head  # its own, over its last hidden states (B, T, H), on the batch's device
    hidden_states: tuple[Tensor, ...] | None  # of its layers, where they were asked for
    strange: Tensor  # (), whether it has no row for an id that is not padding


class TeacherSide:
    """Hold one teacher, put into eval mode and frozen, or none, and say what the student learns from it.

    Args:
        student: as in `DistillationModel`.
        teacher: likewise; None where batches bring its entries, or nothing is learned from one.
        recipe, valid_vocab, vocab, check_heads: likewise.

    Raises ValueError and TypeError as `DistillationModel` does of a teacher.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        recipe: Recipe,
        *,
        valid_vocab: int | None,
        vocab: str,
        check_heads: bool = True,
    ) -> None:
        if teacher is not None:
            check_model(teacher, "teacher", compare=check_heads)
        _check_pair(student, teacher, recipe, valid_vocab, vocab)
        self.model = None if teacher is None else teacher.requires_grad_(False).eval()
        self.inputs = frozenset[str]() if teacher is None else inputs_of(teacher)
        self.kind = KINDS[recipe.teacher](recipe)
        self.projector = self.kind.make_projector(student, teacher)
        self._places = placeholders(student)

    def learn_from_entries(self, recipe: Recipe) -> None:
        """Take the entries that batches bring in place of the teacher's head; `recipe` says so too."""
        self.kind = KINDS[recipe.teacher](recipe)

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        """Raise ValueError for an input that the teacher does not read."""
        if self.model is not None:
            check_inputs(self.model, "teacher", inputs, self.inputs)

    @torch.no_grad()
    def run(self, input_ids: Tensor, inputs: dict[str, Any], *, look: bool) -> TeacherOutput:
        """Run the teacher over a batch.

        Args:
            input_ids: (B, T), as the student reads them.
            inputs: what else the backbone takes.
            look: raise ValueError for ids that it has no row for, which waits for the device.
        """
        assert self.model is not None
        self._check_places(inputs)
        ids, strange = known_ids(self.model, "teacher", input_ids, inputs.get("attention_mask"), look=look)
        states = run_backbone(self.model, input_ids=ids, **inputs)
        own = head(self.model, states.last_hidden_state.to(input_ids.device))
        return TeacherOutput(own, getattr(states, "hidden_states", None), strange)

    def terms(self, batch: Batch, compressed_head: nn.Module | None) -> KDTerms:
        """Return what `fused_kd_loss` takes of this teacher for one batch."""
        return self.kind.terms(batch, compressed_head if self.projector is None else self.projector)

    def _check_places(self, inputs: dict[str, Any]) -> None:
        """Raise ValueError for images whose places the teacher would not find: both models read the same ids."""
        theirs = {} if MEDIA.isdisjoint(inputs) or self.model is None else placeholders(self.model)
        for kind in ("image", "video", "audio"):
            ours, other = self._places.get(kind), theirs.get(kind)
            if ours is not None and other is not None and ours != other:
                raise ValueError(
                    f"the batch has images, video or sound, whose place in input_ids is {kind}_token_id={ours} for the "
                    f"student and {other} for the teacher. Take two models of one processor, or leave images out"
                )


def _check_pair(
    student: PreTrainedModel, teacher: PreTrainedModel | None, recipe: Recipe, valid_vocab: int | None, vocab: str
) -> None:
    if recipe.student_init != "own" and (layer := adapted_layer(student)) is not None:
        raise ValueError(
            f"student carries a PEFT adapter (at {layer!r}), and recipe {recipe.name!r} would overwrite the embedding "
            "of the model below it. Use a recipe with student_init='own', such as 'compressed_head'"
        )
    if teacher is None:
        if recipe.teacher not in ("none", "cached") or recipe.needs_true_head or recipe.hidden_weight:
            needs = "student_init='svd'" if recipe.teacher in ("none", "cached") else f"recipe {recipe.name!r}"
            raise ValueError(f"teacher is None; {needs} needs one. Pass it, or use recipe='lm_only'")
        return
    if teacher is student:
        raise ValueError("teacher and student are the same object; expected two models, for the teacher gets frozen")
    theirs = {id(p) for p in teacher.parameters()}
    shared = next((name for name, p in student.named_parameters() if id(p) in theirs), None)
    if shared is not None and recipe.student_init != "own":
        raise ValueError(
            f"student and teacher share {shared!r}, which student_init={recipe.student_init!r} would overwrite in "
            "both. Give the student a copy, or use a recipe with student_init='own', such as 'compressed_head'"
        )
    rows = head_shape(student)[0], head_shape(teacher)[0]
    if recipe.needs_true_head and not same_vocabulary(*rows, valid_vocab, vocab):
        raise ValueError(
            f"recipe {recipe.name!r} compares the two heads token by token, so they must have the same ids: "
            f"{other_vocabulary(student, teacher)}"
        )
    if (recipe.solves_projector or recipe.student_init != "own") and not same_vocabulary(*rows, valid_vocab):
        raise ValueError(
            f"vocab='truncate' with recipe {recipe.name!r}, which solves the student's rows ({rows[0]}) from the "
            f"teacher's ({rows[1]}); expected as many. Use recipe='compressed_head' or 'teacher_head'"
        )
    if recipe.student_init == "svd_blocks" and (misfit := find_misfit(student, teacher)) is not None:
        raise ValueError(
            f"student_init='svd_blocks' takes the student's layers from the teacher's: {misfit}. Or use "
            "student_init='svd', which solves the embedding alone"
        )
