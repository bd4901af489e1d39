"""The engines: four ways to solve one Problem, and the choice between them.

    reference        eager, plain torch, the specification                        reference.py
    torch            chunks of tokens, plain torch, any device                    chunked.py, torch_rows.py
    triton_chunked   chunks of tokens, Triton row kernels, the vendor's GEMM      chunked.py, triton_rows.py
    triton_tiled     logits in registers only, slabs of the vocabulary            triton_tiled.py

Autograd differentiates `reference`; the others run behind the operators in `operators.py`. With a slice of the
vocabulary on each process, chunks go through `vocab_parallel.py`.

`engine="auto"`, in this order:

    not a GPU                                                                      torch
    float64                                                                        torch
    a divergence without kernels                                                   torch
    the scratch budget holds fewer than MIN_TOKENS tokens of logits                triton_tiled
    else                                                                           triton_chunked
    if that cannot run: Triton not installed, no block sizes for the GPU           torch

The chunked engine takes 6u operations and the tiled one 8u, so the former is preferred if its matrix products get
enough rows; the default budget is large enough for that (1024 to 1536 tokens). This order follows from operation counts
(docs/performance.md), not yet from measurements.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops.planning import InputGradient, bytes_per_token, chunk_tokens
from kdfast.ops.problem import Problem

NAMES = ("auto", "reference", "torch", "triton_chunked", "triton_tiled")

MIN_TOKENS = 256  # twice as many rows make two row blocks of a 16-bit product's tiles; fewer leave a GPU idle


class EngineChoice(NamedTuple):
    engine: str
    tokens: int | None  # per chunk; None if the engine does not work in chunks of tokens
    why: str


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the loss, () or (N,), and detached statistics (6, N) of `problem` from its engine."""
    if problem.engine == "reference":
        from kdfast.engines import reference

        return reference.run(problem)
    from kdfast.engines import operators

    return operators.run(problem)


def unavailable(engine: str, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Return why `engine` cannot run on `device` with operands of `dtypes`, and what to do; None if it can."""
    if not engine.startswith("triton"):
        return None
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed; install it (Linux), or use engine='torch'"
    from kdfast.kernels import block_sizes

    if engine == "triton_tiled" and torch.float64 in dtypes and not block_sizes.MULTIPLIES_FLOAT64:
        return "multiplies float64 with Triton 3.5 or newer, and this is older; use engine='triton_chunked' or 'torch'"
    if device.type == "cpu" and not block_sizes.interpreting():
        return (
            "needs a GPU and the tensors are on cpu; use engine='torch' (or, to test the kernels, set "
            "TRITON_INTERPRET=1 before kdfast is imported: slow)"
        )
    if device.type not in ("cpu", "cuda"):
        return f"needs a CUDA or ROCm GPU and the tensors are on {device.type}; use engine='torch'"
    if block_sizes.known_architecture(device) is None:
        return (
            f"has no block sizes for {block_sizes.architecture(device)}; expected one of "
            f"{', '.join(block_sizes.ARCHITECTURES)} or a newer relative. Use engine='torch'"
        )
    return None


# a graph need not hold it, since it depends only on what is installed. torch.compiler.assume_constant_result does the
# same, but would import the compiler along with the library
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(engine: str, device: torch.device, dtype: torch.dtype, **sizes: Any) -> str:
    """Return `engine`, or what "auto" stands for, with sizes as in `choose`. An explicit choice is never replaced."""
    return choose(device, dtype, **sizes).engine if engine == "auto" else engine


def choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    vocab: int,
    teacher: bool = True,
    scratch_bytes: int = 0,
    buffers: int = 1,
    dx: InputGradient | None = None,
    kernels: bool = True,
    anywhere: bool = False,
) -> EngineChoice:
    """Return the engine that "auto" runs for heads of `dtype`: torch if the preferred engine cannot run here.

    teacher: has logits; buffers: chunks whose logits exist at a time; dx: affects the size of the chunks, not the
    choice; kernels: the divergence has them; anywhere: assume that every engine can run, even without such a device."""
    per_token = bytes_per_token(device, dtype, vocab, sides=1 + teacher, buffers=buffers)
    fits = chunk_tokens(tokens, per_token, device, scratch_bytes)
    chunk = chunk_tokens(tokens, per_token, device, scratch_bytes, dx) if dx else fits
    if device.type != "cuda":
        return EngineChoice("torch", chunk, f"Triton needs a GPU; this is {device.type}")
    if dtype == torch.float64:
        return EngineChoice("torch", chunk, "float64")
    if not kernels:
        return EngineChoice("torch", chunk, "the divergence has no kernel")
    choice = EngineChoice("triton_chunked", chunk, "6u operations against the tiled engine's 8u")
    if fits < min(MIN_TOKENS, tokens):
        choice = EngineChoice("triton_tiled", None, f"the scratch budget holds the logits of {fits} tokens only")
    obstacle = None if anywhere else unavailable(choice.engine, device)
    return choice if obstacle is None else EngineChoice("torch", chunk, f"{choice.engine} {obstacle}")
