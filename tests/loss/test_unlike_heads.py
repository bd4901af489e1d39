"""A student and a teacher that differ in the size of their vocabulary, or in precision, against the definition."""

import oracle
import pytest
import torch
from cases import V, copy, make, student, teacher
from definition import RUNS, check, keep, mean
from oracle import sparse_pair, value
from teachers import ENGINES, entries

from kdfast import Logits, SparseLogits, fused_kd_loss


@pytest.mark.parametrize("vocab", [70, 64, 130])
@pytest.mark.parametrize("kind", ["head", "logits"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_truncated_vocabularies(vocab, kind, ce_weight):
    """KD over the shared first ids; the cross entropy over all of the student's."""
    case = make()
    big = make(v=vocab, seed=3)
    case.Wt, case.bt = big.Wt, big.bt
    shared = min(vocab, V)

    def expected(c):
        z_s = oracle.logits(c.hs, c.W, c.b, 1.3)
        z_t = oracle.logits(c.ht, c.Wt, c.bt)
        log_p, log_q = ((z[:, :shared] / 2).log_softmax(-1) for z in (z_t, z_s))
        loss = 4 * mean(value("jsd", log_p, log_q), keep(c))
        return loss + ce_weight * torch.nn.functional.cross_entropy(z_s, c.labels)

    def source(c):
        return teacher(c, "head") if kind == "head" else Logits(oracle.logits(c.ht, c.Wt, c.bt))

    options = {"divergence": "jsd", "ce_weight": ce_weight, "head": {"logit_scale": 1.3}}
    check(expected, case, source, vocab="truncate", **options)
    with pytest.raises(ValueError, match=r"vocabulary of .* valid_vocab=.* vocab='truncate'"):
        check(expected, case, source, runs=RUNS[:1], **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_over_a_smaller_teacher_vocabulary(engine):
    """The student's own entropy over all of its vocabulary; agreement over the shared ids."""
    case = make()
    z_s = oracle.logits(case.hs, case.W, case.b).detach()
    z_t = oracle.logits(case.ht, case.Wt, case.bt)[:, :70]
    with torch.no_grad():
        case.b[80] += 50  # the student's favourite is an id that the teacher does not have
    z_s = oracle.logits(case.hs, case.W, case.b).detach()
    loss, metrics = fused_kd_loss(
        student(case), Logits(z_t), case.labels, vocab="truncate", return_metrics=True, engine=engine, ce_weight=1.0
    )
    assert loss.isfinite()
    w = keep(case)
    entropies = [mean(torch.distributions.Categorical(logits=z).entropy(), w).float() for z in (z_s, z_t)]
    torch.testing.assert_close((metrics.student_entropy, metrics.teacher_entropy), tuple(entropies))
    agree = mean((z_s[:, :70].argmax(-1) == z_t.argmax(-1)).double(), w)
    torch.testing.assert_close(metrics.agreement, agree.float())
    torch.testing.assert_close(metrics.ce, torch.nn.functional.cross_entropy(z_s, case.labels).float())


@pytest.mark.parametrize("kind", ["head", "logits"])
def test_a_teacher_padded_more_than_the_student(kind):
    """As 152064 against 151936 rows, of which 151665 are real: no padding of either has any probability."""
    case = make()
    big = make(v=V + 27, seed=3)
    case.Wt, case.bt = big.Wt, big.bt
    case.labels.clamp_(max=89)

    def expected(c):
        z_s = oracle.logits(c.hs, c.W, c.b)[:, :90]
        z_t = oracle.logits(c.ht, c.Wt, c.bt)[:, :90]
        kd = mean(value("forward_kl", (z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1)), keep(c))
        return 4 * kd + 0.5 * torch.nn.functional.cross_entropy(z_s, c.labels)

    def source(c):
        return teacher(c, "head") if kind == "head" else Logits(oracle.logits(c.ht, c.Wt, c.bt))

    check(expected, case, source, valid_vocab=90, ce_weight=0.5)


def test_sparse_ids_past_the_vocabulary():
    """Padding ids of the student, and with vocab="truncate" ids it does not have, are left out of the teacher."""
    case = make()
    case.labels.clamp_(max=89)
    indices, log_probs = entries(case, k=9)
    indices[:, 2] = 95  # padding
    strange = torch.where(indices == 95, 4000, indices)
    with pytest.raises(ValueError, match=r"SparseLogits.indices contains 4000; expected ids from 0 to 100"):
        fused_kd_loss(student(case), SparseLogits(strange, log_probs))
    inside = indices < 90
    kept = torch.where(inside, log_probs, -torch.inf)

    def expected(c):
        z_s = oracle.logits(c.hs, c.W, c.b)[:, :90]
        return 4 * mean(value("forward_kl", *sparse_pair(indices, kept, "renormalize", z_s, 2.0)), keep(c))

    check(expected, case, lambda c: SparseLogits(indices, log_probs), valid_vocab=90)
    check(expected, case, lambda c: SparseLogits(strange, log_probs), valid_vocab=90, vocab="truncate")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wide", ["student", "teacher"])
def test_one_head_in_float64_and_one_in_float32(engine, wide):
    case = make(n=6)
    own, other = (torch.float64, torch.float32) if wide == "student" else (torch.float32, torch.float64)
    c, given = copy(copy(case, torch.float32), own), copy(copy(case, torch.float32), other)
    exact = copy(copy(case, torch.float32))
    truth = fused_kd_loss(student(exact), teacher(exact, "head"), engine="reference")
    loss = fused_kd_loss(student(c), teacher(given, "head"), engine=engine)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=0)
