"""Each divergence's two forms agree with each other and with their definition, at the edges too."""

from math import inf, log

import pytest
import torch

from kdfast import JSD, ForwardKL, ReverseKL
from kdfast.divergences import get_divergence, log_ratio

ALL = [ForwardKL(), ReverseKL(), JSD(0.5), JSD(0.1), JSD(0.9)]


def evaluate(divergence, z_t, z_s):
    """(value, ∂/∂z_t, ∂/∂z_s) as the fused engines compute them."""
    log_p, log_q = z_t.log_softmax(-1), z_s.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    terms = divergence.terms(p, q, log_ratio(log_p, log_q))
    grad_t = terms.a_p - (0 if divergence.centred_p else p * terms.a_p.sum(-1, keepdim=True))
    grad_s = terms.a_q - (0 if divergence.centred_q else q * terms.a_q.sum(-1, keepdim=True))
    return terms.f.sum(-1), grad_t, grad_s


@pytest.mark.parametrize("divergence", ALL, ids=str)
@pytest.mark.parametrize("gap", [10.0, 1.0, 1e-3])
def test_terms_are_the_pointwise_value_and_its_derivative(divergence, gap):
    z_t = torch.randn(4, 101, dtype=torch.float64) * 3
    z_s = (z_t + gap * torch.randn_like(z_t)).requires_grad_()
    z_t.requires_grad_()
    expected = divergence.pointwise(z_t.log_softmax(-1), z_s.log_softmax(-1)).sum(-1)
    grads = torch.autograd.grad(expected.sum(), (z_t, z_s))
    value, *computed = evaluate(divergence, z_t.detach(), z_s.detach())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-13)
    for ours, theirs in zip(computed, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_value_keeps_its_digits_near_convergence(divergence):
    """At KL 4e-4 a plain Σ p·(log p − log q) in float32 loses 2e-3 to 9e-3 of the value."""
    z_t = torch.randn(16, 16384) * 2
    z_s = z_t + 0.028 * torch.randn_like(z_t)
    exact = evaluate(divergence, z_t.double(), z_s.double())[0]
    computed = evaluate(divergence, z_t, z_s)[0]
    torch.testing.assert_close(computed.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_extreme_logits_are_finite_and_right(divergence):
    z_t = torch.randn(8, 31, dtype=torch.float64) * 1e4
    z_s = torch.randn(8, 31, dtype=torch.float64) * 1e4
    expected = divergence.pointwise(z_t.log_softmax(-1), z_s.log_softmax(-1)).sum(-1)
    value, grad_t, grad_s = evaluate(divergence, z_t.float(), z_s.float())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    assert grad_t.isfinite().all()
    assert grad_s.isfinite().all()


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_entries_without_mass_on_both_sides_count_nothing(divergence):
    z_t, z_s = torch.randn(3, 40, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    whole = evaluate(divergence, z_t[:, :30], z_s[:, :30])
    masked = torch.arange(40) >= 30
    value, grad_t, grad_s = evaluate(divergence, z_t.masked_fill(masked, -inf), z_s.masked_fill(masked, -inf))
    torch.testing.assert_close(value, whole[0])
    torch.testing.assert_close(grad_t[:, :30], whole[1])
    torch.testing.assert_close(grad_s[:, :30], whole[2])
    assert not grad_t[:, 30:].any()
    assert not grad_s[:, 30:].any()


def test_mass_the_other_side_cannot_produce():
    """Forward KL is +inf where the student has no mass, 0·log 0 = 0 where the teacher has none; JSD is bounded."""
    some, none = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -inf]])
    assert evaluate(ForwardKL(), some, none)[0].item() == inf
    assert evaluate(ReverseKL(), none, some)[0].item() == inf
    assert evaluate(ForwardKL(), none, some)[0].item() == pytest.approx(log(2))
    assert evaluate(ReverseKL(), some, none)[0].item() == pytest.approx(log(2))
    p, q, m = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), torch.tensor([0.75, 0.25])
    expected = 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).nan_to_num().sum()
    assert evaluate(JSD(0.5), some, none)[0].item() == pytest.approx(expected.item())


def test_jsd_at_its_ends_is_defined_as_the_kls():
    assert get_divergence(JSD(0.0)) == ForwardKL()
    assert get_divergence(JSD(1.0)) == ReverseKL()


def test_errors():
    with pytest.raises(ValueError, match="beta"):
        JSD(1.5)
    with pytest.raises(ValueError, match="'kl' is unknown; expected one of forward_kl"):
        get_divergence("kl")
    with pytest.raises(NotImplementedError, match="not in this version"):
        get_divergence("total_variation")
    with pytest.raises(TypeError, match="divergence is int"):
        get_divergence(3)
