"""torchtune's chunked forward KL, on logits in eight chunks: −Σ p·log q, the same gradient towards the student.

It has no temperature, so hidden states are divided by τ.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from workloads import TEMPERATURE, Inputs

from .method import Method

CHUNKS = 8


@cache
def kd_losses() -> Any:
    """torchtune/modules/loss/kd_losses.py by itself, which needs torch alone; the package would want torchao, of a
    version without torch 2.13's in it, and six more to be imported."""
    package = importlib.util.find_spec("torchtune")
    assert package is not None
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "modules/loss/kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chunked_kl(inputs: Inputs) -> Tensor:
    student = [F.linear(rows, inputs.W)[None] for rows in (inputs.hs / TEMPERATURE).chunk(CHUNKS)]
    teacher = [F.linear(rows, inputs.Wt)[None] for rows in (inputs.ht / TEMPERATURE).chunk(CHUNKS)]
    return kd_losses().ForwardKLWithChunkedOutputLoss(len(student))(student, teacher, inputs.labels[None])


METHODS = [
    Method(
        "torchtune chunked KL",
        chunked_kl,
        {"head": "3u(Hs)+u(Ht)"},
        plan="torchtune",
        needs=("torchtune",),
        whole_logits=True,
        cross_entropy=True,
    )
]
