"""Predicted peak memory of every method: one formula each, in `kdfast.plan.ours` and `kdfast.plan.peers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kdfast.plan import ours, peers
from kdfast.plan.resident import beyond_allocations
from kdfast.plan.shape import Shape


@dataclass(frozen=True)
class Method:
    label: str
    phases: Callable[[Shape], ours.Phases | None]
    how: str  # where the formula comes from
    estimate: bool = False  # not held against anything that ran


TRACKED = "held against the bytes it allocates: on a CPU all of them, on a GPU the results of operators"
METHODS: dict[str, Method] = {
    "eager": Method("eager", ours.eager, TRACKED),
    "eager_compiled": Method(
        "eager, torch.compile",
        ours.eager_compiled,
        "an estimate, fitted to a CPU's resident set: logits and their gradients, everything between fused away",
        estimate=True,
    ),
    "reference": Method("kdfast reference", ours.reference, TRACKED),
    "torch": Method("kdfast torch", ours.torch_engine, TRACKED),
    "triton_chunked": Method("kdfast triton_chunked", ours.triton_chunked, TRACKED),
    "triton_tiled": Method("kdfast triton_tiled", ours.triton_tiled, TRACKED),
    "trl": Method("TRL ChunkedDivergence", peers.trl, TRACKED),
    "liger_chunked": Method("Liger chunked JSD", peers.liger_chunked, f"{TRACKED}; not compiled"),
    "liger_triton_jsd": Method("Liger Triton JSD", peers.liger_triton_jsd, TRACKED),
    "torchtune": Method(
        "torchtune chunked KL",
        peers.torchtune,
        f"{TRACKED}; a CPU's resident set was up to 2.5 times this (docs/planning.md)",
    ),
    "fla": Method("fla fused_kl_div", peers.fla, TRACKED),
    "linear_cross_entropy": Method(
        "torch linear_cross_entropy", peers.linear_cross_entropy, "held against it on a CPU; a GPU's derived from 2.13"
    ),
    "cce": Method("Apple CCE", peers.cce, "derived from the source of 25.1.1", estimate=True),
}


def peak_bytes(method: str, shape: Shape) -> int | None:
    """Highest live bytes of one forward and backward of `shape`, above its inputs and the gradients that stay.

    Gradients start as None; forward KL (or the cross entropy alone); on a GPU the caching allocator's count, on a CPU
    the resident set. None: the method is not for this teacher, dtype or device. Raises ValueError: unknown method.
    """
    live = live_bytes(method, shape)
    return None if live is None else live + beyond_allocations(method, shape)


def live_bytes(method: str, shape: Shape) -> int | None:
    """As `peak_bytes`, of PyTorch's own allocations alone."""
    phases = _method(method).phases(shape)
    return None if phases is None else max(0, max(phases.values()) - shape.gradients)


def total_bytes(method: str, shape: Shape) -> int | None:
    """Bytes of inputs and gradients of `shape` and of the peak above them; `method` and None as in `peak_bytes`."""
    peak = peak_bytes(method, shape)
    return None if peak is None else shape.inputs + shape.gradients + peak


def largest_tokens(method: str, shape: Shape, available_bytes: int, *, bytes_per_token: int = 0) -> int:
    """The most tokens for which inputs, gradients and peak of `shape` fit into available_bytes; 0 where not one does,
    or the method is not for this.

    bytes_per_token: of what else grows with the tokens, such as activations kept for backward. Memory does not grow
    with every token (chunks are of equal size; a tiled engine's slab is the wider, the fewer tokens there are): the
    answer is the largest power of two that fits, and what a bisection finds above it.
    """

    def fits(tokens: int) -> bool:
        total = total_bytes(method, replace(shape, tokens=tokens))
        return total is not None and total + tokens * bytes_per_token <= available_bytes

    most = available_bytes // (shape.student_width * shape.dtype.itemsize)  # whose hidden states alone fit
    few = next((1 << power for power in range(max(0, most).bit_length(), -1, -1) if fits(1 << power)), 0)
    many = 2 * few
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    return few


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"method={name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]
