"""`fused_kd_loss` against the definition written out again (tests/helpers/oracle.py), in float64, for every engine."""

import itertools

import oracle
import pytest
import torch
from cases import HS, HT, LEAVES, N, V, copy, gradients, make, relative, student, teacher

from kdfast import (
    JSD,
    AlphaBeta,
    Divergence,
    FusedKDLoss,
    Head,
    Projected,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    fused_kd_loss,
)

ENGINES = ["reference", "torch", "triton_chunked", "triton_tiled"]
SMALL = 5 * 2 * V * 8  # bytes: chunks of five tokens, and 23 is no multiple of five; slabs of 64 ids, a tile's width
TWELVE = 12 * 2 * 128 * 8  # chunks of twelve tokens, whose rows are padded to 128
RUNS = [("reference", None), ("torch", None), ("torch", SMALL), ("triton_chunked", TWELVE), ("triton_tiled", SMALL)]


def both(kind, *, seed=0, head=None, teacher_head=None, case=None, upstream=None, **options):
    """Run every engine and the oracle on the same case; compare the loss and every leaf's gradient."""
    head, teacher_head = head or {}, teacher_head or {}
    case = case or make(seed=seed)
    expected_case = copy(case)
    arguments = dict(options)
    divergence = arguments.pop("divergence", "forward_kl")
    if isinstance(divergence, Divergence):
        arguments |= {"name": divergence.name, **vars(divergence)}  # beta or alpha
    else:
        arguments["name"] = divergence
    for ours, theirs in (("num_items_in_batch", "num_items"), ("valid_vocab", "valid")):
        if ours in arguments:
            arguments[theirs] = arguments.pop(ours)
    sources = {"projected": {"P", "p"}, "hidden": {"P", "p"}, "head": {"Wt", "bt"}, "none": set()}[kind]
    expected = oracle.loss(
        expected_case.hs, expected_case.W, expected_case.b, ht=None if kind == "none" else expected_case.ht,
        **{name: getattr(expected_case, name) for name in sources}, labels=expected_case.labels,
        scale=head.get("logit_scale", 1.0), softcap=head.get("softcap"),
        t_scale=teacher_head.get("logit_scale", 1.0), t_softcap=teacher_head.get("softcap"), **arguments,
    )  # fmt: skip
    upstream = torch.ones_like(expected) * 1.7 if upstream is None else upstream
    expected.backward(upstream)
    for engine, scratch in RUNS:
        ours = copy(case)
        loss = fused_kd_loss(
            student(ours, **head), teacher(ours, kind, **teacher_head), ours.labels,
            engine=engine, scratch_bytes=scratch, **options,
        )  # fmt: skip
        loss.backward(upstream)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
        for name, gradient in gradients(ours).items():
            assert relative(gradient, gradients(expected_case)[name]) < 1e-9, (engine, scratch, name)


DIVERGENCES = ["forward_kl", "reverse_kl", JSD(0.5), JSD(0.2), JSD(0.0), JSD(1.0)]
MORE = [
    "symmetric_kl", SymmetricKL(0.9), AlphaBeta(0.2, 0.7), AlphaBeta(0.4, 0.0), SkewKL(0.1), SkewReverseKL(0.6),
    "total_variation",
]  # fmt: skip
SIDES = [("projected", grad) for grad in ("full", "projector", "none")] + [("hidden", "full"), ("head", "full")]


@pytest.mark.parametrize(("kind", "teacher_grad"), SIDES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_divergence_by_teacher(divergence, kind, teacher_grad):
    both(kind, divergence=divergence, teacher_grad=teacher_grad)


@pytest.mark.parametrize(("kind", "temperature"), [("projected", 0.5), ("head", 5.0)])
@pytest.mark.parametrize("divergence", MORE, ids=str)
def test_more_divergences(divergence, kind, temperature):
    """What a teacher's kind means to the engines does not depend on these: two kinds will do."""
    both(kind, divergence=divergence, temperature=temperature, ce_weight=0.5)


@pytest.mark.parametrize(("kind", "teacher_grad"), SIDES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("ce_weight", "anchor_weight"), [(0.6, 0.0), (0.0, 0.3), (0.6, 0.3)])
def test_terms_by_reduction(kind, teacher_grad, reduction, ce_weight, anchor_weight):
    if kind == "head":
        anchor_weight = 0.0
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64) if reduction == "none" else None
    both(
        kind, teacher_grad=teacher_grad, reduction=reduction, ce_weight=ce_weight, anchor_weight=anchor_weight,
        kd_weight=0.7, upstream=upstream,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 8.0, 10.0])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES[:3], ids=str)
def test_temperature(temperature, squared, divergence):
    both("projected", temperature=temperature, temperature_squared=squared, ce_weight=0.5, divergence=divergence)


@pytest.mark.parametrize("kind", ["projected", "head", "none"])
def test_softcap_and_logit_scale_on_both_heads(kind):
    options = {"ce_weight": 0.4} | ({"anchor_weight": 0.3} if kind == "projected" else {})
    for scale, softcap in ((0.6, None), (1.0, 2.5), (-1.5, 2.5)):
        both(kind, head={"logit_scale": scale, "softcap": softcap}, **options)
    if kind == "head":
        both(kind, teacher_head={"logit_scale": 0.3, "softcap": 4.0}, **options)


def test_cross_entropy_alone():
    for reduction in ("mean", "sum", "none"):
        both("none", ce_weight=1.3, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("which", ["token_weights", "kd_token_weights", "both"])
def test_token_weights(reduction, which):
    case = make()
    given = {"token_weights": case.weights, "kd_token_weights": case.weights.flip(0)}
    if which != "both":
        given = {which: given[which]}
    both("projected", case=case, reduction=reduction, ce_weight=0.5, anchor_weight=0.2, **given)


def test_kd_token_weights_reach_rows_without_a_label():
    case = make()
    case.labels[:] = -100
    loss = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, ce_weight=1.0)
    assert loss.item() == 0
    both("projected", case=case, ce_weight=1.0, kd_token_weights=case.weights)


@pytest.mark.parametrize("divisor", [7, torch.tensor(7), torch.tensor(7.5)])
def test_num_items_in_batch_divides_every_term(divisor):
    both("projected", ce_weight=0.5, anchor_weight=0.2, num_items_in_batch=divisor)


def test_anchor_targets_and_ignore_index():
    case = make()
    case.labels[case.labels == -100] = 3
    case.labels[1::4] = 17
    targets = torch.randint(0, 17, (N,))
    targets[2::3] = 17
    both("projected", case=case, ignore_index=17, anchor_weight=0.5, anchor_targets=targets, ce_weight=0.3)


def test_valid_vocab_gives_padding_rows_no_probability_and_no_gradient():
    case = make()
    case.labels.clamp_(max=89)
    both("projected", case=case, valid_vocab=90, ce_weight=0.5, head={"softcap": 2.0})
    both("head", case=case, valid_vocab=90, ce_weight=0.5)
    loss = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, valid_vocab=90, ce_weight=0.5)
    loss.backward()
    assert not case.W.grad[90:].any()
    assert not case.b.grad[90:].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_masked_vocabulary_rows(engine):
    """A bias of −inf takes a row out: the same as not having it."""
    case, short = make(), make()
    for c in (case, short):
        c.labels.clamp_(max=89)
    with torch.no_grad():
        case.b[90:] = -torch.inf
    loss = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, ce_weight=0.5, engine=engine)
    expected = fused_kd_loss(
        student(short), teacher(short, "projected"), short.labels, ce_weight=0.5, engine=engine, valid_vocab=90
    )
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name in LEAVES:
        torch.testing.assert_close(getattr(case, name).grad, getattr(short, name).grad)


def test_weights_and_temperature_as_tensors():
    case = make()
    numbers = {"temperature": 1.5, "kd_weight": 0.3, "ce_weight": 0.6, "anchor_weight": 0.2}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    for engine in ENGINES:
        a = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, engine=engine, **numbers)
        b = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, engine=engine, **tensors)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_any_leading_shape_and_strides(engine):
    case = make()
    flat = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, ce_weight=0.5, engine=engine)
    flat.backward()
    # 23 rows as (1, 23, 1) slices of larger, transposed storage: nothing is contiguous
    other = copy(case)
    hs = torch.empty(HS, 2 * N, dtype=torch.float64).t()[::2].copy_(other.hs.detach())[None, :, None].requires_grad_()
    ht = torch.empty(HT, N, dtype=torch.float64).t().copy_(other.ht)[None, :, None]
    W = torch.empty(HS, 2 * V, dtype=torch.float64).t()[::2].copy_(other.W.detach()).requires_grad_()
    assert not any(tensor.is_contiguous() for tensor in (hs, ht, W))
    labels = case.labels[None, :, None]
    projected = Projected(ht, other.P, other.p)
    loss = fused_kd_loss(Head(hs, W, other.b), projected, labels, ce_weight=0.5, engine=engine)
    rows = fused_kd_loss(Head(hs, W, other.b), projected, labels, ce_weight=0.5, engine=engine, reduction="none")
    loss.backward()
    assert rows.shape == (1, N, 1)
    torch.testing.assert_close(loss, flat)
    torch.testing.assert_close(hs.grad.reshape(N, HS), case.hs.grad)
    torch.testing.assert_close(W.grad, case.W.grad)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_and_all_rows_ignored(engine, reduction):
    for n in (0, 6):
        case = make(n=n)
        case.labels[:] = -100
        with torch.no_grad():
            case.hs.fill_(torch.nan)  # what an ignored row holds must not matter
        loss, metrics = fused_kd_loss(
            student(case), teacher(case, "projected"), case.labels, ce_weight=0.5, anchor_weight=0.5,
            reduction=reduction, engine=engine, return_metrics=True,
        )  # fmt: skip
        assert loss.shape == ((n,) if reduction == "none" else ())
        assert not loss.any()
        loss.sum().backward()
        for name, gradient in gradients(case).items():
            assert not gradient.any(), name
        assert metrics.tokens == 0
        assert metrics.kd.isnan()


@pytest.mark.parametrize("engine", ENGINES)
def test_ignored_rows_may_hold_nan(engine):
    case, clean = make(), make()
    with torch.no_grad():
        case.hs[::5] = torch.nan
        case.ht[::5] = torch.nan
    for c in (case, clean):
        # without the projector: F.linear's own backward would multiply NaN rows by zero
        fused_kd_loss(student(c), Projected(c.ht[:, :HS].clone()), c.labels, ce_weight=0.5, engine=engine).backward()
    torch.testing.assert_close(case.W.grad, clean.W.grad)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_term_at_all_has_gradients_of_zero(engine):
    """Labels for the metrics alone: a step of training goes on as with any other loss."""
    case = make(torch.float32)
    loss = fused_kd_loss(student(case), None, case.labels, engine=engine)
    loss.backward()
    assert loss == 0
    for name in ("hs", "W", "b"):
        assert torch.equal(getattr(case, name).grad, torch.zeros_like(getattr(case, name))), name


def test_metrics():
    case = make()
    keep = case.labels != -100
    z_s = oracle.logits(case.hs, case.W, case.b)[keep]
    z_t = oracle.logits(torch.nn.functional.linear(case.ht, case.P, case.p), case.W, case.b)[keep]
    w = case.weights[keep]

    def mean(x):
        return ((x * w).sum() / w.sum()).float()

    def cross_entropy(z):
        return mean(torch.nn.functional.cross_entropy(z, case.labels[keep], reduction="none"))

    def entropy(z):
        return mean(-(z.softmax(-1) * z.log_softmax(-1)).sum(-1))

    for engine, reduction in itertools.product(ENGINES, ("mean", "sum", "none")):
        loss, metrics = fused_kd_loss(
            student(case), teacher(case, "projected"), case.labels, kd_weight=0.25, token_weights=case.weights,
            engine=engine, reduction=reduction, num_items_in_batch=5 if reduction == "mean" else None,
            return_metrics=True,
        )  # fmt: skip
        assert all(value.dtype == torch.float32 and value.dim() == 0 for value in metrics)
        assert not any(value.requires_grad for value in metrics)
        assert loss.requires_grad
        expected = mean(oracle.kl((z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1)))
        torch.testing.assert_close(metrics.kd, expected)
        torch.testing.assert_close(metrics.ce, cross_entropy(z_s))
        torch.testing.assert_close(metrics.anchor, cross_entropy(z_t))
        torch.testing.assert_close(metrics.student_entropy, entropy(z_s))
        torch.testing.assert_close(metrics.teacher_entropy, entropy(z_t))
        torch.testing.assert_close(metrics.agreement, mean((z_s.argmax(-1) == z_t.argmax(-1)).double()))
        assert metrics.tokens == keep.sum()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["projected", "head", "none"])
def test_metrics_of_the_terms_alone(engine, kind):
    case = make()
    options = {"kd_weight": 0.25, "ce_weight": 0.5, "token_weights": case.weights, "engine": engine}
    if kind == "projected":
        options["anchor_weight"] = 0.3
    found, every = (
        fused_kd_loss(student(case), teacher(case, kind), case.labels, return_metrics=which, **options)
        for which in ("terms", True)
    )
    torch.testing.assert_close(found[0], every[0])
    terms = {"projected": ["kd", "ce", "anchor"], "head": ["kd", "ce"], "none": ["ce"]}[kind]
    for name, value in found[1]._asdict().items():
        if name in (*terms, "tokens"):
            torch.testing.assert_close(value, getattr(every[1], name), msg=name)
        else:
            assert value.isnan(), name
    _, metrics = fused_kd_loss(student(case), teacher(case, kind), case.labels, return_metrics="terms", engine=engine)
    assert metrics.ce.isnan()


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_are_nan_where_there_is_nothing_to_compute(engine):
    case = make()
    _, metrics = fused_kd_loss(student(case), teacher(case, "head"), engine=engine, return_metrics=True)
    assert metrics.ce.isnan()
    assert metrics.anchor.isnan()
    assert metrics.tokens == N
    _, metrics = fused_kd_loss(student(case), None, case.labels, ce_weight=1.0, engine=engine, return_metrics=True)
    assert metrics.kd.isnan()
    assert metrics.teacher_entropy.isnan()
    assert metrics.student_entropy.isfinite()


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(engine, reduction):
    """Every leaf against finite differences, all terms at once, in chunks."""
    case = make(n=5, v=11, hs=3, ht=4)

    def loss(hs, W, b, P, p):
        return fused_kd_loss(
            Head(hs, W, b, softcap=3.0, logit_scale=0.8), Projected(case.ht, P, p), case.labels, ce_weight=0.5,
            divergence=JSD(0.3), temperature=1.3, engine=engine, scratch_bytes=2 * 2 * 11 * 8, reduction=reduction,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, [getattr(case, name) for name in LEAVES])


def test_reference_has_second_derivatives():
    case = make(n=4, v=7, hs=3, ht=4)

    def loss(hs, W):
        return fused_kd_loss(Head(hs, W), Projected(case.ht, case.P), engine="reference")

    assert torch.autograd.gradgradcheck(loss, [case.hs, case.W])


def test_mixed_dtypes_of_teacher_and_student():
    case = make()
    a, b = copy(case, torch.float32), copy(case, torch.bfloat16)
    loss = fused_kd_loss(student(a), Head(b.ht.detach(), b.Wt.detach(), b.bt.detach()), a.labels)
    exact = fused_kd_loss(student(a), Head(*(t.detach().float() for t in (b.ht, b.Wt, b.bt))), a.labels)
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)
    assert loss.dtype == torch.float32


def test_module_takes_options_at_construction_and_at_the_call():
    case = make()
    criterion = FusedKDLoss(temperature=3.0, ce_weight=0.5)
    expected = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, temperature=3.0, ce_weight=0.5)
    assert criterion(student(case), teacher(case, "projected"), case.labels).item() == expected.item()
    expected = fused_kd_loss(
        student(case), teacher(case, "projected"), case.labels, temperature=3.0, ce_weight=0.5, kd_weight=0.1
    )
    assert criterion(student(case), teacher(case, "projected"), case.labels, kd_weight=0.1).item() == expected.item()
    assert "temperature=3.0" in repr(criterion)
    with pytest.raises(TypeError, match="unknown option 'temprature'"):
        FusedKDLoss(temprature=2.0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["head", "projected"])
@pytest.mark.parametrize(("dtype", "of_bias"), [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_bias_of_another_dtype(engine, kind, dtype, of_bias):
    """Added as it is to products in float32, with a gradient in its own dtype: a bias of 32 bits is not rounded to 16.
    What a projector gives is rounded to 16 bits where the student is of 16."""
    rounded = {name: of_bias if name in ("b", "p", "bt") else dtype for name in (*LEAVES, "ht", "Wt", "bt")}
    case = make()
    for name, its in rounded.items():
        setattr(case, name, getattr(case, name).detach().to(its))
    exact, narrow = copy(case), copy(case, dtype)
    for name in ("b", "p", "bt"):
        setattr(narrow, name, getattr(case, name).clone().requires_grad_(name != "bt"))
    truth = fused_kd_loss(student(exact), teacher(exact, kind), exact.labels, ce_weight=0.5, engine="reference")
    truth.backward()
    loss = fused_kd_loss(student(narrow), teacher(narrow, kind), narrow.labels, ce_weight=0.5, engine=engine)
    loss.backward()
    coarse = max(torch.finfo(each).eps for each in (dtype, of_bias))
    assert relative(loss, truth) < (1e-6 if kind == "head" else coarse)
    for name in LEAVES if kind == "projected" else LEAVES[:3]:
        gradient = getattr(narrow, name).grad
        assert gradient.dtype == rounded[name]
        fine = kind == "head" and gradient.dtype == torch.float32
        assert relative(gradient, getattr(exact, name).grad) < (1e-5 if fine else 2 * coarse), name
