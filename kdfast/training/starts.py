"""Solved starts of a run: hidden states of some training text in, embedding, projector and compressed head in place.

Every eighth target is held out; on those the start's fidelity to the true teacher is measured, before any training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdfast.compress import HELD_OUT, FidelityNotReached, compress_head, held_out_rows, kl_and_agreement
from kdfast.logit_chunks import mean_probabilities
from kdfast.projector import LogitProjector
from kdfast.solve import FREQUENCY_ROWS, Projection, solve_calibrated, solve_lstsq, solve_svd
from kdfast.sources import Head
from kdfast.training.heads import backbone, head
from kdfast.training.labels import IGNORE_INDEX, shift_labels
from kdfast.training.teachers import Probe
from kdfast.validation import same_vocabulary

if TYPE_CHECKING:
    from kdfast.training.model import DistillationModel

TOKENS_PER_WIDTH = 16  # calibration tokens over the teacher's width, where nothing is said


class Start(NamedTuple):
    """What was solved, and the stand-in's fidelity on `tokens` held-out targets before training, at τ = 1."""

    what: str
    kl: float | None  # KL(true teacher ‖ stand-in), nats; None where the teacher's vocabulary is another
    agreement: float | None  # fraction with the same most likely id
    tokens: int

    def __str__(self) -> str:
        if self.kl is None or self.agreement is None:
            return f"{self.what}, from {self.tokens} tokens"
        return f"{self.what}: KL(true‖start) {self.kl:.3f}, agreement {self.agreement:.0%} on {self.tokens} tokens"


class _Text(NamedTuple):
    """Hidden states over the targets of the calibration text, (n, H) each."""

    student: Tensor
    teacher: Tensor

    def split(self) -> tuple[_Text, _Text]:
        """(to solve with, held out)."""
        held_out = held_out_rows(self.teacher)
        return _Text(self.student[~held_out], self.teacher[~held_out]), _Text(
            self.student[held_out], self.teacher[held_out]
        )


def wants_solving(model: DistillationModel) -> bool:
    recipe = model.recipe
    solved = recipe.has_projector and recipe.projector_init in ("svd", "lstsq", "calibrated")
    resolved = recipe.has_projector and recipe.projector_resolve_steps > 0
    return solved or resolved or recipe.student_init == "svd" or recipe.teacher == "compressed_head"


@torch.no_grad()
def solve_starts(model: DistillationModel, batches: Iterable[dict[str, Any]], tokens: int | None) -> list[Start]:
    if not wants_solving(model):
        return []
    assert model.teacher is not None
    recipe, valid = model.recipe, model.valid_vocab
    text = _read(model, batches, tokens or TOKENS_PER_WIDTH * model.teacher.get_output_embeddings().weight.shape[1])
    to_solve, held_out = text.split()
    teacher, true = head(model.teacher, to_solve.teacher), head(model.teacher, held_out.teacher)
    student = head(model.student, to_solve.student)
    starts: list[Start] = []

    def report(what: str, stand_in: Head) -> None:
        starts.append(_measure(what, stand_in, true, model.loss_options))

    projection: Projection | None = None
    if recipe.student_init == "svd":
        rows = student.weight[:valid]
        std = rows.double().square().mean().sqrt().item()
        scale = student.logit_scale
        embedding, projection = solve_svd(teacher, rows.shape[1], std=std, logit_scale=scale, valid_vocab=valid)
        _set_embedding(model, embedding[: len(rows)])
        report(
            "student_init='svd'",
            replace(student, hidden=_apply(projection, held_out.teacher).to(student.weight.dtype)),
        )
    projector = model.logit_projector
    if projector is None:
        pass
    elif recipe.projector_init == "calibrated":
        projection = solve_calibrated(to_solve.student, to_solve.teacher)
    elif recipe.projector_init == "lstsq":
        projection = solve_lstsq(student, teacher, valid_vocab=valid)
    elif recipe.projector_init != "svd":
        projection = None  # as it was drawn
    if projector is not None:
        if isinstance(projector, Probe):
            projector.head.copy_(student.weight)
        if projection is not None:
            _set_projector(projector, projection)
            hidden = projector(held_out.teacher.to(projector.weight.dtype)).to(student.weight.dtype)
            report(f"projector_init={recipe.projector_init!r}", replace(student, hidden=hidden))
    if recipe.projector_resolve_steps > 0:
        sample = to_solve.teacher[:FREQUENCY_ROWS]
        model.vocab_weights = mean_probabilities(replace(teacher, hidden=sample), valid)
    if recipe.teacher == "compressed_head":
        everything = head(model.teacher, text.teacher)
        rank, max_kl = recipe.compressed_rank, recipe.compressed_kl
        if rank is not None or max_kl is None:
            rank, max_kl = rank or student.weight.shape[1], None
        engine = model.loss_options["engine"]
        try:
            compressed = compress_head(everything, rank, max_kl=max_kl, valid_vocab=valid, engine=engine)
        except FidelityNotReached as error:
            starts.append(Start(f"the teacher's head stays whole ({error})", 0.0, 1.0, len(held_out.teacher)))
            return starts
        model.compressed_head = compressed
        # every process made the same: DDP need not send them
        names = [f"compressed_head.{name}" for name, _ in compressed.named_buffers()]
        model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]
        assert compressed.fidelity is not None
        rank, kl, agreement = compressed.fidelity
        starts.append(Start(f"teacher's head at rank {rank}", kl, agreement, len(held_out.teacher)))
    return starts


@torch.no_grad()
def solve_projector_again(model: DistillationModel) -> None:
    """The projector of least squares for the student's head as it is now."""
    assert model.teacher is not None
    assert model.logit_projector is not None
    assert model.vocab_weights is not None
    nothing = torch.empty(0, device=model.vocab_weights.device)
    student, teacher = head(model.student, nothing), head(model.teacher, nothing)
    weights, valid = model.vocab_weights, model.valid_vocab
    _set_projector(model.logit_projector, solve_lstsq(student, teacher, vocab_weights=weights, valid_vocab=valid))


def _read(model: DistillationModel, batches: Iterable[dict[str, Any]], tokens: int) -> _Text:
    pieces, found = [], 0
    for piece in _pieces(model, batches):
        pieces.append(piece)
        found += len(piece.teacher)
        if found >= tokens:
            break
    if found < HELD_OUT:
        raise ValueError(f"batches hold {found} targets; expected some thousands, to solve starts from")
    return _Text(*(torch.cat(states)[:tokens] for states in zip(*pieces, strict=True)))


def _pieces(model: DistillationModel, batches: Iterable[dict[str, Any]]) -> Iterator[_Text]:
    assert model.teacher is not None
    was_training = model.student.training
    model.student.eval()
    try:
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            counted = shift_labels(batch["labels"], batch.get("attention_mask")) != IGNORE_INDEX
            student, teacher = (
                backbone(part)(**inputs, use_cache=False).last_hidden_state[counted]
                for part in (model.student, model.teacher)
            )
            yield _Text(student, teacher)
    finally:
        model.student.train(was_training)


def _set_embedding(model: DistillationModel, rows: Tensor) -> None:
    """Both ends of the student: tied or not, a solved embedding is its input too."""
    ends: tuple[Any, Any] = model.student.get_output_embeddings(), model.student.get_input_embeddings()
    for layer in ends:
        if layer.weight.shape[1] == rows.shape[1]:
            layer.weight[: len(rows)].copy_(rows)
    if (bias := getattr(ends[0], "bias", None)) is not None:
        bias.zero_()


def _set_projector(projector: LogitProjector, projection: Projection) -> None:
    projector.weight.copy_(projection.weight)
    if projector.bias is not None:
        projector.bias.zero_() if projection.bias is None else projector.bias.copy_(projection.bias)


def _apply(projection: Projection, hidden: Tensor) -> Tensor:
    return torch.nn.functional.linear(hidden.to(projection.weight.dtype), projection.weight, projection.bias)


def _measure(what: str, stand_in: Head, true: Head, options: dict[str, Any]) -> Start:
    tokens = len(true.hidden)
    if not same_vocabulary(stand_in.weight.shape[0], true.weight.shape[0], options["valid_vocab"]):
        return Start(what, None, None, tokens)
    return Start(what, *kl_and_agreement(stand_in, true, **options), tokens)
