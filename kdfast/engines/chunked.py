"""The engines `torch` and `triton_chunked`: chunks of tokens, gradients in the forward, no host synchronization.

They differ in the class that turns logits into gradients (`ROWS`); both use the vendor's products. If each process has
a slice of the vocabulary, `vocab_parallel.py` takes the same steps in another order, with collectives between them.
"""

from __future__ import annotations

from torch import Tensor

from kdfast.engines import vocab_parallel
from kdfast.engines.chunk_loop import ChunkLoop, on_active_rows
from kdfast.ops.problem import Problem, Result

# Classes whose instances are called with (rows, z_s, z_t, buffers): rows is a slice of the tokens; z_s and z_t (r, V)
# are raw products h·Wᵀ, which may be overwritten. They fill the rows' statistics and the buffers.
ROWS = {
    "torch": "kdfast.engines.torch_rows:TorchRows",
    "triton_chunked": "kdfast.engines.triton_rows:TritonRows",
}


def run(x: Problem, rows: Tensor | None = None) -> Result:
    """Return loss, statistics and scaled gradients of `x`. rows: not used, since statistics come with the logits."""
    return on_active_rows(x.forward_problem(), vocab_parallel.run_chunks if x.group else _run_chunks)


def _run_chunks(x: Problem) -> Result:
    loop = ChunkLoop(x, ROWS)
    for rows in loop.chunks():
        chunk = loop.logits(rows)
        loop.row_solver(rows, chunk.z_s, chunk.z_t, loop.buffers(chunk))
        loop.weight_gradient(chunk)
        loop.store(rows, loop.input_gradients(chunk))
    return loop.result()
