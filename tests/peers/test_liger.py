"""Liger's losses: chunked in plain torch, then Triton's, hidden states and heads."""

import pytest
import torch
import torch.nn.functional as F
from cases import N, V, relative
from side_by_side import (
    BETAS,
    DEVICE,
    FLOAT32,
    FLOAT64,
    agree,
    fault,
    fresh,
    gradients,
    liger,
    liger_kl,
    liger_triton,
    logits,
    ours,
    peer,
)

from kdfast import JSD, Head, Logits


@pytest.mark.parametrize("hard", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("beta", BETAS)
def test_liger_chunked(beta, temperature, hard):
    """liger_kernel/chunked_loss/jsd_loss.py, LigerFusedLinearJSDLoss: the same β, the cross entropy at τ = 1, both
    divided by the rows that count. Its loss is float32 whatever the inputs are, its KD gradients are theirs."""
    for dtype, gradient in ((torch.float32, FLOAT32), (torch.float64, FLOAT32 if hard else FLOAT64)):
        case = fresh(dtype)
        theirs = liger(
            case, beta, case.labels,
            weight_hard_loss=hard, weight_soft_loss=0.7, temperature=temperature, chunk_size=5,
        )  # fmt: skip
        mine = ours(case, JSD(beta), case.labels, temperature=temperature, kd_weight=0.7, ce_weight=hard)
        agree(theirs, mine, case.hs, case.W, case.b, gradient=gradient)


def test_liger_chunked_adds_half_a_cross_entropy():
    """LigerFusedLinearJSDLoss as it comes: ½ CE + ½ JSD at τ = 1. Ours as it comes: KD alone."""
    case = fresh()
    theirs = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(compiled=False)(
        case.hs, case.W, case.ht, case.Wt, case.labels, case.b, case.bt
    )
    agree(theirs, ours(case, "jsd", case.labels, kd_weight=0.5, ce_weight=0.5), case.hs, case.W, case.b)


def test_liger_chunked_ignores():
    """As above: ignore_index rows, and nothing but such rows."""
    case = fresh()
    labels = case.labels.clamp_min(0)
    labels[::4] = 3
    agree(
        liger(case, 0.5, labels, weight_hard_loss=0.5, ignore_index=3),
        ours(case, "jsd", labels, ce_weight=0.5, ignore_index=3), case.hs, case.W,
    )  # fmt: skip
    nothing = torch.full_like(labels, 3)
    agree(
        liger(case, 0.5, nothing, weight_hard_loss=0.5, ignore_index=3),
        ours(case, "jsd", nothing, ce_weight=0.5, ignore_index=3), case.hs, case.W,
    )  # fmt: skip


@fault("liger_kernel")
def test_liger_chunked_pads_a_smaller_student_with_logits_of_zero():
    """liger_kernel/chunked_loss/fused_linear_distillation.py, _compute_loss: ids that only the teacher has, here eight
    padding rows at −30, become logits of 0 of the student's, mass it cannot take back. A student that equals its
    teacher has a loss of log(1 + 8/Σ eᶻ); ours, with vocab="truncate", is 0. A smaller teacher fails on shapes."""
    case = fresh()
    case.ht = case.hs.detach()
    Wt, bt = torch.cat([case.W, case.W[:8] * 0]).detach(), torch.zeros(V + 8, device=DEVICE)
    bt[V:] = -30.0
    labels = torch.zeros(N, dtype=torch.long, device=DEVICE)
    leaked = torch.log1p(8 * (-F.linear(case.hs, case.W).logsumexp(-1)).exp()).mean()
    theirs = liger(case, 0.0, labels, bias=False, Wt=Wt, bt=bt)
    agree(theirs, leaked, case.hs, case.W)
    assert theirs > 0.01
    mine = ours(case, bias=False, teacher=Head(case.ht, Wt, bt), vocab="truncate")
    assert mine.abs() < 1e-6
    with pytest.raises(RuntimeError, match="size of tensor"):
        liger(case, 0.0, labels, bias=False, Wt=case.W.detach()[:90])


@fault("liger_kernel")
def test_liger_chunked_has_bf16_logits():
    """As above, chunk_forward: bf16 inputs give bf16 logits and log-softmaxes. At a KL of 2e-3 the gradient is tens of
    percent off; ours, from the same inputs, a fraction of one."""
    case = fresh(v=4096, hs=64, n=64, weight_std=0.25)
    labels = torch.zeros(64, dtype=torch.long, device=DEVICE)
    W, hs = case.W.detach().bfloat16(), case.hs.detach().bfloat16()
    ht = (hs.float() + 0.03 * torch.randn_like(case.hs)).detach().bfloat16()

    def gradient(loss, dtype):
        case.hs, case.W, case.ht, case.Wt = (tensor.to(dtype, copy=True) for tensor in (hs, W, ht, W))
        case.hs.requires_grad_()
        return gradients(loss(), [case.hs])[0]

    exact = gradient(lambda: ours(case, bias=False, engine="reference"), torch.float64)
    assert relative(gradient(lambda: liger(case, 0.0, labels, bias=False), torch.bfloat16), exact) > 0.1
    assert relative(gradient(lambda: ours(case, bias=False), torch.bfloat16), exact) < 0.01


@fault("liger_kernel")
def test_liger_chunked_is_nan_where_an_id_is_masked_on_both_sides():
    """As above: −inf − (−inf), when padding rows of the vocabulary have a bias of −inf."""
    case = fresh()
    with torch.no_grad():
        case.b[-5:] = case.bt[-5:] = -torch.inf
    labels = case.labels.clamp(max=V - 6)
    assert liger(case, 0.5, labels).isnan()
    assert ours(case, "jsd", labels).isfinite()


def test_liger_chunked_drops_a_gradient_that_the_teacher_asked_for():
    """As above, backward: none for the teacher's hidden states."""
    case = fresh()
    case.ht.requires_grad_()
    assert torch.autograd.grad(liger(case, 0.5, case.labels), case.ht, allow_unused=True) == (None,)


@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("beta", BETAS)
def test_liger_triton(beta, temperature):
    """liger_kernel/ops/fused_linear_jsd.py, LigerFusedLinearJSDFunction: no bias; the mean over rows that count."""
    case = fresh()
    for labels in (case.labels, None, torch.full_like(case.labels, -100)):
        theirs = liger_triton(case, beta, labels, temperature)
        agree(theirs, ours(case, JSD(beta), labels, bias=False, temperature=temperature), case.hs, case.W)


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_liger_kl_from_probabilities(temperature):
    """liger_kernel/ops/fused_linear_kl_div.py, LigerFusedLinearKLDivFunction: its temperature is the student's alone,
    so the teacher's probabilities have to be at τ already."""
    case = fresh()
    theirs = liger_kl(case, case.labels, temperature)
    agree(theirs, ours(case, labels=case.labels, bias=False, temperature=temperature), case.hs, case.W)
    teacher = Logits(logits(case, bias=False)[1])
    agree(theirs, ours(case, labels=case.labels, bias=False, teacher=teacher, temperature=temperature), case.hs)


def test_liger_cross_entropy_and_total_variation():
    """liger_kernel/ops/fused_ce_tvd.py, LigerFusedCETVDFunction: rows of both, from whole logits, at τ = 1."""
    module = peer("liger_kernel.transformers.fused_ce_tvd", "LigerFusedCETVDLoss")
    case, upstream = fresh(), torch.linspace(-1, 2, N, device=DEVICE)
    z_s, z_t = logits(case)
    ce, tvd = module()(z_s, z_t, case.labels)
    leaves = (case.hs, case.W, case.b)
    agree(tvd, ours(case, "total_variation", case.labels, reduction="none"), *leaves, upstream=upstream)
    mine = ours(case, "total_variation", case.labels, reduction="none", kd_weight=0.0, ce_weight=1.0)
    agree(ce, mine, *leaves, upstream=upstream)


@pytest.mark.gpu  # its kernel calls a method of a Python float, which the interpreter has not
def test_liger_total_variation():
    """liger_kernel/ops/tvd.py, LigerTVDLossFunction: of given probabilities, the mean over rows that count."""
    module = peer("liger_kernel.transformers.tvd", "LigerTVDLoss")
    case = fresh()
    p, q = (z.softmax(-1) for z in logits(case))
    agree(module()(p, q, case.labels), ours(case, "total_variation", case.labels), case.hs, case.W, case.b)


@fault("liger_kernel")
def test_liger_total_variation_of_ignored_rows_alone():
    """As above, tv_distance_forward_triton: divides by the number of rows that count, on the host. Ours is 0."""
    module = peer("liger_kernel.transformers.tvd", "LigerTVDLoss")
    case = fresh()
    p, q = (z.softmax(-1) for z in logits(case))
    nothing = torch.full_like(case.labels, -100)
    with pytest.raises(ZeroDivisionError):
        module()(p, q, nothing)
    assert ours(case, "total_variation", nothing) == 0


@fault("liger_kernel")
def test_liger_triton_and_a_larger_teacher():
    """LigerFusedLinearJSDFunction: the teacher is normalised over its own vocabulary, and what it has beyond the
    student's is left out: no distribution any more, and no error."""
    case = fresh()
    larger = torch.cat([case.Wt, case.Wt[:9]])
    log_p = F.linear(case.ht, larger).log_softmax(-1)[:, :V]
    log_q = logits(case, bias=False)[0].log_softmax(-1)
    cut = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    theirs = liger_triton(case, 0.0, Wt=larger)
    assert relative(theirs, cut) < FLOAT32
    mine = ours(case, bias=False, teacher=Head(case.ht, larger), vocab="truncate")
    assert relative(mine, ours(case, bias=False)) < FLOAT32
    assert relative(theirs, mine) > 0.01
