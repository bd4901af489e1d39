"""The chunk loop under vocabulary parallelism: every process has a slice of the vocabulary and takes the same chunks.

A softmax over the whole vocabulary needs numbers from every slice. For each chunk, on each process:

    logits       of its slice                                            one product
    update       15 to 27 numbers per row                                → gathered                    collective 1
    merge        the rows' log-sum-exps, losses, statistics              from all processes' numbers, alike on all
    terms        if the divergence needs a second pass (all but KLs)     → gathered                    collective 2
    gradients    of the logits of its slice; dW of its slice             two products
    dX           its slice's contribution                                → summed over the processes   collective 3

    so for k chunks, forward and backward together:
    forward or reverse KL, a sparse teacher, or none    k gathers, k sums
    another divergence                                  2k gathers, k sums
    without gradients of hidden states                  no sums

Every collective overlaps with work: a chunk's first gather with the previous chunk's gradients and products, the second
gather and the sums of dX with the next chunk's logits. So two chunks' logits exist at a time, and chunks are half as
large.

Per row, R·15·4 bytes are gathered (with K more numbers for a sparse teacher's entries) and 2·H·4 summed for each side's
dX; gathering the logits would take 2·V·4. bench/communication.py counts the bytes.
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
    """A class that turns logits into gradients in phases. rows: a slice of the tokens; z_s, z_t (r, V): raw products,
    which `update` may turn into logits in place; constants: per-row numbers that the gradients need."""

    second_pass: bool

    def update(self, rows: slice, z_s: Tensor, z_t: Tensor | None) -> Tensor:
        """Return the numbers (numbers, r) that other processes need from this slice."""

    def merge(self, rows: slice, states: Tensor) -> Any:
        """Return the rows' constants from all processes' numbers (R, numbers, r); fill `stats[:, rows]`."""

    def terms(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Any) -> Tensor:
        """Return the sums (numbers, r) of the second pass over this slice."""

    def merge_terms(self, rows: slice, terms: Tensor, constants: Any) -> Any:
        """Return the constants, completed by all processes' sums (R, numbers, r)."""

    def gradients(self, rows: slice, z_s: Tensor, z_t: Tensor | None, constants: Any, out: GradientBuffers) -> None: ...


class _Waiting(NamedTuple):
    """A chunk that lacks only its gradients."""

    chunk: Chunk
    constants: Any
    terms: Pending | None


def run_chunks(x: Problem) -> Result:
    """Return loss, statistics and scaled gradients of `x` from this process's slice of the vocabulary."""
    loop = ChunkLoop(x, ROWS)
    solver: VocabParallelRows = loop.row_solver
    waiting: _Waiting | None = None
    sums: list[tuple[slice, Pending]] = []  # dX being summed
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
    """Compute a waiting chunk's gradients; store dX of the chunk before it."""
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
