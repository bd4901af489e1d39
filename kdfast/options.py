"""The keyword options of `fused_kd_loss`, as one object the checks and the assembly read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from torch import Tensor

from kdfast.divergences import Divergence
from kdfast.inputs import Head, Logits, SparseLogits


def is_asked(weight: float | Tensor) -> bool:
    """Whether a term with this weight may count: a tensor's value is not looked at."""
    return isinstance(weight, Tensor) or weight != 0


class LossKeywords(TypedDict, total=False):
    """What `fused_kd_loss` takes by keyword, but `return_metrics`: for type checkers, as its signature has them."""

    temperature: float | Tensor
    divergence: str | Divergence
    kd_weight: float | Tensor
    ce_weight: float | Tensor
    anchor_weight: float | Tensor
    anchor_targets: Tensor | Head | Logits | SparseLogits | None
    teacher_grad: Literal["full", "projector", "none"]
    token_weights: Tensor | None
    kd_token_weights: Tensor | None
    ignore_index: int
    reduction: Literal["mean", "sum", "none"]
    num_items_in_batch: int | Tensor | None
    temperature_squared: bool
    valid_vocab: int | None
    vocab: Literal["error", "truncate"]
    process_group: Any
    vocab_start: int | None
    engine: str
    scratch_bytes: int | None


@dataclass(frozen=True, eq=False)
class Options:
    """Meaning and shapes: see `fused_kd_loss`. `divergence` is an instance here."""

    temperature: float | Tensor
    divergence: Divergence
    kd_weight: float | Tensor
    ce_weight: float | Tensor
    anchor_weight: float | Tensor
    anchor_targets: Tensor | Head | Logits | SparseLogits | None
    teacher_grad: str
    token_weights: Tensor | None
    kd_token_weights: Tensor | None
    ignore_index: int
    reduction: str
    num_items_in_batch: int | Tensor | None
    temperature_squared: bool
    valid_vocab: int | None
    vocab: str
    process_group: Any
    vocab_start: int | None
    engine: str
    scratch_bytes: int | None
    return_metrics: bool

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]
