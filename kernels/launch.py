"""What the launchers are told, in two pieces: the heads that make logits, and the loss that is taken of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdfast.kernels.block_sizes import TileConfig, architecture
from kdfast.kernels.divergences import ENTRIES, Entry


@dataclass(frozen=True, eq=False)
class Heads:
    """Logits: softcap·tanh(logit_scale·(h Wᵀ + b)/softcap) of student and teacher."""

    hidden: Tensor  # (N, Hs)
    weight: Tensor  # (V, Hs)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    teacher_hidden: Tensor | None  # (N, Hs) where it shares the student's head, (N, Ht), or None
    teacher_weight: Tensor | None  # (V, Ht), or None
    teacher_bias: Tensor | None  # (V,): the student's again where the head is shared
    teacher_logit_scale: float
    teacher_softcap: float | None
    teacher_logits: Tensor | None  # given, of any strides but one row a token at `offsets` (N,) int64, or None
    offsets: Tensor | None
    vocab: int  # entries of the vocabulary that count
    kd_vocab: int  # of both sides of the KD term; the rest is the cross entropy's alone
    tf32: bool  # fp32 products may round their operands to TF32
    truncated: bool = False  # there is a rest; where the vocabulary lies in slices, in some slice

    @property
    def own(self) -> bool:
        return self.teacher_weight is not None

    @property
    def teacher(self) -> bool:
        """There are two sides of logits."""
        return self.teacher_hidden is not None or self.teacher_logits is not None

    def student_alone(self) -> Heads:
        return replace(self, teacher_hidden=None, teacher_weight=None, teacher_bias=None, teacher_logits=None)

    def given(self) -> tuple[Tensor | None, Tensor | None, int]:
        """Kernel arguments: logits, where their rows lie, and the stride of their entries."""
        logits = self.teacher_logits
        return logits, self.offsets, 0 if logits is None else logits.stride(-1)

    @property
    def intricate(self) -> bool:
        """More work per logit than a product and a sum: the "full" rows of the configuration table."""
        extras = (self.softcap, self.teacher_softcap, self.bias, self.teacher_bias)
        return any(extra is not None for extra in extras)

    def pointers(self) -> tuple[Any, ...]:
        """Kernel arguments: tensors with their strides, then the biases."""
        matrices = (self.hidden, self.teacher_hidden, self.weight, self.teacher_weight)
        pairs = [(None, 0, 0) if t is None else (readable(t), t.stride(0), t.stride(1)) for t in matrices]
        return (*pairs[0], *pairs[1], *pairs[2], *pairs[3], self.bias, self.teacher_bias)

    def widths(self) -> tuple[int, int]:
        """Hs, Ht."""
        width = self.hidden.shape[1]
        return width, self.teacher_hidden.shape[1] if self.own else width

    def scalars(self) -> tuple[float, float, float, float]:
        return (self.logit_scale, self.softcap or 1.0, self.teacher_logit_scale, self.teacher_softcap or 1.0)

    def flags(self, config: TileConfig) -> dict[str, Any]:
        Hs, Ht = self.widths()
        return {
            "SOFTCAP_S": self.softcap is not None,
            "SOFTCAP_T": self.teacher_softcap is not None,
            "EVEN_S": Hs % config.block_h == 0,
            "EVEN_T": Ht % config.block_h == 0,
            "PRECISION": "tf32" if self.tf32 else "ieee",
        }


@dataclass(frozen=True, eq=False)
class Term:
    """The loss: a divergence, and what else is wanted of the logits."""

    divergence: str  # "sparse": a teacher given by a few entries a row, which the kernels know little of
    parameter: float  # the divergence's only number, or 0
    temperature: Tensor  # ()
    coefficients: Tensor  # (3, N): kd, ce, anchor
    scale: Tensor  # (): gradients are divided by it
    active: Tensor  # (N,) bool
    labels: Tensor | None  # (N,) int64; given = the cross entropy is wanted
    targets: Tensor | None  # (N,) int64; given = the anchor is wanted
    ce_gradient: bool
    teacher_gradient: bool
    anchor_gradient: bool
    metrics: bool
    bits: Tensor | None = None  # (rows at hand, words) int32: set bits take entries out of a sparse teacher's bucket

    @property
    def sparse(self) -> bool:
        return self.divergence == "sparse"

    @property
    def intricate(self) -> bool:
        return self.metrics or self.targets is not None or self.entry.base == "" or self.bits is not None

    @property
    def entry(self) -> Entry:
        return Entry() if self.sparse else ENTRIES[self.divergence]

    def excluded(self) -> tuple[Tensor | None, int]:
        """Kernel arguments."""
        return self.bits, 0 if self.bits is None else self.bits.stride(0)

    def divergence_flags(self) -> dict[str, Any]:
        entry = self.entry
        return {
            "DIVERGENCE": self.divergence,
            "BASE": entry.base,
            "CENTRED_P": entry.centred_p,
            "CENTRED_Q": entry.centred_q,
        }


def readable(operand: Tensor) -> Tensor:
    """The interpreter has no bf16 product; widened there."""
    if operand.dtype == torch.bfloat16 and architecture(operand.device) == "interpreter":
        return torch.empty_strided(operand.shape, operand.stride(), dtype=torch.float32).copy_(operand)
    return operand
