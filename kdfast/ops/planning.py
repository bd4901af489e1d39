"""What every engine that takes its own gradients decides first: which, at what scale, in how much memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops import matmul
from kdfast.ops.problem import Problem


class GradFlags(NamedTuple):
    """Which gradients of the logits are wanted."""

    student: bool  # dL/dz_s
    teacher: bool  # the KD term's dL/dz_t
    anchor: bool  # the anchor's dL/dz_t
    teacher_to_weight: bool  # the KD term's dL/dz_t reaches W and the bias, and the anchor's must not

    @property
    def anchor_apart(self) -> bool:
        """The anchor's gradient waits in a plane of its own until dW has been taken."""
        return self.anchor and self.teacher_to_weight


def grad_flags(x: Problem) -> GradFlags:
    """Return which gradients of the logits are wanted, by what needs one and by what the options let through."""
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


CPU_SCRATCH = 128 << 20  # 316 tokens at V=50257: past that the products gain nothing
DEVICE_SCRATCH = 512 << 20
SLAB_SCRATCH = 128 << 20  # with dX and dW 4% of what eager takes at V=50257, Hs=768
DEVICE_TOKENS = 1024  # fewer rows than this starve a GPU's matrix units; half as many more where they fill its waves
TILE = 128  # rows and columns of a product that a GPU's multiprocessor takes at a time
PASS_OVER_DW = 0.05  # reading and writing its 128 columns once, in waves of dX: on A100, H100 and H200 alike
ALIGNMENT = 128  # elements a row of scratch is padded to, so that products see an aligned leading dimension


def on_cpu(device: torch.device, engine: str) -> bool:
    """Return whether this is the `torch` engine on a CPU, where looking at a mask is free, and a few rows at a time
    stay in the cache."""
    return device.type == "cpu" and engine in ("auto", "torch")


def row_stride(vocab: int, device: torch.device, engine: str = "auto") -> int:
    """Return the elements from one row of logits to the next. A CPU's are packed."""
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
    """Return the bytes of scratch that one token takes in a chunk: fp32 (fp64) logits of 1 or 2 sides, and gradients of
    them where those have another dtype. dtype: the head's; buffers: chunks whose logits are there at a time."""
    logits = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = matmul.gradient_dtype(dtype, device)
    size = buffers * sides * logits.itemsize
    if gradients and narrow != logits:
        size += sides * narrow.itemsize
    if anchor_apart:
        size += narrow.itemsize
    return size * row_stride(vocab, device, engine)


class InputGradient(NamedTuple):
    """dX of a chunk on a GPU: the one product with so few tiles that a last wave half idle shows."""

    rows: int  # per token: two where student's and teacher's hidden states share W
    width: int
    multiprocessors: int

    @property
    def columns(self) -> int:
        return -(-self.width // TILE)

    def waves(self, tokens: int) -> int:
        """Return in how many rounds the multiprocessors take the tiles of so many tokens."""
        return -(-(-(-self.rows * tokens // TILE) * self.columns) // self.multiprocessors)

    def tokens(self, waves: int) -> int:
        """Return the most tokens that take no more than `waves`."""
        return waves * self.multiprocessors // self.columns * TILE // self.rows

    def cost(self, tokens: int, chunk: int) -> float:
        """Return the waves of all chunks and, in waves, their passes over dW."""
        chunks = -(-tokens // chunk)
        last = self.waves(tokens - (chunks - 1) * chunk)
        return (chunks - 1) * self.waves(chunk) + last + chunks * self.columns * PASS_OVER_DW


def multiprocessors(device: torch.device) -> int:
    """Return how many a GPU has; an H200's 132 for one that is not there."""
    here = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if here else 132


def chunk_tokens(
    tokens: int, per_token: int, device: torch.device, scratch_bytes: int = 0, dx: InputGradient | None = None
) -> int:
    """Return the tokens of a chunk: as many as the budget holds, in chunks of about equal size; given `dx`, on a GPU,
    multiples of 16, and somewhat fewer where that takes fewer waves."""
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
    """Return the entries of the vocabulary that `triton_tiled` takes at a time: whole tiles, in slabs of about equal
    width. bytes_per_entry: of all tokens' gradients of one logit, and of its row of dW."""
    tiles = -(-vocab // tile)
    slabs = -(-tiles // max(1, scratch_budget(scratch_bytes, SLAB_SCRATCH) // (bytes_per_entry * tile)))
    return -(-tiles // slabs) * tile


def gradient_buffer(
    x: Problem, needed: bool, shape: Sequence[int], written: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """Return zeros, of no elements where not needed. written: rows that will be, which are left as they are."""
    out = torch.empty(shape if needed else (0,), device=x.hidden.device, dtype=dtype or x.dtype)
    if written < out.shape[0]:
        out[written:].zero_()
    return out


FLOAT16_HEADROOM = 1024.0


def gradient_scale(x: Problem) -> Tensor:
    """Return (): what gradients of the logits are divided by, a power of two; 1 where nothing can underflow.

    For 16-bit inputs the power of two at or below the largest coefficient, so that 1/N comes last. float16 holds
    nothing below 6e-8, and q − p is smaller than that for most of a large vocabulary: there gradients, of the order
    of 1 at most, are made 1024 times larger still (and saturate at 65504 rather than becoming infinite)."""
    if x.weight.dtype == x.dtype or x.coefficients.numel() == 0:
        return torch.ones((), device=x.coefficients.device, dtype=x.dtype)
    largest = torch.linalg.vector_norm(x.coefficients, torch.inf)
    one = 1 / FLOAT16_HEADROOM if x.weight.dtype == torch.float16 else 1.0
    # exact: the quotient by the mantissa, which is from ½ to 1, is a power of two, and NaN for 0, infinity and NaN
    return (largest / torch.frexp(largest).mantissa * (one / 2)).nan_to_num_(one, one)


def scratch_budget(scratch_bytes: int, default: int) -> int:
    """Return bytes: the argument where it is not 0, else KDFAST_SCRATCH_BYTES, else the engine's default."""
    if scratch_bytes:
        return scratch_bytes
    setting = os.environ.get("KDFAST_SCRATCH_BYTES")
    if setting is None:
        return default
    if not setting.isdecimal() or int(setting) == 0:
        raise ValueError(f"KDFAST_SCRATCH_BYTES={setting!r}; expected a positive number of bytes, such as 268435456")
    return int(setting)


def active_rows(sides: list[Tensor], inactive: Tensor) -> Tensor:
    """Return one or two sides' hidden states (n, H), stacked, with zeros in inactive rows (n, 1): whatever they hold,
    NaN included, must not reach a sum."""
    if len(sides) == 1:
        return sides[0].masked_fill(inactive, 0)
    return torch.stack(sides).masked_fill_(inactive, 0).flatten(0, 1)


def decorrelate_inputs(inputs: Tensor, c: Tensor) -> None:
    """Turn inputs [h_s; h_p] (2n, H) into [h_s − c·h_p; h_p], c (n,) in fp32, rounded once."""
    student, teacher = inputs.chunk(2)
    torch.addcmul(student, teacher, c[:, None], value=-1, out=student)


def total(x: Problem, stats: Tensor) -> Tensor:
    """Return the loss, (N,) or (), from the terms' values in stats (6, N)."""
    terms = (x.coefficients * stats[: x.coefficients.shape[0]]).masked_fill_(x.coefficients == 0, 0.0)
    return terms.sum(dim=0) if x.per_row else terms.sum()
