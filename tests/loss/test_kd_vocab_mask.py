"""`kd_vocab_mask`: the KD term over some of the ids, the rest of the loss over all of them."""

import oracle
import pytest
import torch
from cases import V, copy, gradients, make, relative, student, teacher
from definition import EVERY, check, keep, mean
from near_convergence import errors_of_rows
from oracle import sparse_pair, value
from teachers import ENGINES, entries, own_logits

from kdfast import Logits, SparseLogits, fused_kd_loss
from kdfast.frontend import checks
from kdfast.training.teachers.fidelity import fidelity

IDS = torch.arange(V)
MASK = (IDS * 7 % 11 < 6) & (IDS != 40)
HERE = MASK.nonzero().squeeze(1)
HEAD = {"logit_scale": 1.3, "softcap": 9.0}


def student_logits(c):
    return oracle.logits(c.hs, c.W, c.b, 1.3, 9.0)


def projected_logits(c):
    return oracle.logits(torch.nn.functional.linear(c.ht, c.P, c.p), c.W, c.b, 1.3, 9.0)


@pytest.mark.parametrize("divergence", [*EVERY, "alpha_beta"], ids=str)
def test_every_divergence(divergence):
    """A projected teacher, its anchor and the cross entropy over all ids."""

    def expected(c):
        z_s, z_t = student_logits(c), projected_logits(c)
        log_p, log_q = ((z[:, HERE] / 2).log_softmax(-1) for z in (z_t, z_s))
        fixed = replace_head(c)
        anchor = torch.nn.functional.cross_entropy(projected_logits(fixed), c.labels)
        ce = torch.nn.functional.cross_entropy(z_s, c.labels)
        return 4 * mean(value(divergence, log_p, log_q), keep(c)) + 0.5 * ce + 0.3 * anchor

    options = {"divergence": divergence, "ce_weight": 0.5, "anchor_weight": 0.3, "head": HEAD}
    check(expected, make(), lambda c: teacher(c, "projected"), kd_vocab_mask=MASK, **options)


def replace_head(c):
    """The same case, of whose head no gradient is taken."""
    fixed = copy(c)
    fixed.W, fixed.b, fixed.P, fixed.p = c.W.detach(), c.b.detach(), c.P, c.p
    return fixed


@pytest.mark.parametrize("kind", ["head", "logits"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_kl"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_a_teacher_whose_other_ids_hold_anything(kind, divergence, ce_weight):
    case = make()
    with torch.no_grad():
        case.Wt[~MASK] = torch.nan
        case.bt[~MASK] = torch.inf

    def expected(c):
        z_s, z_t = student_logits(c), oracle.logits(c.ht, c.Wt[HERE], c.bt[HERE])
        kd = mean(value(divergence, (z_t / 2).log_softmax(-1), (z_s[:, HERE] / 2).log_softmax(-1)), keep(c))
        return 4 * kd + ce_weight * torch.nn.functional.cross_entropy(z_s, c.labels)

    def source(c):
        return teacher(c, "head") if kind == "head" else Logits(own_logits(c))

    options = {"divergence": divergence, "ce_weight": ce_weight, "head": HEAD}
    check(expected, case, source, kd_vocab_mask=MASK, **options)


@pytest.mark.parametrize("kind", ["head", "logits"])
def test_over_a_smaller_teacher_vocabulary_and_padding(kind):
    case = make()
    small = make(v=70, seed=3)
    case.Wt, case.bt = small.Wt, small.bt
    case.labels.clamp_(max=89)
    here = HERE[HERE < 70]

    def expected(c):
        z_s, z_t = oracle.logits(c.hs, c.W, c.b)[:, :90], oracle.logits(c.ht, c.Wt, c.bt)
        log_p, log_q = ((z[:, here] / 2).log_softmax(-1) for z in (z_t, z_s))
        return 4 * mean(value("jsd", log_p, log_q), keep(c)) + 0.5 * torch.nn.functional.cross_entropy(z_s, c.labels)

    def source(c):
        return teacher(c, "head") if kind == "head" else Logits(own_logits(c))

    options = {"divergence": "jsd", "ce_weight": 0.5, "vocab": "truncate", "valid_vocab": 90}
    check(expected, case, source, kd_vocab_mask=MASK, **options)


@pytest.mark.parametrize("tail", ["renormalize", "bucket", "none", "renormalize_both"])
def test_entries_of_a_sparse_teacher(tail):
    """Those of other ids are dropped; a bucket's mass is that of the ids that are not given and compared."""
    case = make()
    indices, log_probs = entries(case, k=9)
    indices[:, 0], log_probs[:, 0] = HERE[3], -3.0
    tau = 1.0 if tail == "none" else 2.0
    log_tail = torch.full((len(indices),), -2.0).double() if tail == "bucket" else None
    dropped = ~MASK[indices]
    position = torch.where(dropped, 0, MASK.cumsum(0)[indices] - 1)
    assert 0.2 < dropped.double().mean() < 0.8

    def expected(c):
        z_s = oracle.logits(c.hs, c.W, c.b)
        pair = sparse_pair(
            position, log_probs.masked_fill(dropped, -torch.inf), tail, z_s[:, HERE], tau, log_tail=log_tail
        )  # fmt: skip
        kd = tau**2 * mean(value("forward_kl", *pair), keep(c))
        return kd + 0.5 * torch.nn.functional.cross_entropy(z_s, c.labels)

    def source(c):
        return SparseLogits(indices, log_probs, tail=tail, log_tail=log_tail)

    check(expected, case, source, kd_vocab_mask=MASK, ce_weight=0.5, temperature=tau)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_id_given_is_the_dense_teacher(engine):
    """A masked distribution as entries, some of them in no order, and as logits."""
    case = make()
    log_p = own_logits(case).log_softmax(-1)
    indices = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(0)) for _ in case.labels])
    source = SparseLogits(indices, log_p.gather(1, indices))
    found = []
    for given in (Logits(own_logits(case)), source):
        c = copy(case)
        loss = fused_kd_loss(student(c), given, c.labels, kd_vocab_mask=MASK, ce_weight=0.5, engine=engine)
        loss.backward()
        found.append((loss.detach(), gradients(c)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["projected", "head", "sparse"])
def test_metrics(engine, kind):
    """The student's own entropy, and a projected teacher's, over all ids; another's and the agreement over the mask."""
    case = make()
    with torch.no_grad():
        case.b[40] += 50  # the student's favourite is an id that the mask leaves out
        case.bt[40] += 80
    z_s, z_t = oracle.logits(case.hs, case.W, case.b).detach(), own_logits(case)
    source = teacher(case, "head" if kind == "sparse" else kind)
    if kind == "projected":
        z_t = oracle.logits(torch.nn.functional.linear(case.ht, case.P, case.p), case.W, case.b).detach()
    if kind == "sparse":
        z_t[:, 40] = -torch.inf
        source = SparseLogits(*reversed(z_t[:, HERE].log_softmax(-1).topk(5)))
        source = SparseLogits(HERE[source.indices], source.log_probs)
    _, metrics = fused_kd_loss(
        student(case), source, case.labels, kd_vocab_mask=MASK, return_metrics=True, engine=engine, ce_weight=1.0,
    )  # fmt: skip
    w = keep(case)
    entropies = [
        mean(torch.distributions.Categorical(logits=z).entropy(), w).float()
        for z in (z_s, z_t if kind == "projected" else z_t[:, HERE])
    ]
    torch.testing.assert_close(metrics.student_entropy, entropies[0])
    if kind != "sparse":
        torch.testing.assert_close(metrics.teacher_entropy, entropies[1])
    agree = mean((z_s[:, HERE].argmax(-1) == z_t[:, HERE].argmax(-1)).double(), w)
    torch.testing.assert_close(metrics.agreement, agree.float())
    torch.testing.assert_close(metrics.ce, torch.nn.functional.cross_entropy(z_s, case.labels).float())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_mask_of_all_ids_is_none(engine, reduction):
    found = []
    for mask in (None, MASK | True):
        c = make()
        loss = fused_kd_loss(
            student(c), teacher(c, "projected"), c.labels, kd_vocab_mask=mask, ce_weight=0.5, anchor_weight=0.1,
            engine=engine, reduction=reduction,
        )  # fmt: skip
        loss.sum().backward()
        found.append((loss.detach(), gradients(c)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["projected", "head"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_an_id_outside_has_all_of_the_mass(engine, kind, divergence):
    """In float32 the KD term has its own maxima, so it loses no digit to the student's favourite, nor to a token of the
    teacher's that it does not see."""
    case = make()
    with torch.no_grad():
        case.b[40], case.bt[40] = 300, 300

    def solve(dtype, engine):
        c = copy(copy(case, torch.float32), dtype)
        loss = fused_kd_loss(
            student(c), teacher(c, kind), c.labels, kd_vocab_mask=MASK, ce_weight=0.01, divergence=divergence,
            engine=engine, anchor_weight=0.01 * (kind == "projected"),
        )  # fmt: skip
        loss.backward()
        return loss.detach(), gradients(c)

    (exact, expected), (ours, found) = solve(torch.float64, "reference"), solve(torch.float32, engine)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) < 2e-5, name


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skew_reverse_kl"])
def test_near_convergence(divergence):
    """The kernels': tests/engines/test_device_accuracy.py."""
    assert errors_of_rows(divergence, "torch", torch.float32, mask=torch.arange(3001) % 5 > 1).max() <= 4e-6


WRONG = {
    "float": (MASK.float(), TypeError, "kd_vocab_mask has dtype torch.float32; expected torch.bool"),
    "list": (MASK.tolist(), TypeError, "kd_vocab_mask is list; expected a bool tensor"),
    "ids": (HERE, TypeError, "kd_vocab_mask has dtype torch.int64; expected torch.bool"),
    "short": (MASK[1:], ValueError, r"kd_vocab_mask is \(100,\); expected \(101,\), one per row"),
    "rows": (MASK[None], ValueError, r"kd_vocab_mask is \(1, 101\); expected \(101,\)"),
    "device": (MASK.to("meta"), ValueError, "kd_vocab_mask is on meta and student: Head.hidden on cpu"),
    "nothing": (MASK & False, ValueError, "kd_vocab_mask is False at every id that both sides have"),
    "padding alone": (IDS >= 90, ValueError, "kd_vocab_mask is False at every id that both sides have"),
    "sparse": (MASK.to_sparse(), TypeError, "kd_vocab_mask is a torch.sparse_coo tensor"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_mask_is_an_error(what):
    mask, error, message = WRONG[what]
    case = make()
    case.labels.clamp_(max=89)
    with pytest.raises(error, match=message):
        fused_kd_loss(student(case), teacher(case, "head"), case.labels, kd_vocab_mask=mask, valid_vocab=90)


def test_a_sparse_teacher_that_the_mask_leaves_nothing_of_is_an_error():
    case = make()
    indices, log_probs = entries(case, k=2)
    indices[:] = HERE[:2]
    indices[1] = (~MASK).nonzero().squeeze(1)[:2]
    with pytest.raises(ValueError, match=r"no entry in row 1, which counts.* or is False in kd_vocab_mask"):
        fused_kd_loss(student(case), SparseLogits(indices, log_probs), case.labels, kd_vocab_mask=MASK)
    case.labels[1] = -100
    assert fused_kd_loss(student(case), SparseLogits(indices, log_probs), case.labels, kd_vocab_mask=MASK).isfinite()


def test_a_bucket_whose_mass_would_be_on_other_ids_is_an_error():
    case = make()
    source = SparseLogits(*entries(case, k=3), tail="bucket")
    with pytest.raises(ValueError, match=r"kd_vocab_mask with .*tail='bucket' and no log_tail.* Pass log_tail"):
        fused_kd_loss(student(case), source, case.labels, kd_vocab_mask=MASK)


@pytest.mark.parametrize("kind", ["projected", "bucket"])
@pytest.mark.parametrize("engine", ENGINES)
def test_where_it_cannot_be_read_a_mask_of_nothing_is_a_nan(engine, kind, monkeypatch):
    monkeypatch.setattr(checks, "can_read", lambda tensor: False)
    case = make()
    source = teacher(case, "projected")
    if kind == "bucket":
        source = SparseLogits(*entries(case, k=3), tail="bucket", log_tail=torch.full((len(case.labels),), -1.0))
    loss = fused_kd_loss(student(case), source, case.labels, kd_vocab_mask=MASK & False, engine=engine)
    assert loss.isnan()


def test_fidelity_is_of_the_compared_ids():
    case = make()
    found = fidelity(student(case), student(case), teacher(case, "head"), case.labels, kd_vocab_mask=MASK)
    log_p, log_q = (z[:, HERE].log_softmax(-1) for z in (own_logits(case), oracle.logits(case.hs, case.W, case.b)))
    expected = mean(value("forward_kl", log_p, log_q), keep(case))
    torch.testing.assert_close(found[:2], (expected.detach(), expected.detach()))


def test_without_a_teacher_it_changes_nothing():
    case = make()
    found = [
        fused_kd_loss(student(case), None, case.labels, ce_weight=1.0, kd_vocab_mask=mask) for mask in (None, MASK)
    ]
    assert torch.equal(*found)
