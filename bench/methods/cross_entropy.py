"""Cross entropy alone: PyTorch's chunked linear_cross_entropy (torch ≥ 2.13) and apple's CCE, which filters small
gradients by default ("high" = by the dtype's rounding)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from workloads import Inputs

from .method import Method


def torch_chunked(inputs: Inputs) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(inputs.hs, inputs.W, inputs.labels, options=options)


def cce(inputs: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(inputs.hs, inputs.W, inputs.labels)


def _too_old(device: str) -> str | None:
    return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else f"torch {torch.__version__} does not have it"


METHODS = [
    Method(
        "PyTorch linear_cross_entropy",
        torch_chunked,
        {"none": "3u(Hs)"},
        plan="linear_cross_entropy",
        why_not=_too_old,
    ),
    Method("apple CCE", cce, {"none": "4u(Hs)"}, plan="cce", needs=("cut_cross_entropy",), gpu=True),
]
