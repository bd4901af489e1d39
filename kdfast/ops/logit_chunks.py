"""Passes over all logits of a head, a few rows at a time, for statistics rather than a loss.

Plain torch on any device, without gradients. Training steps use `fused_kd_loss` instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdfast.inputs import Head
from kdfast.ops import matmul

CHUNK_BYTES = 128 * 2**20  # fp32 logits held at a time


@torch.no_grad()
def logit_chunks(head: Head) -> Iterator[Tensor]:
    """Yield the head's logits (n, V), a chunk of rows at a time, in fp32 (float64 for float64 heads)."""
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
    """Return the mean of softmax(logits) over the rows, (V,) in float64; ids from `valid_vocab` on have 0."""
    total = head.weight.new_zeros(head.weight.shape[0], dtype=torch.float64)
    for logits in logit_chunks(head):
        total[:valid_vocab] += logits[:, :valid_vocab].softmax(-1).sum(0)
    return total / max(1, head.hidden.shape[:-1].numel())
