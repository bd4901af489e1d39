"""`compress_head`: the teacher's head as two thin factors."""

import pytest
import torch

from kdfast import Head, fused_kd_loss
from kdfast.low_rank_head import compress_head

V, HT = 257, 40


def teacher(dtype=torch.float32, **options):
    """A head whose singular values fall off, over hidden states of very different variances."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(640, HT, generator=generator) * torch.logspace(0.5, -1.5, HT)
    return Head(hidden.to(dtype), torch.randn(V, HT, generator=generator).to(dtype), **options)


def test_full_rank_reproduces_the_logits_up_to_a_constant():
    whole = teacher(torch.float64, logit_scale=0.5)
    compressed = compress_head(whole, HT)
    ours, true = compressed(whole.hidden), 0.5 * whole.hidden @ whole.weight.T
    z = ours.logit_scale * ours.hidden @ ours.weight.T
    assert (z.log_softmax(-1) - true.log_softmax(-1)).abs().max() < 1e-10
    assert compressed.fidelity.kl < 1e-12
    assert compressed.fidelity.agreement == 1.0


def test_fidelity_is_measured_on_what_was_held_out():
    whole = teacher()
    compressed = compress_head(whole, 16)
    held_out = Head(whole.hidden[::8], whole.weight)
    kl = fused_kd_loss(compressed(held_out.hidden), held_out, temperature=1.0)
    assert compressed.fidelity.kl == pytest.approx(kl.item(), rel=1e-6)
    assert compressed.rank == compressed.fidelity.rank == 16
    assert compressed(whole.hidden).hidden.shape == (640, 16)


def test_a_higher_rank_is_nearer():
    kls = [compress_head(teacher(), rank).fidelity.kl for rank in (4, 8, 16, 32, HT)]
    assert kls == sorted(kls, reverse=True)
    assert kls[0] > 100 * kls[-1]


def test_the_smallest_rank_that_reaches_a_fidelity():
    whole = teacher()
    compressed = compress_head(whole, max_kl=0.05)
    assert compressed.rank == 32
    assert compressed.fidelity.kl <= 0.05 < compress_head(whole, 16).fidelity.kl
    assert compressed.fidelity in compressed.tried
    assert [f.rank for f in compressed.tried] == sorted(f.rank for f in compressed.tried)


def test_a_fidelity_that_cannot_be_reached_says_what_can():
    with pytest.raises(ValueError, match=r"max_kl=1e-30; at its full rank 40 the head in torch.bfloat16 still has"):
        compress_head(teacher(torch.bfloat16), max_kl=1e-30)


def test_bias_softcap_and_padding():
    whole = teacher(torch.float64, softcap=3.0)
    whole = Head(whole.hidden, whole.weight, torch.linspace(-1, 1, V).double(), softcap=3.0)
    compressed = compress_head(whole, HT + 1, valid_vocab=V - 7)
    assert compressed.softcap == 3.0
    assert compressed.fidelity.kl < 1e-12
    assert compressed.fidelity.rank == HT + 1  # the bias is one more direction


def test_it_is_a_module_without_parameters():
    compressed = compress_head(teacher(), 8)
    assert not list(compressed.parameters())
    assert set(compressed.state_dict()) == {"weight", "projector"}
    assert compressed.to(torch.float64)(torch.zeros(2, 3, HT)).hidden.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "rank=None and max_kl=None"),
        ({"rank": 3, "max_kl": 0.1}, "exactly one of the two"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_errors_name_the_argument(options, says):
    with pytest.raises(ValueError, match=says):
        compress_head(teacher(), **options)


def test_too_few_hidden_states():
    with pytest.raises(ValueError, match=r"teacher\.hidden has 3 rows"):
        compress_head(Head(torch.zeros(3, HT), torch.zeros(V, HT)), 4)
