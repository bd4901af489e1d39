"""Solved starts of a run: hidden states of some training text in, embedding, projector and compressed head in place.

Every eighth target is held out; on those the start's fidelity to the true teacher is measured, before any training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.closed_form import Projection, solve_lstsq, solve_svd, vocab_frequencies
from kdfast.frontend.checks import same_vocabulary
from kdfast.low_rank_head import HELD_OUT, FidelityNotReached, compress_head, held_out_rows, kl_and_agreement
from kdfast.projector import LogitProjector
from kdfast.training.hf import backbone, head
from kdfast.training.labels import IGNORE_INDEX, shift_labels
from kdfast.training.teachers import Probe

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


class _Calibration:
    """The text's hidden states under the heads: a part to solve with, and one held out to measure on."""

    def __init__(self, model: DistillationModel, text: _Text) -> None:
        assert model.teacher is not None
        held_out = held_out_rows(text.teacher)
        self.model, self.recipe, self.valid_vocab = model, model.recipe, model.valid_vocab
        self.student = head(model.student, text.student[~held_out])  # its weight is the parameter itself
        self.teacher = head(model.teacher, text.teacher[~held_out])
        self.true = head(model.teacher, text.teacher[held_out])
        self.whole = head(model.teacher, text.teacher)  # both parts

    @cached_property
    def vocab_weights(self) -> Tensor:
        """(V,) float64, for whatever is solved of the teacher's head."""
        return vocab_frequencies(self.teacher, self.valid_vocab)

    def measure(self, what: str, projected: Tensor) -> Start:
        """`projected`: the held-out hidden states, of the student's width, for the student's head as it is now."""
        stand_in = replace(self.student, hidden=projected.to(self.student.weight.dtype))
        tokens = len(projected)
        if not same_vocabulary(stand_in.weight.shape[0], self.true.weight.shape[0], self.valid_vocab):
            return Start(what, None, None, tokens)
        return Start(what, *kl_and_agreement(stand_in, self.true, **self.model.loss_options), tokens)


def wants_solving(model: DistillationModel) -> bool:
    recipe = model.recipe
    solved = recipe.has_projector and recipe.projector_init in ("svd", "lstsq")
    resolved = recipe.has_projector and recipe.projector_resolve_steps > 0
    return solved or resolved or recipe.student_init == "svd" or recipe.teacher == "compressed_head"


@torch.no_grad()
def solve_starts(model: DistillationModel, batches: Iterable[dict[str, Any]], tokens: int | None) -> list[Start]:
    if not wants_solving(model):
        return []
    assert model.teacher is not None
    text = _read(model, batches, tokens or TOKENS_PER_WIDTH * model.teacher.get_output_embeddings().weight.shape[1])
    x, starts = _Calibration(model, text), []
    projection: Projection | None = None
    if x.recipe.student_init == "svd" and not model.loaded:
        projection, start = _start_student(x)
        starts.append(start)
    if model.logit_projector is not None and not model.loaded:
        starts += _start_projector(x, model.logit_projector, projection)
    if x.recipe.projector_resolve_steps > 0:
        model.vocab_weights = x.vocab_weights
    if x.recipe.teacher == "compressed_head":
        starts.append(_start_compressed_head(x))
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


def _start_student(x: _Calibration) -> tuple[Projection, Start]:
    """The student's embedding; and the projector that goes with it, for whoever wants one."""
    rows = x.student.weight[: x.valid_vocab]
    std = rows.double().square().mean().sqrt().item()
    embedding, projection = solve_svd(
        x.teacher,
        rows.shape[1],
        std=std,
        logit_scale=x.student.logit_scale,
        vocab_weights=x.vocab_weights,
        valid_vocab=x.valid_vocab,
    )
    _set_embedding(x.model, embedding[: len(rows)])
    hidden = x.true.hidden.to(projection.weight.dtype)
    return projection, x.measure("student_init='svd'", F.linear(hidden, projection.weight, projection.bias))


def _start_projector(x: _Calibration, projector: LogitProjector, solved: Projection | None) -> list[Start]:
    """`solved`: with the student's embedding. No start where the projector stays as it was drawn."""
    init = x.recipe.projector_init
    if isinstance(projector, Probe):
        projector.head.copy_(x.student.weight)
    if init == "lstsq":
        solved = solve_lstsq(x.student, x.teacher, vocab_weights=x.vocab_weights, valid_vocab=x.valid_vocab)
    elif init != "svd":
        solved = None
    if solved is None:
        return []
    _set_projector(projector, solved)
    return [x.measure(f"projector_init={init!r}", projector(x.true.hidden.to(projector.weight.dtype)))]


def _start_compressed_head(x: _Calibration) -> Start:
    """At the rank or the fidelity asked for, or the student's width where neither is; the whole head where no rank is
    near enough."""
    rank, max_kl, tokens = x.recipe.compressed_rank, x.recipe.compressed_kl, len(x.true.hidden)
    if rank is not None or max_kl is None:
        rank, max_kl = rank or x.student.weight.shape[1], None
    try:
        compressed = compress_head(
            x.whole,
            rank,
            max_kl=max_kl,
            vocab_weights=x.vocab_weights,
            valid_vocab=x.valid_vocab,
            engine=x.model.loss_options["engine"],
        )
    except FidelityNotReached as error:
        return Start(f"the teacher's head stays whole ({error})", 0.0, 1.0, tokens)
    x.model.compressed_head = compressed
    # every process made the same: DDP need not send them
    names = [f"compressed_head.{name}" for name, _ in compressed.named_buffers()]
    x.model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]
    assert compressed.fidelity is not None
    rank, kl, agreement = compressed.fidelity
    return Start(f"teacher's head at rank {rank}", kl, agreement, tokens)


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
