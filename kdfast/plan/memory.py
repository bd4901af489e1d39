"""Live bytes of eager PyTorch and of our engines, phase by phase, and what follows: peak, total, largest N.

A formula returns {phase: bytes} above the inputs, with the gradients that stay; the highest phase counts. Comments
say L = N·V·s, W = V·Hs·s, A = N·Hs·s for s bytes of the inputs' dtype, m tokens of a chunk, w bytes of fp32 (fp64).
tests/plan holds every formula against what the same code allocates.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from kdfast.engines.torch_rows import CPU_BLOCK
from kdfast.ops import matmul, planning
from kdfast.ops.planning import bytes_per_token, chunk_tokens, row_stride
from kdfast.plan.shape import Shape

Phases = dict[str, int]
Formula = Callable[[Shape], Phases | None]

TILE = 128  # entries that a slab's width is rounded up to, at most (kdfast.kernels.block_sizes)
ROW = 60  # bytes per token: coefficients, statistics, masks, labels
ROW_WORK = {True: 6, False: 2}  # planes that plain torch's row work holds: p, q, g, f, ∂f/∂p, ∂f/∂q; or log q, q


def peak_bytes(method: str, shape: Shape) -> int | None:
    """Return the highest live bytes of one forward and backward of `shape`, above inputs and gradients that stay.

    Gradients start as None; forward KL (or the cross entropy alone); PyTorch's own allocations.
    None: `method` does not do this teacher, dtype or device. Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}; expected one of {', '.join(METHODS)}")
    return highest(METHODS[method], shape)


def highest(formula: Formula, shape: Shape) -> int | None:
    """Return the bytes of the highest phase, less the gradients that stay; None where there are no phases."""
    phases = formula(shape)
    return None if phases is None else max(0, max(phases.values()) - shape.gradients)


def total_bytes(method: str, shape: Shape) -> int | None:
    """Return the bytes of inputs and gradients of `shape` and of the peak above them; `method` as in `peak_bytes`."""
    peak = peak_bytes(method, shape)
    return None if peak is None else shape.inputs + shape.gradients + peak


def largest_tokens(method: str, shape: Shape, available_bytes: int, *, bytes_per_token: int = 0) -> int:
    """Return the most tokens for which inputs, gradients and peak of `shape` fit into available_bytes; 0 where none do.

    bytes_per_token: of what else grows with the tokens, such as activations kept for backward. `method` is as in
    `peak_bytes`. Memory does not grow with every token (chunks are of equal size; a tiled engine's slab is wider for
    fewer tokens): the answer is the largest power of two that fits, and what a bisection finds above it.
    """

    def needed(tokens: int) -> int:
        total = total_bytes(method, replace(shape, tokens=tokens))
        return available_bytes + 1 if total is None else total + tokens * bytes_per_token

    most = max(0, available_bytes) // (shape.student_width * shape.dtype.itemsize)  # whose hidden states alone fit
    powers = (1 << power for power in range(most.bit_length(), -1, -1))
    few = next((tokens for tokens in powers if needed(tokens) <= available_bytes), 0)
    return few + bisect_right(range(few + 1, 2 * few), available_bytes, key=needed)


def eager(x: Shape) -> Phases:
    """Count logits widened to fp32, in a function whose names for them are gone before the backward."""
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
        "products": L + 2 * F + 2 * A + W,  # dW by the teacher's logits, while the student's wait
        "student": L + 2 * W + 2 * A + x.projector,  # dW by the student's
        "sum": 3 * W + 2 * A + x.projector,  # autograd adds them up out of place
    }


def chunk_of(x: Shape, engine: str) -> int:
    """Return the tokens of a chunk."""
    device = torch.device(x.device)
    per_token = bytes_per_token(device, x.dtype, x.vocab, sides=x.sides, engine=engine)
    return chunk_tokens(x.tokens, per_token, device, x.scratch_bytes)


def chunked(x: Shape, engine: str) -> Phases | None:
    """Count the chunked engines' buffers: "torch" or "triton_chunked", the latter on a GPU only."""
    cpu = x.device == "cpu"
    if cpu and engine == "triton_chunked":
        return None
    device, w, s = torch.device(x.device), x.wide, x.dtype.itemsize
    m, V, Hs = chunk_of(x, engine), x.vocab, x.student_width
    projected = x.teacher == "projected"
    pairs = 1 + projected  # rows of the student's head per token
    gradient = matmul.gradient_dtype(x.dtype, device).itemsize
    A, W = x.tokens * Hs * w, V * Hs * w
    # dX, dW and the projected rows' gradient in fp32 from the first chunk on, and the projected rows
    always = pairs * A + W + projected * x.hidden + ROW * x.tokens
    # fp32 logits; fp32 gradients overwrite them
    planes = x.sides * m * row_stride(V, device, engine) * (w + (gradient if gradient != w else 0))
    stacked = pairs * m * Hs  # numbers in [h_s; h_p] of a chunk
    blocks = 0
    if engine == "torch":
        rows = min(m, max(1, CPU_BLOCK // V)) if cpu else m
        blocks = ROW_WORK[x.sides == 2] * rows * V * w
    widened = 0  # 16-bit operands on a CPU, a block of the vocabulary at a time
    if cpu and x.narrow:
        width = max(Hs, x.teacher_width if x.teacher == "head" else 0)
        widened = min(V, matmul.VOCAB_BLOCK) * width * w + stacked * w
    rounded = pairs * m * V * 2 if cpu and x.dtype == torch.bfloat16 else 0  # G in bf16, for dX
    taken = 0 if cpu and not projected else stacked * s  # a CPU reads one side's rows where they are
    phases = {
        "rows": always + planes + blocks + taken,
        "widened": always + planes + taken + widened,
        "input gradient": always + planes + taken + stacked * w + rounded,
    }
    if not (cpu and s == w):  # saved gradients become the leaves': on a CPU in full precision they are
        # a CPU rounds through a temporary in fp32
        phases["finish"] = always - ROW * x.tokens + pairs * x.hidden + x.weight + cpu * max(W, A)
    return phases


def tiled(x: Shape) -> Phases | None:
    """Count a slab of gradients and statistics; no logits."""
    if x.device == "cpu":
        return None
    s, w, V, Hs = x.dtype.itemsize, x.wide, x.vocab, x.student_width
    projected = x.teacher == "projected"
    pairs = 1 + projected
    A, wide = x.hidden, x.tokens * Hs * w  # in the inputs' dtype, in fp32
    dW = V * Hs * (s if x.dtype == torch.bfloat16 else w)
    width = slab_width(x)
    always = pairs * wide + dW + projected * A + 2 * ROW * x.tokens
    planes = pairs * x.tokens * width * s
    stacked = pairs * A
    return {
        # gradients of a slab; rows of both sides, in one piece; dX of both in fp32; dW of the slab before it is rounded
        "slab": always + planes + stacked + pairs * wide + min(width, V) * Hs * w,
        # for 16-bit gradients [h_s − mix·h_p; h_p] is made, in fp32
        "stack": always + planes + (stacked + 3 * wide if projected and x.narrow else 2 * stacked),
        "finish": always + stacked + x.weight,
    }


def slab_width(x: Shape) -> int:
    """Return the entries of the vocabulary that the tiled engine takes at a time."""
    gradients = x.tokens * (2 if x.teacher == "projected" else 1) * x.dtype.itemsize
    return planning.slab_width(x.vocab, gradients + x.student_width * x.wide, TILE, x.scratch_bytes)


METHODS: dict[str, Formula] = {
    "eager": eager,
    "torch": partial(chunked, engine="torch"),
    "triton_chunked": partial(chunked, engine="triton_chunked"),
    "triton_tiled": tiled,
}
