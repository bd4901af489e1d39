"""TRL's ChunkedDivergenceFunction: tiles of 4096 tokens × 32768 ids, fp32; on a CPU its plain-torch path."""

from __future__ import annotations

from torch import Tensor
from workloads import TEMPERATURE, Inputs

from .method import Method


def chunked_divergence(inputs: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (inputs.hs, inputs.W, None), (inputs.ht, inputs.Wt, None)
    divergence, _ = ChunkedDivergenceFunction.apply(*student, *teacher, 0.0, TEMPERATURE)
    return divergence.mean()


METHODS = [
    Method(
        "TRL ChunkedDivergence",
        chunked_divergence,
        {"head": "4u(Hs)+2u(Ht)"},
        plan="trl",
        needs=("trl.kernels.chunked_divergence",),
    )
]
