"""The engines: four ways to solve one Problem.

    reference        eager, plain torch, the specification                        reference.py
    torch            chunks of tokens, plain torch, any device                    chunked.py, torch_rows.py
    triton_chunked   chunks of tokens, Triton row kernels, the vendor's GEMM      chunked.py, triton_rows.py
    triton_tiled     logits in registers only, slabs of the vocabulary            triton_tiled.py

`reference` is differentiated by autograd; the others run behind the operators in `operators.py`. `choice.py` says
which can run where and what "auto" picks.
"""

from __future__ import annotations

from torch import Tensor

from kdfast.ops.problem import Problem

NAMES = ("auto", "reference", "torch", "triton_chunked", "triton_tiled")


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Solve: (loss () or (N,), differentiable; stats (6, N), detached)."""
    if problem.engine == "reference":
        from kdfast.engines import reference

        return reference.run(problem)
    from kdfast.engines import operators

    return operators.run(problem)
