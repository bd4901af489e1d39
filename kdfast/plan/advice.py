"""What `engine="auto"` takes for a shape, and what scratch to give it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from math import ceil

import torch

from kdfast.engines import preferred
from kdfast.ops.planning import bytes_per_token
from kdfast.plan.memory import chunk_of, slab_width, total_bytes
from kdfast.plan.shape import Shape


@dataclass(frozen=True)
class Portion:
    """How an engine divides its work."""

    engine: str
    scratch_bytes: int  # 0 = the engine's default
    passes: int  # chunks, each of which reads and writes dW; slabs, each of which reads and writes dX
    total_bytes: int  # with inputs and gradients


def portion(shape: Shape) -> Portion:
    """Return that of the engine `auto` takes with the shape's scratch, on a GPU that Triton has block sizes for."""
    sizes = {"tokens": shape.tokens, "vocab": shape.vocab, "teacher": shape.sides == 2}
    choice = preferred(torch.device(shape.device), shape.dtype, **sizes, scratch_bytes=shape.scratch_bytes)
    passes = shape.vocab / slab_width(shape) if choice.tokens is None else shape.tokens / choice.tokens
    total = total_bytes(choice.engine, shape)
    assert total is not None
    return Portion(choice.engine, shape.scratch_bytes, ceil(passes), total)


def fitting_portion(shape: Shape, available_bytes: int) -> Portion | None:
    """Return the portion with the fewest passes that fits, from the shape's own scratch downwards; None if none fits.

    `auto` turns to triton_tiled by itself where the scratch holds fewer than 256 tokens of logits."""
    candidates = [portion(shape), *_portions(shape, 0.5)]
    return next((found for found in candidates if found.total_bytes <= available_bytes), None)


def larger_portions(shape: Shape, available_bytes: int) -> list[Portion]:
    """Return those with twice the scratch, four times and so on, as long as they fit and save passes."""
    now = portion(shape)
    larger = _portions(shape, 2) if now.passes > 1 else iter(())
    return [*takewhile(lambda found: found.engine == now.engine and found.total_bytes <= available_bytes, larger)]


def _portions(shape: Shape, factor: float) -> Iterator[Portion]:
    """Yield portions whose scratch holds `factor` times the tokens of the one before, to one token or all."""
    device = torch.device(shape.device)
    per_token = bytes_per_token(device, shape.dtype, shape.vocab, sides=shape.sides)
    tokens = chunk_of(shape, "auto")
    while 1 < tokens < shape.tokens or (factor < 1 < tokens):
        tokens = min(shape.tokens, int(factor * tokens))
        yield portion(replace(shape, scratch_bytes=tokens * per_token))
