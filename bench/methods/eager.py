"""What one writes without a library: whole logits, in fp32 from there on, and autograd; as it is, and compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from workloads import TEMPERATURE, Inputs

from .method import Method
from .ours import CHUNKED


def _kl(hs: Tensor, W: Tensor, ht: Tensor, Wt: Tensor | None, P: Tensor | None) -> Tensor:
    z_s = F.linear(hs, W)
    z_t = F.linear(ht, Wt) if Wt is not None else F.linear(F.linear(ht, P), W)
    log_q = (z_s.float() / TEMPERATURE).log_softmax(-1)
    log_p = (z_t.float() / TEMPERATURE).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _cross_entropy(hs: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(hs, W)
    return F.cross_entropy(z.float(), labels)


def _arguments(inputs: Inputs) -> tuple:
    if inputs.workload.teacher == "none":
        return inputs.hs, inputs.W, inputs.labels
    return inputs.hs, inputs.W, inputs.ht, getattr(inputs, "Wt", None), getattr(inputs, "P", None)


def eager(inputs: Inputs) -> Tensor:
    function = _cross_entropy if inputs.workload.teacher == "none" else _kl
    return function(*_arguments(inputs))


def compiled(inputs: Inputs) -> Tensor:
    function = _cross_entropy if inputs.workload.teacher == "none" else _kl
    return torch.compile(function, dynamic=False)(*_arguments(inputs))


METHODS = [
    Method("eager", eager, CHUNKED, plan="eager", whole_logits=True),
    Method("eager, torch.compile", compiled, CHUNKED, plan="eager_compiled", whole_logits=True, compiles=True),
]
