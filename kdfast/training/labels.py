"""Targets from labels: the one place where labels are shifted and padding is masked."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def shift_labels(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """targets[:, t] = labels[:, t + 1]: what the hidden state at t has to predict.

    A target is −100 (counts for nothing) at the last position, where the label is −100, and where either the
    position or the one it predicts is padding.

    Args:
        labels: (B, T) int64, not shifted.
        attention_mask: (B, T), 0 at padding; a mask of another rank says nothing about padding and is not used.

    Returns: (B, T) int64.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if attention_mask is None or attention_mask.dim() != 2:
        return targets
    real = attention_mask != 0
    return targets.masked_fill(~(real & F.pad(real[:, 1:], (0, 1), value=False)), IGNORE_INDEX)
