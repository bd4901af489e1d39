"""Solved starts of a run: embedding, projector and compressed head from hidden states of some training text.

Every eighth target is held out. There the start's fidelity to the true teacher is measured, before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import PreTrainedModel

from kdfast.closed_form import Projection, solve_lstsq, solve_svd, vocab_frequencies
from kdfast.inputs import same_vocabulary
from kdfast.low_rank_head import (
    HELD_OUT,
    CompressedHead,
    FidelityNotReached,
    compress_head,
    held_out_rows,
    kl_and_agreement,
)
from kdfast.projector import LogitProjector
from kdfast.training.durable import processes
from kdfast.training.hf import IGNORE_INDEX, check_inputs, head, known_ids, placeholders, run_backbone, shift_labels
from kdfast.training.initialization.layers import start_layers
from kdfast.training.recipes import Recipe
from kdfast.training.teachers.kinds import Probe
from kdfast.training.teachers.own_inputs import NAMES, read_own_inputs
from kdfast.training.teachers.side import run_teacher

TOKENS_PER_WIDTH = 16  # default calibration tokens per unit of the teacher's width


class Start(NamedTuple):
    """What was solved, and the surrogate's fidelity on `tokens` held-out targets at τ = 1, before training."""

    what: str
    kl: float | None  # KL(true teacher ‖ surrogate), nats; None if the teacher has another vocabulary
    agreement: float | None  # fraction of targets with the same most likely id
    tokens: int

    def __str__(self) -> str:
        if self.kl is None or self.agreement is None:
            return f"{self.what}, from {self.tokens} tokens"
        return f"{self.what}: KL(true‖start) {self.kl:.3f}, agreement {self.agreement:.0%} on {self.tokens} tokens"


class Calibration:
    """A solver on the teacher's hidden states over some text, part of which is held out for measuring.

    Args:
        batches: keyword arguments of `DistillationModel.forward`, on the models' device.
        tokens: how many targets to read; None = 16 times the teacher's width.
        options: engine, scratch_bytes and valid_vocab, as in `fused_kd_loss`.

    Raises ValueError if the batches contain too few targets.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batches: Iterable[dict[str, Any]],
        tokens: int | None,
        options: dict[str, Any],
    ) -> None:
        tokens = tokens or TOKENS_PER_WIDTH * teacher.get_output_embeddings().weight.shape[1]
        hidden, self.text = _read(student, teacher, batches, tokens)
        held_out = held_out_rows(hidden)
        self.models, self.options, self.valid_vocab = (student, teacher), options, options["valid_vocab"]
        self.student = head(student, hidden[:0])  # only its weight, the parameter itself, is used
        self.whole = head(teacher, hidden)
        self.teacher, self.true = (replace(self.whole, hidden=hidden[rows]) for rows in (~held_out, held_out))

    @cached_property
    def vocab_weights(self) -> Tensor:
        """Return token weights (V,) float64 for everything that is solved from the teacher's head."""
        return vocab_frequencies(self.teacher, self.valid_vocab)

    def solve_student(self) -> tuple[Projection, Start]:
        """Solve the student's embedding in place; return the projector that belongs to it, and the start."""
        rows = self.student.weight[: self.valid_vocab]
        embedding, projection = solve_svd(
            self.teacher,
            rows.shape[1],
            std=rows.double().square().mean().sqrt().item(),
            logit_scale=self.student.logit_scale,
            vocab_weights=self.vocab_weights,
            valid_vocab=self.valid_vocab,
        )
        _set_embedding(self.models[0], embedding[: len(rows)])
        projected = F.linear(self.true.hidden.to(projection.weight.dtype), projection.weight, projection.bias)
        return projection, self._measure("student_init='svd', the embedding alone", projected)

    def solve_layers(self) -> tuple[Projection, Start]:
        """Solve the whole student in place; return its head's projector, and its fidelity on the last batches."""
        counts = [int(some.sum()) for _, some in self.text]
        last = next(n for n in range(1, len(counts) + 1) if sum(counts[-n:]) * HELD_OUT >= sum(counts))
        solving = self.text[:-last] or self.text
        projection = start_layers(*self.models, solving, self.vocab_weights, self.valid_vocab)
        student, training = self.models[0], self.models[0].training
        student.eval()
        hidden = [run_backbone(student, **x, use_cache=False).last_hidden_state[some] for x, some in self.text[-last:]]
        student.train(training)
        own = replace(self.student, hidden=torch.cat(hidden))
        true = replace(self.whole, hidden=self.whole.hidden[-len(own.hidden) :])
        found = kl_and_agreement(own, true, **self.options)
        return projection, Start("student_init='svd_blocks', the student itself", *found, len(own.hidden))

    def solve_projector(self, projector: LogitProjector, init: str, solved: Projection | None) -> list[Start]:
        """Solve the projector in place, or copy the `solved` one; no start is returned if `init` leaves it as drawn."""
        if isinstance(projector, Probe):
            projector.head.copy_(self.student.weight)
        if init == "lstsq":
            weights, valid = self.vocab_weights, self.valid_vocab
            solved = solve_lstsq(self.student, self.teacher, vocab_weights=weights, valid_vocab=valid)
        if init not in ("svd", "lstsq") or solved is None:
            return []
        set_projector(projector, solved)
        projected = projector(self.true.hidden.to(projector.weight.dtype))
        return [self._measure(f"projector_init={init!r}", projected)]

    def compress(self, recipe: Recipe) -> tuple[CompressedHead | None, Start]:
        """Cut the teacher's head to the given rank or KL, or the student's width; None if no rank is close enough."""
        rank, max_kl, tokens = recipe.compressed_rank, recipe.compressed_kl, len(self.true.hidden)
        if rank is not None or max_kl is None:
            rank, max_kl = rank or self.student.weight.shape[1], None
        weights, valid, engine = self.vocab_weights, self.valid_vocab, self.options["engine"]
        try:
            compressed = compress_head(
                self.whole, rank, max_kl=max_kl, vocab_weights=weights, valid_vocab=valid, engine=engine
            )
        except FidelityNotReached as error:
            return None, Start(f"the teacher's head stays whole ({error})", 0.0, 1.0, tokens)
        assert compressed.fidelity is not None
        rank, kl, agreement = compressed.fidelity
        return compressed, Start(f"teacher's head at rank {rank}", kl, agreement, tokens)

    def _measure(self, what: str, projected: Tensor) -> Start:
        """Return the start for projected held-out hidden states under the student's current head."""
        surrogate = replace(self.student, hidden=projected.to(self.student.weight.dtype))
        if not same_vocabulary(len(surrogate.weight), len(self.true.weight), self.valid_vocab):
            return Start(what, None, None, len(projected))
        return Start(what, *kl_and_agreement(surrogate, self.true, **self.options), len(projected))


def text_loader(dataset: Any, batch_size: int, collate: Callable[[list[Any]], Any]) -> DataLoader:
    """Return a loader of training text in random order, which leaves the run's own loader and random states alone."""
    by_number = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0)) if by_number else None
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate, generator=torch.Generator())


def set_projector(projector: LogitProjector, solved: Projection) -> None:
    """Copy a solved projection into `projector`; set the bias to zero if the solution has none."""
    projector.weight.copy_(solved.weight)
    if projector.bias is not None:
        projector.bias.zero_() if solved.bias is None else projector.bias.copy_(solved.bias)


def _read(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[dict[str, Any]], tokens: int
) -> tuple[Tensor, list[tuple[dict[str, Any], Tensor]]]:
    """Return the teacher's hidden states (n, Ht) over the text's first `tokens` targets, and that text.

    The text is, per batch, the inputs of both backbones and a mask (B, T) of the tokens used.
    """
    pieces: list[Tensor] = []
    text = []
    found = 0
    for batch in batches:
        inputs = {name: x for name, x in batch.items() if name != "labels" and not name.startswith("teacher_")}
        check_inputs(teacher, "teacher", inputs)
        mask = batch.get("attention_mask")
        own = read_own_inputs(*(batch.get(name) for name in NAMES), shape=batch["input_ids"].shape)
        inputs["input_ids"], _ = known_ids(student, "student", inputs["input_ids"], mask)
        counted = shift_labels(batch["labels"], mask, placeholders(student).values()) != IGNORE_INDEX
        if own is not None:
            counted &= own.aligned
        counted &= counted.flatten().cumsum(0).view_as(counted) <= tokens - found
        (states,), _ = run_teacher(teacher, inputs["input_ids"], inputs, own, look=True)
        pieces.append(states.to(counted.device)[counted])
        text.append((inputs, counted))
        found += len(pieces[-1])
        if found >= tokens:
            break
    if found < min(HELD_OUT, tokens):
        raise ValueError(f"batches hold {found} targets; expected some thousands, to solve starts from")
    return torch.cat(pieces), text


def _set_embedding(student: PreTrainedModel, rows: Tensor) -> None:
    """Copy the embedding into both ends of the student: even if untied, it is the input embedding too."""
    ends: tuple[Any, Any] = student.get_output_embeddings(), student.get_input_embeddings()
    for layer in ends:
        if layer.weight.shape[1] == rows.shape[1]:
            layer.weight[: len(rows)].copy_(rows)
    if (bias := getattr(ends[0], "bias", None)) is not None:
        bias.zero_()


def share_starts(model: Any, starts: list[Start], device: torch.device) -> list[Start]:
    """Copy the first process's trained weights, vocabulary weights and compressed head to all; return its `starts`.

    Every process has solved, so none waits, but devices and thread counts round differently, and the rank that a
    threshold selects may differ. The teacher is assumed to be the same everywhere.
    """
    if model.compressed_head is not None:
        model.compressed_head.cpu()
    solved: list[Any] = [starts, model.compressed_head]
    distributed.broadcast_object_list(solved, src=0, device=device)
    starts, model.compressed_head = solved
    if model.compressed_head is not None:
        model.compressed_head.to(device)
    weights: list[Tensor] = [p for name, p in model.named_parameters() if not name.startswith("teacher.")]
    processes.broadcast([*weights, *([] if model.vocab_weights is None else [model.vocab_weights])], device)
    return starts
