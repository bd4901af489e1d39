"""Teachers given as some of their log-probabilities, against the definition."""

import math

import oracle
import pytest
import torch
from cases import N, copy, gradients, make, relative, student
from definition import EVERY, check, keep, mean
from oracle import sparse_pair, value
from teachers import ENGINES, entries

from kdfast import JSD, Head, Logits, SkewKL, SkewReverseKL, SparseLogits, fused_kd_loss
from kdfast.frontend import checks

TAILS = ["renormalize", "bucket", "none", "renormalize_both"]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_sparse_logits(divergence, tail):
    case = make()
    if tail in ("renormalize", "none") and divergence in ("reverse_kl", "symmetric_kl"):
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
@pytest.mark.parametrize("tail", TAILS)
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


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("tail", TAILS)
def test_entries_at_the_temperature_of_the_loss(tail, divergence):
    """log_softmax(z/τ) of some ids: a bucket has the others' mass at τ, a whole vocabulary is the dense teacher."""
    case, tau = make(), 2.5
    z_t = oracle.logits(case.ht, case.Wt, case.bt)
    for k in (5, z_t.shape[-1]):
        log_probs, indices = (z_t / tau).log_softmax(-1).topk(k)

        def expected(c, k=k, indices=indices, log_probs=log_probs):
            log_t, log_s = (z_t / tau).log_softmax(-1), (oracle.logits(c.hs, c.W, c.b) / tau).log_softmax(-1)
            if k < z_t.shape[-1] and tail == "bucket":
                rest = log_s.scatter(1, indices, -torch.inf).logsumexp(-1, keepdim=True)
                log_s = torch.cat([log_s.gather(1, indices), rest], dim=-1)
                missing = (1 - log_probs.exp().sum(-1, keepdim=True)).log()
                log_t = torch.cat([log_probs, missing], dim=-1)
            elif k < z_t.shape[-1] and tail == "renormalize_both":
                log_t, log_s = log_probs.log_softmax(-1), log_s.gather(1, indices).log_softmax(-1)
            elif k < z_t.shape[-1]:
                kept = log_probs.log_softmax(-1) if tail == "renormalize" else log_probs
                log_t = torch.full_like(log_s, -torch.inf, requires_grad=False).detach().scatter(1, indices, kept)
            return tau**2 * value(divergence, log_t, log_s).mean()

        check(
            expected, case, lambda c, e=(indices, log_probs): SparseLogits(*e, tail=tail, tempered=True),
            divergence=divergence, temperature=tau, labels=False,
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
    total = fused_kd_loss(student(again), source, again.labels, ce_weight=0.5, reduction="none", engine="reference")
    total.backward(upstream)
    for name, gradient in gradients(case).items():
        assert relative(gradient, gradients(again)[name]) < 1e-9


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("tail", TAILS)
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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", ["symmetric_kl", "jsd", "total_variation"])
def test_a_student_of_nan_has_a_loss_of_nan(divergence, tail, engine):
    if divergence == "symmetric_kl" and tail in ("renormalize", "none"):
        return  # refused
    case = make(n=3)
    with torch.no_grad():
        case.hs[1] = torch.nan
    options = {"divergence": divergence, "temperature": 1.0, "reduction": "none", "engine": engine}
    loss = fused_kd_loss(student(case), SparseLogits(*entries(case, k=4, kind="top"), tail=tail), **options)
    assert loss.isnan().tolist() == [False, True, False]


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


def solved(engine, z_s, teacher, **options):
    """(loss, gradient) of student logits, through a head that leaves them as they are."""
    z = z_s.detach().clone().requires_grad_()
    loss = fused_kd_loss(Head(z, torch.eye(z.shape[-1], dtype=z.dtype)), teacher, engine=engine, **options)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def by_categories(z_s, ids, log_probs, log_tail, divergence, tau=1.0, tempered=False):
    """(loss, gradient), in float64, written out: the K ids' categories and one of all others."""
    z = z_s.detach().double().requires_grad_()
    log_q = (z / (tau if tempered else 1.0)).log_softmax(-1)
    rest = log_q.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([log_q.gather(1, ids), rest], dim=-1)
    log_p = torch.cat([log_probs.double(), log_tail.double()[:, None]], dim=-1)
    log_p, log_q = ((side / (1.0 if tempered else tau)).log_softmax(-1) for side in (log_p, log_q))
    loss = tau**2 * value(divergence, log_p, log_q).mean()
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # of the log-probabilities
def test_a_tail_that_is_given(engine, dtype):
    """In float32, 1 − Σ exp(log_probs) is 1.4% off where the tail is e⁻¹⁴, and nothing at e⁻¹⁷."""
    generator = torch.Generator().manual_seed(0)
    tails = torch.tensor([-2.0, -8.0, -14.0, -18.083, -25.0, -40.0])
    z_s, z_t = (torch.randn(len(tails), 41, generator=generator, dtype=torch.float64) for _ in range(2))
    kept, ids = z_t.topk(5)
    log_probs = (kept.log_softmax(-1) + torch.log(-torch.expm1(tails.double()))[:, None]).to(dtype)
    for divergence in EVERY:
        for tau, tempered in ((1.0, False), (2.0, True), (2.0, False)):
            if engine.startswith("triton") and (tau != 1.0) == (divergence != "reverse_kl"):
                continue  # the same arithmetic
            expected = by_categories(z_s.float(), ids, log_probs, tails, divergence, tau, tempered)
            source = SparseLogits(ids, log_probs, log_tail=tails, tail="bucket", tempered=tempered)
            found = solved(engine, z_s.float(), source, divergence=divergence, temperature=tau)
            for ours, theirs in zip(found, expected, strict=True):
                assert relative(ours.double(), theirs) < 5e-6, (divergence, tau, tempered)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_confident_teacher(engine):
    """A uniform student, whose tail has 92% of its mass, against 99.999999% on one token: 17.7039."""
    z_t = torch.cat([torch.tensor([18 + math.log(100)]), torch.ones(7), torch.zeros(92)])[None].double()
    log_p = z_t.log_softmax(-1)
    log_probs, ids = log_p.topk(8)
    log_tail = log_p[:, 8:].logsumexp(-1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        source = SparseLogits(ids, log_probs.to(dtype), log_tail=log_tail, tail="bucket")
        found = solved(engine, torch.zeros(1, 100), source, divergence="reverse_kl", temperature=1.0)
        expected = by_categories(torch.zeros(1, 100), ids, source.log_probs, log_tail, "reverse_kl")
        assert float(expected[0]) == pytest.approx(17.7039, abs=1e-4 if dtype != torch.bfloat16 else 1e-2)
        assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
        assert relative(found[1].double(), expected[1]) < 1e-6


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("tail", TAILS)
def test_a_confident_student(tail, engine):
    """In float32 its one large gradient is the difference of numbers near 1, thousands of times as large."""
    known = tail in ("renormalize", "none")
    generator = torch.Generator().manual_seed(1)
    z_s, z_t = (torch.randn(6, 41, generator=generator) for _ in range(2))
    z_s[:, 5] += torch.linspace(8, 20, 6)
    z_t[:, 5] += 6
    log_p = z_t.double().log_softmax(-1)
    log_probs, ids = log_p.topk(8)
    log_tail = log_p.scatter(1, ids, -torch.inf).logsumexp(-1) if tail == "bucket" else None
    source = SparseLogits(ids, log_probs.float(), log_tail=log_tail, tail=tail)
    for divergence in [*EVERY, SkewKL(0.9)] if engine == "torch" else [SkewKL(0.9)]:  # the same arithmetic
        if known and divergence in ("forward_kl", "reverse_kl", "symmetric_kl"):
            continue  # forward KL has no pass of its own for this; the others are refused
        z = z_s.double().requires_grad_()
        pair = sparse_pair(ids, log_probs, tail, z, 1.0, log_tail=log_tail)
        (expected,) = torch.autograd.grad(value(divergence, *pair).mean(), z)
        _, found = solved(engine, z_s, source, divergence=divergence, temperature=1.0)
        for ours, theirs in zip(found.double(), expected, strict=True):
            assert relative(ours, theirs) < 1e-5, divergence


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("tail", ["renormalize", "none"])
@pytest.mark.parametrize(("shift", "tau"), [(8, 0.5), (12, 1.0), (16, 1.0)])
def test_a_confident_student_of_a_confident_teacher(shift, tau, tail, engine):
    """What both have elsewhere is below the rounding of 1, and all that loss and gradient are made of."""
    generator = torch.Generator().manual_seed(2)
    z_s, z_t = torch.randn(1, 60, generator=generator), torch.randn(1, 60, generator=generator)
    z_s[:, 3] += shift
    z_t[:, 3] += shift
    log_probs, ids = (z_t.double() / tau).log_softmax(-1).topk(6)
    source = SparseLogits(ids, log_probs, tail=tail, tempered=True)
    for divergence in [JSD(), JSD(0.9), SkewKL(0.1), SkewKL(0.9), SkewReverseKL(0.1)]:
        options = {"divergence": divergence, "temperature": tau}
        expected, gradient = solved("reference", z_s.double(), source, **options)
        loss, found = solved(engine, z_s, source, **options)
        assert relative(found.double(), gradient) < 1e-4, divergence
        assert relative(loss.double(), expected) < 2e-3, divergence


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_tail_that_nobody_knows(engine, dtype):
    """As a server prints it; two that have everything; and 1.02 in all. What rounding could have hidden is assumed."""
    rows = [[0.0, -17.5, -19.0], [math.log(0.5), math.log(0.5), -40.0], [-0.3, -1.3, -5.2]]
    log_probs, ids = torch.tensor(rows, dtype=dtype), torch.tensor([[4, 7, 9]]).expand(3, 3)
    tails = torch.tensor([oracle.guessed_tail(row) for row in log_probs], dtype=torch.float64).log()
    assert float(tails[0]) == pytest.approx(-36.04 if dtype == torch.float64 else -15.94, abs=0.01)
    z_s = torch.randn(3, 37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for divergence in EVERY if engine in ("reference", "torch") else ["symmetric_kl"]:
        source = SparseLogits(ids, log_probs, tail="bucket")
        found = solved(engine, z_s, source, divergence=divergence, temperature=1.0)
        for ours, theirs in zip(found, by_categories(z_s, ids, log_probs, tails, divergence), strict=True):
            assert relative(ours, theirs) < 1e-9, divergence


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_ids_that_are_all_of_the_vocabulary(engine, divergence):
    """No tail, whatever is said of it, and the dense teacher's loss: K ≥ V, up to `valid_vocab`, of the shared ids."""
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = (torch.randn(3, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    for n, options in ((11, {}), (9, {"valid_vocab": 9}), (9, {"vocab": "truncate"})):
        dense = Logits(z_t[:, :n] if "vocab" in options else z_t)
        options = {"divergence": divergence, "temperature": 2.0, **options}
        expected = solved(engine, z_s, dense, **options)
        log_p = z_t[:, :n].log_softmax(-1)
        twice = log_p[:, :2] + math.log(0.5)  # two ids come twice, and one entry is no entry
        log_probs = torch.cat([twice, log_p[:, 2:], twice, torch.full((3, 1), -torch.inf)], dim=-1)
        ids = torch.tensor([*range(n), 0, 1, 5]).expand(3, -1)
        if "vocab" in options:  # both sides end with the student's
            z, options = z_s[:, :n], {**options, "vocab": "truncate"}
            expected = solved(engine, z, dense, **options)
        else:
            z = z_s
        for log_tail in (None, torch.full((3,), -16.0)):
            source = SparseLogits(ids, log_probs, log_tail=log_tail, tail="bucket")
            for ours, theirs in zip(solved(engine, z, source, **options), expected, strict=True):
                assert relative(ours, theirs) < 1e-9, options


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_both_sides_normalized_over_the_entries(engine, divergence):
    """Whatever the student's other logits are; an entry of −inf is none, and equal ids add up."""
    generator = torch.Generator().manual_seed(0)
    z_s = torch.randn(4, 41, generator=generator, dtype=torch.float64)
    z_s[0, 40] = 1e4
    ids = torch.stack([torch.randperm(40, generator=generator)[:6] for _ in range(4)])
    given, nothing = torch.randn(4, 6, generator=generator), torch.full((4, 1), -torch.inf)  # logits will do
    more = torch.cat([ids, ids[:, :1], torch.full((4, 1), 40)], dim=-1), torch.cat([given, given[:, :1], nothing], -1)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-6)):
        for tau, tempered in ((1.0, False), (2.0, False), (2.0, True)):
            z = z_s.to(dtype).double().requires_grad_()
            log_p = torch.cat([given.double()[:, :1] + math.log(2), given.double()[:, 1:]], dim=-1)
            log_p = (log_p / (1.0 if tempered else tau)).log_softmax(-1)
            loss = tau**2 * value(divergence, log_p, (z.gather(1, ids) / tau).log_softmax(-1)).mean()
            expected = loss.detach(), torch.autograd.grad(loss, z)[0]
            source = SparseLogits(*more, tail="renormalize_both", tempered=tempered)
            found = solved(engine, z_s.to(dtype), source, divergence=divergence, temperature=tau)
            for ours, theirs in zip(found, expected, strict=True):
                assert relative(ours.double(), theirs) < tolerance, (dtype, tau, tempered)
            outside = torch.ones_like(z_s, dtype=torch.bool).scatter(1, ids, value=False)
            assert not found[1][outside].any()


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("V", [257, 300, 40_000])
@pytest.mark.parametrize("vocab", ["error", "truncate"])
def test_ids_of_narrow_types(dtype, V, vocab):
    """257 is 1 to eight bits, and 40,000 negative to sixteen: no id may be compared with that."""
    generator = torch.Generator().manual_seed(0)
    h, W = torch.randn(2, 4, generator=generator), torch.randn(V, 4, generator=generator)
    ids = torch.tensor([[5, 100, 44], [127, 0, 1]])
    log_probs = torch.tensor([[-1.0, -2.0, -0.7], [-1.0, -2.0, -0.7]])
    labels = torch.tensor([100, 3])

    def loss(dtype, **options):
        teacher = SparseLogits(ids.to(dtype), log_probs)
        return fused_kd_loss(Head(h, W), teacher, labels.to(dtype), ce_weight=1.0, vocab=vocab, **options)

    for engine in ("reference", "torch"):
        assert torch.equal(loss(dtype, engine=engine), loss(torch.int64, engine=engine))


def test_a_label_that_is_the_ignored_one_modulo_its_type():
    """156 is −100 to eight bits without a sign."""
    h, W = torch.randn(2, 4), torch.randn(101, 4)
    with pytest.raises(ValueError, match="labels contains 156; expected ids from 0 to 100"):
        fused_kd_loss(Head(h, W), None, torch.tensor([100, 156], dtype=torch.uint8), ce_weight=1.0)


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("of", ["log_tail", "id", "nan", "inf", "positive", "no entry"])
def test_entries_of_rows_that_do_not_count_are_not_looked_at(of, engine):
    """A padded row may hold anything; a row that counts is refused for the same."""
    case = make(n=3)
    indices, log_probs = entries(case, k=4, kind="top")
    log_tail = torch.log1p(-log_probs.exp().sum(-1))
    tail = "bucket" if of in ("log_tail", "positive") else "renormalize"
    indices[1], log_probs[1], log_tail[1] = 0, 0.0, 0.0
    if of == "id":
        indices[1] = -100
    elif of in ("nan", "inf", "positive", "no entry"):
        log_probs[1] = {"nan": torch.nan, "inf": torch.inf, "positive": 3.0, "no entry": -torch.inf}[of]
    teacher = SparseLogits(indices, log_probs, tail=tail, log_tail=log_tail if tail == "bucket" else None)
    rows = SparseLogits(indices[::2], log_probs[::2], tail=tail, log_tail=log_tail[::2] if tail == "bucket" else None)
    labels, weights = torch.tensor([1, -100, 2]), torch.tensor([1.0, 0.0, 1.0])
    expected = fused_kd_loss(Head(case.hs[::2], case.W, case.b), rows, engine=engine)
    for which in ({"labels": labels}, {"token_weights": weights}, {"kd_token_weights": weights}):
        torch.testing.assert_close(fused_kd_loss(student(case), teacher, engine=engine, **which), expected)
    for which in ({}, {"token_weights": 1 - weights}, {"labels": labels, "kd_token_weights": torch.ones(3)}):
        with pytest.raises(ValueError, match=r"teacher: SparseLogits"):
            fused_kd_loss(student(case), teacher, engine=engine, **which)


@pytest.mark.parametrize("tail", ["renormalize", "renormalize_both"])
@pytest.mark.parametrize("how", ["truncate", "valid_vocab", "all −inf"])
def test_a_row_that_counts_without_an_entry(how, tail, monkeypatch):
    """Its softmax would be 0/0: an error where values are read, else NaN, in the gradients of all engines alike."""
    case = make(torch.float64, n=6)
    vocab = case.W.shape[0]
    indices, log_probs = (each.reshape(2, 3, 4) for each in entries(case, k=4, kind="top"))
    options = {"truncate": {"vocab": "truncate"}, "valid_vocab": {"valid_vocab": vocab - 4}, "all −inf": {}}[how]
    indices = indices % (vocab - 4)
    if how == "all −inf":
        log_probs[1, 2] = -torch.inf
    else:
        indices[1, 2] = torch.arange(4) + (vocab if how == "truncate" else vocab - 4)
    shaped = Head(case.hs.reshape(2, 3, -1), case.W, case.b)
    teacher = SparseLogits(indices, log_probs, tail=tail)
    valid = options.get("valid_vocab", vocab)
    with pytest.raises(ValueError, match=rf"no entry in row 1, 2, which counts, .*'{tail}' .* from 0 to {valid - 1}"):
        fused_kd_loss(shaped, teacher, **options)
    out = torch.ones(2, 3)
    out[1, 2] = 0
    assert fused_kd_loss(shaped, teacher, token_weights=out, **options).isfinite()
    monkeypatch.setattr(checks, "can_read", lambda tensor: False)
    assert fused_kd_loss(shaped, teacher, token_weights=out, **options).isfinite()
    found = []
    for engine in ENGINES:
        own = copy(case)
        head = Head(own.hs.reshape(2, 3, -1), own.W, own.b)
        loss = fused_kd_loss(head, teacher, engine=engine, reduction="none", divergence="jsd", **options)
        assert loss.isnan().tolist() == [[False] * 3, [False, False, True]]
        loss.sum().backward()
        found.append((own.hs.grad, own.W.grad[:valid], own.b.grad[:valid]))
        torch.testing.assert_close(found[-1], found[0], equal_nan=True)
    assert found[0][0][-1].isnan().all()
    assert found[0][0][:-1].isfinite().all()
