"""Divergences in units of log2, as kernels take them whose gradients are in 16 bits, against their definitions."""

from math import inf, nan

import pytest
import torch
from cases import relative

from kdfast import JSD, SkewKL, SkewReverseKL, SymmetricKL, TotalVariation
from kdfast.divergences import log_ratio
from kdfast.kernels.block_sizes import RowConfig
from kdfast.kernels.divergences import ENTRIES
from kdfast.kernels.launch import Gradients, Heads, Term
from kdfast.kernels.row_kernel import Chunk, solve_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has test_gpu.py")
ALL = [
    JSD(0.5), JSD(0.1), JSD(0.9), SkewKL(0.1), SkewKL(0.9), SkewKL(1e-6), SkewReverseKL(0.1), SkewReverseKL(0.9),
    SymmetricKL(0.5), SymmetricKL(0.1), SymmetricKL(0.9), TotalVariation(),
]  # fmt: skip


def rows(divergence, z_t, z_s, *, kd=1.0, decorrelate=True, teacher_tau=None):
    """(values, ∂/∂z_t, ∂/∂z_s, decorrelation) of rows of float32 logits; gradients unrounded."""
    N, V = z_s.shape
    hidden, weight, one = torch.zeros(N, 4), torch.zeros(V, 4), torch.ones(())
    heads = Heads(hidden, weight, None, 1.0, None, hidden, None, None, 1.0, None, None, None, V, V, False)
    coefficients = torch.tensor([kd, 0.0, 0.0])[:, None].repeat(1, N)
    parameter = next(iter(divergence.parameters), 0.0)
    active = torch.ones(N, dtype=torch.bool)
    term = Term(
        divergence.name, parameter, one, coefficients, one, active, None, None, False, True, False, False,
        teacher_temperature=teacher_tau, precise=False,
    )  # fmt: skip
    stats, grad_s, grad_t, c = torch.zeros(6, N), torch.empty(N, V), torch.empty(N, V), torch.zeros(N)
    grads = Gradients.of(grad_s, grad_t, decorrelation=c if decorrelate else None)
    solve_rows(Chunk(heads, term, z_s, z_t, width=V, start=0), grads, stats=stats, config=RowConfig(4, 512, 1))
    return stats[0], grad_t - c[:, None] * grad_s, grad_s, c


def definition(divergence, z_t, z_s):
    log_p, log_q = z_t.double().log_softmax(-1), z_s.double().log_softmax(-1)
    p, q, (f, a_p, a_q) = divergence.solve(log_p.clone(), log_q.clone(), log_ratio(log_p, log_q))
    return f.sum(-1), a_p - p * a_p.sum(-1, keepdim=True), a_q - q * a_q.sum(-1, keepdim=True)


def logits(gap, rows=3, vocab=1000):
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(rows, vocab, generator=generator)
    return z_t, z_t + gap * torch.randn(rows, vocab, generator=generator)


def test_these_are_all():
    assert {d.name for d in ALL} == {name for name, entry in ENTRIES.items() if entry.in_log2}


@pytest.mark.parametrize("divergence", ALL, ids=str)
@pytest.mark.parametrize("gap", [0.005, 0.028, 0.5, 4.0, 30.0])
def test_values_and_gradients(divergence, gap):
    """Near convergence what is left is the rounding of log p and log q, relative to the gap between them."""
    z_t, z_s = logits(gap)
    value, grad_t, grad_s, _ = rows(divergence, z_t, z_s)
    expected = definition(divergence, z_t, z_s)
    rest = 1 - getattr(divergence, "alpha", 0.0)  # a skewed divergence is the less of it
    assert ((value - expected[0]) / expected[0]).abs().max() < (4e-6 if gap > 0.01 else 2e-5) / rest
    assert relative(grad_t, expected[1]) < (4e-6 + 4e-7 / gap + 1e-6 * gap) / rest
    assert relative(grad_s, expected[2]) < (4e-6 + 4e-7 / gap + 1e-5 * gap) / rest


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_decorrelation_near_convergence_and_away_from_it(divergence):
    """Alike near convergence, G_t = −G_s; where one side has mass that the other has not, the larger gradient is left
    out of the smaller one."""
    *_, c = rows(divergence, *logits(0.01))
    torch.testing.assert_close(c, torch.ones(3), rtol=0, atol=0.02)
    z_t, z_s = logits(0.01)
    z_t[:, ::5] -= 12
    _, grad_t, grad_s, c = rows(divergence, z_t, z_s)
    rest = 1 - getattr(divergence, "alpha", 0.0)
    assert (c.abs() * grad_s.norm(dim=-1) < 2 / rest**2 * grad_t.norm(dim=-1)).all()


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_masked_logits(divergence):
    """On both sides they count nothing; on one, a bounded divergence is finite and its gradient right."""
    z_t, z_s = logits(1.0)
    masked = torch.arange(1000) >= 900
    whole = rows(divergence, z_t[:, :900].contiguous(), z_s[:, :900].contiguous())
    z_t, z_s = z_t.masked_fill(masked, -inf), z_s.masked_fill(masked, -inf)
    value, grad_t, grad_s, c = rows(divergence, z_t, z_s)
    torch.testing.assert_close(value, whole[0])
    torch.testing.assert_close(c, whole[3])
    torch.testing.assert_close(grad_s[:, :900], whole[2])
    assert not grad_t[:, 900:].any()
    assert not grad_s[:, 900:].any()
    z_t[:, :10] = -inf
    z_s[:, 20:30] = -1e4
    if isinstance(divergence, SymmetricKL):
        z_s[:, 20:30] = -inf
        assert rows(divergence, z_t, z_s)[0].tolist() == [inf] * 3
        assert not any(gradient.any() for gradient in rows(divergence, z_t, z_s, kd=0.0)[1:3])
        return
    value, grad_t, grad_s, c = rows(divergence, z_t, z_s)
    expected = definition(divergence, z_t, z_s)
    torch.testing.assert_close(value.double(), expected[0], rtol=3e-5, atol=0)
    assert c.isfinite().all()
    assert relative(grad_t, expected[1]) < 1e-4
    assert relative(grad_s, expected[2]) < 1e-4


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_rows_that_are_nan_say_so(divergence):
    for side in (0, 1):
        both = logits(1.0)
        both[side][1, 7] = nan
        value, grad_t, grad_s, _ = rows(divergence, *both)
        assert value.isnan().tolist() == [False, True, False]
        for gradient in (grad_t, grad_s):
            assert gradient.isnan().all(dim=-1).tolist() == [False, True, False]
            assert gradient[::2].isfinite().all()


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_a_temperature_of_the_teachers_own(divergence):
    z_t, z_s = logits(0.5)
    value, grad_t, grad_s, _ = rows(divergence, z_t, z_s, teacher_tau=torch.tensor(1.7), decorrelate=False)
    expected = definition(divergence, z_t / 1.7, z_s)
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=0)
    assert relative(grad_t, expected[1] / 1.7) < 3e-5
    assert relative(grad_s, expected[2]) < 3e-5
