"""What is kept of a teacher's distribution: its k most likely ids, or ids drawn from it, and the mass of the others.

Logits exist for a chunk of tokens at a time. Nothing here is rounded but by fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.inputs import Head
from kdfast.ops.logit_chunks import logit_chunks


class TopK(NamedTuple):
    indices: Tensor  # (*, k) int64, most likely first
    log_probs: Tensor  # (*, k) at τ = 1; −inf where fewer than k ids are possible
    log_tails: Tensor  # (*, 1 + temperatures): log of the mass of all other ids at τ = 1, then at each temperature


class Drawn(NamedTuple):
    """Ids that were drawn, each once, those of all tokens one after the other."""

    indices: Tensor  # (all,) int64
    counts: Tensor  # (all,) int64: how often it came; over n, its weight
    distinct: Tensor  # (N,) int64: how many of them are the token's


@torch.no_grad()
def top_k(head: Head, k: int, temperatures: Sequence[float] = (), valid_vocab: int | None = None) -> TopK:
    """The k most likely ids of `head` (*, H) and the mass that is left at τ = 1 and at every temperature."""
    taus = (1.0, *temperatures)
    found = []
    for logits in logit_chunks(head):
        z = _possible(logits, valid_vocab)
        largest, indices = z.topk(k, dim=-1)
        log_probs = largest - z.logsumexp(-1, keepdim=True)
        totals = [(z / tau).logsumexp(-1) for tau in taus]
        z.scatter_(-1, indices, -inf)
        tails = [(z / tau).logsumexp(-1) - total for tau, total in zip(taus, totals, strict=True)]
        found.append((indices, log_probs, torch.stack(tails, dim=-1)))
    shape = head.hidden.shape[:-1]
    return TopK(*(torch.cat(part).unflatten(0, shape) for part in zip(*found, strict=True)))


@torch.no_grad()
def draw(head: Head, n: int, temperature: float, generator: torch.Generator, valid_vocab: int | None = None) -> Drawn:
    """n ids for each row of `head` (N, H), with replacement, from softmax(z/τ).

    counts/n are weights whose expectation is that softmax. Source: Anshumann et al. 2025, arXiv:2503.16870
    """
    indices, counts, distinct = [], [], []
    for logits in logit_chunks(head):
        p = (_possible(logits, valid_vocab) / temperature).softmax(-1)
        ids = torch.multinomial(p, n, replacement=True, generator=generator).sort(dim=-1).values
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = first.flatten().nonzero().squeeze(-1)
        ends = torch.cat([starts[1:], starts.new_tensor([ids.numel()])])
        indices.append(ids[first])
        counts.append(ends - starts)
        distinct.append(first.sum(-1))
    return Drawn(torch.cat(indices), torch.cat(counts), torch.cat(distinct))


def _possible(logits: Tensor, valid_vocab: int | None) -> Tensor:
    return logits if valid_vocab is None else logits[:, :valid_vocab]
