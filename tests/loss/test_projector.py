import pytest
import torch
from torch import nn

from kdfast import Head, Projected, fused_kd_loss
from kdfast.projector import LogitProjector


def test_default_init_is_that_of_linear():
    torch.manual_seed(1)
    ours = LogitProjector(48, 32)
    torch.manual_seed(1)
    theirs = nn.Linear(48, 32)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-6, atol=0)


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
