"""Our engines."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from workloads import TEMPERATURE, Inputs

from kdfast import Head, Projected, fused_kd_loss
from kdfast.engines import unavailable

from .method import Method


def loss(inputs: Inputs, engine: str, **options: Any) -> Tensor:
    """options: of `fused_kd_loss`; with a weight of the cross entropy there are labels."""
    student, kind = Head(inputs.hs, inputs.W), inputs.workload.teacher
    if kind == "none":
        return fused_kd_loss(student, None, inputs.labels, ce_weight=1.0, engine=engine)
    teacher = Projected(inputs.ht, inputs.P) if kind == "projected" else Head(inputs.ht, inputs.Wt)
    options = {"temperature": TEMPERATURE, "temperature_squared": False, "engine": engine, **options}
    return fused_kd_loss(student, teacher, inputs.labels if "ce_weight" in options else None, **options)


def _why_not(device: str, engine: str) -> str | None:
    reason = unavailable(engine, torch.device(device))
    return reason and reason.partition(";")[0].partition(" and the tensors")[0]


CHUNKED = {"projected": "6u(Hs)", "head": "3u(Hs)+u(Ht)", "none": "3u(Hs)"}
TILED = {"projected": "8u(Hs)", "head": "4u(Hs)+2u(Ht)", "none": "4u(Hs)"}
ENGINES = {"torch": CHUNKED, "triton_chunked": CHUNKED, "triton_tiled": TILED, "reference": CHUNKED}
METHODS = [
    Method(
        f"kdfast {engine}",
        partial(loss, engine=engine),
        operations,
        plan=engine,
        ours=True,
        whole_logits=engine == "reference",
        why_not=partial(_why_not, engine=engine),
    )
    for engine, operations in ENGINES.items()
]
