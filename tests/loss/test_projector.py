import oracle
import pytest
import torch
from cases import copy, gradients, make, relative, student
from torch import nn

from kdfast import Head, Projected, fused_kd_loss
from kdfast.ops import matmul
from kdfast.projector import LogitProjector


def test_default_init_is_that_of_linear():
    torch.manual_seed(1)
    ours = LogitProjector(48, 32)
    torch.manual_seed(1)
    theirs = nn.Linear(48, 32)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-6, atol=0)


def test_teacher_states_of_inference_mode():
    projector = LogitProjector(6, 4)
    with torch.inference_mode():
        hidden = torch.randn(5, 6)
    projector(hidden).sum().backward()
    torch.testing.assert_close(projector.weight.grad, hidden.sum(0).expand(4, 6))


def test_normal_init_has_std_001_and_zero_bias():
    projector = LogitProjector(512, 256, init="normal")
    # 131072 draws: the sample's std is within 0.2% of the true one, its mean within 3e-5 of 0
    assert projector.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert projector.weight.mean().item() == pytest.approx(0.0, abs=2e-4)
    assert projector.weight.abs().max() > 0.03, "tails of a normal, not of a uniform"
    assert (projector.bias == 0).all()


def test_weight_is_student_by_teacher_and_feeds_the_loss():
    projector = LogitProjector(6, 4, init="normal")
    assert projector.weight.shape == (4, 6)
    hidden_t = torch.randn(5, 6)
    torch.testing.assert_close(projector(hidden_t), hidden_t @ projector.weight.T + projector.bias)
    teacher = Projected(hidden_t, projector.weight, projector.bias)
    fused_kd_loss(Head(torch.randn(5, 4), torch.randn(11, 4)), teacher).backward()
    assert projector.weight.grad.abs().sum() > 0
    assert projector.bias.grad.abs().sum() > 0


def test_without_bias_and_in_another_dtype():
    projector = LogitProjector(6, 4, bias=False, dtype=torch.float64)
    assert projector.bias is None
    assert projector.weight.dtype == torch.float64
    assert [name for name, _ in projector.named_parameters()] == ["weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "teacher_width=0"),
        ((4, -1), "student_width=-1"),
    ],
)
def test_bad_widths(arguments, message):
    with pytest.raises(ValueError, match=message):
        LogitProjector(*arguments)


def test_bad_init_and_std():
    with pytest.raises(ValueError, match="init='xavier' is unknown; expected one of 'default', 'normal'"):
        LogitProjector(4, 4, init="xavier")
    with pytest.raises(ValueError, match="std=-1"):
        LogitProjector(4, 4, init="normal", std=-1)


@pytest.mark.parametrize("engine", ["reference", "torch", "triton_chunked", "triton_tiled"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_temperature_of_the_teachers_own(engine, divergence, reduction):
    """Its logits over τ_t, the student's over τ, τ² of the loss's; anchor, cross entropy and entropies at 1."""
    case, tau, tau_t = make(n=9, v=70), 2.0, 0.6
    theirs, ours = copy(case), copy(case)
    head = {"logit_scale": 0.7, "softcap": 4.0}
    z_s, z_t = (oracle.logits(h, theirs.W, theirs.b, 0.7, 4.0) for h in (theirs.hs, theirs.ht @ theirs.P.T + theirs.p))
    z_a = oracle.logits(theirs.ht @ theirs.P.T + theirs.p, theirs.W.detach(), theirs.b.detach(), 0.7, 4.0)
    kd = oracle.divergence(divergence, (z_t / tau_t).log_softmax(-1), (z_s / tau).log_softmax(-1))
    counts = theirs.labels != -100
    targets = theirs.labels.clamp_min(0)
    rows = tau**2 * kd + 0.3 * torch.nn.functional.cross_entropy(z_a, targets, reduction="none")
    expected = torch.where(counts, rows, 0) if reduction == "none" else rows[counts].mean()
    upstream = torch.linspace(-1, 2, 9, dtype=torch.float64) if reduction == "none" else torch.ones_like(expected)
    expected.backward(upstream)
    loss, metrics = fused_kd_loss(
        student(ours, **head), Projected(ours.ht, ours.P, ours.p, temperature=tau_t), ours.labels, temperature=tau,
        divergence=divergence, anchor_weight=0.3, reduction=reduction, return_metrics=True, engine=engine,
        scratch_bytes=5 * 2 * 128 * 8,
    )  # fmt: skip
    loss.backward(upstream)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    for name, gradient in gradients(ours).items():
        assert relative(gradient, gradients(theirs)[name]) < 1e-9, name
    p = z_t.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    for found, right in ((metrics.kd, kd), (metrics.teacher_entropy, entropy)):
        assert float(found) == pytest.approx(float(right[counts].mean().detach()), rel=1e-6)


@pytest.mark.parametrize("engine", ["torch", "triton_chunked", "triton_tiled"])
def test_the_teachers_temperature_where_gradients_are_rounded(engine, monkeypatch):
    """To 16 bits, as on a GPU: near convergence dW is a difference of nearly equal products."""
    monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
    case, found = make(n=40, v=300, hs=16), []
    case.ht = case.hs + 0.05 * torch.randn_like(case.hs)
    for dtype, how in ((torch.float64, "reference"), (torch.float16, "reference"), (torch.float16, engine)):
        own = copy(copy(case, torch.float16), dtype)
        source = Projected(own.ht.detach().requires_grad_(), temperature=2.2)
        fused_kd_loss(student(own), source, temperature=2.0, engine=how).backward()
        found.append(own.W.grad)
    truth, eager, ours = found
    assert relative(ours, truth) < relative(eager, truth) + 2e-3


def test_the_teachers_temperature_may_be_a_tensor_and_is_checked():
    case = make()
    expected = fused_kd_loss(student(case), Projected(case.ht, case.P, temperature=3.0), temperature=1.5)
    given = Projected(case.ht, case.P, temperature=torch.tensor(3.0))
    assert fused_kd_loss(student(case), given, temperature=torch.tensor(1.5)) == expected
    for wrong, error in ((0.0, ValueError), (-1.0, ValueError), ("2", TypeError), (torch.ones(1), ValueError)):
        with pytest.raises(error, match=r"teacher: Projected\.temperature"):
            fused_kd_loss(student(case), Projected(case.ht, case.P, temperature=wrong))
