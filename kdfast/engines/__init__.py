"""The engines: four ways to solve one Problem, and the one function that picks.

    reference        eager, plain torch, the specification                        engines/reference.py
    torch            chunked, plain torch, any device                             engines/chunked.py
    triton_chunked   Triton and the vendor's GEMM                                 not in this version
    triton_tiled     Triton only                                                  not in this version

`reference` is differentiated by autograd; the others run behind the operators in `kdfast.operators`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.problem import Problem

AVAILABLE = ("reference", "torch", "triton_chunked")
TO_COME = ("triton_tiled",)
NAMES = ("auto", *AVAILABLE, *TO_COME)


def resolve(engine: str, device: torch.device) -> str:
    """The engine that `engine` stands for on `device`. "auto" is `torch` everywhere in this version."""
    return "torch" if engine == "auto" else engine


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Solve: (loss () or (N,), differentiable; stats (6, N), detached)."""
    if problem.engine == "reference":
        from kdfast.engines import reference

        return reference.run(problem)
    from kdfast import operators

    return operators.run(problem)
