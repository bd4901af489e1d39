"""The problem an engine solves: flat, checked tensors and explicit flags; and the result it gives back.

Every user-facing convention (reduction, divisors, masks, τ²) is folded into one coefficient per row and term, so
an engine knows only

    loss = Σₙ  c_kdₙ·divergenceₙ + c_ceₙ·CEₙ + c_anchorₙ·anchorₙ            (a term counts nothing where c = 0)

Letters: `N` tokens, `V` vocabulary (where it is sliced, the entries here), `Hs`/`Ht` student and teacher width. Ids of
labels, targets and sparse entries are those of the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.divergences import Divergence, get_divergence

# Rows of Problem.coefficients and, with the statistics after them, of Result.stats.
KD, CE, ANCHOR, STUDENT_ENTROPY, TEACHER_ENTROPY, AGREEMENT = range(6)
# Fields of Problem with one row per token; in `coefficients` that is one column.
PER_TOKEN = (
    "hidden", "teacher_hidden", "teacher_rows", "teacher_indices", "teacher_log_probs", "teacher_log_tail", "labels",
    "anchor_targets", "active",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Problem:
    """Field for field the arguments of the operators in `kdfast.engines.operators`."""

    hidden: Tensor  # (N, Hs)
    weight: Tensor  # (V, Hs)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    teacher_hidden: Tensor | None  # (N, Hs) already projected where teacher_weight is None, else (N, Ht)
    teacher_weight: Tensor | None  # (V, Ht): the teacher's own head; None = the student's (weight, bias, …)
    teacher_bias: Tensor | None  # (V,)
    teacher_logit_scale: float
    teacher_softcap: float | None
    teacher_logits: Tensor | None  # (*, ≥ kd_vocab): dense, given, of any strides
    teacher_rows: Tensor | None  # (N,) int64: each token's row of them, counted through their leading dimensions
    teacher_indices: Tensor | None  # (N, K) int64 as `kdfast.ops.sparse.prepare` leaves them
    teacher_log_probs: Tensor | None  # (N, K)
    teacher_log_tail: Tensor | None  # (N,): log of the mass elsewhere, −inf for none; None: not a category of its own
    teacher_tail: str  # "renormalize" | "bucket" | "none" | "renormalize_both"; of the sparse teacher
    teacher_tempered: bool  # teacher_log_probs are at `temperature`, not at 1
    labels: Tensor | None  # (N,) int64, every entry a valid address
    anchor_targets: Tensor | None  # (N,) int64, likewise; None unless the teacher is projected
    temperature: Tensor  # ()
    teacher_temperature: Tensor  # (): of a dense teacher's logits in the KD term
    coefficients: Tensor  # (3, N), rows KD, CE, ANCHOR; dtype: the precision of the logits
    active: Tensor  # (N,) bool; an inactive row counts for nothing, whatever its hidden states hold
    divergence_name: str
    divergence_parameters: list[float]
    teacher_grad: str  # "full" | "projector" | "none"
    valid_vocab: int  # ids from here on are padding rows of the student's embedding
    kd_vocab: int  # both sides of the KD term end here: less than valid_vocab where the teacher's vocabulary is smaller
    kd_mask: Tensor | None  # (V,) bool: which ids the KD term is over, none from kd_vocab on; None = all before that
    vocab_size: int  # valid_vocab of all processes together
    kd_size: int  # kd_vocab of all processes together
    vocab_start: int  # id of the first entry here
    largest: int  # most entries any process has
    group: str  # of processes that have a slice of the vocabulary each, all taking the same rows; "" = it is whole
    ce_term: bool  # the cross entropy is part of the loss
    anchor_term: bool  # the anchor is part of the loss
    want_metrics: bool  # every statistic there is, in the loss or not
    per_row: bool  # loss (N,) instead of ()
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
        """A sparse teacher's ids and log-probabilities, (N, K) each."""
        assert self.teacher_indices is not None
        assert self.teacher_log_probs is not None
        return self.teacher_indices, self.teacher_log_probs

    @property
    def has_teacher(self) -> bool:
        return self.teacher_hidden is not None or self.teacher_logits is not None or self.sparse

    @property
    def projected(self) -> bool:
        """Whether the teacher goes through the student's head."""
        return self.teacher_hidden is not None and self.teacher_weight is None

    @property
    def truncated(self) -> bool:
        """Whether some process has entries that are the cross entropy's or the anchor's, and not the KD term's."""
        masked = self.kd_mask is not None and (self.use_ce or self.use_anchor or self.want_metrics)
        return masked or self.kd_size < self.vocab_size

    @property
    def further(self) -> bool:
        """Whether what is taken of the teacher at τ = 1 sees entries that the KD term does not: it shares the head."""
        return self.projected and self.truncated

    def of_kd(self, z: Tensor) -> Tensor:
        """Return logits (r, ≥ kd_vocab) as the KD term sees them: (r, kd_vocab), −inf at ids that it leaves out."""
        z = z[:, : self.kd_vocab]
        return z if self.kd_mask is None else z.masked_fill(~self.kd_mask[: self.kd_vocab], -inf)

    def local(self, ids: Tensor | None) -> Tensor | None:
        """Return the entries here of `ids`; −1 for those of other processes."""
        if ids is None or not self.group:
            return ids
        here = (ids >= self.vocab_start) & (ids < self.vocab_start + self.valid_vocab)
        return torch.where(here, ids - self.vocab_start, -1)

    def dense_teacher(self, rows: slice) -> Tensor:
        """Return the given teacher logits of `rows`, (r, kd_vocab) in their own dtype, read where they lie."""
        logits, index = self._dense_index(rows)
        return logits[..., : self.kd_vocab][index]

    def dense_teacher_offsets(self) -> Tensor:
        """Return (N,) int64: elements from the first of the given teacher logits to the first of each token's row."""
        logits, index = self._dense_index(slice(None))
        return torch.stack([i * stride for i, stride in zip(index, logits.stride()[:-1], strict=True)]).sum(dim=0)

    def _dense_index(self, rows: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert self.teacher_logits is not None
        assert self.teacher_rows is not None
        logits = self.teacher_logits if self.teacher_logits.dim() > 1 else self.teacher_logits[None]
        rest, index = self.teacher_rows[rows], []
        for size in reversed(logits.shape[:-1]):  # torch.unravel_index copies the sizes to the device, and waits
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
        """Return what the forward solves: with per-row losses no gradient can be taken before the upstream ones are
        known."""
        if not self.per_row:
            return self
        return replace(self, need_hidden=False, need_weight=False, need_bias=False, need_teacher_hidden=False)

    @property
    def weight_gradient_dtype(self) -> torch.dtype:
        """The dtype of Result.weight. The tiled engine finishes a slab of dW in one product, so bf16 is rounded once,
        there."""
        narrow = self.engine == "triton_tiled" and self.weight.dtype == torch.bfloat16
        return torch.bfloat16 if narrow else self.dtype

    @property
    def row_constants(self) -> int:
        """Numbers per row that the forward leaves for a backward of per-row losses
        (`kdfast.kernels.online_softmax`)."""
        return 12 if self.engine == "triton_tiled" and self.per_row else 0

    @property
    def dtype(self) -> torch.dtype:
        """Precision of logits, losses and accumulated gradients: float64 for float64 inputs, else float32."""
        return self.coefficients.dtype


class Result(NamedTuple):
    """What a fused engine returns. A gradient is that of the summed loss *divided by `scale`*, a power of two, so
    that 16-bit inputs do not underflow before the upstream gradient is known; empty where it was not asked for.
    """

    loss: Tensor  # () or (N,)
    stats: Tensor  # (6, N): divergence, CE, anchor, student entropy, teacher entropy, agreement; 0 = not computed
    hidden: Tensor  # (N, Hs)
    weight: Tensor  # (V, Hs)
    bias: Tensor  # (V,)
    teacher_hidden: Tensor  # (N, Hs)
    scale: Tensor  # ()
    rows: Tensor  # (row_constants, N), or empty
