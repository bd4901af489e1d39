"""The entries that a batch brings from a teacher that ran earlier, as a teacher for the loss."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kdfast.inputs import Head, SparseLogits
from kdfast.training.data.rows import ENTRIES

TeacherTail = Literal["bucket", "renormalize", "renormalize_both", "none"]
OWN_ENTRIES = (
    "say what they are. teacher_tail='bucket': log-probabilities of some ids at τ = 1, all others being one category; "
    "'renormalize', 'renormalize_both': the same, with nothing said of the others; 'none': log(n/N) of ids that came n "
    "times in N draws at the run's temperature"
)


class KeptTeacher:
    """A teacher that ran earlier, which may be one of several; the base of `TeacherCache`."""

    folder: Path
    description: Any
    head: Any  # for hidden states, otherwise None

    def check_vocabulary(self, vocab: int, valid_vocab: int | None) -> None:
        """Raise ValueError if a student with `vocab` ids cannot learn from it."""
        raise NotImplementedError


class CachedEntries(NamedTuple):
    """The entries of a teacher cache in a batch, as `CachedBlocks` adds them.

    teacher = CachedEntries(batch["teacher_indices"], batch["teacher_log_probs"], batch["teacher_log_tails"])
    loss = fused_kd_loss(student, teacher.at(2.0), labels, temperature=2.0)

    Its `check` raises ValueError if the tails are visibly of another temperature.
    """

    indices: Tensor  # (*, K) integer
    log_probs: Tensor  # (*, K) any float dtype: top-k at τ = 1; for drawn ids, the log of their weights
    log_tails: Tensor | None  # (*, 2): log of the remaining mass at τ = 1 and at the KD term's τ; drawn: (*, 0)
    tail: TeacherTail | None = "none"  # the kind of entries if log_tails is None; None: unknown

    def at(self, temperature: float | Tensor) -> SparseLogits:
        """Return the teacher for a KD term at `temperature`, for which the data set was made."""
        if self.log_tails is None or not self.log_tails.shape[-1]:
            return SparseLogits(self.indices, self.log_probs, tail=self.tail or "none", tempered=self.tail == "none")
        return self._at(temperature, self.log_tails[..., 1])

    def check(self, temperature: float | Tensor, counted: Tensor) -> None:
        """Raise ValueError if the tails of `counted` rows are visibly of another temperature."""
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
        """Return the teacher at τ = 1; None if unknown, since ids were drawn or log_tails are missing."""
        if self.log_tails is not None and self.log_tails.shape[-1]:
            return self._at(1.0, self.log_tails[..., 0])
        return SparseLogits(self.indices, self.log_probs, tail="bucket") if self.tail == "bucket" else None

    def _at(self, temperature: float | Tensor, log_tail: Tensor) -> SparseLogits:
        """Normalize the entries to what the tail leaves, which undoes the rounding of their sum."""
        # a row of only −inf becomes NaN; all its mass is in the tail
        entries = (self.log_probs.float() / temperature).log_softmax(-1).nan_to_num(nan=-inf, neginf=-inf)
        left = torch.log(-torch.expm1(log_tail.clamp_max(0)))
        log_probs = entries + left[..., None]
        return SparseLogits(self.indices, log_probs, log_tail=log_tail, tail="bucket", tempered=True)


class CachedStates(NamedTuple):
    """Coordinates of the teacher's hidden states, in place of `CachedEntries`, under the head they go through."""

    head: Head
    tail: TeacherTail = "none"  # there is no tail

    def at(self, temperature: float | Tensor) -> Head:
        """Return the teacher for a KD term at any temperature."""
        return self.head

    def check(self, temperature: float | Tensor, counted: Tensor) -> None:
        """Accept any temperature."""

    def at_one(self) -> Head:
        """Return the teacher at τ = 1."""
        return self.head


def read_states(hidden: Tensor | None, shape: torch.Size, head: Any) -> CachedStates | None:
    """Return a batch's coordinates (B, T, r) under the cache's `head`; None if `hidden` is None.

    shape: (B, T), of the batch's ids. Raises ValueError if there is no head, or one of another rank.
    """
    if hidden is None:
        return None
    if head is None:
        raise ValueError(
            "the batch has teacher_hidden, and the model no head for it; expected model.learn_from_entries("
            "head=TeacherCache(folder).head), as KDTrainer does"
        )
    if hidden.shape != (*shape, head.rank):
        raise ValueError(
            f"teacher_hidden is {tuple(hidden.shape)}; expected {(*shape, head.rank)}: a row for each of input_ids, "
            "and the rank of the cache that the model has the head of"
        )
    return CachedStates(head.to(hidden.device)(hidden))


def take_entries(
    batch: dict[str, Any], name: str, shape: torch.Size, head: Any, tail: TeacherTail | None
) -> CachedEntries | CachedStates | None:
    """Remove the columns of one of several teachers, teacher_indices_<name> and so on, from `batch`; return them.

    Returns None if there are none. shape, head: as in `read_states`. tail: the kind of entries without log_tails.
    """
    indices, log_probs, log_tails, hidden = (batch.pop(f"{column}_{name}", None) for column in ENTRIES)
    found = read_entries(indices, log_probs, log_tails, tail if log_tails is None else None)
    return found or read_states(hidden, shape, head)


def read_entries(
    indices: Tensor | None, log_probs: Tensor | None, log_tails: Tensor | None, tail: TeacherTail | None
) -> CachedEntries | None:
    """Return a batch's entries, or None; `tail` as in `CachedEntries`. Raise ValueError if half of them is missing."""
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
