"""Passes over all logits of a head, a few rows at a time, where a statistic of them is wanted and no loss.

Plain torch on any device, without gradients. `fused_kd_loss` has everything that training needs at every step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdfast.inputs import Head
from kdfast.ops import matmul

CHUNK_BYTES = 128 * 2**20  # of fp32 logits


@torch.no_grad()
def logit_chunks(head: Head) -> Iterator[Tensor]:
    """Yield the head's logits (n, V), fp32 (float64 for float64 heads), not rounded to 16 bits, chunk by chunk over
    `head.hidden`'s rows."""
    rows = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    for hidden in head.hidden.reshape(-1, head.hidden.shape[-1]).split(rows):
        logits = torch.empty(len(hidden), head.weight.shape[0], dtype=wide, device=hidden.device)
        matmul.logits(hidden.to(head.weight.dtype), head.weight, logits)
        if head.bias is not None:
            logits += head.bias
        logits *= head.logit_scale
        yield logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def mean_probabilities(head: Head, valid_vocab: int | None = None) -> Tensor:
    """Return (V,) float64: the mean of softmax(logits) over the rows; ids from `valid_vocab` on have none."""
    total = head.weight.new_zeros(head.weight.shape[0], dtype=torch.float64)
    for logits in logit_chunks(head):
        total[:valid_vocab] += logits[:, :valid_vocab].softmax(-1).sum(0)
    return total / max(1, head.hidden.shape[:-1].numel())
