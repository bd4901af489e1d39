"""The peers' losses and ours, values and gradients: equal wherever they define the same thing; where they do not, a
test says which convention of theirs, or which fault, makes the difference, and shows it.

TRL, Liger, torchtune and flash-linear-attention (fla); a peer that is not installed skips its tests. Faults are shown
for the version they were seen in, and skipped in any other. Without a GPU the peers' Triton kernels run in Triton's
interpreter. None of the peers applies τ²: `ours` leaves it out.
"""

import functools
import importlib.util
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import LEAVES, N, V, make, relative

from kdfast import JSD, Head, Logits, Projected, SparseLogits, fused_kd_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = {"trl": "1.16.0", "liger_kernel": "0.8.5", "torchtune": "0.6.1", "fla-core": "0.6.0"}
FLOAT32, FLOAT64 = 1e-5, 1e-11  # relative, in the norm
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]  # the ends are forward and reverse KL


def fault(package):
    """A test that shows a fault: later versions may have mended it."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "none"
    seen = VERSIONS[package]
    return pytest.mark.skipif(installed != seen, reason=f"seen in {package} {seen}; installed: {installed}")


def peer(module, name):
    """A name of a peer's module, or a skip. What its import warns of is the peer's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(pytest.importorskip(module, exc_type=ImportError), name)


def fresh(dtype=torch.float32, **sizes):
    """A case of normal inputs on the device at hand."""
    case = make(dtype, **sizes)
    for name, tensor in list(vars(case).items()):
        setattr(case, name, tensor.detach().to(DEVICE).requires_grad_(name in LEAVES))
    return case


def ours(case, divergence="forward_kl", labels=None, *, bias=True, teacher=None, **options):
    """Without τ², with the teacher's own head."""
    b, bt = (case.b, case.bt) if bias else (None, None)
    options = {"temperature": 1.0, "temperature_squared": False, "divergence": divergence} | options
    return fused_kd_loss(Head(case.hs, case.W, b), teacher or Head(case.ht, case.Wt, bt), labels, **options)


def logits(case, bias=True):
    """(student's, teacher's), whole: what a peer that works on logits is given."""
    b, bt = (case.b, case.bt) if bias else (None, None)
    return F.linear(case.hs, case.W, b), F.linear(case.ht, case.Wt, bt)


def entropy(z):
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


def gradients(loss, leaves, upstream=None):
    """Taken with the graph kept, and copied: a peer may write to what it returned."""
    return [g.clone() for g in torch.autograd.grad(loss, leaves, upstream, retain_graph=True)]


def agree(theirs, mine, *leaves, value=FLOAT32, gradient=FLOAT32, upstream=None):
    assert theirs.shape == mine.shape
    assert relative(theirs, mine) < value
    pairs = zip(gradients(theirs, leaves, upstream), gradients(mine, leaves, upstream), strict=True)
    for index, (one, other) in enumerate(pairs):
        assert relative(one, other) < gradient, index


# ---- TRL: hidden states and heads


def chunked_divergence(case, beta, temperature=1.0, *options, bias=True, b=None, Wt=None):
    """(rows of the divergence, rows of the student's entropy)."""
    function = peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    b, bt = (case.b, case.bt) if bias else (b, b)
    Wt = case.Wt if Wt is None else Wt
    return function.apply(case.hs, case.W, b, case.ht, Wt, bt, beta, temperature, *options)


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


# ---- TRL: dense logits


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


def test_topk_without_a_tail():
    """As above without add_tail: the student too is renormalised over the K ids, so what mass it has elsewhere costs
    nothing. Ours is normalised over the vocabulary: the same plus −log of its mass on those ids."""
    loss = peer("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer").generalized_jsd_loss
    case = fresh(torch.float64)
    z_s, z_t = logits(case)
    log_probs, ids = z_t.log_softmax(-1).topk(7)
    theirs = loss(z_s[None], z_t[None], None, 0.0, top_k=7, add_tail=False, reduction="sum")
    mine = ours(case, teacher=SparseLogits(ids, log_probs.detach()), reduction="sum")
    elsewhere = -z_s.log_softmax(-1).gather(-1, ids).logsumexp(-1).sum()
    agree(theirs + elsewhere, mine, case.hs, case.W, value=FLOAT64, gradient=FLOAT64)


# ---- Liger: hidden states and heads


def liger(case, beta, labels, *, bias=True, Wt=None, bt=None, **options):
    module = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0} | options
    b, bt = (case.b, case.bt) if bias else (None, bt)
    Wt = case.Wt if Wt is None else Wt
    return module(beta=beta, compiled=False, **options)(case.hs, case.W, case.ht, Wt, labels, b, bt)


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


def liger_triton(case, beta, labels=None, temperature=1.0, Wt=None):
    module = peer("liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD")
    Wt = case.Wt if Wt is None else Wt
    return module(jsd_beta=beta, temperature=temperature)(case.hs, case.W, case.ht, Wt, labels)


def liger_kl(case, labels=None, temperature=1.0):
    module = peer("liger_kernel.transformers.fused_linear_kl_div", "LigerFusedLinearKLDivLoss")
    probabilities = (logits(case, bias=False)[1] / temperature).softmax(-1)
    return module(temperature=temperature)(case.hs, case.W, probabilities, labels)


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


# ---- fla: hidden states and heads


def fla(case, Wt=None):
    module = peer("fla.modules.fused_kl_div", "FusedKLDivLoss")
    return module()(case.hs, case.ht, case.W, case.Wt if Wt is None else Wt)


def test_fla():
    """fla/modules/fused_kl_div/ops.py, FusedKLDivLossFunction: forward KL at τ = 1, no bias, no labels."""
    case = fresh()
    agree(fla(case), ours(case, bias=False), case.hs, case.W)


@fault("fla-core")
def test_fla_and_a_larger_teacher():
    """As above, kl_div_kernel: rows of the teacher's logits are found by the student's stride, so that a larger
    vocabulary shifts every row but a chunk's first: wrong, and no error."""
    case = fresh()
    larger = torch.cat([case.Wt, case.Wt[:9]])
    mine = ours(case, bias=False, teacher=Head(case.ht, larger), vocab="truncate")
    assert relative(fla(case, larger), mine) > 0.01


# ---- second backward and second derivative


@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        pytest.param(liger_kl, 0.5, marks=fault("liger_kernel")),
        pytest.param(lambda case: liger_triton(case, 0.5), 0.5, marks=fault("liger_kernel")),
        pytest.param(fla, 0.5, marks=fault("fla-core")),
        pytest.param(lambda case: liger(case, 0.5, case.labels), 1.0),
        pytest.param(lambda case: chunked_divergence(case, 0.5)[0].mean(), 1.0),
        pytest.param(lambda case: ours(case, "jsd", bias=False), 1.0),
    ],
    ids=["liger_kl", "liger_triton", "fla", "liger", "trl", "ours"],
)
def test_second_backward(loss, factor):
    """fused_linear_kl_div_backward, fused_linear_jsd_backward and fla's fused_kl_div_bwd multiply the saved gradient
    by the upstream one where it lies, by a kernel that autograd can't see: half a loss has a quarter of the gradient
    in the second backward, an eighth in the third."""
    case = fresh()
    half = loss(case) / 2
    first, second = gradients(half, [case.hs]), gradients(half, [case.hs])
    assert relative(second[0], first[0] * factor) < FLOAT32


@pytest.mark.parametrize(
    "loss",
    [liger_kl, lambda case: liger_triton(case, 0.5), lambda case: liger(case, 0.5, case.labels), fla],
    ids=["liger_kl", "liger_triton", "liger", "fla"],
)
def test_second_derivative_is_left_out_without_a_word(loss):
    """Gradients taken in the forward and returned as constants: a gradient penalty would see no gradient."""
    case = fresh()
    (gradient,) = torch.autograd.grad(loss(case), case.hs, create_graph=True)
    assert not gradient.requires_grad


def test_second_derivative_is_refused():
    """ChunkedDivergenceFunction.backward: an error about out=; ours names the engine that has them."""
    case = fresh()
    theirs = chunked_divergence(case, 0.0)[0].sum()
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        torch.autograd.grad(theirs, case.hs, create_graph=True)
    (gradient,) = torch.autograd.grad(ours(case), case.hs, create_graph=True)
    with pytest.raises(RuntimeError, match="engine='reference'"):
        gradient.sum().backward()


# ---- torchtune: dense logits


@functools.cache
def torchtune(name):
    """A class of torchtune/modules/loss/kd_losses.py, from that file, which needs torch alone; the package would want
    torchao, of a version without torch 2.13's in it, and six more to be imported."""
    package = importlib.util.find_spec("torchtune")
    if package is None:
        pytest.skip("could not import 'torchtune'")
    file = Path(package.submodule_search_locations[0]) / "modules/loss/kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_torchtune_forward_kl_is_a_cross_entropy(temperature):
    """ForwardKLLoss is −Σ p·log q: the teacher's entropy more than KL(p‖q), and towards the student the same gradient.
    It has no temperature: the logits are divided beforehand."""
    case = fresh()
    z_s, z_t = (z / temperature for z in logits(case))
    theirs = torchtune("ForwardKLLoss")()(z_s, z_t, case.labels)
    constant = entropy(z_t)[case.labels != -100].mean()
    assert constant > 1
    mine = ours(case, labels=case.labels, temperature=temperature)
    agree(theirs - constant, mine, case.hs, case.W, case.b)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_torchtune_reverse_kl(temperature):
    """ReverseKLLoss: KL(q‖p), the mean over rows that count; normalize=False is the sum."""
    case = fresh()
    z_s, z_t = (z / temperature for z in logits(case))
    for normalize, reduction in ((True, "mean"), (False, "sum")):
        theirs = torchtune("ReverseKLLoss")()(z_s, z_t, case.labels, normalize)
        mine = ours(case, "reverse_kl", case.labels, temperature=temperature, reduction=reduction)
        agree(theirs, mine, case.hs, case.W, case.b)


@pytest.mark.parametrize(("ratio", "divergence"), [(0.0, "reverse_kl"), (0.5, "symmetric_kl"), (1.0, "forward_kl")])
def test_torchtune_symmetric_kl(ratio, divergence):
    """SymmetricKLLoss: sym_kd_ratio of the forward one, as above with the teacher's entropy, and the rest of the
    reverse. Ours is their mean, ½ each."""
    case = fresh()
    z_s, z_t = logits(case)
    theirs = torchtune("SymmetricKLLoss")(sym_kd_ratio=ratio)(z_s, z_t, case.labels)
    constant = ratio * entropy(z_t)[case.labels != -100].mean()
    agree(theirs - constant, ours(case, divergence, case.labels), case.hs, case.W, case.b)


@pytest.mark.parametrize("kind", ["Forward", "Reverse", "Symmetric"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_torchtune_chunked_output(kind, chunks):
    """ForwardKLWithChunkedOutputLoss and the others: lists of logits, whole all the same; the losses above."""
    case = fresh(leading=(4, 6))
    z_s, z_t = logits(case)
    loss = torchtune(f"{kind}KLWithChunkedOutputLoss")(num_output_chunks=chunks)
    theirs = loss(list(z_s.chunk(chunks, 1)), list(z_t.chunk(chunks, 1)), case.labels)
    share = {"Forward": 1.0, "Reverse": 0.0, "Symmetric": 0.5}[kind]
    constant = share * entropy(z_t)[case.labels != -100].mean()
    agree(theirs - constant, ours(case, f"{kind.lower()}_kl", case.labels), case.hs, case.W, case.b)


@pytest.mark.parametrize("kind", ["Forward", "Reverse"])
def test_torchtune_and_a_teacher_that_learns(kind):
    """A projected teacher through ForwardKLLoss gets the gradient of the cross entropy, which is the KL's less that of
    its entropy: far from it. Through ReverseKLLoss it is right."""
    case = fresh()
    projected = F.linear(case.ht, case.P, case.p)
    z_s, z_t = F.linear(case.hs, case.W, case.b), F.linear(projected, case.W, case.b)
    theirs = torchtune(f"{kind}KLLoss")()(z_s, z_t, case.labels)
    mine = ours(case, f"{kind.lower()}_kl", case.labels, teacher=Projected(case.ht, case.P, case.p))
    leaves = (case.hs, case.W, case.b, case.P, case.p)
    if kind == "Forward":
        difference = relative(gradients(theirs, [case.P])[0], gradients(mine, [case.P])[0])
        assert difference > 0.1
        theirs = theirs - entropy(z_t)[case.labels != -100].mean()
    agree(theirs, mine, *leaves)


@fault("torchtune")
def test_torchtune_of_ignored_rows_alone():
    """A constant without a graph, whose backward is an error; NaN from the reverse and symmetric chunked ones. Ours
    is 0 with gradients of 0."""
    case = fresh(leading=(4, 6))
    nothing = torch.full_like(case.labels, -100)
    z_s, z_t = logits(case)
    for kind in ("Forward", "Reverse", "Symmetric"):
        loss = torchtune(f"{kind}KLLoss")()(z_s.flatten(0, 1), z_t.flatten(0, 1), nothing.flatten())
        assert loss == 0
        assert not loss.requires_grad
        chunked = torchtune(f"{kind}KLWithChunkedOutputLoss")(num_output_chunks=1)([z_s], [z_t], nothing)
        assert chunked.isnan() == (kind != "Forward")
    mine = ours(case, "symmetric_kl", nothing)
    assert mine == 0
    assert all((g == 0).all() for g in gradients(mine, [case.hs, case.W]))


@fault("torchtune")
def test_torchtune_and_ids_without_mass():
    """ForwardKLLoss, ReverseKLLoss: a term that has an infinite logit is left out. So an id the teacher has and the
    student cannot produce costs nothing, where KL(p‖q) is infinite; and where it is masked on both sides the reverse
    loss is right and its gradient NaN."""
    case = fresh()
    masked = torch.zeros(V, device=DEVICE)
    masked[-5:] = -torch.inf
    z_s, z_t = logits(case, bias=False)
    student = Head(case.hs, case.W, masked)
    assert torchtune("ForwardKLLoss")()(z_s + masked, z_t, case.labels).isfinite()
    assert fused_kd_loss(student, Logits(z_t), case.labels).isposinf()
    theirs = torchtune("ReverseKLLoss")()(z_s + masked, z_t + masked, case.labels)
    mine = fused_kd_loss(student, Logits(z_t + masked), case.labels, divergence="reverse_kl", temperature=1.0)
    assert relative(theirs, mine) < FLOAT32
    assert gradients(theirs, [case.hs])[0].isnan().any()
    assert gradients(mine, [case.hs])[0].isfinite().all()


@fault("torchtune")
def test_torchtune_drops_chunks():
    """The chunked ones zip their lists: of logits in fewer chunks than num_output_chunks, here three of eight, the
    rest of the tokens is left out of the sum, not of the divisor."""
    case = fresh(leading=(2, 16))
    z_s, z_t = logits(case)
    loss = torchtune("ReverseKLWithChunkedOutputLoss")(num_output_chunks=8)
    theirs = loss(list(z_s.chunk(8, 1))[:3], list(z_t.chunk(8, 1))[:3], case.labels)
    part = case.labels.clone()
    part[:, 6:] = -100
    mine = ours(case, "reverse_kl", part, num_items_in_batch=int((case.labels != -100).sum()))
    assert relative(theirs, mine) < FLOAT32
