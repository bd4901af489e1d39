"""Live bytes of eager PyTorch and of our engines by phase, and from these the peak, total, largest N and scratch.

A formula returns {phase: bytes}, not counting inputs but counting the resulting gradients; the highest phase is the
peak. In comments L = N·V·s, W = V·Hs·s, A = N·Hs·s for inputs of s bytes, m is the tokens of a chunk, and w the bytes
of fp32 (fp64). tests/plan checks every formula against what the same code allocates.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Literal

import torch

from kdfast.engines import choose
from kdfast.engines.torch_rows import CPU_BLOCK
from kdfast.ops import matmul, planning
from kdfast.ops.planning import InputGradient, bytes_per_token, chunk_tokens, multiprocessors, row_stride

Phases = dict[str, int]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TILE = 128  # a slab's width is rounded up to a multiple of at most this (kdfast.kernels.block_sizes)
ROW = 60  # bytes per token: coefficients, statistics, masks, labels
ROW_WORK = {True: 6, False: 2}  # planes that the torch engine's rows need: p, q, g, f, ∂f/∂p, ∂f/∂q; or log q, q


@dataclass(frozen=True)
class Shape:
    """The sizes of one forward and backward of the loss. Raises ValueError naming the field.

    teacher: "projected" goes through the student's head, with gradients to hidden states, W and the projector (no
    bias); "head" has its own, with gradients to the student's hidden states and W; "none" is cross entropy alone.
    """

    tokens: int  # N
    vocab: int  # V
    student_width: int  # Hs
    teacher_width: int  # Ht; not used without a teacher
    dtype: torch.dtype = torch.bfloat16  # dtype of hidden states and weights of both models
    device: Literal["cuda", "cpu"] = "cuda"
    teacher: Literal["projected", "head", "none"] = "projected"
    scratch_bytes: int = 0  # as in fused_kd_loss; 0 = KDFAST_SCRATCH_BYTES or the engine's default

    def __post_init__(self) -> None:
        positive = ("tokens", "vocab", "student_width", "teacher_width")[: 3 if self.teacher == "none" else 4]
        expected = {name: (getattr(self, name) > 0, "a positive number") for name in positive} | {
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(map(str, DTYPES))}"),
            "device": (self.device in ("cuda", "cpu"), "'cuda' (any GPU) or 'cpu'"),
            "teacher": (self.teacher in ("projected", "head", "none"), "'projected', 'head' or 'none'"),
            "scratch_bytes": (self.scratch_bytes >= 0, "bytes, or 0 for the engine's default"),
        }
        for name, (right, expectation) in expected.items():
            if not right:
                raise ValueError(f"Shape: {name}={getattr(self, name)!r}; expected {expectation}")

    @property
    def sides(self) -> int:
        """Return the number of sides with logits: 2, or 1 without a teacher."""
        return 1 if self.teacher == "none" else 2

    @property
    def wide(self) -> int:
        """Return the bytes of an accumulated number in our engines: 4, or 8 for float64."""
        return max(4, self.dtype.itemsize)

    @property
    def logits(self) -> int:
        """Return the bytes of one side's logits (N, V) in the inputs' dtype."""
        return self.tokens * self.vocab * self.dtype.itemsize

    @property
    def hidden(self) -> int:
        """Return the bytes of the student's hidden states (N, Hs)."""
        return self.tokens * self.student_width * self.dtype.itemsize

    @property
    def weight(self) -> int:
        """Return the bytes of W (V, Hs)."""
        return self.vocab * self.student_width * self.dtype.itemsize

    @property
    def projector(self) -> int:
        """Return the bytes of P (Hs, Ht), or 0 without a projector."""
        return self.student_width * self.teacher_width * self.dtype.itemsize if self.teacher == "projected" else 0

    @property
    def input_gradient(self) -> InputGradient:
        """Return the size of dX per token, which a GPU's chunk size depends on."""
        rows = 1 + (self.teacher == "projected")
        return InputGradient(rows, self.student_width, multiprocessors(torch.device(self.device)))

    @property
    def inputs(self) -> int:
        """Return the bytes of hidden states, W, P or the teacher's W, and labels."""
        rows = {"none": 0, "projected": self.tokens, "head": self.tokens + self.vocab}[self.teacher]
        teacher = rows * self.teacher_width * self.dtype.itemsize
        return self.gradients + teacher + 8 * self.tokens

    @property
    def gradients(self) -> int:
        """Return the bytes of the resulting gradients."""
        return self.hidden + self.weight + self.projector


def eager(x: Shape) -> Phases:
    """Count eager PyTorch with logits widened to fp32, in a function that keeps no name for them past the forward."""
    L, W, A = x.logits, x.weight, x.hidden
    F = x.tokens * x.vocab * x.wide  # log-softmax and what follows
    if x.teacher == "none":
        # log_softmax, its gradient, the logits' gradient
        return {"logits": 3 * F, "products": L + W + A}
    # logits and log_softmax of two sides; p, log p − log q and their product
    forward = 2 * L + 5 * F
    if x.teacher == "head":
        return {"logits": forward, "products": L + W + A}
    return {
        "logits": forward + A,  # the projected hidden states
        "products": L + 2 * F + 2 * A + W,  # dW from the teacher's logits, while the student's wait
        "student": L + 2 * W + 2 * A + x.projector,  # dW from the student's
        "sum": 3 * W + 2 * A + x.projector,  # autograd adds the two out of place
    }


def chunk_of(x: Shape, engine: str) -> int:
    """Return the number of tokens per chunk."""
    device = torch.device(x.device)
    per_token = bytes_per_token(device, x.dtype, x.vocab, sides=x.sides, engine=engine)
    return chunk_tokens(x.tokens, per_token, device, x.scratch_bytes, x.input_gradient)


def chunked(x: Shape, engine: str) -> Phases | None:
    """Count the buffers of the chunked engines, "torch" or (on a GPU only) "triton_chunked"."""
    cpu = x.device == "cpu"
    if cpu and engine == "triton_chunked":
        return None
    device, w, s = torch.device(x.device), x.wide, x.dtype.itemsize
    m, V, Hs = chunk_of(x, engine), x.vocab, x.student_width
    projected = x.teacher == "projected"
    pairs = 1 + projected  # rows of the student's head per token
    gradient = matmul.gradient_dtype(x.dtype, device).itemsize
    A, W = x.tokens * Hs * w, V * Hs * w
    # from the first chunk on: dX, dW and the projected rows' gradient in fp32, and the projected rows
    rows_of_teacher = projected * x.hidden
    if projected and cpu and engine == "torch" and s == 2:  # the projector's input and output are fp32
        rows_of_teacher = A + x.tokens * x.teacher_width * w
    always = pairs * A + W + rows_of_teacher + ROW * x.tokens
    # fp32 logits, which fp32 gradients overwrite
    planes = x.sides * m * row_stride(V, device, engine) * (w + (gradient if gradient != w else 0))
    stacked = pairs * m * Hs  # numbers in [h_s; h_p] of a chunk
    blocks = 0
    if engine == "torch":
        rows = min(m, max(1, CPU_BLOCK // V)) if cpu else m
        at_once = min(torch.get_num_threads(), -(-m // rows)) if cpu else 1
        blocks = ROW_WORK[x.sides == 2] * at_once * rows * V * w
    widened = 0  # 16-bit operands on a CPU are widened one block of the vocabulary at a time
    if cpu and s == 2:
        width = max(Hs, x.teacher_width if x.teacher == "head" else 0)
        widened = min(V, matmul.VOCAB_BLOCK) * width * w + stacked * w
    rounded = pairs * m * (V + Hs) * 2 if cpu and x.dtype == torch.bfloat16 else 0  # G in bf16, and dX
    taken = 0 if cpu and not projected else stacked * s  # a CPU reads one side's rows in place
    phases = {
        "rows": always + planes + blocks + taken,
        "widened": always + planes + taken + widened,
        "input gradient": always + planes + taken + stacked * w + rounded,
    }
    if not (cpu and s == w):  # in full precision on a CPU, saved gradients become the leaves' without a copy
        # a CPU rounds through an fp32 temporary
        phases["finish"] = always - ROW * x.tokens + pairs * x.hidden + x.weight + cpu * max(W, A)
    return phases


def tiled(x: Shape) -> Phases | None:
    """Count the tiled engine's slab of gradients and its statistics; it has no logits."""
    if x.device == "cpu":
        return None
    s, w, V, Hs = x.dtype.itemsize, x.wide, x.vocab, x.student_width
    projected = x.teacher == "projected"
    pairs = 1 + projected
    A, wide = x.hidden, x.tokens * Hs * w  # in the inputs' dtype, in fp32
    rounded = x.dtype == torch.bfloat16  # dW, slab by slab
    dW = V * Hs * (s if rounded else w)
    width = slab_width(x)
    always = pairs * wide + dW + projected * A + 2 * ROW * x.tokens
    planes = pairs * x.tokens * width * s
    stacked = pairs * A
    return {
        # a slab's gradients; both sides' rows, stacked; both sides' dX in fp32; the slab's dW before rounding
        "slab": always + planes + stacked + pairs * wide + rounded * min(width, V) * Hs * w,
        "finish": always + stacked + x.weight,
    }


def slab_width(x: Shape) -> int:
    """Return how many entries of the vocabulary the tiled engine handles at a time."""
    gradients = x.tokens * (2 if x.teacher == "projected" else 1) * x.dtype.itemsize
    return planning.slab_width(x.vocab, gradients + x.student_width * x.wide, TILE, x.scratch_bytes)


Formula = Callable[[Shape], Phases | None]
METHODS: dict[str, Formula] = {
    "eager": eager,
    "torch": partial(chunked, engine="torch"),
    "triton_chunked": partial(chunked, engine="triton_chunked"),
    "triton_tiled": tiled,
}


def peak_bytes(method: str, shape: Shape) -> int | None:
    """Return the peak memory in bytes of one forward and backward of `shape`, beyond inputs and resulting gradients.

    Assumes forward KL (or the cross entropy alone) and gradients that start as None; counts what PyTorch allocates.
    None if `method` does not support the device. Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}; expected one of {', '.join(METHODS)}")
    return highest(METHODS[method], shape)


def highest(formula: Formula, shape: Shape) -> int | None:
    """Return the bytes of the highest phase, less the resulting gradients; None if there are no phases."""
    phases = formula(shape)
    return None if phases is None else max(0, max(phases.values()) - shape.gradients)


def total_bytes(method: str, shape: Shape) -> int | None:
    """Return the bytes of inputs, gradients and the peak above them for `shape`; `method` is as in `peak_bytes`."""
    peak = peak_bytes(method, shape)
    return None if peak is None else shape.inputs + shape.gradients + peak


def largest_tokens(method: str, shape: Shape, available_bytes: int) -> int:
    """Return the largest number of tokens for which inputs, gradients and peak fit into available_bytes, or 0.

    `shape` gives everything but the tokens; `method` is as in `peak_bytes`. Memory is not monotonic in the tokens
    (chunks have equal sizes; a tiled engine's slab is wider for fewer tokens), so this finds the largest power of two
    that fits, then bisects above it.
    """

    def needed(tokens: int) -> int:
        total = total_bytes(method, replace(shape, tokens=tokens))
        return available_bytes + 1 if total is None else total

    most = max(0, available_bytes) // (shape.student_width * shape.dtype.itemsize)  # their hidden states alone fit
    powers = (1 << power for power in range(most.bit_length(), -1, -1))
    few = next((tokens for tokens in powers if needed(tokens) <= available_bytes), 0)
    return few + bisect_right(range(few + 1, 2 * few), available_bytes, key=needed)


@dataclass(frozen=True)
class Portion:
    """How an engine divides its work."""

    engine: str
    scratch_bytes: int  # 0 = the engine's default
    passes: int  # number of chunks (each reads and writes dW) or slabs (each reads and writes dX)
    total_bytes: int  # including inputs and gradients


def portion(shape: Shape) -> Portion:
    """Return how the engine that `auto` chooses divides the work, on a GPU whose block sizes are known."""
    choice = choose(
        torch.device(shape.device),
        shape.dtype,
        tokens=shape.tokens,
        vocab=shape.vocab,
        teacher=shape.sides == 2,
        scratch_bytes=shape.scratch_bytes,
        dx=shape.input_gradient,
        anywhere=True,
    )
    passes = shape.vocab / slab_width(shape) if choice.tokens is None else shape.tokens / choice.tokens
    total = total_bytes(choice.engine, shape)
    assert total is not None
    return Portion(choice.engine, shape.scratch_bytes, ceil(passes), total)


def fitting_portion(shape: Shape, available_bytes: float) -> Portion | None:
    """Return the first portion that fits, starting from the shape's own scratch and halving it; None if none fits.

    `auto` switches to triton_tiled when the scratch holds fewer than 256 tokens of logits."""
    per_token = bytes_per_token(torch.device(shape.device), shape.dtype, shape.vocab, sides=shape.sides)
    tokens, found = chunk_of(shape, "auto"), portion(shape)
    while found.total_bytes > available_bytes and tokens > 1:
        tokens //= 2
        found = portion(replace(shape, scratch_bytes=tokens * per_token))
    return found if found.total_bytes <= available_bytes else None
