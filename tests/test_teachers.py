"""Teachers that are given rather than computed, vocabularies of different size, anchors that are a distribution.

Each against its definition written out again over whole float64 logits, values and every leaf's gradient, every engine.
"""

import math

import oracle
import pytest
import torch
from cases import HS, N, V, copy, gradients, make, relative, student, teacher
from oracle import sparse_pair, value

from kdfast import JSD, Head, Logits, Projected, SkewKL, SkewReverseKL, SparseLogits, fused_kd_loss

SMALL = 5 * 2 * V * 8  # bytes: chunks of five tokens, slabs of one tile
RUNS = [("reference", None), ("torch", None), ("torch", SMALL), ("triton_chunked", 2 * SMALL), ("triton_tiled", SMALL)]
ENGINES = ["reference", "torch", "triton_chunked", "triton_tiled"]
EVERY = ["forward_kl", "reverse_kl", "symmetric_kl", JSD(0.3), SkewKL(0.2), SkewReverseKL(0.2), "total_variation"]


def mean(rows, weights):
    return (weights * torch.where(weights > 0, rows, 0)).sum() / weights.sum()


def check(expected, case, source, *, runs=RUNS, tolerance=1e-9, head=None, labels=True, **options):
    """`expected(case)` is the loss of a copy of `case`; `source(case)` its teacher."""
    theirs = copy(case)
    loss = expected(theirs)
    loss.sum().backward()
    assert loss.isfinite().all()
    for engine, scratch in runs:
        ours = copy(case)
        computed = fused_kd_loss(
            student(ours, **(head or {})), source(ours), ours.labels if labels else None, engine=engine,
            scratch_bytes=scratch, **options,
        )  # fmt: skip
        computed.sum().backward()
        torch.testing.assert_close(computed, loss, rtol=tolerance, atol=1e-11, msg=lambda m, e=engine: f"{e}: {m}")
        for name, gradient in gradients(ours).items():
            assert relative(gradient, gradients(theirs)[name]) < tolerance, (engine, scratch, name)


def keep(case):
    return (case.labels != -100).double()


# dense logits


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_dense_logits(divergence):
    case = make()
    z_t = oracle.logits(case.ht, case.Wt, case.bt).detach()

    def expected(c):
        z_s = oracle.logits(c.hs, c.W, c.b)
        kd = mean(value(divergence, (z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1)), keep(c))
        return 4 * kd + 0.5 * torch.nn.functional.cross_entropy(z_s, c.labels)

    check(expected, case, lambda c: Logits(z_t), divergence=divergence, ce_weight=0.5)


@pytest.mark.parametrize("engine", ENGINES)
def test_dense_logits_of_any_strides_are_read_in_place(engine):
    """A slice of a batch, (2, 7 of 8, V) with every other entry: flattening it would copy it."""
    case = make(n=14, leading=(2, 7))
    storage = torch.randn(2, 8, 2 * V, dtype=torch.float64)
    z_t = storage[:, :-1, ::2]
    with pytest.raises(RuntimeError, match="view"):
        z_t.view(-1, V)
    losses = []
    for logits in (z_t, z_t.contiguous()):
        c = copy(case)
        loss = fused_kd_loss(student(c), Logits(logits), c.labels, engine=engine, scratch_bytes=SMALL)
        loss.backward()
        losses.append((loss.detach(), c.W.grad, c.hs.grad))
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_logits_of_another_dtype(engine, dtype):
    case = make(torch.float32)
    z_t = torch.randn(N, V).to(dtype)
    losses = []
    for logits in (z_t, z_t.double()):
        c = copy(case, torch.float32)
        loss = fused_kd_loss(student(c), Logits(logits), engine=engine)
        loss.backward()
        assert loss.dtype == torch.float32
        losses.append((loss.detach(), c.W.grad))
    torch.testing.assert_close(*losses)


# sparse logits


def entries(case, *, kind="top", k=7, seed=1):
    """(indices, log_probs) of the teacher's own head: its largest, random ones, or everything."""
    generator = torch.Generator().manual_seed(seed)
    log_p = oracle.logits(case.ht, case.Wt, case.bt).detach().log_softmax(-1)
    n, vocab = log_p.shape
    if kind == "top":
        log_probs, indices = log_p.topk(k, dim=-1)
        return indices, log_probs
    if kind == "whole":
        indices = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(n)])
        return indices, log_p.gather(1, indices)
    if kind == "sampled":  # ids drawn with replacement, each of weight 1/k
        indices = torch.multinomial(log_p.exp(), k, replacement=True, generator=generator)
        return indices, torch.full(indices.shape, -math.log(k), dtype=torch.float64)
    # ids that come twice, entries of no mass, some of them of no valid id, and one row with a single entry
    indices = torch.randint(0, vocab, (n, k), generator=generator)
    log_probs = log_p.gather(1, indices) - 0.1
    indices[:, 3], log_probs[:, 3] = indices[:, 0], log_probs[:, 0] - 1
    indices[:, 4], log_probs[:, 4] = indices[:, 0], log_probs[:, 0] - 2
    indices[1::3, 5], log_probs[1::3, 5] = -1, -torch.inf
    indices[2::3, 5], log_probs[2::3, 5] = indices[2::3, 1], -torch.inf
    log_probs[4, 1:] = -torch.inf
    return indices, log_probs


@pytest.mark.parametrize("tail", ["renormalize", "bucket", "none"])
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_sparse_logits(divergence, tail):
    case = make()
    if tail != "bucket" and divergence in ("reverse_kl", "symmetric_kl"):
        with pytest.raises(ValueError, match=r"infinite.*bucket"):
            fused_kd_loss(
                student(case), SparseLogits(*entries(case), tail=tail), divergence=divergence, temperature=1.0
            )
        return
    for kind, tau in (("rough", 1.0), ("top", 1.0), ("top", 2.0)):
        if tail == "none" and tau != 1:
            continue
        indices, log_probs = entries(case, kind=kind)

        def expected(c, pair=(indices, log_probs), tau=tau):
            z_s = oracle.logits(c.hs, c.W, c.b)
            kd = mean(value(divergence, *sparse_pair(*pair, tail, z_s, tau)), keep(c))
            return tau**2 * kd + 0.5 * torch.nn.functional.cross_entropy(z_s, c.labels)

        def source(c, pair=(indices, log_probs)):
            return SparseLogits(*pair, tail=tail)

        check(expected, case, source, divergence=divergence, temperature=tau, ce_weight=0.5)


@pytest.mark.parametrize("kind", ["whole", "sampled"])
@pytest.mark.parametrize("tail", ["renormalize", "bucket", "none"])
def test_sparse_entries_that_are_everything_or_drawn(kind, tail):
    """All of the vocabulary is the dense teacher; ids drawn with replacement add up to counts over their number."""
    case = make()
    indices, log_probs = entries(case, kind=kind, k=12)
    # drawn entries hold all of the mass: what a bucket of the rest gets is rounding, and rounding^(1/3) is much
    taus = (1.0,) if tail == "none" or (kind, tail) == ("sampled", "bucket") else (1.0, 3.0)
    for tau in taus:

        def expected(c, tau=tau):
            z_s = oracle.logits(c.hs, c.W, c.b, 0.8, 3.0)
            if kind == "whole":
                z_t = oracle.logits(c.ht, c.Wt, c.bt)
                return tau**2 * value("forward_kl", (z_t / tau).log_softmax(-1), (z_s / tau).log_softmax(-1)).mean()
            pair = sparse_pair(indices, log_probs, tail, z_s, tau)
            return tau**2 * value("forward_kl", *pair).mean()

        check(
            expected, case, lambda c: SparseLogits(indices, log_probs, tail=tail), temperature=tau, labels=False,
            head={"softcap": 3.0, "logit_scale": 0.8},
        )  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_sparse_metrics_and_per_row_losses(engine):
    case = make()
    indices, log_probs = entries(case)
    source = SparseLogits(indices, log_probs, tail="bucket")
    z_s = oracle.logits(case.hs, case.W, case.b).detach()
    rows = 4 * value("forward_kl", *sparse_pair(indices, log_probs, "bucket", z_s, 2.0))
    loss, metrics = fused_kd_loss(
        student(case), source, case.labels, ce_weight=0.5, reduction="none", return_metrics=True, engine=engine
    )
    ce = torch.nn.functional.cross_entropy(z_s, case.labels, reduction="none")
    torch.testing.assert_close(loss.detach(), rows * keep(case) + 0.5 * ce)
    assert metrics.teacher_entropy.isnan()
    agreement = mean((z_s.argmax(-1) == indices[:, 0]).double(), keep(case))
    entropy = mean(torch.distributions.Categorical(logits=z_s).entropy(), keep(case))
    torch.testing.assert_close(metrics.agreement, agreement.float())
    torch.testing.assert_close(metrics.student_entropy, entropy.float())
    torch.testing.assert_close(metrics.kd, mean(rows / 4, keep(case)).float())
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    loss.backward(upstream)
    again = copy(case)
    total = fused_kd_loss(
        student(again), source, again.labels, ce_weight=0.5, reduction="none", engine="reference"
    )
    total.backward(upstream)
    for name, gradient in gradients(case).items():
        assert relative(gradient, gradients(again)[name]) < 1e-9


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("tail", ["renormalize", "bucket", "none"])
def test_sparse_teacher_far_from_the_student(engine, tail):
    """The student's mass is all outside the support, or all inside of it, by hundreds of nats."""
    for shift in (-300.0, 300.0):
        case = make(torch.float32)
        indices, log_probs = entries(case, k=3)
        with torch.no_grad():
            case.b[:] = 0
            case.b[indices[0]] = shift  # of row 0: its teacher's entries, exactly
        one = Head(case.hs[:1], case.W, case.b)
        exact = copy(case)
        truth = fused_kd_loss(
            Head(exact.hs[:1], exact.W, exact.b), SparseLogits(indices[:1], log_probs[:1], tail=tail), temperature=1.0,
            engine="reference",
        )  # fmt: skip
        loss = fused_kd_loss(one, SparseLogits(indices[:1], log_probs[:1], tail=tail), temperature=1.0, engine=engine)
        truth.backward()
        loss.backward()
        assert relative(loss, truth) < 5e-5  # logits of 300 are rounded at 2e-5
        for name, gradient in gradients(case).items():
            # Σ q and its complement are rounded at 1e-7 of one; gradients here are of the order of one
            assert float((gradient - gradients(exact)[name]).norm()) < 5e-5 * (1 + float(gradients(exact)[name].norm()))


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_without_weight_may_have_any_sparse_teacher(engine):
    case = make()
    indices, log_probs = entries(case)
    clean = fused_kd_loss(student(case), SparseLogits(indices, log_probs), case.labels, engine=engine)
    clean.backward()
    expected = gradients(case)["W"].clone()
    log_probs[::5] = -torch.inf  # the ignored rows
    c = copy(case)
    loss = fused_kd_loss(student(c), SparseLogits(indices, log_probs), c.labels, engine=engine)
    loss.backward()
    torch.testing.assert_close(loss, clean)
    torch.testing.assert_close(c.W.grad, expected)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_sparse_entries_of_any_strides(engine):
    case = make(n=6)
    indices, log_probs = entries(case)
    results = []
    for pair in ((indices, log_probs), (indices.t().contiguous().t(), log_probs.t().contiguous().t())):
        c = copy(case)
        loss = fused_kd_loss(student(c), SparseLogits(*pair), c.labels, ce_weight=0.5, engine=engine)
        loss.backward()
        results.append((loss.detach(), c.W.grad, c.hs.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bucket_that_the_student_cannot_reach(engine):
    """All that it can produce is in the support, and one of the padding entries has an id from the bucket."""
    case = make(n=3, v=7)
    with torch.no_grad():
        case.b[4:] = -torch.inf
    ids = torch.tensor([[0, 1, 2, 3, 5]]).expand(3, 5)
    log_probs = torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.0]], dtype=torch.float64).log().expand(3, 5)

    def expected(c):
        z = oracle.logits(c.hs, c.W, c.b)
        return 4 * mean(value("reverse_kl", *sparse_pair(ids, log_probs, "bucket", z, 2.0)), keep(c))

    def source(c):
        return SparseLogits(ids, log_probs, tail="bucket")

    check(expected, case, source, runs=[(engine, None)], divergence="reverse_kl")


# rows and terms that count for nothing


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["logits", "bucket"])
def test_a_divergence_without_weight_may_be_infinite(engine, kind):
    """One side has mass where the other cannot have any; the weight, of a schedule say, is still 0."""
    case = make(n=6, v=7)
    case.labels.clamp_(max=3)
    if kind == "logits":
        source = Logits(torch.zeros(6, 7, dtype=torch.float64).index_fill(1, torch.tensor([5]), -torch.inf))
    else:
        with torch.no_grad():
            case.b[4:] = -torch.inf
        source = SparseLogits(torch.arange(4).expand(6, 4), torch.full((6, 4), math.log(0.2)), tail="bucket")
    options = {"divergence": "reverse_kl" if kind == "logits" else "forward_kl", "ce_weight": 0.5, "engine": engine}
    assert fused_kd_loss(student(case), source, case.labels, **options).item() == math.inf
    results = []
    for given in (None, source):
        c = copy(case)
        loss = fused_kd_loss(student(c), given, c.labels, kd_weight=0.0, **options)
        loss.backward()
        results.append((loss.detach(), c.W.grad, c.hs.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_the_metric_of_a_divergence_without_weight(engine, tail):
    case = make(n=6)
    source = SparseLogits(*entries(case), tail=tail)
    kd = [
        fused_kd_loss(student(case), source, kd_weight=weight, engine=engine, return_metrics=True)[1].kd
        for weight in (0.0, 1.0)
    ]
    torch.testing.assert_close(*kd)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_mass_that_underflows_is_none(engine, divergence):
    """0·∞ = 0: logits 1e4 below the others', of ids that the other side cannot have."""
    case = make(n=3, v=7)
    z_t = torch.zeros(3, 7, dtype=torch.float64)
    if divergence == "forward_kl":
        z_t[:, 5] = -1e4
    with torch.no_grad():
        case.b[5] = -torch.inf if divergence == "forward_kl" else -1e4
    if divergence == "reverse_kl":
        z_t[:, 5] = -torch.inf
    loss = fused_kd_loss(student(case), Logits(z_t), divergence=divergence, engine=engine)
    loss.backward()
    assert loss.isfinite()
    assert case.W.grad.isfinite().all()


# heads of different precision


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


# vocabularies of different size


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
    with pytest.raises(ValueError, match=r"SparseLogits.indices contains 4000; expected ids from 0 to 100"):
        fused_kd_loss(student(case), SparseLogits(indices + 4000 * (indices == 95), log_probs).__class__(
            torch.where(indices == 95, 4000, indices), log_probs))  # fmt: skip
    inside = indices < 90
    kept = torch.where(inside, log_probs, -torch.inf)

    def expected(c):
        z_s = oracle.logits(c.hs, c.W, c.b)[:, :90]
        return 4 * mean(value("forward_kl", *sparse_pair(indices, kept, "renormalize", z_s, 2.0)), keep(c))

    check(expected, case, lambda c: SparseLogits(indices, log_probs), valid_vocab=90)
    strange = torch.where(indices == 95, 4000, indices)
    check(expected, case, lambda c: SparseLogits(strange, log_probs), valid_vocab=90, vocab="truncate")


# anchors that are a distribution


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
