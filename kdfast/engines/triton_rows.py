"""The row work of the `triton_chunked` engine: `row_kernel.py`, one launch a chunk, two for a sparse teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from kdfast.engines import triton_sparse
from kdfast.engines.chunk_loop import GradientBuffers
from kdfast.engines.triton_arguments import heads_of, term_of
from kdfast.kernels import topk_teacher
from kdfast.kernels.column_sums import add_column_sums
from kdfast.kernels.online_softmax import ROWS
from kdfast.kernels.row_kernel import solve_rows
from kdfast.ops.planning import GradFlags
from kdfast.ops.problem import Problem


class TritonRows:
    """Turn logits into gradients on the device, as `chunked.ROWS` says."""

    def __init__(self, x: Problem, scale: Tensor, wanted: GradFlags, stats: Tensor) -> None:
        self.x, self.scale, self.wanted, self.stats = x, scale, wanted, stats
        self.heads, self.term = heads_of(x), term_of(x, scale)

    def __call__(self, rows: slice, z_s: Tensor, z_t: Tensor | None, out: GradientBuffers) -> None:
        if self.x.sparse:
            self._sparse(rows, z_s, out.student)
        else:
            grads = {"grad_s": out.student, "grad_t": out.teacher, "grad_a": out.anchor, "mix": out.decorrelation}
            solve_rows(self.heads, self.term, z_s, z_t, **self._chunk(rows, z_s), **grads)
        bias_gradients(out, self.wanted)

    def _sparse(self, rows: slice, z: Tensor, grad: Tensor | None) -> None:
        x = self.x
        assert x.teacher_indices is not None
        at = triton_sparse.entries(x, rows, z.gather(1, triton_sparse.addresses(x, rows)))
        constants = z.new_empty(ROWS.value, z.shape[0])
        phase = {"z_s": z, "z_t": None, **self._chunk(rows, z)}
        term = replace(self.term, bits=triton_sparse.bits(x, rows))
        solve_rows(self.heads, term, **phase, grad_s=None, phase="statistics", rows=constants)
        found = triton_sparse.solve(x, rows, at, constants, self.scale)
        triton_sparse.record(x, rows, found, self.stats)
        if grad is None:
            return
        outside = triton_sparse.outside(x, found, constants)
        solve_rows(self.heads, self.term, **phase, grad_s=grad, phase="gradients", rows=outside)
        inside = triton_sparse.inside(x, rows, at, found, constants, self.scale, grad.dtype)
        topk_teacher.write(grad, at.indices, inside)

    def _chunk(self, rows: slice, z: Tensor) -> dict[str, Any]:
        # the chunk loop's scratch: whole padded rows
        return {"width": z.stride(0), "start": rows.start, "stats": self.stats}


def bias_gradients(out: GradientBuffers, wanted: GradFlags) -> None:
    if out.bias is None:
        return
    if out.student is not None:
        weights = None if out.decorrelation is None else 1 - out.decorrelation
        add_column_sums(out.student, weights, out.bias)
    if wanted.teacher_to_weight and out.teacher is not None:
        add_column_sums(out.teacher, None, out.bias)
