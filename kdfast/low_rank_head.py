"""`compress_head`: the teacher's head as two thin factors, which makes the teacher cheaper.

    compressed = compress_head(Head(hidden, W), max_kl=0.05)       # (V, Ht) → (V, r) and (r, Ht), fixed
    loss = fused_kd_loss(Head(h_s, W_s), compressed(h_t), labels)

A step then does 2·N·V·r operations for the teacher instead of 2·N·V·Ht, and V·r numbers stay in memory instead of V·Ht:
the full head is no longer needed. The loss of accuracy is measured on held-out hidden states. The factors are not
trained: unlike a projector through the student's changing embedding, this teacher stays fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.closed_form import Factors, LowRankStart
from kdfast.inputs import Head
from kdfast.loss import fused_kd_loss

HELD_OUT = 8  # every eighth hidden state is held out to measure on
STEP = 16  # a search tries multiples of this, which matrix units multiply at full speed


class FidelityNotReached(ValueError):
    """Raised when no rank is as close to the full head as requested."""


class HeadFidelity(NamedTuple):
    """How closely a head at `rank` matches the full one: means over held-out hidden states, at τ = 1."""

    rank: int
    kl: float  # KL(full ‖ compressed), in nats
    agreement: float  # fraction of rows with the same most likely id


class CompressedHead(nn.Module):
    """The result of `compress_head`: a frozen module that maps hidden states (*, Ht) to a `Head` of width r.

    `compress_head` builds it from `start`, the solved factors, and `whole`, the full head.

    Attributes:
        weight: (V, r), a buffer in the full head's dtype.
        projector: (r, Ht), a buffer; bias (r,) or None.
        fidelity: `HeadFidelity` of this rank. tried: those of all ranks measured, by rank.
    """

    weight: Tensor
    projector: Tensor
    bias: Tensor | None

    def __init__(self, start: LowRankStart, whole: Head) -> None:
        super().__init__()
        dtype = whole.weight.dtype
        embedding, (projector, bias) = start
        # balances the coordinates' rounding errors in int8; powers of two, so that nothing else is rounded
        scale = embedding.norm(dim=0).clamp_min(torch.finfo(embedding.dtype).tiny).log2().div(4).round().exp2()
        self.register_buffer("weight", (embedding / scale).to(dtype))
        self.register_buffer("projector", (projector * scale[:, None]).to(dtype))
        self.register_buffer("bias", None if bias is None else (bias * scale).to(dtype))
        self.logit_scale, self.softcap = whole.logit_scale, whole.softcap
        self.fidelity: HeadFidelity | None = None
        self.tried: tuple[HeadFidelity, ...] = ()

    @property
    def rank(self) -> int:
        return self.weight.shape[1]

    def forward(self, hidden: Tensor) -> Head:
        """Return a `Head` of width r for hidden states (*, Ht), to pass to `fused_kd_loss`."""
        projected = F.linear(hidden.to(self.projector.dtype), self.projector, self.bias)
        return Head(projected, self.weight, logit_scale=self.logit_scale, softcap=self.softcap)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, from width {self.projector.shape[1]}, {self.fidelity}"


@torch.no_grad()
def compress_head(
    teacher: Head,
    rank: int | None = None,
    *,
    max_kl: float | None = None,
    vocab_weights: Tensor | None = None,
    valid_vocab: int | None = None,
    engine: str = "auto",
    rounded: Callable[[Tensor], Tensor] = lambda projected: projected,
) -> CompressedHead:
    """Return the teacher's head at a given rank, or at the smallest rank whose measured KL is at most `max_kl`.

    Args:
        teacher: the head, with hidden states (*, Ht) of text like the student's: 4·Ht rows or more. Every eighth row is
            held out to measure on.
        rank: r, capped at Ht; at r = Ht the logits are the full head's up to rounding and a constant per row.
        max_kl: in nats, instead of `rank`; found by bisection over multiples of 16.
        vocab_weights, valid_vocab: as in `kdfast.closed_form.Factors`.
        engine: for the measurement, as in `fused_kd_loss`.
        rounded: applied to the projected hidden states (n, r) before measuring, such as a rounding to int8.

    Raises:
        ValueError: both or neither of rank and max_kl, a rank below 1, or too few rows.
        FidelityNotReached, a ValueError: even the full rank misses `max_kl` in the head's dtype; the message states
            the KL it reaches.
    """
    if (rank is None) == (max_kl is None):
        raise ValueError(f"rank={rank} and max_kl={max_kl}; expected exactly one of the two")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank!r}; expected an int ≥ 1, at most the head's width")
    hidden = teacher.hidden.reshape(-1, teacher.hidden.shape[-1])
    if len(hidden) < HELD_OUT:
        raise ValueError(f"teacher.hidden has {len(hidden)} rows; expected at least {HELD_OUT}, better 4·Ht")
    held_out = held_out_rows(hidden)
    whole = replace(teacher, hidden=hidden[held_out])
    factors = Factors(replace(teacher, hidden=hidden[~held_out]), vocab_weights=vocab_weights, valid_vocab=valid_vocab)
    tried: dict[int, HeadFidelity] = {}

    def at(rank: int) -> CompressedHead:
        compressed = CompressedHead(factors.cut(rank), teacher)
        surrogate = compressed(whole.hidden)
        surrogate = replace(surrogate, hidden=rounded(surrogate.hidden))
        measured = kl_and_agreement(surrogate, whole, valid_vocab=valid_vocab, engine=engine)
        compressed.fidelity = tried[rank] = HeadFidelity(compressed.rank, *measured)
        return compressed

    full = len(factors.singular_values)
    if rank is not None:
        found = at(min(rank, full))
    else:
        assert max_kl is not None
        found = at(full)
        if not tried[full].kl <= max_kl:
            raise FidelityNotReached(
                f"max_kl={max_kl}; at its full rank {full} the head in {teacher.weight.dtype} still has a KL of "
                f"{tried[full].kl:.3g}. Ask for more, or give the head in a wider dtype"
            )
        ranks = list(range(STEP, full, STEP))
        while ranks:
            middle = len(ranks) // 2
            candidate = at(ranks[middle])
            if tried[candidate.rank].kl <= max_kl:
                found, ranks = candidate, ranks[:middle]
            else:
                ranks = ranks[middle + 1 :]
    found.tried = tuple(tried[rank] for rank in sorted(tried))
    return found


def held_out_rows(hidden: Tensor) -> Tensor:
    """Return a mask (n,), True for the hidden states (n, H) that are held out to measure on."""
    return torch.arange(len(hidden), device=hidden.device) % HELD_OUT == 0


def kl_and_agreement(surrogate: Head, whole: Head, **options: Any) -> tuple[float, float]:
    """Return KL(whole ‖ surrogate) in nats and the fraction of rows with the same most likely id, at τ = 1.

    options: engine, scratch_bytes, valid_vocab.
    """
    kl, metrics = fused_kd_loss(surrogate, whole, temperature=1.0, return_metrics=True, **options)
    return kl.item(), metrics.agreement.item()
