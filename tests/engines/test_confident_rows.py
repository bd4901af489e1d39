"""Confident rows, in which one entry has nearly all of the mass: no engine is much worse there than eager float32.

Two things go wrong: a − softmax·Σa cancels at that entry, and what one pass has found of a row (a KL, a sum) differs by
its rounding from what another computes anew. Any kernel has to pass this."""

import pytest
import torch
from confident import DIVERGENCES, ROWS, check, draw, row_gradients

from kdfast import JSD, Head, Projected, SkewKL, fused_kd_loss

pytestmark = pytest.mark.slow
ENGINES = ["torch", "triton_chunked", "triton_tiled"]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_no_worse_than_eager(engine, divergence):
    """At τ = ½ and a scale of ¼ the most probable entry has 0.5 to 1 − 1e-20 of the mass."""
    for kind in ("head", "projected"):
        for agreement, size in (("none", 2.0), ("none", 5.0), ("most", 10.0)):
            problem = (draw(agreement, size), kind, divergence)
            check(row_gradients(*problem, torch.float32, engine, temperature=0.5), *problem, temperature=0.5)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_row_of_a_skew_kl(engine):
    """Student and teacher are sure of different entries: a multiple of q, which centering takes out, must not be there
    to be taken out. Many draws of one row, every one within four times eager's error."""
    for seed in range(10):
        tensors = [t[:1] if len(t) == ROWS else t for t in draw("none", 3.0, seed)]
        exact, eager, ours = (
            row_gradients(tensors, "head", SkewKL(0.9), dtype, name, temperature=0.5)[0]
            for dtype, name in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, engine))
        )
        assert (ours - exact).norm() <= 4 * (eager - exact).norm() + 4e-6 * exact.norm(), seed


def saturated(engine, dtype, size, divergence, temperature, **head):
    """(gradients, by leaf) through a projector, of logits with a standard deviation of 5·size."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"h": (6, 24), "W": (300, 24), "ht": (6, 40), "P": (24, 40)}
    t = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    t["h"], t["ht"], t["P"] = t["h"] * size, t["ht"] * size, t["P"] / 40**0.5
    t = {name: tensor.to(dtype).requires_grad_(name != "ht") for name, tensor in t.items()}
    student, teacher = Head(t["h"], t["W"], **head), Projected(t["ht"], t["P"])
    loss = fused_kd_loss(student, teacher, divergence=divergence, temperature=temperature, engine=engine)
    names = ("h", "W", "P")
    return dict(zip(names, (g.double() for g in torch.autograd.grad(loss, [t[n] for n in names])), strict=True))


HEADS = [{}, {"logit_scale": 0.3}, {"softcap": 30.0}]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "symmetric_kl", JSD(0.5), SkewKL(0.1)], ids=str)
@pytest.mark.parametrize(("size", "temperature"), [(1.0, 1e-3), (10.0, 1e-3), (200.0, 1.0)])
@pytest.mark.parametrize("engine", ENGINES)
def test_saturated_teacher(engine, size, temperature, divergence):
    """Logits of ±5, ±50 and ±1000 over a τ at which every probability is 0 or 1: of a forward KL the projector's
    gradient is then 0, not the rounding of two passes' difference."""
    for head in HEADS:
        exact = saturated("reference", torch.float64, size, divergence, temperature, **head)
        eager = saturated("reference", torch.float32, size, divergence, temperature, **head)
        ours = saturated(engine, torch.float32, size, divergence, temperature, **head)
        for name, truth in exact.items():
            error, allowed = (float((g[name] - truth).norm()) for g in (ours, eager))
            assert error <= 4 * allowed + 1e-6 * float(truth.norm()) + 1e-12, (name, head)


@pytest.mark.parametrize("engine", ENGINES)
def test_saturated_teacher_in_double_precision(engine):
    """Every engine's gradient of the projector is 0 there, or as small as float64 knows."""
    for divergence in ("forward_kl", "symmetric_kl", JSD(0.3)):
        exact = saturated("reference", torch.float64, 10.0, divergence, 1e-3)
        ours = saturated(engine, torch.float64, 10.0, divergence, 1e-3)
        for name, truth in exact.items():
            assert float((ours[name] - truth).norm()) <= 1e-10 * float(truth.norm()) + 1e-15, name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("divergence", "student", "teacher"), [("forward_kl", 30, 21), ("forward_kl", 18, 25), ("reverse_kl", 25, 18)]
)
def test_sides_that_are_sure_of_one_token(engine, divergence, student, teacher):
    """The gradient of the token that has all of the mass is minus the others', 1e-8, and the KL as small: so
    that nothing cancels, and it must not become 0."""
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = (torch.randn(40, 60, generator=generator) for _ in range(2))
    z_s[:, 3] += student
    z_t[:, 3] += teacher

    def gradient(dtype, engine):
        sides = [z.to(dtype).requires_grad_() for z in (z_s, z_t)]
        loss = fused_kd_loss(
            Head(sides[0], torch.eye(60, dtype=dtype)), Projected(sides[1]), divergence=divergence, temperature=1.0,
            engine=engine, reduction="sum",
        )  # fmt: skip
        return torch.autograd.grad(loss, sides)[divergence == "forward_kl"].double()

    exact = gradient(torch.float64, "reference")
    assert float((gradient(torch.float32, engine) - exact).norm() / exact.norm()) < 1e-4
