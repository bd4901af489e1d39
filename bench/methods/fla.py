"""flash-linear-attention's fused KL: Triton, forward KL without a temperature, so hidden states are divided by τ."""

from __future__ import annotations

from torch import Tensor
from workloads import TEMPERATURE, Inputs

from .method import Method


def fused_kl(inputs: Inputs) -> Tensor:
    from fla.modules.fused_kl_div import FusedKLDivLoss

    return FusedKLDivLoss()(inputs.hs / TEMPERATURE, inputs.ht / TEMPERATURE, inputs.W, inputs.Wt)


METHODS = [Method("fla fused KL", fused_kl, {"head": "3u(Hs)+u(Ht)"}, plan="fla", needs=("fla",), gpu=True)]
