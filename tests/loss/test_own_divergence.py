"""An instance of a `Divergence` of one's own: taken as it is where no kernel is needed, refused by name elsewhere."""

import itertools
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import ClassVar

import pytest
import torch
from cases import copy, gradients, make, relative, student
from own_divergences import Doubled, Hellinger, Weighted
from teachers import KINDS, PROJECTED, leaves, sources

from kdfast import JSD, AlphaBeta, Divergence, ForwardKL, FusedKDLoss, Logits, SkewReverseKL, fused_kd_loss
from kdfast.divergences import Terms
from kdfast.engines import choose


def by_hand(z_t, z_s, tau):
    p, q = (z_t / tau).softmax(-1), (z_s / tau).softmax(-1)
    return tau**2 * 1.5 * (p.sqrt() - q.sqrt()).square().sum(-1).mean() / 2


@pytest.mark.parametrize("engine", ["reference", "torch", "auto"])
def test_against_plain_torch(engine):
    case = make()
    theirs = copy(case)
    z_s, z_t = theirs.hs @ theirs.W.T + theirs.b, theirs.ht @ theirs.Wt.T
    expected = by_hand(z_t, z_s, 3.0)
    expected.backward()
    loss = fused_kd_loss(student(case), Logits(z_t), divergence=Hellinger(1.5), temperature=3.0, engine=engine)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name in ("hs", "W", "b"):
        assert relative(getattr(case, name).grad, getattr(theirs, name).grad) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_teacher(kind, reduction):
    one, other = make(), make()
    for case, engine in ((one, "reference"), (other, "torch")):
        source, options = sources(case, kind)
        loss = fused_kd_loss(
            student(case), source, case.labels, ce_weight=0.5, divergence=Hellinger(0.7), engine=engine,
            reduction=reduction, **options,
        )  # fmt: skip
        loss.sum().backward()
    for name in leaves(kind) if kind in PROJECTED else leaves(kind)[:3]:
        assert relative(gradients(other)[name], gradients(one)[name]) < 1e-9, name


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_a_keyword_and_a_field_that_is_computed(engine):
    case = make()
    teacher, _ = sources(case, "head")
    once, thrice = (
        fused_kd_loss(student(case), teacher, divergence=d, engine=engine) for d in ("forward_kl", Weighted(w=3))
    )
    torch.testing.assert_close(thrice, 3 * once)


class Named(JSD):
    name = "named"


class Skewed(SkewReverseKL):
    pass


class Balanced(AlphaBeta):
    pass


@pytest.mark.parametrize("engine", ["reference", "torch", "auto"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (Named(0.0), "forward_kl"),
        (Named(1.0), "reverse_kl"),
        (Named(0.3), JSD(0.3)),
        (Skewed(0), "reverse_kl"),
        (Balanced(0, 1), "reverse_kl"),
    ],
    ids=str,
)
def test_a_subclass_of_a_listed_one_has_its_limits(theirs, ours, engine):
    case = make()
    teacher, _ = sources(case, "head")
    found, expected = (fused_kd_loss(student(case), teacher, divergence=d, engine=engine) for d in (theirs, ours))
    torch.testing.assert_close(found, expected)


def test_a_subclass_of_its_own_formula_is_what_it_says_at_the_limits_too():
    """As it says, half the KL, and no forward KL."""
    case = make()
    teacher, _ = sources(case, "head")
    for engine, own in itertools.product(("reference", "torch"), (Halved(0.0), HalvedAlphaBeta(1.0, 0.0))):
        half, whole = (
            fused_kd_loss(student(case), teacher, divergence=d, engine=engine) for d in (own, "forward_kl")
        )
        torch.testing.assert_close(half, whole / 2)


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_of_a_listed_name(engine):
    case = make()
    once, twice = (
        fused_kd_loss(student(case), None if d is None else Logits(case.hs.detach() @ case.Wt[:, :12].T), case.labels,
                      divergence=d, engine=engine)
        for d in ("forward_kl", Doubled())
    )  # fmt: skip
    torch.testing.assert_close(twice, 2 * once)


def test_in_a_compiled_graph():
    case = make()
    compiled = torch.compile(FusedKDLoss(), fullgraph=True, backend="aot_eager")
    for weight in (0.7, 1.4, 2.1):
        options = {"divergence": Hellinger(weight)}
        loss = compiled(student(case), sources(case, "head")[0], **options)
        torch.testing.assert_close(loss, fused_kd_loss(student(case), sources(case, "head")[0], **options))


@pytest.mark.parametrize("engine", ["triton_chunked", "triton_tiled"])
def test_triton_engines_say_what_they_lack(engine):
    case = make()
    message = f"engine='{engine}' has no kernel for divergence=Hellinger.*CONTRIBUTING.md.*engine='torch'"
    with pytest.raises(ValueError, match=message):
        fused_kd_loss(student(case), sources(case, "projected")[0], divergence=Hellinger(), engine=engine)
    source, options = sources(case, "bucket")  # which no kernel sees
    theirs, ours = (
        fused_kd_loss(student(case), source, divergence=Hellinger(), engine=e, **options) for e in ("reference", engine)
    )
    torch.testing.assert_close(ours, theirs)


def test_auto_takes_torch_on_a_gpu():
    sizes = {"tokens": 8192, "vocab": 50257, "anywhere": True}
    device, dtype = torch.device("cuda"), torch.bfloat16
    assert choose(device, dtype, **sizes).engine == "triton_chunked"
    chosen = choose(device, dtype, kernels=False, **sizes)
    assert chosen.engine == "torch"
    assert chosen.why == "the divergence has no kernel"


class Nothing(Divergence):
    name = "nothing"


class Nameless(Divergence):
    pointwise, terms = Hellinger.pointwise, Hellinger.terms


class Halved(JSD):
    def pointwise(self, log_p, log_q):
        return ForwardKL().pointwise(log_p, log_q) / 2

    def terms(self, p, q, g):
        return Terms(*(each / 2 for each in ForwardKL().terms(p, q, g)))


class HalvedAlphaBeta(AlphaBeta):
    pointwise, terms = Halved.pointwise, Halved.terms


@dataclass(frozen=True)
class Asking(Hellinger):
    _: KW_ONLY
    more: InitVar[float]

    def __post_init__(self, more):
        pass


@dataclass(frozen=True)
class Rescaled(Hellinger):
    def __post_init__(self):
        object.__setattr__(self, "weight", 2 * self.weight)


class Stateful(Hellinger):
    def __init__(self, table):
        super().__init__()
        self.table = table


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        (Divergence(), "an instance of Divergence, which lacks name, pointwise, terms"),
        (Nothing(), "an instance of Nothing, which lacks pointwise, terms"),
        (Nameless(), "an instance of Nameless, which lacks name"),
        (Stateful([1.0]), r"an instance of Stateful, whose table is no dataclass field.*@dataclass\(frozen=True\)"),
        (Asking(1.0, more=2.0), "an instance of Asking, .*from its fields.* raises TypeError: .*'more'"),
        (Rescaled(1.0), r"an instance of Rescaled, .*Rescaled\(\*\*{'weight': 2.0}\) has others: \[4.0\]"),
        (Hellinger("1"), "an instance of Hellinger, whose weight is str"),
        (JSD, "divergence is the class JSD; expected a name .* or an instance"),
        (Hellinger, "divergence is the class Hellinger; expected"),
        (torch.nn.KLDivLoss(), "divergence is KLDivLoss; expected a name"),
    ],
)
def test_wrong_instances(divergence, message):
    case = make()
    with pytest.raises(TypeError, match=message):
        fused_kd_loss(student(case), sources(case, "head")[0], divergence=divergence)


@dataclass(frozen=True)
class Squares(Divergence):
    """½ Σ (p − q)²: of degree two."""

    name: ClassVar[str] = "squares"

    def pointwise(self, log_p, log_q):
        return (log_p.exp() - log_q.exp()).square() / 2

    def terms(self, p, q, g):
        return Terms((p - q).square() / 2, (p - q) * p, (q - p) * q)


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_of_another_degree_a_sparse_teacher_needs_a_bucket(engine):
    case = make()
    for kind in ("renormalize", "weights"):
        source, options = sources(case, kind)
        with pytest.raises(ValueError, match=r"divergence=Squares\(\) with a SparseLogits .*tail='bucket'"):
            fused_kd_loss(student(case), source, divergence=Squares(), engine=engine, **options)
    fused_kd_loss(student(case), sources(case, "bucket")[0], divergence=Squares(), engine=engine)
