r"""Closed-form initialization: an embedding and a projector computed from the teacher's head.

Adding a constant to logits does not change a softmax, and to second order KL(p‖q) = ½ Σ_v p_v (dz_v − Σ_u p_u dz_u)².
With the vocabulary's weights d (V,), the teacher's mean probabilities, and the second moment C = E[h hᵀ] of its hidden
states, the KL that a low rank costs is therefore close to

    ‖ D^½ (W_t − 1·w̄ᵀ − E P) C^½ ‖²_F ,    w̄ = Σ_v d_v w_v / Σ_v d_v

svd    the best pair E (V, r), P (r, Ht): D^½ (W_t − 1·w̄ᵀ) C^½ = U S Vᵀ, E = D^-½ U_r S_r, P = V_rᵀ C^-½.
       Source: Eckart and Young 1936, in the metric of the data, as in Hsu et al. 2022, arXiv:2207.00112
lstsq  the best P for a given E, the student's embedding: (Eᵀ D E) P = Eᵀ D W_t, both centered. C drops out.
       The unweighted case is the pseudo-inverse start of DSKDv2 (Zhang et al. 2025, arXiv:2504.11426)

Only (Ht, Ht) and (Hs, Ht) matrices are built: sums over V in float64, a few thousand rows of the heads at a time. A
head's bias is treated as one more column, for a hidden state of 1, and becomes the projector's bias. A softcap does
see constants, so nothing is centered then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.inputs import Head, same_vocabulary
from kdfast.ops import matmul
from kdfast.ops.logit_chunks import mean_probabilities

ROWS = 4096  # rows of the heads handled at a time
FREQUENCY_ROWS = 2048  # hidden states used for the mean probabilities
RIDGE = 1e-6  # share of the mean eigenvalue: keeps directions that the calibration text lacks invertible


class Projection(NamedTuple):
    """A projector, in fp32 (float64 for float64 heads), on the head's device."""

    weight: Tensor  # (Hs, Ht), as nn.Linear's
    bias: Tensor | None  # (Hs,)


class LowRankStart(NamedTuple):
    """A student's embedding, and the projector that feeds it."""

    embedding: Tensor  # (V, Hs)
    projection: Projection


class Factors:
    """The singular value decomposition of a head in the metric of its hidden states, which can be cut at any rank.

    Args:
        teacher: the head, with hidden states (*, Ht) of some text; a few times Ht rows are enough.
        vocab_weights: (V,) ≥ 0, the cost of an error at each id; None = `vocab_frequencies` of the teacher.
        valid_vocab: ids from here on are padding rows, with weight 0.

    Attributes: `singular_values` (Ht,), descending; (Ht + 1,) if the head has a bias.

    Raises ValueError for no rows, hidden states that are not finite, or weights that are not (V,) or are all 0.
    """

    def __init__(self, teacher: Head, *, vocab_weights: Tensor | None = None, valid_vocab: int | None = None) -> None:
        moment = _second_moment(teacher)
        weights = _vocab_weights(teacher, vocab_weights, valid_vocab)
        self._matrix = _Matrix(teacher.weight, teacher.bias, teacher.softcap is None)
        gram, self._mean = _products(self._matrix, self._matrix, weights)
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp_min(0) + RIDGE * values.mean()
        root = vectors * values.sqrt()  # C = root rootᵀ
        squares, right = torch.linalg.eigh(root.T @ gram @ root)
        order = squares.argsort(descending=True)
        self.singular_values = squares[order].clamp_min(0).sqrt()
        self._into = root @ right[:, order]  # E = (W − mean) into
        self._from = right[:, order].T @ (vectors / values.sqrt()).T  # P = from

    def cut(self, rank: int) -> LowRankStart:
        """Return E (V, rank) and P (rank, Ht); the projected hidden states have unit second moments."""
        rank = min(rank, len(self.singular_values))
        matrix, into = self._matrix, self._into[:, :rank]
        dtype = torch.promote_types(matrix.weight.dtype, torch.float32)
        rows = [((matrix.rows(ids) - self._mean) @ into).to(dtype) for ids in matmul.blocks(len(matrix.weight), ROWS)]
        return LowRankStart(torch.cat(rows), _projection(self._from[:rank], matrix))


def solve_svd(
    teacher: Head,
    width: int,
    *,
    std: float = 0.02,
    logit_scale: float = 1.0,
    vocab_weights: Tensor | None = None,
    valid_vocab: int | None = None,
) -> LowRankStart:
    """Return an embedding and a projector for a new student: the teacher's head at rank `width`.

    `projection` followed by `embedding` gives the teacher's logits up to a constant per row, as well as `width` allows
    (exactly if width ≥ Ht). A fixed rotation makes all coordinates alike, as in a random start.

    Args:
        teacher, vocab_weights, valid_vocab: as in `Factors`.
        width: Hs, the student's width.
        std: root mean square of the embedding's entries; the projector gets the inverse factor.
        logit_scale: the student's.

    Raises ValueError as `Factors` does, and for a width below 1.
    """
    if width < 1:
        raise ValueError(f"width={width!r}; expected the student's width, an int ≥ 1")
    embedding, (weight, bias) = Factors(teacher, vocab_weights=vocab_weights, valid_vocab=valid_vocab).cut(width)
    rotation = random_rotation(width, embedding)[: embedding.shape[1]]
    embedding, weight = embedding @ rotation, rotation.T @ weight
    bias = None if bias is None else rotation.T @ bias
    scale = std / embedding[:valid_vocab].square().mean().sqrt()
    back = teacher.logit_scale / (logit_scale * scale)
    return LowRankStart(embedding * scale, Projection(weight * back, None if bias is None else bias * back))


def solve_lstsq(
    student: Head,
    teacher: Head,
    *,
    vocab_weights: Tensor | None = None,
    valid_vocab: int | None = None,
    ridge: float = RIDGE,
) -> Projection:
    """Return the projector (Hs, Ht) that best reproduces the teacher's logits through the student's head.

    Args:
        student: the student's head; `hidden` is not read.
        teacher, vocab_weights, valid_vocab: as in `Factors`. Both heads have the same V, or `valid_vocab` fits in both.
        ridge: added to the diagonal of the normal equations, as a share of its mean.

    Raises ValueError as `Factors` does, and for heads of different V.
    """
    if not same_vocabulary(student.weight.shape[0], teacher.weight.shape[0], valid_vocab):
        raise ValueError(
            f"teacher.weight has {teacher.weight.shape[0]} rows and student.weight {student.weight.shape[0]}; expected "
            "the same vocabulary, or valid_vocab, the number of real tokens, within both"
        )
    weights = _vocab_weights(teacher, vocab_weights, valid_vocab)
    ratio = teacher.logit_scale / student.logit_scale
    bias = None
    if teacher.bias is not None or student.bias is not None:  # in units of the teacher's logits before their scale
        theirs, ours = (
            weights.new_zeros(len(weights)) if b is None else b.detach().double()[: len(weights)]
            for b in (teacher.bias, student.bias)
        )
        bias = theirs - ours / ratio
    centered = teacher.softcap is None and student.softcap is None
    embedding, target = _Matrix(student.weight, None, centered), _Matrix(teacher.weight, bias, centered)
    gram, _ = _products(embedding, embedding, weights)
    cross, _ = _products(embedding, target, weights)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return _projection(torch.linalg.solve(gram, cross) * ratio, target)


def _projection(solution: Tensor, matrix: _Matrix) -> Projection:
    """Split a solution (Hs, Ht), or (Hs, Ht + 1) with the bias last, and round it to a projector's precision."""
    solution = solution.to(torch.promote_types(matrix.weight.dtype, torch.float32))
    width = matrix.weight.shape[1]
    bias = None if matrix.bias is None else solution[:, width].contiguous()
    return Projection(solution[:, :width].contiguous(), bias)


def _second_moment(head: Head) -> Tensor:
    """Return E[h hᵀ] in float64, with one more row and column if the head has a bias."""
    hidden = head.hidden.reshape(-1, head.hidden.shape[-1])
    if not len(hidden):
        raise ValueError("teacher.hidden has no rows; expected hidden states of some text, a few times Ht of them")
    width = hidden.shape[1] + (head.bias is not None)
    moment = hidden.new_zeros(width, width, dtype=torch.float64)
    for rows in hidden.split(ROWS):
        rows = rows.double()
        if head.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        moment += rows.T @ rows
    if not torch.isfinite(moment).all():
        raise ValueError("teacher.hidden holds NaN or infinity; expected finite hidden states")
    return moment / len(hidden)


def vocab_frequencies(head: Head, valid_vocab: int | None = None) -> Tensor:
    """Return the head's mean probabilities (V,), float64, over FREQUENCY_ROWS evenly spaced hidden states.

    This computes all logits of those rows. To solve several starts for one teacher, compute it once and pass it as
    `vocab_weights`.
    """
    hidden = head.hidden.reshape(-1, head.hidden.shape[-1])
    sample = hidden[:: max(1, len(hidden) // FREQUENCY_ROWS)][:FREQUENCY_ROWS]
    if not len(sample):
        raise ValueError("teacher.hidden has no rows; expected hidden states of some text, or give vocab_weights")
    return mean_probabilities(replace(head, hidden=sample), valid_vocab)


def centered_gram(head: Head, weights: Tensor) -> Tensor:
    """Return Eᵀ D E (H, H), float64, for the head's weight E less its weighted mean; weights (≤ V,) for its first rows.
    """
    matrix = _Matrix(head.weight, None, head.softcap is None)
    return _products(matrix, matrix, weights.to(head.weight.device, torch.float64) / weights.sum())[0]


def _vocab_weights(head: Head, given: Tensor | None, valid_vocab: int | None) -> Tensor:
    vocab = head.weight.shape[0]
    if given is None:
        given = vocab_frequencies(head, valid_vocab)
    weights = given.to(head.weight.device, torch.float64).clone()
    if weights.shape != (vocab,) or not (weights >= 0).all() or not 0 < weights.sum() < torch.inf:
        raise ValueError(f"vocab_weights is {tuple(given.shape)}; expected ({vocab},) finite numbers ≥ 0, not all 0")
    weights = weights[:valid_vocab]
    return weights / weights.sum()


def _products(one: _Matrix, other: _Matrix, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return Aᵀ D B and A's mean, float64, for two matrices of V rows; means are subtracted if `one` is centered."""
    total = torch.zeros(one.width, other.width, dtype=torch.float64, device=weights.device)
    sums = [torch.zeros(m.width, dtype=torch.float64, device=weights.device) for m in (one, other)]
    for ids in matmul.blocks(len(weights), ROWS):
        a, b, d = one.rows(ids), other.rows(ids), weights[ids, None]
        weighted = a * d
        total += weighted.T @ b
        sums[0] += weighted.sum(0)
        sums[1] += (b * d).sum(0)
    if not one.centered:
        return total, torch.zeros_like(sums[0])
    return total - torch.outer(sums[0], sums[1]), sums[0]  # the weights sum to 1


class _Matrix(NamedTuple):
    """A head's weight (V, H), with its bias (if any) as one more column."""

    weight: Tensor
    bias: Tensor | None
    centered: bool

    @property
    def width(self) -> int:
        return self.weight.shape[1] + (self.bias is not None)

    def rows(self, ids: slice) -> Tensor:
        rows = self.weight[ids].detach().double()
        return rows if self.bias is None else torch.cat([rows, self.bias[ids].detach().double()[:, None]], 1)


def random_rotation(width: int, like: Tensor) -> Tensor:
    """Return a random orthogonal (width, width) matrix, always the same, so that no coordinate is special."""
    normal = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(normal).Q.to(like)
