"""What a row may hold: finite masks, a token that one side of a truncated vocabulary has alone, a flat side, NaN."""

import pytest
import torch
from cases import relative

from kdfast import Head, Logits, Projected, fused_kd_loss
from kdfast.ops import matmul

ENGINES = ["torch", "triton_chunked", "triton_tiled"]
DTYPES = [torch.float32, torch.float16]


def gradients(leaves, **options):
    """(loss, gradients) of a projected or given teacher, in the engine's own precision of gradients."""
    h, W, bias, teacher = leaves
    student = Head(h.requires_grad_(), W.requires_grad_(), bias)
    loss = fused_kd_loss(student, teacher, torch.arange(len(h)) % 5, ce_weight=0.5, vocab="truncate", **options)
    return [loss.detach(), *torch.autograd.grad(loss, [h, W])]


def compare(engine, dtype, make, monkeypatch, **options):
    monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)  # as on a GPU
    exact = gradients(make(torch.float64), engine="reference", **options)
    ours = gradients(make(dtype), engine=engine, **options)
    for found, expected in zip(ours, exact, strict=True):
        assert found.isfinite().all()
        assert relative(found, expected) < (2e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [-1e10, -1e30])
@pytest.mark.parametrize("where", [slice(0, 150), slice(150, 300)])
def test_a_mask_that_is_a_finite_number(engine, dtype, mask, where, monkeypatch):
    """Whole blocks of it, before or after everything else."""

    def make(dtype):
        generator = torch.Generator().manual_seed(0)
        h, W, ht = (torch.randn(*shape, generator=generator) for shape in ((7, 24), (300, 24), (7, 24)))
        bias = torch.zeros(300)
        bias[where] = mask
        h, W, ht = (t.half().to(dtype) for t in (h, W, ht))
        return h, W, bias.to(torch.promote_types(dtype, torch.float32)), Projected(ht)

    compare(engine, dtype, make, monkeypatch)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_beyond_the_shared_vocabulary_has_all_of_the_mass(engine, dtype, monkeypatch):
    def make(dtype):
        generator = torch.Generator().manual_seed(0)
        h, W, z = (torch.randn(*shape, generator=generator) for shape in ((7, 24), (70, 24), (7, 65)))
        bias = torch.zeros(70)
        bias[67] = 300
        h, W, z = (t.half().to(dtype) for t in (h, W, z))
        return h, W, bias.to(torch.promote_types(dtype, torch.float32)), Logits(z)

    compare(engine, dtype, make, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("sharp", ["student", "teacher"])
def test_one_side_is_flat(engine, divergence, sharp, monkeypatch):
    """A fresh student's 2048 tokens are alike: what they sum to does not drown a sure teacher's KL, nor the reverse."""
    monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
    generator = torch.Generator().manual_seed(0)
    size = {"student": 0.02, "teacher": 0.02} | {sharp: 4.0}
    z = {side: (torch.randn(5, 2048, generator=generator) * s).half() for side, s in size.items()}

    def losses(dtype, engine):
        h = z["student"].to(dtype).requires_grad_()
        loss = fused_kd_loss(
            Head(h, torch.eye(2048, dtype=dtype)), Logits(z["teacher"].to(dtype)), divergence=divergence,
            temperature=1.0, reduction="none", engine=engine,
        )  # fmt: skip
        return loss.detach().double(), torch.autograd.grad(loss.sum(), h)[0].double()

    (exact, gradient), (ours, found) = losses(torch.float64, "reference"), losses(torch.float16, engine)
    assert ((ours - exact).abs() / exact).max() < 2e-6
    assert relative(found, gradient) < 2e-3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_row_that_is_not_a_number_says_so_in_both_gradients(engine, dtype, divergence, side, monkeypatch):
    monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
    generator = torch.Generator().manual_seed(0)
    h, W, ht = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((4, 24), (70, 24), (4, 24)))
    (h if side == "student" else ht)[2, 3] = torch.nan
    leaves = [h.requires_grad_(), ht.requires_grad_()]
    loss = fused_kd_loss(Head(h, W), Projected(ht), divergence=divergence, reduction="none", engine=engine)
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert gradient.isnan().any(dim=1).tolist() == [False, False, True, False]
