"""Liger's fused linear losses: JSD at β = 0, which is forward KL, in chunks, in Triton and in CuTe DSL; KL from given
probabilities; cross entropy. Liger takes CuTe DSL by itself where it is installed, so that both are asked for by name.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor
from workloads import TEMPERATURE, Inputs

from .method import Method


def chunked_jsd(inputs: Inputs, compiled: bool) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0, "temperature": TEMPERATURE}
    criterion = LigerFusedLinearJSDLoss(compiled=compiled, **options)
    return criterion(inputs.hs, inputs.W, inputs.ht, inputs.Wt, inputs.labels)


def jsd(inputs: Inputs, implementation: str) -> Tensor:
    from liger_kernel.functional import fused_linear_jsd

    options = {"jsd_beta": 0.0, "temperature": TEMPERATURE, "impl": implementation}
    return fused_linear_jsd(inputs.hs, inputs.W, inputs.ht, inputs.Wt, None, **options)


def triton_kl(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    target = (F.linear(inputs.ht, inputs.Wt).float() / TEMPERATURE).softmax(-1)
    return LigerFusedLinearKLDivLoss(temperature=TEMPERATURE)(inputs.hs, inputs.W, target)


def cross_entropy(inputs: Inputs, implementation: str) -> Tensor:
    from liger_kernel.backends import set_impl
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    set_impl(implementation)  # the forward makes the gradients too
    try:
        return LigerFusedLinearCrossEntropyLoss()(inputs.W, inputs.hs, inputs.labels)
    finally:
        set_impl(None)


def hopper_cross_entropy(inputs: Inputs) -> Tensor:
    """The products in CuTe DSL too, for N a multiple of 128 and V of 256."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return liger_fused_linear_cross_entropy_sm90(inputs.hs, inputs.W, inputs.labels)


TRITON, CUTE = "nvidia-triton", "nvidia-cutedsl"
HEAD, NONE = {"head": "3u(Hs)+u(Ht)"}, {"none": "3u(Hs)"}
HERE = {"needs": ("liger_kernel",)}
ON_A_GPU = {**HERE, "gpu": True}
IN_CUTE = {"needs": ("liger_kernel", "cutlass.cute"), "gpu": True}
METHODS = [
    Method("Liger chunked JSD (beta=0)", partial(chunked_jsd, compiled=False), HEAD, plan="liger_chunked", **HERE),
    # its inner torch.compile(grad) takes minutes with the C++ back end, for the same products
    Method(
        "Liger chunked JSD, compiled", partial(chunked_jsd, compiled=True), HEAD, plan="liger_chunked", **ON_A_GPU
    ),
    Method("Liger Triton JSD (beta=0)", partial(jsd, implementation=TRITON), HEAD, plan="liger_triton_jsd", **ON_A_GPU),
    Method("Liger CuTe DSL JSD (beta=0)", partial(jsd, implementation=CUTE), HEAD, **IN_CUTE),
    Method("Liger Triton KL, given p", triton_kl, HEAD, whole_logits=True, **ON_A_GPU),
    Method("Liger cross entropy", partial(cross_entropy, implementation=TRITON), NONE, **ON_A_GPU),
    Method("Liger cross entropy, CuTe DSL", partial(cross_entropy, implementation=CUTE), NONE, **IN_CUTE),
    Method("Liger cross entropy, Hopper", hopper_cross_entropy, NONE, whole_logits=True, **IN_CUTE),
]
