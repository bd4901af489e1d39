"""What a student learns from: one small class per kind of teacher, how true it is, and the hidden states' own loss.

The *surrogate* is the head that the student learns from in place of the teacher's own: the student's over projected
hidden states, a probe's, or the compressed one. A projector can bring the KD loss to zero by turning the projected
teacher into the student; what tells is `Fidelity`, the surrogate's KL to the true teacher, which evaluation measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.inputs import Head, Projected, SparseLogits, Teacher, same_vocabulary
from kdfast.loss import fused_kd_loss
from kdfast.projector import LogitProjector
from kdfast.training.hf import IGNORE_INDEX, head_shape
from kdfast.training.recipes import Recipe


class Probe(LogitProjector):
    """A projector with a head of its own (V, Hs), trained by the anchor alone: a teacher that no student can move.

    The head starts as the student's embedding.
    """

    def __init__(self, teacher_width: int, embedding: Tensor, **options: Any) -> None:
        super().__init__(teacher_width, embedding.shape[1], **options)
        self.head = nn.Parameter(embedding.detach().to(self.weight.dtype).clone())


TeacherTail = Literal["bucket", "renormalize", "renormalize_both", "none"]
OWN_ENTRIES = (
    "say what they are. teacher_tail='bucket': log-probabilities of some ids at τ = 1, all others being one category; "
    "'renormalize', 'renormalize_both': the same, with nothing said of the others; 'none': log(n/N) of ids that came n "
    "times in N draws at the run's temperature"
)


class CachedEntries(NamedTuple):
    """What `CachedBlocks` adds to a batch: entries of a teacher cache.

    teacher = CachedEntries(batch["teacher_indices"], batch["teacher_log_probs"], batch["teacher_log_tails"])
    loss = fused_kd_loss(student, teacher.at(2.0), labels, temperature=2.0)

    Its `check` raises ValueError for tails that are seen to be of another temperature.
    """

    indices: Tensor  # (*, K) integer
    log_probs: Tensor  # (*, K) any float dtype: of top-k entries at τ = 1; of drawn ones the log of their weights
    log_tails: Tensor | None  # (*, 2): log of the mass they do not hold, at τ = 1 and at the KD term's; drawn: (*, 0)
    tail: TeacherTail | None = "none"  # what they are where log_tails is None; None: not known

    def at(self, temperature: float | Tensor) -> SparseLogits:
        """Return the teacher for a KD term at `temperature`, the one the data set was made with."""
        if self.log_tails is None or not self.log_tails.shape[-1]:
            return SparseLogits(self.indices, self.log_probs, tail=self.tail or "none", tempered=self.tail == "none")
        return self._at(temperature, self.log_tails[..., 1])

    def check(self, temperature: float | Tensor, counted: Tensor) -> None:
        """Raise ValueError where the tails of rows that count are seen to be of another temperature."""
        if self.log_tails is None or not self.log_tails.shape[-1] or float(temperature) != 1:
            return
        at_one, here = self.log_tails[counted].unbind(-1)
        if not torch.allclose(at_one, here, rtol=1e-3, atol=1e-3):
            raise ValueError(
                "teacher_log_tails is of another temperature: the run's is 1, where its two columns, the log of the "
                "other ids' mass at τ = 1 and at the KD term's τ, have to be equal. Set temperature to the τ they were "
                "made for, or give the first column twice"
            )

    def at_one(self) -> SparseLogits | None:
        """Return the teacher at τ = 1; None where that is unknown: entries were drawn, or log_tails are missing."""
        if self.log_tails is not None and self.log_tails.shape[-1]:
            return self._at(1.0, self.log_tails[..., 0])
        return SparseLogits(self.indices, self.log_probs, tail="bucket") if self.tail == "bucket" else None

    def _at(self, temperature: float | Tensor, log_tail: Tensor) -> SparseLogits:
        """Give back what rounding has taken from the entries' sum: they have what the tail leaves."""
        # a row without any entry, −inf alone, comes out as NaN, and has all its mass in the tail
        entries = (self.log_probs.float() / temperature).log_softmax(-1).nan_to_num(nan=-inf, neginf=-inf)
        left = torch.log(-torch.expm1(log_tail.clamp_max(0)))
        log_probs = entries + left[..., None]
        return SparseLogits(self.indices, log_probs, log_tail=log_tail, tail="bucket", tempered=True)


def read_entries(
    indices: Tensor | None, log_probs: Tensor | None, log_tails: Tensor | None, tail: TeacherTail | None
) -> CachedEntries | None:
    """Return a batch's entries, None where it has none; `tail` as in `CachedEntries`. ValueError for half of them."""
    if indices is None and log_probs is None:
        return None
    if indices is None or log_probs is None:
        absent, there = ("indices", "log_probs") if indices is None else ("log_probs", "indices")
        raise ValueError(f"teacher_{absent} is None beside teacher_{there}; expected both, (B, T, K), or neither")
    if log_tails is None:
        return CachedEntries(indices, log_probs, None, tail)
    if log_tails.shape[:-1] != indices.shape[:-1] or log_tails.shape[-1] not in (0, 2):
        raise ValueError(
            f"teacher_log_tails is {tuple(log_tails.shape)} beside teacher_indices {tuple(indices.shape)}; expected "
            "(B, T, 2), the log of the other ids' mass at τ = 1 and at the KD term's τ; of drawn ids (B, T, 0)"
        )
    known: TeacherTail = "bucket" if log_tails.shape[-1] else "none"
    if tail not in (None, known):
        raise ValueError(f"teacher_tail={tail!r}, and by its teacher_log_tails the batch's is {known!r}; leave it out")
    return CachedEntries(indices, log_probs, log_tails, known)


class Batch(NamedTuple):
    """One batch, as a kind of teacher sees it."""

    student: Head
    own: Head | None  # the teacher's own head, where there is a live one
    cached: CachedEntries | None
    targets: Tensor  # (B, T), −100 counts for nothing
    temperature: float | Tensor
    options: dict[str, Any]  # of `fused_kd_loss`: engine, scratch_bytes, valid_vocab, num_items_in_batch


class KDTerms(NamedTuple):
    """What `fused_kd_loss` takes beside the recipe's numbers."""

    teacher: Teacher | None
    options: dict[str, Any]
    surrogate: Callable[[], Head] | None = None  # None where the teacher's own head is the teacher, or there is none
    anchor_loss: Tensor | None = None  # (), where the anchor is no part of the loss's own computation


class NoTeacher:
    """Learn from the text alone."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def make_projector(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> LogitProjector | None:
        """Build what is trained on the teacher's side, in fp32 at least; None where nothing is."""
        return None

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        """Return the teacher of one batch; `part` is the model's projector or compressed head."""
        return KDTerms(None, batch.options)


class OwnHead(NoTeacher):
    """Learn from the teacher's own head."""

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        return KDTerms(batch.own, batch.options)


class Cached(NoTeacher):
    """Learn from what the teacher's own head once said."""

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        if batch.cached is None and batch.own is not None:  # in an evaluation that a live teacher was kept for
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
    """Learn from the teacher's head as two thin factors; from the whole one where no rank is near enough."""

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        assert batch.own is not None
        if part is None:
            return KDTerms(batch.own, batch.options)
        surrogate = part(batch.own.hidden)
        return KDTerms(surrogate, batch.options, lambda: surrogate)


class ThroughProjector(NoTeacher):
    """Learn from a projector followed by the student's own head."""

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

        def surrogate() -> Head:  # for evaluation alone: the loss projects within its engine
            return _detached(replace(student, hidden=part(hidden).to(student.hidden.dtype)))

        options = {**batch.options, "teacher_grad": recipe.teacher_grad, "anchor_weight": recipe.anchor_weight}
        return KDTerms(Projected(hidden, part.weight, part.bias), options, surrogate)


class ThroughProbe(ThroughProjector):
    """Learn from a projector and a head of its own, which learn from the labels alone."""

    def _build(self, teacher_width: int, weight: Tensor, options: dict[str, Any]) -> LogitProjector:
        return Probe(teacher_width, weight, **options)

    def terms(self, batch: Batch, part: nn.Module | None) -> KDTerms:
        assert batch.own is not None
        assert isinstance(part, Probe)
        student = batch.student
        hidden = part(batch.own.hidden.to(part.weight.dtype))
        surrogate = Head(hidden, part.head, logit_scale=student.logit_scale, softcap=student.softcap)
        anchor_loss = fused_kd_loss(surrogate, None, batch.targets, ce_weight=1.0, **batch.options)
        assert isinstance(anchor_loss, Tensor)
        surrogate = _detached(surrogate)
        return KDTerms(surrogate, batch.options, lambda: surrogate, anchor_loss)


KINDS: dict[str, type[NoTeacher]] = {  # by `Recipe.teacher`
    "none": NoTeacher,
    "own_head": OwnHead,
    "compressed_head": Compressed,
    "projected": ThroughProjector,
    "probe": ThroughProbe,
    "cached": Cached,
}


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, hidden=head.hidden.detach(), weight=head.weight.detach(), bias=bias)


class Fidelity(NamedTuple):
    """How near student and surrogate are to the true teacher: 0-d tensors, means over the targets at τ = 1."""

    kl_teacher_student: Tensor  # KL(true teacher ‖ student); of a cached one at most that: its tail is one category
    kl_teacher_projected: Tensor | None = None  # KL(true teacher ‖ surrogate); None where there is none
    ce_projected: Tensor | None = None  # the surrogate's cross entropy on the labels


@torch.no_grad()
def fidelity(
    student: Head, surrogate: Head | None, teacher: Head | SparseLogits, targets: Tensor, **options: Any
) -> Fidelity | None:
    """Compare student and surrogate with the teacher's own head, or with its entries from a cache at τ = 1.

    Return None where the vocabularies differ by more than padding, and vocab="truncate" does not end both where the
    smaller one does. The rows of `targets` (B, T) that are not −100 are compared. options: engine, scratch_bytes,
    valid_vocab, vocab.
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


class HiddenStateLoss(nn.Module):
    """Draw the student's layers to the teacher's, an optional term beside the logits'.

        mean over layers and targets of ½·‖n(A_l h_s) − n(h_t)‖² / Ht,    n(x) = (x − mean x) / std x,  A_l trained

    which is 1 − the correlation of the two: between 0 and 2 whatever a layer's scale, so one weight serves all models.
    Student layer l of Ls is compared with teacher layer round(l·Lt/Ls). Source: Jiao et al. 2020, arXiv:1909.10351
    (TinyBERT), with the normalization of patient KD, Sun et al. 2019, arXiv:1908.09355.

    Args:
        student_layers, teacher_layers: Ls, Lt.
        student_width, teacher_width: Hs, Ht. Equal widths still get a map each.
    """

    def __init__(self, student_layers: int, teacher_layers: int, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.pairs = [(i, round(i * teacher_layers / student_layers)) for i in range(1, student_layers + 1)]
        self.maps = nn.ModuleList(nn.Linear(student_width, teacher_width) for _ in self.pairs)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], targets: Tensor, items: int | Tensor | None = None
    ) -> Tensor:
        """Return the loss, ().

        Args:
            student, teacher: hidden states (B, T, H) as transformers returns them: embeddings, then every layer's.
            targets: (B, T); the rows that are not −100 count.
            items: the divisor; None = the rows that count.
        """
        counted = targets != IGNORE_INDEX
        total = torch.zeros((), device=targets.device)
        for (i, j), linear in zip(self.pairs, self.maps, strict=True):
            ours, theirs = _standardized(linear(student[i])), _standardized(teacher[j].detach().to(targets.device))
            total = total + ((ours - theirs).square().mean(-1) / 2 * counted).sum()
        rows = counted.sum()
        divisor = rows if items is None else items
        return total / ((divisor + (rows == 0)) * len(self.pairs))  # 0 without rows, whatever the divisor


def _standardized(x: Tensor) -> Tensor:
    """Return `x` of mean 0 and variance 1 per row, in fp32, or float64 as it came."""
    return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:])
