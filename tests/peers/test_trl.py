"""TRL's losses: hidden states and heads, then dense logits."""

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
    chunked_divergence,
    entropy,
    fault,
    fresh,
    gradients,
    logits,
    ours,
    peer,
)

from kdfast import JSD, Head, Logits, Projected, SparseLogits, fused_kd_loss

# hidden states and heads


@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("beta", BETAS)
def test_trl_rows(beta, temperature):
    """trl/kernels/chunked_divergence.py, ChunkedDivergenceFunction: one value a row, no labels, the same β."""
    case, upstream = fresh(), torch.linspace(-1, 2, N, device=DEVICE)
    theirs, _ = chunked_divergence(case, beta, temperature)
    mine = ours(case, JSD(beta), temperature=temperature, reduction="none")
    agree(theirs, mine, case.hs, case.W, case.b, upstream=upstream)


@pytest.mark.parametrize("beta", BETAS)
def test_trl_softcap_and_scale(beta):
    """As above: the scale multiplies the logits before the cap, on either side its own."""
    case = fresh()
    theirs, _ = chunked_divergence(case, beta, 2.0, 0.8, 5.0, 1.1, 7.0)
    mine = fused_kd_loss(
        Head(case.hs, case.W, case.b, logit_scale=0.8, softcap=5.0),
        Head(case.ht, case.Wt, case.bt, logit_scale=1.1, softcap=7.0),
        divergence=JSD(beta), temperature=2.0, temperature_squared=False, reduction="none",
    )  # fmt: skip
    agree(theirs.sum(), mine.sum(), case.hs, case.W, case.b)


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trl_trainer(beta, items):
    """trl/trainer/distillation_trainer.py, _chunked_divergence_loss: masked rows count for nothing, nor in the
    divisor, which num_items_in_batch replaces; nothing but masked rows is zero."""
    peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")  # before it, the loss had a chunk_size
    loss = peer("trl.trainer.distillation_trainer", "_chunked_divergence_loss")
    case = fresh(leading=(4, 5))
    for labels in (case.labels, torch.full_like(case.labels, -100)):
        theirs, _, _ = loss(
            case.hs, case.ht, case.W, case.Wt, labels != -100, beta, items, case.b, case.bt, temperature=2.0
        )
        mine = ours(case, JSD(beta), labels, temperature=2.0, num_items_in_batch=items)
        agree(theirs, mine, case.hs, case.W, case.b)


def test_trl_leaves_out_temperature_squared():
    """ChunkedDivergenceFunction: at τ the divergence itself; we multiply it by τ² unless told not to."""
    case = fresh()
    theirs, _ = chunked_divergence(case, 0.0, 3.0)
    mine = ours(case, temperature=3.0, temperature_squared=True, reduction="none")
    agree(9 * theirs, mine, case.hs, upstream=torch.ones(N, device=DEVICE))


def test_trl_entropy_is_taken_at_tau():
    """ChunkedDivergenceFunction's second result is the entropy of softmax(z/τ); our metric is at τ = 1."""
    case = fresh()
    _, metrics = ours(case, temperature=3.0, return_metrics=True)
    assert relative(chunked_divergence(case, 0.0, 1.0)[1].mean(), metrics.student_entropy) < FLOAT32
    assert relative(chunked_divergence(case, 0.0, 3.0)[1], entropy(logits(case)[0] / 3.0)) < FLOAT32


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_trl_cuts_a_larger_teacher():
    """ChunkedDivergenceFunction.forward takes the student's vocabulary size for both: a larger teacher is cut to the
    shared ids, without a word, and a smaller one fails on the shapes of tiles. Ours has to be asked."""
    case = fresh()
    larger = torch.cat([case.Wt, case.Wt[:9]])
    theirs, _ = chunked_divergence(case, 0.5, 2.0, bias=False, Wt=larger)
    mine = ours(
        case, "jsd", bias=False, teacher=Head(case.ht, larger), temperature=2.0, vocab="truncate", reduction="none"
    )
    agree(theirs.sum(), mine.sum(), case.hs, case.W)
    with pytest.raises(RuntimeError, match="size of tensor"):
        chunked_divergence(case, 0.5, bias=False, Wt=case.Wt[:90])
    with pytest.raises(ValueError, match="truncate"):
        ours(case, bias=False, teacher=Head(case.ht, larger))


@fault("trl")
@pytest.mark.parametrize(("beta", "divergence"), [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.5, "jsd")])
def test_trl_value_near_convergence(beta, divergence):
    """ChunkedDivergenceFunction.forward: a difference of two log-sum-exps plus a mean gap (β = 0 and 1), or a sum of
    terms of either sign. At a KL of 1e-6 that leaves one digit or two, ours three more; the gradients are fine."""
    case = fresh()
    case.Wt = case.W.detach()
    case.ht = (case.hs + 1e-3 * torch.randn_like(case.hs)).detach()
    theirs, _ = chunked_divergence(case, beta, bias=False)
    mine = ours(case, divergence, bias=False, reduction="none")
    hs, W, ht, Wt = (tensor.double() for tensor in (case.hs, case.W, case.ht, case.Wt))
    exact = fused_kd_loss(
        Head(hs, W), Head(ht, Wt), divergence=divergence, temperature=1.0, reduction="none", engine="reference"
    )
    assert relative(mine, exact) < 1e-3
    assert relative(theirs, exact) > 30 * relative(mine, exact)
    agree(theirs.sum(), mine.sum(), case.hs, case.W, value=1.0, gradient=1e-3)


@fault("trl")
@pytest.mark.parametrize("beta", BETAS)
def test_trl_is_nan_where_an_id_is_masked_on_both_sides(beta):
    """ChunkedDivergenceFunction.forward: −inf − (−inf), when padding rows of the vocabulary have a bias of −inf."""
    case = fresh()
    bias = torch.zeros(V, device=DEVICE)
    bias[-5:] = -torch.inf
    assert chunked_divergence(case, beta, bias=False, b=bias)[0].isnan().all()
    mine = fused_kd_loss(Head(case.hs, case.W, bias), Head(case.ht, case.Wt, bias), divergence=JSD(beta))
    assert mine.isfinite()
    assert all(g.isfinite().all() for g in gradients(mine, [case.hs, case.W]))


def test_trl_drops_a_gradient_that_the_teacher_asked_for():
    """ChunkedDivergenceFunction.backward returns none for the teacher's hidden states and weight, as Liger's do;
    fla and we refuse."""
    case = fresh()
    case.ht.requires_grad_()
    assert torch.autograd.grad(chunked_divergence(case, 0.0)[0].sum(), case.ht, allow_unused=True) == (None,)
    with pytest.raises(ValueError, match="detach"):
        ours(case)


# dense logits


TEACHERS = {
    "head": lambda case, z_t: Head(case.ht, case.Wt, case.bt),
    "logits": lambda case, z_t: Logits(z_t.detach()),
    "projected": lambda case, z_t: Projected(case.ht, case.P, case.p),
}


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("beta", BETAS)
def test_gkd(beta, temperature, kind):
    """trl/experimental/gkd/gkd_trainer.py, GKDTrainer.generalized_jsd_loss, on whole logits in float64. Through
    autograd it gives a projected teacher its gradient too: the projector's, and W's by both ways."""
    loss = peer("trl.experimental.gkd", "GKDTrainer").generalized_jsd_loss
    case = fresh(torch.float64)
    leaves = [case.hs, case.W, case.b]
    z_s, z_t = logits(case)
    if kind == "projected":
        z_t = F.linear(F.linear(case.ht, case.P, case.p), case.W, case.b)
        leaves += [case.P, case.p]
    teacher = TEACHERS[kind](case, z_t)
    for items in (None, 40):
        theirs = loss(z_s, z_t, case.labels, beta, temperature, num_items_in_batch=items)
        mine = ours(case, JSD(beta), case.labels, teacher=teacher, temperature=temperature, num_items_in_batch=items)
        agree(theirs, mine, *leaves, value=FLOAT64, gradient=FLOAT64)
    theirs = loss(z_s, z_t, case.labels, beta, temperature, reduction="sum")
    mine = ours(case, JSD(beta), case.labels, teacher=teacher, temperature=temperature, reduction="sum")
    agree(theirs, mine, *leaves, value=FLOAT64, gradient=FLOAT64)


def test_gkd_mean_divides_by_the_vocabulary_too():
    """generalized_jsd_loss, reduction="mean": the mean over rows and vocabulary. Our "mean" is its "batchmean"."""
    loss = peer("trl.experimental.gkd", "GKDTrainer").generalized_jsd_loss
    case = fresh(torch.float64)
    theirs = loss(*logits(case), case.labels, 0.5, 2.0, reduction="mean")
    agree(theirs * V, ours(case, "jsd", case.labels, temperature=2.0), case.hs, value=FLOAT64, gradient=FLOAT64)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_with_a_tail(temperature):
    """trl/experimental/iw_opd/iw_opd_trainer.py, IWOPDTrainer.generalized_jsd_loss with top_k and add_tail: the
    teacher's K first ids and one bucket for the rest. It has the whole teacher, so its bucket is the tail's mass at
    τ; ours knows the masses at τ = 1, and is the same loss where both logits are divided beforehand."""
    loss = peer("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer").generalized_jsd_loss
    case = fresh(torch.float64)
    z_s, z_t = logits(case)
    theirs = loss(z_s[None], z_t[None], case.labels[None], 0.0, temperature, top_k=7, add_tail=True)
    log_probs, ids = (z_t / temperature).log_softmax(-1).topk(7)
    mine = fused_kd_loss(
        Head(case.hs, case.W, case.b, logit_scale=1 / temperature),
        SparseLogits(ids, log_probs.detach(), tail="bucket"), case.labels, temperature=1.0,
    )  # fmt: skip
    agree(theirs, mine, case.hs, case.W, value=FLOAT64, gradient=FLOAT64)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_topk_without_a_tail(beta):
    """As above without add_tail: the student too is normalized over the K ids, so what mass it has elsewhere costs
    nothing. Normalized over the vocabulary its forward KL is the same plus −log of its mass on those ids."""
    loss = peer("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer").generalized_jsd_loss
    case = fresh(torch.float64)
    z_s, z_t = logits(case)
    theirs = loss(z_s[None], z_t[None], None, beta, top_k=7, add_tail=False, reduction="sum")
    log_p = z_t.detach().log_softmax(-1)
    log_probs, ids = log_p.topk(7)
    if beta:  # the student's K ids, or both's
        mine = z_s.detach().topk(7).indices
        support = mine if beta == 1 else torch.cat([ids, mine], dim=-1)
        again = (support[:, :, None] == support[:, None]).tril(-1).any(-1)
        both = SparseLogits(support, log_p.gather(-1, support).masked_fill(again, -torch.inf), tail="renormalize_both")
    else:
        both = SparseLogits(ids, log_probs, tail="renormalize_both")
    mine = ours(case, JSD(beta), teacher=both, reduction="sum")
    agree(theirs, mine, case.hs, case.W, value=FLOAT64, gradient=FLOAT64)
    if beta:
        return
    mine = ours(case, teacher=SparseLogits(ids, log_probs), reduction="sum")
    elsewhere = -z_s.log_softmax(-1).gather(-1, ids).logsumexp(-1).sum()
    agree(theirs + elsewhere, mine, case.hs, case.W, value=FLOAT64, gradient=FLOAT64)
