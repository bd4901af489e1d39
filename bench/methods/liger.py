"""Liger's fused linear losses: JSD at β = 0, which is forward KL, in chunks and in Triton; KL from given
probabilities; cross entropy."""

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


def triton_jsd(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    criterion = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
    return criterion(inputs.hs, inputs.W, inputs.ht, inputs.Wt, None)


def triton_kl(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    target = (F.linear(inputs.ht, inputs.Wt).float() / TEMPERATURE).softmax(-1)
    return LigerFusedLinearKLDivLoss(temperature=TEMPERATURE)(inputs.hs, inputs.W, target)


def cross_entropy(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(inputs.W, inputs.hs, inputs.labels)


HEAD = {"head": "3u(Hs)+u(Ht)"}
NEEDS = ("liger_kernel",)
METHODS = [
    Method("Liger chunked JSD (beta=0)", partial(chunked_jsd, compiled=False), HEAD, plan="liger_chunked", needs=NEEDS),
    Method(
        "Liger chunked JSD, compiled",
        partial(chunked_jsd, compiled=True),
        HEAD,
        plan="liger_chunked",
        needs=NEEDS,
        gpu=True,  # its inner torch.compile(grad) takes minutes with the C++ back end, for the same products
    ),
    Method("Liger Triton JSD (beta=0)", triton_jsd, HEAD, plan="liger_triton_jsd", needs=NEEDS, gpu=True),
    Method("Liger Triton KL, given p", triton_kl, HEAD, needs=NEEDS, gpu=True, whole_logits=True),
    Method("Liger cross entropy", cross_entropy, {"none": "3u(Hs)"}, needs=NEEDS, gpu=True),
]
