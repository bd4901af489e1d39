"""Teachers given as some of their log-probabilities, against the definition."""

import oracle
import pytest
import torch
from cases import N, copy, gradients, make, relative, student
from definition import EVERY, check, keep, mean
from oracle import sparse_pair, value
from teachers import ENGINES, entries

from kdfast import Head, SparseLogits, fused_kd_loss


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


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("tail", ["renormalize", "bucket", "none"])
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
