"""A batch's entries of a teacher cache, as the teacher that the loss takes."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.inputs import SparseLogits


class CachedEntries(NamedTuple):
    """What `CachedBlocks` adds to a batch.

    teacher = CachedEntries(batch["teacher_indices"], batch["teacher_log_probs"], batch["teacher_log_tails"])
    loss = fused_kd_loss(student, teacher.at(2.0), labels, temperature=2.0)
    """

    indices: Tensor  # (*, K) integer
    log_probs: Tensor  # (*, K) any float dtype: of top-k entries at τ = 1; of drawn ones the log of their weights
    log_tails: Tensor | None  # (*, 2): log of the mass they do not hold, at τ = 1 and at the KD term's; drawn: None

    def at(self, temperature: float | Tensor) -> SparseLogits:
        """The teacher for a KD term at `temperature`, the one the data set was made with."""
        if self.log_tails is None:
            return SparseLogits(self.indices, self.log_probs, tail="none", tempered=True)
        return self._at(temperature, self.log_tails[..., 1])

    def at_one(self) -> SparseLogits | None:
        """The teacher at τ = 1; None where its entries were drawn, at that temperature alone."""
        return None if self.log_tails is None else self._at(1.0, self.log_tails[..., 0])

    def _at(self, temperature: float | Tensor, log_tail: Tensor) -> SparseLogits:
        """What rounding has taken from the entries' sum is given back: they have what the tail leaves."""
        # a row without any entry, −inf alone, comes out as NaN, and has all its mass in the tail
        entries = (self.log_probs.float() / temperature).log_softmax(-1).nan_to_num(nan=-inf, neginf=-inf)
        left = torch.log(-torch.expm1(log_tail.clamp_max(0)))
        return SparseLogits(self.indices, entries + left[..., None], tail="bucket", tempered=True)
