"""One teacher of a run: whether it fits the student, its head over a batch, and what the student learns from it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.divergences import Divergence
from kdfast.inputs import Head, same_vocabulary
from kdfast.loss import KDMetrics, fused_kd_loss
from kdfast.training.adapters import adapted_layer
from kdfast.training.data.columns import MEDIA
from kdfast.training.data.shared_vocabulary import SharedVocabulary
from kdfast.training.data.tokenizers import other_vocabulary
from kdfast.training.hf import (
    IGNORE_INDEX,
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
from kdfast.training.teachers.entries import CachedEntries, CachedStates
from kdfast.training.teachers.fidelity import Fidelity, fidelity
from kdfast.training.teachers.kinds import KINDS, Batch, KDTerms
from kdfast.training.teachers.own_inputs import OwnInputs
from kdfast.training.teachers.shared_head import SharedHead

TEXT = {"input_ids", "attention_mask", "position_ids", "use_cache", "output_hidden_states"}  # of a text batch


@dataclass(frozen=True)
class StudentBatch:
    """One batch from the student's side: what every teacher and the loss need."""

    student: Head  # over its last hidden states (B, T, H)
    input_ids: Tensor  # (B, T)
    inputs: dict[str, Any]  # other inputs of both backbones
    targets: Tensor  # (B, T), −100 is ignored
    kd_targets: Tensor  # (B, T), the KD term's targets; `targets` itself if they are the same
    cached: CachedEntries | CachedStates | None
    temperature: float | Tensor
    kd_weight: float | Tensor
    ce_weight: float
    items: int | Tensor | None  # the divisor of every term; None = the targets of this batch
    kd_items: int | Tensor | None  # the KD term's divisor
    look: bool  # whether to check ids and entries, which waits for the device
    with_fidelity: bool
    with_metrics: bool
    own_inputs: OwnInputs | None = None  # the teacher's own inputs, if it reads other ids

    @property
    def counted(self) -> Tensor:
        """Return the number of targets, ()."""
        return (self.targets != IGNORE_INDEX).sum()

    @property
    def compared(self) -> Tensor:
        """Return the targets that the teacher also predicts, (B, T)."""
        if self.own_inputs is None:
            return self.targets
        return self.targets.masked_fill(~self.own_inputs.aligned, IGNORE_INDEX)

    @property
    def share(self) -> float | Tensor:
        """Return this batch's share of the step's targets."""
        return self._part(self.counted, self.items)

    @property
    def compared_share(self) -> float | Tensor:
        """Return the share of the compared targets; without own inputs, that of all targets."""
        if self.own_inputs is None:
            return self.share
        return self._part((self.compared != IGNORE_INDEX).sum(), self.kd_items)

    def _part(self, counted: Tensor, items: int | Tensor | None) -> float | Tensor:
        return 1.0 if items is None else counted / torch.as_tensor(items).clamp(min=1).to(counted.device)

    @property
    def kd_token_weights(self) -> Tensor | None:
        """Return weights (B, T) with which `items`, the divisor of all terms, divides the KD term by `kd_items`."""
        if self.kd_targets is self.targets:
            return None
        weights = (self.kd_targets != IGNORE_INDEX).to(torch.float32)
        if self.items is None or self.kd_items is None:
            return weights
        return weights * (self.items / torch.as_tensor(self.kd_items).clamp(min=1))

    def rows(self, index: list[int]) -> StudentBatch:
        """Return the batch of these rows, with its divisors. Raise ValueError for inputs that rows cannot split."""
        n_rows = len(self.targets)
        for name, x in self.inputs.items():
            if isinstance(x, Tensor) and (name in MEDIA or len(x) != n_rows):
                raise ValueError(
                    f"teacher_id sends rows to several teachers, and {name} is {tuple(x.shape)} for {n_rows} rows: "
                    "which of it belongs to which row is not known. Leave it out, or batch rows of one teacher each"
                )
        if len(index) == n_rows:
            return self
        at = torch.tensor(index, device=self.targets.device)

        def of_rows(x: Any) -> Any:
            if isinstance(x, Head):
                return replace(x, hidden=x.hidden[at])
            if isinstance(x, CachedEntries | CachedStates | OwnInputs):
                return type(x)(*map(of_rows, x))
            if isinstance(x, dict):
                return {name: of_rows(value) for name, value in x.items()}
            return x[at] if isinstance(x, Tensor) and x.dim() > 0 else x

        found = replace(self, **{field.name: of_rows(getattr(self, field.name)) for field in fields(self)})
        if self.items is None:
            found = replace(found, items=self.counted, kd_items=(self.kd_targets != IGNORE_INDEX).sum())
        return replace(found, kd_targets=found.targets) if self.kd_targets is self.targets else found


class Learned(NamedTuple):
    """What a student learns from one teacher in a batch, its own cross entropy included."""

    loss: Tensor  # ()
    metrics: KDMetrics
    counted: Tensor  # (), number of targets
    compared: Tensor  # (), number of targets that fidelity and anchor cover
    strange: bool | Tensor  # (), whether the teacher has no row for a real token's id
    hidden_states: tuple[Tensor, ...] | None = None  # of the teacher's layers, if requested
    fidelity: Fidelity | None = None  # if requested, and there is a teacher to compare with


class TeacherSide:
    """One teacher, frozen and in eval mode, or none, and what the student learns from it.

    Args:
        student: as in `DistillationModel`.
        teacher: as there; None if batches bring its entries, or nothing is learned from one.
        recipe, valid_vocab, vocab, shared_vocabulary, check_heads: as there.
        role: its name in errors.

    Raises ValueError and TypeError as `DistillationModel` does about a teacher.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        recipe: Recipe,
        *,
        valid_vocab: int | None,
        vocab: str,
        shared_vocabulary: SharedVocabulary | None = None,
        check_heads: bool = True,
        role: str = "teacher",
    ) -> None:
        if teacher is not None:
            check_model(teacher, "teacher", compare=check_heads)
        shared = None if teacher is None else shared_vocabulary
        _check_pair(student, teacher, recipe, valid_vocab, vocab, shared is not None)
        self.shared_head = None if shared is None or teacher is None else SharedHead(student, teacher, shared)
        self.role = role
        self.model = None if teacher is None else teacher.requires_grad_(False).eval()
        self.inputs = frozenset[str]() if teacher is None else inputs_of(teacher)
        self.kind = KINDS[recipe.teacher](recipe)
        self.projector = self.kind.make_projector(student, teacher)
        self._places = placeholders(student)

    def learn_from_entries(self, recipe: Recipe) -> None:
        """Learn from entries in batches instead of the teacher's head; `recipe` says so too."""
        self.kind = KINDS[recipe.teacher](recipe)

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        """Raise ValueError for an input that the teacher does not read."""
        if self.model is not None:
            check_inputs(self.model, self.role, inputs, self.inputs)

    def is_needed(self, batch: StudentBatch, recipe: Recipe, *, train: bool) -> bool:
        """Return whether a batch needs the teacher; in training it does not at a KD weight known to be 0."""
        zero = not isinstance(batch.kd_weight, Tensor) and batch.kd_weight == 0 and train
        return batch.with_fidelity or not zero or recipe.needs_teacher_always

    def learn(
        self,
        batch: StudentBatch,
        recipe: Recipe,
        divergence: Divergence,
        options: dict[str, Any],
        *,
        train: bool,
        compressed: nn.Module | None,
    ) -> Learned:
        """Return the loss of a batch: the cross entropy, the KD term and the anchor.

        Args:
            recipe: the run's recipe.
            options: engine, scratch_bytes, valid_vocab and vocab, as in `fused_kd_loss`.
            train: whether a KD weight of 0 skips the teacher.
            compressed: the teacher's compressed head, if it has one.
        """
        needed = self.is_needed(batch, recipe, train=train)
        own: Head | None = None
        states: tuple[Tensor, ...] | None = None
        strange: bool | Tensor = False
        live = recipe.teacher not in ("none", "cached") or recipe.hidden_weight > 0
        if self.model is not None and (batch.with_fidelity or (needed and live)):
            own, states, strange = self.run(batch)
        kd = KDTerms(None, {**options, "num_items_in_batch": batch.items})
        if needed or recipe.teacher == "cached":  # missing entries are an error at any weight
            part = self.projector or self.shared_head or compressed
            items = None if batch.own_inputs is None else batch.kd_items
            shown = Batch(batch.student, own, batch.cached, batch.compared, batch.temperature, kd.options, items)
            kd = self.kind.terms(shown, part)
        loss, metrics = fused_kd_loss(
            batch.student,
            kd.teacher if needed else None,
            batch.targets,
            temperature=batch.temperature,
            kd_weight=batch.kd_weight,
            divergence=divergence,
            ce_weight=batch.ce_weight,
            kd_token_weights=batch.kd_token_weights,
            return_metrics=True if batch.with_metrics or self.projector is not None else "terms",
            **kd.options,
        )
        if kd.anchor_loss is not None:
            loss = loss + recipe.anchor_weight * kd.anchor_loss
            metrics = metrics._replace(anchor=kd.anchor_loss.detach().float() / batch.compared_share)
        found = None
        true = batch.cached.at_one() if own is None and batch.cached else own
        if true is not None and batch.with_fidelity:
            over = options if self.shared_head is None else {**options, "kd_vocab_mask": self.shared_head.mask}
            found = fidelity(batch.student, kd.surrogate and kd.surrogate(), true, batch.compared, **over)
        compared = (batch.compared != IGNORE_INDEX).sum()
        return Learned(loss, metrics, batch.counted, compared, strange, states, found)

    @torch.no_grad()
    def run(self, batch: StudentBatch) -> tuple[Head, tuple[Tensor, ...], Tensor]:
        """Return the teacher's head at the student's positions, and `run_teacher`'s layers and `strange`."""
        assert self.model is not None
        self._check_places(batch.inputs)
        if self.shared_head is not None and batch.own_inputs is None:
            raise ValueError(
                "the batch has no teacher_input_ids, and the teacher's tokenizer is another: it would read other words "
                "than are there. Expected rows as OtherTokenizer(…).align gives them, which KDTrainer calls itself"
            )
        given = (batch.input_ids, batch.inputs, batch.own_inputs)
        states, strange = run_teacher(self.model, *given, look=batch.look, role=self.role)
        own = head(self.model, states[-1].to(batch.input_ids.device))
        return own if self.shared_head is None else self.shared_head(own), states[:-1], strange

    def _check_places(self, inputs: dict[str, Any]) -> None:
        """Raise ValueError if the teacher would not find the images' places in ids that both models read."""
        theirs = {} if MEDIA.isdisjoint(inputs) or self.model is None else placeholders(self.model)
        for kind in ("image", "video", "audio"):
            ours, other = self._places.get(kind), theirs.get(kind)
            if ours is not None and other is not None and ours != other:
                raise ValueError(
                    f"the batch has images, video or sound, whose place in input_ids is {kind}_token_id={ours} for the "
                    f"student and {other} for the teacher. Take two models of one processor, or leave images out"
                )


def run_teacher(
    model: PreTrainedModel,
    input_ids: Tensor,
    inputs: dict[str, Any],
    own: OwnInputs | None,
    *,
    look: bool,
    role: str = "teacher",
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return hidden states (B, T, H), of the layers if requested and the last ones, and `strange`, ().

    `strange` is whether the teacher has no row for a real token's id, or no such position.

    Args:
        input_ids, inputs: the student's ids, and the other inputs of both backbones.
        own: replaces the student's ids and mask; states are then returned at the student's positions.
        look: raise ValueError for strange ids or positions, which waits for the device.
        role: its name in errors.

    Raises ValueError for `own` together with inputs that belong to the student's ids, such as images.
    """
    argument, bad = "input_ids", None
    if own is not None:
        if more := sorted(inputs.keys() - TEXT):
            raise ValueError(
                f"the batch has teacher_input_ids and {more[0]}, which goes with input_ids; expected text alone where "
                "the teacher reads ids of its own"
            )
        bad, argument, input_ids = own.strange(look=look), "teacher_input_ids", own.input_ids
        inputs = {name: x for name, x in inputs.items() if name != "position_ids"}
        inputs["attention_mask"] = own.attention_mask
    mask = inputs.get("attention_mask")
    ids, strange = known_ids(model, role, input_ids, mask, look=look, argument=argument)
    output = run_backbone(model, **{**inputs, "input_ids": ids, "use_cache": False})
    states = (*(getattr(output, "hidden_states", None) or ()), output.last_hidden_state)
    if own is not None and bad is not None:
        states, strange = tuple(map(own.align, states)), strange | bad
    return states, strange


def _check_pair(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    recipe: Recipe,
    valid_vocab: int | None,
    vocab: str,
    other_tokenizer: bool,
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
    if other_tokenizer and (recipe.needs_true_head or recipe.teacher == "cached"):
        raise ValueError(
            f"recipe {recipe.name!r} compares two heads id by id, and the teacher's tokenizer is another, whose ids "
            "are other strings. Use recipe='shared_tokens', which learns of those that both have, or 'projector'"
        )
    if recipe.teacher == "shared_head" and not other_tokenizer:
        raise ValueError(
            f"recipe {recipe.name!r} is for a teacher whose tokenizer is known and another than the text's; this one's "
            "is the same, or does not lie beside its weights. Name it (teacher_tokenizer_name_or_path), or use "
            "recipe='compressed_head' or 'teacher_head'"
        )
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
