"""Decisions that every fused engine makes first: which gradients, at what scale, in how much memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops import matmul
from kdfast.ops.problem import Problem


class GradFlags(NamedTuple):
    """Which gradients of the logits to compute."""

    student: bool  # dL/dz_s
    teacher: bool  # the KD term's dL/dz_t
    anchor: bool  # the anchor's dL/dz_t
    teacher_to_weight: bool  # the KD term's dL/dz_t reaches W and the bias; the anchor's must not

    @property
    def anchor_apart(self) -> bool:
        """Return whether the anchor's gradient needs a plane of its own until dW has been computed."""
        return self.anchor and self.teacher_to_weight


def grad_flags(x: Problem) -> GradFlags:
    """Return which gradients of the logits are needed and allowed by the options."""
    needs_head = x.need_weight or x.need_bias
    full = x.projected and x.teacher_grad == "full"
    to_teacher = x.projected and x.teacher_grad != "none" and x.need_teacher_hidden
    return GradFlags(
        student=x.need_hidden or needs_head,
        teacher=to_teacher or (full and needs_head),
        anchor=x.anchor_term and x.need_teacher_hidden,
        teacher_to_weight=full and needs_head,
    )


def decorrelate(x: Problem) -> bool:
    """Return whether teacher rows are made orthogonal to student rows before both are rounded to 16 bits
    (`torch_rows._decorrelate`)."""
    narrow = matmul.gradient_dtype(x.weight.dtype, x.weight.device) != x.dtype
    full = x.projected and x.teacher_grad == "full"
    return narrow and full and x.need_weight and (x.need_hidden or not x.need_teacher_hidden)


CPU_SCRATCH = 128 << 20  # 316 tokens at V=50257; more does not speed up the products
DEVICE_SCRATCH = 512 << 20
SLAB_SCRATCH = 128 << 20  # with dX and dW 4% of eager's memory at V=50257, Hs=768
DEVICE_TOKENS = 1024  # fewer rows starve a GPU's matrix units; up to half as many more to fill its waves
TILE = 128  # rows and columns of the part of a product that one multiprocessor computes at a time
PASS_OVER_DW = 0.05  # cost of one pass over 128 columns of dW, in waves of dX; the same on A100, H100 and H200
ALIGNMENT = 128  # rows of scratch are padded to a multiple of this, so that products see an aligned leading dimension


def on_cpu(device: torch.device, engine: str) -> bool:
    """Return whether the `torch` engine is on a CPU, where reading a mask is free and a few rows fit in the cache."""
    return device.type == "cpu" and engine in ("auto", "torch")


def row_stride(vocab: int, device: torch.device, engine: str = "auto") -> int:
    """Return the number of elements from one row of logits to the next. On a CPU rows are packed."""
    if on_cpu(device, engine):
        return vocab
    return -(-vocab // ALIGNMENT) * ALIGNMENT


def bytes_per_token(
    device: torch.device,
    dtype: torch.dtype,
    vocab: int,
    *,
    sides: int,
    gradients: bool = True,
    anchor_apart: bool = False,
    engine: str = "auto",
    buffers: int = 1,
) -> int:
    """Return the bytes of scratch per token in a chunk: fp32 (fp64) logits of 1 or 2 sides, and their gradients if
    those have another dtype. dtype: the head's; buffers: how many chunks' logits exist at a time."""
    logits = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = matmul.gradient_dtype(dtype, device)
    size = buffers * sides * logits.itemsize
    if gradients and narrow != logits:
        size += sides * narrow.itemsize
    if anchor_apart:
        size += narrow.itemsize
    return size * row_stride(vocab, device, engine)


class InputGradient(NamedTuple):
    """Size of a chunk's dX on a GPU, the only product with so few tiles that a half-idle last wave matters."""

    rows: int  # per token: two if student's and teacher's hidden states share W
    width: int
    multiprocessors: int

    @property
    def columns(self) -> int:
        return -(-self.width // TILE)

    def waves(self, tokens: int) -> int:
        """Return how many rounds the multiprocessors need for the tiles of this many tokens."""
        return -(-(-(-self.rows * tokens // TILE) * self.columns) // self.multiprocessors)

    def tokens(self, waves: int) -> int:
        """Return the largest number of tokens that need no more than `waves`."""
        return waves * self.multiprocessors // self.columns * TILE // self.rows

    def cost(self, tokens: int, chunk: int) -> float:
        """Return the waves of all chunks plus the cost of their passes over dW, in waves."""
        chunks = -(-tokens // chunk)
        last = self.waves(tokens - (chunks - 1) * chunk)
        return (chunks - 1) * self.waves(chunk) + last + chunks * self.columns * PASS_OVER_DW


def multiprocessors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors, or an H200's 132 if there is no GPU here."""
    here = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if here else 132


def chunk_tokens(
    tokens: int, per_token: int, device: torch.device, scratch_bytes: int = 0, dx: InputGradient | None = None
) -> int:
    """Return the number of tokens per chunk: as many as the budget holds, in chunks of about equal size. With `dx`, on
    a GPU, a multiple of 16, and fewer if that saves waves."""
    if device.type == "cpu" or (dx is not None and not dx.rows):
        dx = None
    full = DEVICE_TOKENS if dx is None else dx.tokens(dx.waves(DEVICE_TOKENS))
    least = full if full <= 1.5 * DEVICE_TOKENS else DEVICE_TOKENS
    default = CPU_SCRATCH if device.type == "cpu" else max(DEVICE_SCRATCH, least * per_token)
    most = min(max(1, scratch_budget(scratch_bytes, default) // per_token), max(1, tokens))
    if dx is None or most >= tokens:
        return -(-tokens // -(-tokens // most)) if tokens else 1
    found = []
    for limit in (most, dx.tokens(dx.waves(most) - 1)):
        if limit > 0:
            equal = -(-tokens // -(-tokens // limit))
            found.append(equal if -(-equal // 16) * 16 > limit else -(-equal // 16) * 16)
    return min(found, key=lambda chunk: dx.cost(tokens, chunk))


def slab_width(vocab: int, bytes_per_entry: int, tile: int, scratch_bytes: int = 0) -> int:
    """Return how many entries of the vocabulary `triton_tiled` handles at a time: whole tiles, in slabs of about equal
    width. bytes_per_entry: for all tokens' gradients of one logit, and its row of dW."""
    tiles = -(-vocab // tile)
    slabs = -(-tiles // max(1, scratch_budget(scratch_bytes, SLAB_SCRATCH) // (bytes_per_entry * tile)))
    return -(-tiles // slabs) * tile


def gradient_buffer(
    x: Problem, needed: bool, shape: Sequence[int], written: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """Return zeros, or no elements if not needed. written: leading rows that will be overwritten, so need no zeros."""
    out = torch.empty(shape if needed else (0,), device=x.hidden.device, dtype=dtype or x.dtype)
    if written < out.shape[0]:
        out[written:].zero_()
    return out


FLOAT16_HEADROOM = 1024.0


def gradient_scale(x: Problem) -> Tensor:
    """Return the power of two, (), by which gradients of the logits are divided; 1 if nothing can underflow.

    For 16-bit inputs it is the power of two at or below the largest coefficient, so that 1/N comes last. float16 holds
    nothing below 6e-8, and q − p is smaller than that for most of a large vocabulary. There gradients, which are of
    order 1 at most, are enlarged by another factor of 1024 (and saturate at 65504 instead of becoming infinite)."""
    if x.weight.dtype == x.dtype or x.coefficients.numel() == 0:
        return torch.ones((), device=x.coefficients.device, dtype=x.dtype)
    largest = torch.linalg.vector_norm(x.coefficients, torch.inf)
    one = 1 / FLOAT16_HEADROOM if x.weight.dtype == torch.float16 else 1.0
    # exact: dividing by the mantissa, in [½, 1), gives a power of two, or NaN for 0, infinity and NaN
    return (largest / torch.frexp(largest).mantissa * (one / 2)).nan_to_num_(one, one)


def scratch_budget(scratch_bytes: int, default: int) -> int:
    """Return a budget in bytes: the argument if not 0, else KDFAST_SCRATCH_BYTES, else the engine's default."""
    if scratch_bytes:
        return scratch_bytes
    setting = os.environ.get("KDFAST_SCRATCH_BYTES")
    if setting is None:
        return default
    if not setting.isdecimal() or int(setting) == 0:
        raise ValueError(f"KDFAST_SCRATCH_BYTES={setting!r}; expected a positive number of bytes, such as 268435456")
    return int(setting)


def active_rows(sides: list[Tensor], inactive: Tensor) -> Tensor:
    """Return one or two sides' hidden states (n, H), stacked, with zeros in rows where `inactive` (n, 1) is True: their
    values, which may be NaN, must not reach a sum."""
    if len(sides) == 1:
        return sides[0].masked_fill(inactive, 0)
    return torch.stack(sides).masked_fill_(inactive, 0).flatten(0, 1)


def decorrelate_inputs(inputs: Tensor, c: Tensor) -> None:
    """Turn inputs [h_s; h_p] (2n, H) into [h_s − c·h_p; h_p] in place; c (n,) in fp32, rounded once."""
    student, teacher = inputs.chunk(2)
    torch.addcmul(student, teacher, c[:, None], value=-1, out=student)


def total(x: Problem, stats: Tensor) -> Tensor:
    """Return the loss, (N,) or (), from the values of its terms in stats (6, N)."""
    terms = (x.coefficients * stats[: x.coefficients.shape[0]]).masked_fill_(x.coefficients == 0, 0.0)
    return terms.sum(dim=0) if x.per_row else terms.sum()
