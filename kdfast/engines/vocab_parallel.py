"""The chunk loop under vocabulary parallelism: every process has a slice of the vocabulary and takes the same chunks.

A softmax over the whole vocabulary needs something of every slice. For each chunk, on each process:

    logits       of its slice                                            one product
    fold         fifteen to thirty-one numbers a row                     → gathered                    collective 1
    merge        the rows' log-sum-exps, losses, statistics              from all processes' numbers, alike on all
    terms        where a divergence needs a second pass (all but KLs)    → gathered                    collective 2
    gradients    of the logits of its slice; dW of its slice             two products
    dX           what its slice contributes                              → summed over the processes   collective 3

    so for k chunks, forward and backward together:
    forward or reverse KL, a sparse teacher, or none    k gathers, k sums
    another divergence                                  2k gathers, k sums
    without gradients of hidden states                  no sums

No collective is waited for where it starts: while the numbers of a chunk are on their way, the one before has its
gradients and products taken; while the terms are, and the sums of dX, the next chunk's logits. That takes two chunks'
logits at a time, in half the chunk each.

A row is R·15·4 bytes gathered (with K more numbers for a sparse teacher's entries) and 2·H·4 of each side's dX summed;
its logits in the slices of all would be 2·V·4. docs/scaling.md counts them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from kdfast.engines.row_work import Buffers
from kdfast.ops import collectives
from kdfast.ops.collectives import Pending
from kdfast.ops.planning import Wanted
from kdfast.ops.problem import Problem

if TYPE_CHECKING:
    from kdfast.engines.chunked import Chunk, Loop


class SlicedWork(Protocol):
    """The row work in phases. rows: of x; z_s, z_t (r, V) raw products, which `fold` may turn into logits in place."""

    second_pass: bool

    def __init__(self, x: Problem, *, scale: Tensor, wanted: Wanted, stats: Tensor) -> None: ...

    def fold(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> Tensor:
        """(numbers, r): what the others must know of this slice."""

    def merge(self, rows: slice, states: Tensor) -> Any:
        """states (R, numbers, r) → what gradients need to know of the rows; fills `stats[:, rows]`."""

    def terms(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Any) -> Tensor:
        """The second pass: (numbers, r)."""

    def merge_terms(self, rows: slice, terms: Tensor, constants: Any) -> Any: ...

    def gradients(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Any, out: Buffers) -> None: ...


class _Waiting(NamedTuple):
    """A chunk that is short of its gradients."""

    chunk: Chunk
    constants: Any
    terms: Pending | None


def run(loop: Loop) -> None:
    work, group = loop.work, loop.x.group
    waiting: _Waiting | None = None
    sums: list[tuple[slice, Pending]] = []  # dX under way
    for i, rows in enumerate(loop.chunks()):
        chunk = loop.logits(rows, i % 2)
        states = collectives.gather(work.fold(rows, chunk.z_s, chunk.z_t), group)
        _finish(loop, waiting, sums)
        constants = work.merge(rows, states.wait())
        terms: Pending | None = None
        if work.second_pass:
            terms = collectives.gather(work.terms(rows, chunk.z_s, chunk.z_t, constants), group)
        waiting = _Waiting(chunk, constants, terms)
    _finish(loop, waiting, sums)
    for rows, d_inputs in sums:
        loop.store(rows, d_inputs.wait())


def _finish(loop: Loop, waiting: _Waiting | None, sums: list[tuple[slice, Pending]]) -> None:
    """The gradients of a chunk; stores dX of the one before it."""
    if waiting is None:
        return
    work, chunk, constants = loop.work, waiting.chunk, waiting.constants
    if waiting.terms is not None:
        constants = work.merge_terms(chunk.rows, waiting.terms.wait(), constants)
    if not any(loop.plan.wanted):
        return
    work.gradients(chunk.rows, chunk.z_s, chunk.z_t, constants, loop.buffers(chunk))
    loop.weight_gradient(chunk)
    d_inputs = loop.input_gradients(chunk)
    while sums:
        rows, pending = sums.pop()
        loop.store(rows, pending.wait())
    if d_inputs is not None:
        sums.append((chunk.rows, collectives.add_up(d_inputs, loop.x.group)))
