"""What `engine="auto"` takes for a shape, and what scratch to give it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch

from kdfast.engines import MIN_TOKENS, preferred
from kdfast.ops.planning import SLAB_SCRATCH, bytes_per_token
from kdfast.plan.memory import total_bytes
from kdfast.plan.ours import chunk_of, slab_width
from kdfast.plan.shape import Shape


@dataclass(frozen=True)
class Portion:
    """How an engine divides its work."""

    engine: str
    scratch_bytes: int  # 0 = the engine's default
    passes: int  # chunks, each of which reads and writes dW; slabs, each of which reads and writes dX
    total_bytes: int  # with inputs and gradients


def portion(shape: Shape) -> Portion:
    """Of the engine that `auto` takes with the shape's scratch, on a GPU that Triton has block sizes for."""
    sizes = {"tokens": shape.tokens, "vocab": shape.vocab, "teacher": shape.teacher != "none"}
    choice = preferred(torch.device(shape.device), shape.dtype, **sizes, scratch_bytes=shape.scratch_bytes)
    if choice.tokens is None:
        passes = ceil(shape.vocab / slab_width(shape))
    else:
        passes = ceil(shape.tokens / choice.tokens)
    total = total_bytes(choice.engine, shape)
    assert total is not None
    return Portion(choice.engine, shape.scratch_bytes, passes, total)


def fitting_portion(shape: Shape, available_bytes: int) -> Portion | None:
    """The one with the fewest passes that fits, from the shape's own scratch downwards; None where none does.

    `auto` turns to triton_tiled by itself where the scratch holds fewer than 256 tokens of logits."""
    candidates = [portion(shape)]
    if candidates[0].engine == "triton_chunked":
        tokens = chunk_of(shape, "triton_chunked")
        while tokens > MIN_TOKENS:
            tokens = max(MIN_TOKENS, tokens // 2)
            candidates.append(portion(replace(shape, scratch_bytes=tokens * _per_token(shape))))
    if shape.device == "cuda" and shape.dtype != torch.float64:
        scratch = min(SLAB_SCRATCH, least_scratch(shape) - 1)
        candidates += [portion(replace(shape, scratch_bytes=scratch >> power)) for power in range(6)]
    else:
        scratch = _per_token(shape) * chunk_of(shape, "torch")
        candidates += [portion(replace(shape, scratch_bytes=scratch >> power)) for power in range(1, 10)]
    return next((found for found in candidates if found.total_bytes <= available_bytes), None)


def larger_portions(shape: Shape, available_bytes: int) -> list[Portion]:
    """With twice the scratch, four times and so on, as long as it fits and saves passes."""
    known = [portion(shape)]
    tokens = chunk_of(shape, "auto")
    while known[-1].passes > 1 and tokens < shape.tokens:
        tokens = min(shape.tokens, 2 * tokens)
        found = portion(replace(shape, scratch_bytes=tokens * _per_token(shape)))
        if found.total_bytes > available_bytes or found.engine != known[0].engine:
            break
        known.append(found)
    return known[1:]


def least_scratch(shape: Shape) -> int:
    """Bytes below which `auto` leaves triton_chunked."""
    return min(MIN_TOKENS, shape.tokens) * _per_token(shape)


def _per_token(shape: Shape) -> int:
    device = torch.device(shape.device)
    return bytes_per_token(device, shape.dtype, shape.vocab, sides=1 if shape.teacher == "none" else 2)
