"""The chunk loop under vocabulary parallelism: every process has a slice of the vocabulary and takes the same chunks.

A softmax over the whole vocabulary needs something of every slice. For each chunk, on each process:

    logits       of its slice                                            one product
    update       fifteen to thirty-one numbers a row                     → gathered                    collective 1
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
logits at a time, in half the chunk solver.

A row is R·15·4 bytes gathered (with K more numbers for a sparse teacher's entries) and 2·H·4 of each side's dX summed;
its logits in the slices of all would be 2·V·4. bench/communication.py counts them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from kdfast.engines.chunk_loop import Chunk, ChunkLoop, GradientBuffers
from kdfast.ops import collectives
from kdfast.ops.collectives import Pending
from kdfast.ops.problem import Problem, Result

ROWS = {
    "torch": "kdfast.engines.torch_vocab_parallel:TorchVocabParallelRows",
    "triton_chunked": "kdfast.engines.triton_vocab_parallel:TritonVocabParallelRows",
}


class VocabParallelRows(Protocol):
    """What turns logits into gradients, in phases. rows: of the problem; z_s, z_t (r, V) raw products, which `update`
    may turn into logits in place; constants: what gradients need to know of the rows."""

    second_pass: bool

    def update(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> Tensor:
        """Return (numbers, r): what the others must know of this slice."""

    def merge(self, rows: slice, states: Tensor) -> Any:
        """Return the rows' constants from all processes' states (R, numbers, r); fill `stats[:, rows]`."""

    def terms(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Any) -> Tensor:
        """Return (numbers, r): the second pass over this slice."""

    def merge_terms(self, rows: slice, terms: Tensor, constants: Any) -> Any:
        """Return the constants, completed from all processes' second passes (R, numbers, r)."""

    def gradients(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Any, out: GradientBuffers) -> None: ...


class _Waiting(NamedTuple):
    """A chunk that is short of its gradients."""

    chunk: Chunk
    constants: Any
    terms: Pending | None


def run_chunks(x: Problem) -> Result:
    """Return loss, statistics and scaled gradients of `x`, of whose vocabulary a slice is here."""
    loop = ChunkLoop(x, ROWS)
    solver: VocabParallelRows = loop.row_solver
    waiting: _Waiting | None = None
    sums: list[tuple[slice, Pending]] = []  # dX under way
    for i, rows in enumerate(loop.chunks()):
        chunk = loop.logits(rows, i % 2)
        states = collectives.all_gather(solver.update(rows, chunk.z_s, chunk.z_t), x.group)
        _finalize(loop, waiting, sums)
        constants = solver.merge(rows, states.wait())
        terms: Pending | None = None
        if solver.second_pass:
            terms = collectives.all_gather(solver.terms(rows, chunk.z_s, chunk.z_t, constants), x.group)
        waiting = _Waiting(chunk, constants, terms)
    _finalize(loop, waiting, sums)
    for rows, d_inputs in sums:
        loop.store(rows, d_inputs.wait())
    return loop.result()


def _finalize(loop: ChunkLoop, waiting: _Waiting | None, sums: list[tuple[slice, Pending]]) -> None:
    """Take a chunk's gradients; store dX of the one before it."""
    if waiting is None:
        return
    solver, chunk, constants = loop.row_solver, waiting.chunk, waiting.constants
    if waiting.terms is not None:
        constants = solver.merge_terms(chunk.rows, waiting.terms.wait(), constants)
    if not any(loop.wanted):
        return
    solver.gradients(chunk.rows, chunk.z_s, chunk.z_t, constants, loop.buffers(chunk))
    loop.weight_gradient(chunk)
    d_inputs = loop.input_gradients(chunk)
    while sums:
        rows, pending = sums.pop()
        loop.store(rows, pending.wait())
    if d_inputs is not None:
        sums.append((chunk.rows, collectives.all_reduce(d_inputs, loop.x.group)))
