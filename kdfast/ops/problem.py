"""The problem that an engine solves (flat, checked tensors and explicit flags) and the result that it returns.

Every user-facing convention (reduction, divisors, masks, τ²) is folded into one coefficient per row and term, so an
engine only has to compute

    loss = Σₙ  c_kdₙ·divergenceₙ + c_ceₙ·CEₙ + c_anchorₙ·anchorₙ            (a term is left out where its c = 0)

Letters: `N` tokens, `V` vocabulary (this process's entries, if it is sliced), `Hs`/`Ht` student and teacher width.
Labels, targets and sparse entries hold ids of the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.divergences import Divergence, get_divergence

# Rows of Result.stats; the first three are also those of Problem.coefficients.
KD, CE, ANCHOR, STUDENT_ENTROPY, TEACHER_ENTROPY, AGREEMENT = range(6)
# Fields of Problem with one row per token (`coefficients` has one column per token).
PER_TOKEN = (
    "hidden", "teacher_hidden", "teacher_rows", "teacher_indices", "teacher_log_probs", "teacher_log_tail", "labels",
    "anchor_targets", "active",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Problem:
    """The arguments of the operators in `kdfast.engines.operators`, field by field."""

    hidden: Tensor  # (N, Hs)
    weight: Tensor  # (V, Hs)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    teacher_hidden: Tensor | None  # (N, Hs), already projected, if teacher_weight is None; else (N, Ht)
    teacher_weight: Tensor | None  # (V, Ht): the teacher's own head; None = the student's (weight, bias, …)
    teacher_bias: Tensor | None  # (V,)
    teacher_logit_scale: float
    teacher_softcap: float | None
    teacher_logits: Tensor | None  # (*, ≥ kd_vocab): dense logits, with any strides
    teacher_rows: Tensor | None  # (N,) int64: each token's row in them, counted through their leading dimensions
    teacher_indices: Tensor | None  # (N, K) int64, as `kdfast.ops.sparse.prepare` returns them
    teacher_log_probs: Tensor | None  # (N, K)
    teacher_log_tail: Tensor | None  # (N,): log of the mass elsewhere, −inf for none; None: no category of its own
    teacher_tail: str  # "renormalize" | "bucket" | "none" | "renormalize_both", for a sparse teacher
    teacher_tempered: bool  # teacher_log_probs are at `temperature`, not at 1
    labels: Tensor | None  # (N,) int64; every entry is a valid address
    anchor_targets: Tensor | None  # (N,) int64, as labels; None unless the teacher is projected
    temperature: Tensor  # ()
    teacher_temperature: Tensor  # (): divides a dense teacher's logits in the KD term
    coefficients: Tensor  # (3, N), rows KD, CE, ANCHOR; its dtype is the precision of the logits
    active: Tensor  # (N,) bool; an inactive row does not count, whatever its hidden states hold
    divergence_name: str
    divergence_parameters: list[float]
    teacher_grad: str  # "full" | "projector" | "none"
    valid_vocab: int  # later ids are padding rows of the student's embedding
    kd_vocab: int  # both sides of the KD term end here; below valid_vocab if the teacher's vocabulary is smaller
    kd_mask: Tensor | None  # (V,) bool: the ids the KD term covers, False from kd_vocab on; None = all up to kd_vocab
    vocab_size: int  # valid_vocab, summed over processes
    kd_size: int  # kd_vocab, summed over processes
    vocab_start: int  # id of this process's first entry
    largest: int  # the most entries any process has
    group: str  # name of the group whose processes have one slice of the vocabulary each and the same rows; "" = none
    ce_term: bool  # the cross entropy is part of the loss
    anchor_term: bool  # the anchor is part of the loss
    want_metrics: bool  # compute every statistic, whether or not it is in the loss
    per_row: bool  # the loss is (N,) instead of ()
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    need_teacher_hidden: bool
    engine: str
    scratch_bytes: int  # 0 = the engine's default

    @property
    def divergence(self) -> Divergence:
        return get_divergence(self.divergence_name, self.divergence_parameters)

    @property
    def sparse(self) -> bool:
        return self.teacher_indices is not None

    @property
    def entries(self) -> tuple[Tensor, Tensor]:
        """Return a sparse teacher's ids and log-probabilities, (N, K) each."""
        assert self.teacher_indices is not None
        assert self.teacher_log_probs is not None
        return self.teacher_indices, self.teacher_log_probs

    @property
    def has_teacher(self) -> bool:
        return self.teacher_hidden is not None or self.teacher_logits is not None or self.sparse

    @property
    def projected(self) -> bool:
        """Return whether the teacher goes through the student's head."""
        return self.teacher_hidden is not None and self.teacher_weight is None

    @property
    def truncated(self) -> bool:
        """Return whether, on some process, cross entropy or anchor cover entries that the KD term does not."""
        masked = self.kd_mask is not None and (self.use_ce or self.use_anchor or self.want_metrics)
        return masked or self.kd_size < self.vocab_size

    @property
    def further(self) -> bool:
        """Return whether the teacher's terms at τ = 1 cover such entries too, which they do if it shares the head."""
        return self.projected and self.truncated

    def of_kd(self, z: Tensor) -> Tensor:
        """Return the KD term's part (r, kd_vocab) of logits (r, ≥ kd_vocab), with −inf at ids that it leaves out."""
        z = z[:, : self.kd_vocab]
        return z if self.kd_mask is None else z.masked_fill(~self.kd_mask[: self.kd_vocab], -inf)

    def local(self, ids: Tensor | None) -> Tensor | None:
        """Return the positions of `ids` in this process's slice; −1 for those of other processes."""
        if ids is None or not self.group:
            return ids
        here = (ids >= self.vocab_start) & (ids < self.vocab_start + self.valid_vocab)
        return torch.where(here, ids - self.vocab_start, -1)

    def dense_teacher(self, rows: slice) -> Tensor:
        """Return `rows` of the dense teacher logits, (r, kd_vocab) in their own dtype."""
        logits, index = self._dense_index(rows)
        return logits[..., : self.kd_vocab][index]

    def dense_teacher_offsets(self) -> Tensor:
        """Return each token's offset (N,), int64, in elements from the start of the dense teacher logits to its row."""
        logits, index = self._dense_index(slice(None))
        return torch.stack([i * stride for i, stride in zip(index, logits.stride()[:-1], strict=True)]).sum(dim=0)

    def _dense_index(self, rows: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert self.teacher_logits is not None
        assert self.teacher_rows is not None
        logits = self.teacher_logits if self.teacher_logits.dim() > 1 else self.teacher_logits[None]
        rest, index = self.teacher_rows[rows], []
        for size in reversed(logits.shape[:-1]):  # torch.unravel_index would copy the sizes to the device and wait
            index.append(rest % size)
            rest = rest // size
        return logits, tuple(index[::-1])

    @property
    def use_ce(self) -> bool:
        return self.ce_term or (self.want_metrics and self.labels is not None)

    @property
    def use_anchor(self) -> bool:
        return self.anchor_term or (self.want_metrics and self.anchor_targets is not None)

    def forward_problem(self) -> Problem:
        """Return the problem for the forward: with per-row losses, gradients must wait for the upstream gradient."""
        if not self.per_row:
            return self
        return replace(self, need_hidden=False, need_weight=False, need_bias=False, need_teacher_hidden=False)

    @property
    def weight_gradient_dtype(self) -> torch.dtype:
        """Return the dtype of Result.weight. The tiled engine computes a slab of dW in one product, so it can round to
        bf16 there, once."""
        narrow = self.engine == "triton_tiled" and self.weight.dtype == torch.bfloat16
        return torch.bfloat16 if narrow else self.dtype

    @property
    def row_constants(self) -> int:
        """Return how many numbers per row the forward keeps for a backward of per-row losses
        (`kdfast.kernels.online_softmax`)."""
        return 12 if self.engine == "triton_tiled" and self.per_row else 0

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of logits, losses and accumulated gradients: float64 for float64 inputs, else float32."""
        return self.coefficients.dtype


class Result(NamedTuple):
    """The result of a fused engine. Gradients are those of the summed loss *divided by `scale`*, a power of two, so
    that 16-bit inputs do not underflow before the upstream gradient is known; those not requested are empty.
    """

    loss: Tensor  # () or (N,)
    stats: Tensor  # (6, N): divergence, CE, anchor, student entropy, teacher entropy, agreement; 0 if not computed
    hidden: Tensor  # (N, Hs)
    weight: Tensor  # (V, Hs)
    bias: Tensor  # (V,)
    teacher_hidden: Tensor  # (N, Hs)
    scale: Tensor  # ()
    rows: Tensor  # (row_constants, N), or empty
