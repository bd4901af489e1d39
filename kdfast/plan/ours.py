"""Live bytes of eager PyTorch and of our engines, phase by phase, above the inputs; gradients that stay included.

Each function returns {phase: bytes}; the highest phase counts. In comments: m tokens of a chunk, w bytes of fp32
(fp64), s bytes of the inputs' dtype, L = N·V·s, W = V·Hs·s, A = N·Hs·s. The projected hidden states are one more A.
"""

from __future__ import annotations

import torch

from kdfast.engines.torch_rows import CPU_BLOCK
from kdfast.ops import matmul, planning
from kdfast.ops.planning import bytes_per_token, chunk_tokens, row_stride
from kdfast.plan.shape import Shape

Phases = dict[str, int]

TILE = 128  # entries a slab's width is rounded up to, at the most (kdfast.kernels.block_sizes)
ROW = 60  # bytes a token: coefficients, statistics, masks, labels
ROW_WORK = {True: 6, False: 2}  # planes that plain torch's row work holds: p, q, g, f, ∂f/∂p, ∂f/∂q; or log q, q


def eager(x: Shape) -> Phases:
    """Logits widened to fp32, in a function whose names for them are gone before the backward."""
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


def eager_compiled(x: Shape) -> Phases:
    L, W, A = x.logits, x.weight, x.hidden
    # what the compiler must keep: logits of each side. Its one backward kernel overwrites the student's with their
    # gradient; not those of a projected teacher's two sides
    if x.teacher == "none":
        return {"logits": L, "products": L + W + A}
    if x.teacher == "head":
        return {"logits": 2 * L, "products": L + W + A}
    return {"logits": 4 * L + A, "products": L + 2 * W + 2 * A, "sum": 3 * W + 2 * A + x.projector}


def reference(x: Shape) -> Phases:
    w, cast = x.wide, x.dtype.itemsize < x.wide
    L, A = x.tokens * x.vocab * w, x.tokens * x.student_width * w
    W = x.vocab * x.student_width * w  # in fp32: of W's gradient, and for 16-bit inputs of a copy that autograd keeps
    rows = ROW * x.tokens
    if x.teacher == "none":
        kept = A + cast * W + rows
        # logits, log_softmax, gradient; dW and its transpose
        return {"logits": 3 * L + kept, "products": L + W + A + kept, "transpose": 2 * W + A}
    teacher = x.tokens * x.teacher_width * x.dtype.itemsize
    middle = 9 * L + x.tokens * x.vocab + rows  # two sides' logits, scaled, log_softmax; p, masked; a mask of bytes
    if x.teacher == "head":
        kept = A + cast * W  # masked hidden states
        own = x.vocab * x.teacher_width * w
        return {
            "teacher": 2 * L + kept + cast * own + teacher,
            "logits": middle + kept + teacher,
            "products": L + A + W + kept,
            "transpose": 2 * W + A,
        }
    kept = 2 * A + 2 * cast * W  # hidden states and projected ones; W widened for each of the two products
    narrow = x.hidden * (2 if cast else 1)
    return {
        "logits": middle + kept + narrow,
        "products": 2 * L + A + W + kept,
        "transpose": (2 + cast) * W + 2 * A + L,
        "sum": 3 * W + 2 * A,
    }


def torch_engine(x: Shape) -> Phases:
    return _chunked(x, "torch")


def triton_chunked(x: Shape) -> Phases | None:
    return None if x.device == "cpu" else _chunked(x, "triton_chunked")


def chunk_of(x: Shape, engine: str) -> int:
    """Tokens of a chunk."""
    device = torch.device(x.device)
    sides = 1 if x.teacher == "none" else 2
    return chunk_tokens(
        x.tokens, bytes_per_token(device, x.dtype, x.vocab, sides=sides, engine=engine), device, x.scratch_bytes
    )


def _chunked(x: Shape, engine: str) -> Phases:
    device, w, s = torch.device(x.device), x.wide, x.dtype.itemsize
    cpu = x.device == "cpu"
    m, V, Hs = chunk_of(x, engine), x.vocab, x.student_width
    projected, sides = x.teacher == "projected", 1 if x.teacher == "none" else 2
    pairs = 2 if projected else 1  # rows of the student's head a token
    gradient = matmul.gradient_dtype(x.dtype, device).itemsize
    A, W = x.tokens * Hs * w, V * Hs * w
    # dX, dW and the projected rows' gradient in fp32 from the first chunk on, and the projected rows
    always = pairs * A + W + projected * x.hidden + ROW * x.tokens
    planes = sides * m * row_stride(V, device, engine) * w  # fp32 logits; fp32 gradients overwrite them
    if gradient != w:
        planes += sides * m * row_stride(V, device, engine) * gradient
    stacked = pairs * m * Hs  # numbers in [h_s; h_p] of a chunk
    blocks = 0
    if engine == "torch":
        rows = min(m, max(1, CPU_BLOCK // V)) if cpu else m
        blocks = ROW_WORK[sides == 2] * rows * V * w
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
        done = pairs * x.hidden + x.weight
        # a CPU rounds through a temporary in fp32
        phases["finish"] = always - ROW * x.tokens + done + cpu * max(W, A)
    return phases


def triton_tiled(x: Shape) -> Phases | None:
    if x.device == "cpu":
        return None
    s, w, V, Hs = x.dtype.itemsize, x.wide, x.vocab, x.student_width
    projected = x.teacher == "projected"
    pairs = 2 if projected else 1
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
        "finish": always + pairs * A + x.weight,
    }


def slab_width(x: Shape) -> int:
    """Entries of the vocabulary the tiled engine takes at a time."""
    gradients = x.tokens * (2 if x.teacher == "projected" else 1) * x.dtype.itemsize
    return planning.slab_width(x.vocab, gradients + x.student_width * x.wide, TILE, x.scratch_bytes)
