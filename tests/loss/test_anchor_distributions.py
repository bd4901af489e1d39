"""Anchors that are a distribution, against the definition."""

import oracle
import pytest
import torch
from cases import HS, N, make, student, teacher
from definition import check, keep, mean
from oracle import sparse_pair, value
from teachers import ENGINES, entries

from kdfast import Head, Logits, Projected, SparseLogits, fused_kd_loss


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("teacher_grad", ["full", "projector", "none"])
@pytest.mark.parametrize("kind", ["head", "logits", "renormalize", "bucket"])
def test_anchor_to_a_distribution(kind, teacher_grad, reduction):
    """−Σ a·log p at τ = 1, of the projected teacher p; its gradient reaches the projector and nothing else."""
    case = make()
    indices, log_probs = entries(case)

    def target(c):
        if kind == "head":
            return Head(c.ht, c.Wt, c.bt, softcap=4.0)
        if kind == "logits":
            return Logits(oracle.logits(c.ht, c.Wt, c.bt, 1.0, 4.0))
        return SparseLogits(indices, log_probs, tail=kind)

    def expected(c):
        z_s = oracle.logits(c.hs, c.W, c.b)
        hp = torch.nn.functional.linear(c.ht, c.P, c.p)
        z_a = oracle.logits(hp, c.W.detach(), c.b.detach())
        z_t = {"full": oracle.logits(hp, c.W, c.b), "projector": z_a, "none": z_a.detach()}[teacher_grad]
        kd = value("forward_kl", (z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1))
        if kind in ("head", "logits"):
            a = oracle.logits(c.ht, c.Wt, c.bt, 1.0, 4.0).softmax(-1)
            anchor = -(a * z_a.log_softmax(-1)).sum(-1)
        else:
            log_a, log_z = sparse_pair(indices, log_probs, kind, z_a, 1.0)
            anchor = -torch.where(log_a.isneginf(), 0, log_a.exp() * log_z.masked_fill(log_a.isneginf(), 0)).sum(-1)
        ce = torch.nn.functional.cross_entropy(z_s, c.labels.clamp_min(0), reduction="none")
        rows = (4 * kd + 0.3 * anchor + 0.5 * ce) * keep(c)
        return rows if reduction == "none" else rows.sum() / keep(c).sum()

    check(
        expected, case, lambda c: teacher(c, "projected"), teacher_grad=teacher_grad, reduction=reduction,
        anchor_weight=0.3, ce_weight=0.5, **{"anchor_targets": target(case)},
    )  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("asked", [0.0, 0.3])
def test_anchor_metric_of_a_distribution(engine, asked):
    case = make()
    z_a = oracle.logits(torch.nn.functional.linear(case.ht, case.P, case.p), case.W, case.b)
    a = oracle.logits(case.ht, case.Wt, case.bt).softmax(-1)
    loss, metrics = fused_kd_loss(
        student(case), teacher(case, "projected"), case.labels, anchor_weight=asked,
        anchor_targets=Head(case.ht, case.Wt, case.bt), return_metrics=True, engine=engine,
    )  # fmt: skip
    expected = mean(-(a * z_a.log_softmax(-1)).sum(-1), keep(case))
    torch.testing.assert_close(metrics.anchor, expected.detach().float())
    loss.backward()
    assert case.P.grad.any()


def test_a_projected_hidden_gets_the_anchors_gradient():
    case = make()
    hp = torch.randn(N, HS, dtype=torch.float64, requires_grad=True)
    fused_kd_loss(
        student(case), Projected(hp), teacher_grad="none", anchor_weight=1.0,
        anchor_targets=Head(case.ht, case.Wt, case.bt), kd_weight=0.0,
    ).backward()  # fmt: skip
    z = oracle.logits(hp, case.W.detach(), case.b.detach())
    a = oracle.logits(case.ht, case.Wt, case.bt).softmax(-1)
    (expected,) = torch.autograd.grad(-(a * z.log_softmax(-1)).sum(-1).mean(), hp)
    torch.testing.assert_close(hp.grad, expected)
    assert not case.W.grad.any()
