"""The chunked engine: precision where it is hardest, and the sizes of its chunks. (Its products: test_products.py.)"""

import os
from types import SimpleNamespace

import pytest
import torch
from cases import V, copy, gradients, make, relative, student, teacher
from near_convergence import near_convergence, solve
from recorder import products

from kdfast import JSD, fused_kd_loss
from kdfast.ops import matmul
from kdfast.ops.planning import gradient_scale


def eager(case, kind, dtype, *, temperature, ce_weight, **head):
    """What a user would write: everything in `dtype`, logits included; loss and gradients."""
    import oracle

    c = copy(case, dtype)
    sources = {"P": c.P, "p": c.p} if kind == "projected" else {"Wt": c.Wt, "bt": c.bt}
    loss = oracle.loss(
        c.hs, c.W, c.b, ht=c.ht, **sources, labels=c.labels, temperature=temperature, ce_weight=ce_weight, **head
    )
    loss.backward()
    return loss, gradients(c)


# V: just below, at, above a multiple of 16, prime and odd. std 8 gives logits of ±100 at width 12, 800 ±1e4.
@pytest.mark.parametrize("v", [95, 96, 97, 101])
@pytest.mark.parametrize("kind", ["projected", "head"])
@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("weight_std", [0.3, 8.0, 800.0])
def test_float32_is_no_worse_than_eager(v, kind, temperature, weight_std):
    """|ours − truth| ≤ |eager in float32 − truth| + tolerance. The tolerance, relative to the truth's norm, is 2e-5:
    a few hundred roundings of 6e-8; at logits of 1e4 their own rounding (1e-3) is what eager's error is made of."""
    case = make(torch.float32, v=v, weight_std=weight_std)
    options = {"temperature": temperature, "ce_weight": 0.5}
    truth, truth_gradients = eager(case, kind, torch.float64, **options)
    theirs, their_gradients = eager(case, kind, torch.float32, **options)
    ours = copy(case, torch.float32)
    loss = fused_kd_loss(student(ours), teacher(ours, kind), ours.labels, scratch_bytes=5 * 2 * v * 4, **options)
    loss.backward()
    assert loss.dtype == torch.float32
    assert relative(loss, truth) <= relative(theirs, truth) + 2e-5
    for name, gradient in gradients(ours).items():
        allowed = relative(their_gradients[name], truth_gradients[name]) + 2e-5
        if weight_std == 800.0:  # a softmax of logits rounded at 1e-3 is a matter of luck row by row
            allowed = max(2 * allowed, 1e-3)
        assert relative(gradient, truth_gradients[name]) <= allowed, name


# noise 0.02 is KL 4e-4, the figure the numerical policy is stated at
@pytest.mark.parametrize("noise", [0.2, 0.02, 0.005])
def test_bfloat16_near_convergence_own_head(noise):
    """Gradients within 0.3% of float64's on the same bf16 inputs, the value within 1e-4."""
    tensors = near_convergence(torch.bfloat16, noise)
    truth, kl, exact = solve(tensors, "head", torch.float64, "reference")
    if noise == 0.02:
        assert 2e-4 < kl < 8e-4
    loss, _, ours = solve(tensors, "head", torch.bfloat16, "torch")
    assert relative(loss, truth) < 1e-4
    for gradient, expected in zip(ours, exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative(gradient, expected) < 3e-3


@pytest.mark.parametrize("products", ["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("noise", [0.2, 0.02])
def test_bfloat16_near_convergence_projected(noise, products, monkeypatch):
    """The same through a projector, whose output is not rounded to bf16 on a CPU: that would leave the gradients 5 to
    10% off at a KL of 4e-4."""
    if products == "as on a GPU":  # gradients of the logits rounded to bf16 before every product
        monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
    tensors = near_convergence(torch.bfloat16, noise)
    truth, _, exact = solve(tensors, "projected", torch.float64, "reference")
    loss, _, ours = solve(tensors, "projected", torch.bfloat16, "torch")
    assert relative(loss, truth) < 1e-4
    for name, gradient, expected in zip(("hidden", "weight", "projector"), ours, exact, strict=True):
        assert relative(gradient, expected) < 3e-3, name


def test_projected_hidden_states_are_not_rounded_under_autocast():
    tensors = near_convergence(torch.bfloat16, 0.02)
    _, _, exact = solve(tensors, "projected", torch.float64, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, ours = solve(tensors, "projected", torch.float32, "torch")
    for gradient, expected in zip(ours, exact, strict=True):
        assert relative(gradient, expected) < 3e-3


def test_float16_gradients_survive_a_loss_scaler():
    """The saved gradients carry no 1/N: with a scaler's upstream factor nothing has underflowed before it acts."""
    tensors = near_convergence(torch.float16, 0.02)
    for kind in ("head", "projected"):
        _, _, exact = solve(tensors, kind, torch.float64, "reference", upstream=2.0**16)
        _, _, ours = solve(tensors, kind, torch.float16, "torch", upstream=2.0**16)
        for gradient, expected in zip(ours, exact, strict=True):
            assert relative(gradient, expected) < 3e-3


def test_ignored_rows_cost_no_products_on_a_cpu():
    case = make(n=20)
    case.labels[5:] = -100
    case.labels[:5] = 3
    with products() as calls:
        fused_kd_loss(student(case), teacher(case, "projected"), case.labels)
    assert {call.rows for call in calls} == {10}


def test_scratch_bounds_the_chunk(monkeypatch):
    case = make(n=20)
    case.labels.clamp_(min=0)

    def rows(**options):
        with products() as calls:
            fused_kd_loss(student(case), teacher(case, "projected"), case.labels, **options)
        return [call.rows // 2 for call in calls if call.kind == "logits"]

    pair = 2 * V * 8
    assert rows() == [20]
    assert rows(scratch_bytes=6 * pair) == [5, 5, 5, 5]  # equal chunks rather than 6, 6, 6, 2
    assert rows(scratch_bytes=1) == [1] * 20
    monkeypatch.setenv("KDFAST_SCRATCH_BYTES", str(10 * pair))
    assert rows() == [10, 10]
    assert rows(scratch_bytes=20 * pair) == [20]
    monkeypatch.setenv("KDFAST_SCRATCH_BYTES", "lots")
    with pytest.raises(ValueError, match="KDFAST_SCRATCH_BYTES"):
        rows()


def test_chunking_does_not_change_the_numbers_in_bfloat16():
    """dW accumulates in fp32 over chunks: 32 chunks are no worse than one."""
    tensors = near_convergence(torch.bfloat16, 0.02, vocab=2048)
    _, _, exact = solve(tensors, "head", torch.float64, "reference")
    errors = []
    for scratch in (1 << 30, 2 * 2048 * 6 * 8):
        os.environ["KDFAST_SCRATCH_BYTES"] = str(scratch)
        try:
            errors.append(relative(solve(tensors, "head", torch.bfloat16, "torch")[2][1], exact[1]))
        finally:
            del os.environ["KDFAST_SCRATCH_BYTES"]
    assert errors[1] < 1.5 * errors[0]


def test_scale_is_a_power_of_two_and_survives_nan():
    def scale(coefficients, dtype=torch.bfloat16):
        x = SimpleNamespace(coefficients=coefficients, weight=torch.empty(0, dtype=dtype), dtype=torch.float32)
        return gradient_scale(x).item()

    assert scale(torch.tensor([[0.3, -0.7], [0.0, 0.0]])) == 0.5
    assert scale(torch.tensor([[0.3, -0.7], [0.0, 0.0]]), torch.float32) == 1
    assert scale(torch.tensor([[0.3, -0.7], [0.0, 0.0]]), torch.float16) == 0.5 / 1024
    assert scale(torch.zeros(3, 4)) == 1
    assert scale(torch.tensor([torch.nan, 1.0])) == 1
    assert scale(torch.zeros(3, 0)) == 1


def test_jsd_takes_its_second_pass_in_chunks():
    case = make()
    whole = fused_kd_loss(student(case), teacher(case, "head"), divergence=JSD(0.5))
    parts = fused_kd_loss(student(case), teacher(case, "head"), divergence=JSD(0.5), scratch_bytes=1)
    torch.testing.assert_close(whole, parts)
