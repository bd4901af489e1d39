"""Rows and terms that count for nothing, and mass that is none: 0·∞ is 0."""

import math

import pytest
import torch
from cases import copy, make, student
from teachers import ENGINES, entries

from kdfast import Logits, SparseLogits, fused_kd_loss


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["logits", "bucket"])
def test_a_divergence_without_weight_may_be_infinite(engine, kind):
    """One side has mass where the other cannot have any; the weight, of a schedule say, is still 0."""
    case = make(n=6, v=7)
    case.labels.clamp_(max=3)
    if kind == "logits":
        source = Logits(torch.zeros(6, 7, dtype=torch.float64).index_fill(1, torch.tensor([5]), -torch.inf))
    else:
        with torch.no_grad():
            case.b[4:] = -torch.inf
        source = SparseLogits(torch.arange(4).expand(6, 4), torch.full((6, 4), math.log(0.2)), tail="bucket")
    options = {"divergence": "reverse_kl" if kind == "logits" else "forward_kl", "ce_weight": 0.5, "engine": engine}
    assert fused_kd_loss(student(case), source, case.labels, **options).item() == math.inf
    results = []
    for given in (None, source):
        c = copy(case)
        loss = fused_kd_loss(student(c), given, c.labels, kd_weight=0.0, **options)
        loss.backward()
        results.append((loss.detach(), c.W.grad, c.hs.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_the_metric_of_a_divergence_without_weight(engine, tail):
    case = make(n=6)
    source = SparseLogits(*entries(case), tail=tail)
    kd = [
        fused_kd_loss(student(case), source, kd_weight=weight, engine=engine, return_metrics=True)[1].kd
        for weight in (0.0, 1.0)
    ]
    torch.testing.assert_close(*kd)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_mass_that_underflows_is_none(engine, divergence):
    """0·∞ = 0: logits 1e4 below the others', of ids that the other side cannot have."""
    case = make(n=3, v=7)
    z_t = torch.zeros(3, 7, dtype=torch.float64)
    if divergence == "forward_kl":
        z_t[:, 5] = -1e4
    with torch.no_grad():
        case.b[5] = -torch.inf if divergence == "forward_kl" else -1e4
    if divergence == "reverse_kl":
        z_t[:, 5] = -torch.inf
    loss = fused_kd_loss(student(case), Logits(z_t), divergence=divergence, engine=engine)
    loss.backward()
    assert loss.isfinite()
    assert case.W.grad.isfinite().all()
