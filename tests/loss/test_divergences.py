"""Each divergence's two forms agree with each other and with their definition, at the edges too."""

from math import inf, log

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import relative

from kdfast import JSD, AlphaBeta, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, SymmetricKL, TotalVariation
from kdfast.divergences import get_divergence, log_ratio
from kdfast.kernels.divergences import ENTRIES, terms

ALL = [
    ForwardKL(), ReverseKL(), SymmetricKL(), SymmetricKL(0.1), SymmetricKL(0.9), JSD(0.5), JSD(0.1), JSD(0.9),
    SkewKL(0.1), SkewKL(0.9), SkewReverseKL(0.1), SkewReverseKL(0.9), TotalVariation(),
    AlphaBeta(), AlphaBeta(0.2, 0.7), AlphaBeta(1.3, 0.4),
]  # fmt: skip
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has test_gpu.py")


def evaluate(divergence, z_t, z_s):
    """(value, ∂/∂z_t, ∂/∂z_s) as the fused engines compute them."""
    log_p, log_q = z_t.log_softmax(-1), z_s.log_softmax(-1)
    p, q, (f, a_p, a_q) = divergence.solve(log_p.clone(), log_q.clone(), log_ratio(log_p, log_q))
    grad_t = a_p - (0 if divergence.centred_p else p * a_p.sum(-1, keepdim=True))
    grad_s = a_q - (0 if divergence.centred_q else q * a_q.sum(-1, keepdim=True))
    return f.sum(-1), grad_t, grad_s


def by_hand(divergence, p, q):
    """The definition in numpy, for distributions without zeros."""

    def kl(a, b):
        return (a * np.log(a / b)).sum()

    def mixed(weight):
        return weight * p + (1 - weight) * q

    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "symmetric_kl": lambda c: (1 - c) * kl(p, q) + c * kl(q, p),
        "jsd": lambda b: b * kl(p, mixed(b)) + (1 - b) * kl(q, mixed(b)),
        "skew_kl": lambda a: kl(p, mixed(a)),
        "skew_reverse_kl": lambda a: kl(q, mixed(1 - a)),
        "total_variation": lambda: np.abs(p - q).sum() / 2,
        "alpha_beta": lambda a, b: alpha_beta(a, b, p, q),
    }[divergence.name](*divergence.parameters)


def alpha_beta(a, b, p, q):
    """With the limits of Cichocki, Cruces and Amari 2011."""
    if a == b == 0:
        return (np.log(p / q) ** 2).sum() / 2
    if a == 0:
        return alpha_beta(b, a, q, p)
    if b == 0:
        return (p**a * np.log((p / q) ** a) - p**a + q**a).sum() / a**2
    if a + b == 0:
        return (np.log((q / p) ** a) + (p / q) ** a - 1).sum() / a**2
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum() / (a * b)


def logs(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


# the second pair is far apart, the third nearly equal, the last has ties
PAIRS = [
    ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]), ([0.97, 0.02, 0.01], [1e-6, 1e-9, 1 - 1e-6 - 1e-9]),
    ([0.6, 0.4], [0.6001, 0.3999]), ([0.25, 0.25, 0.5], [0.25, 0.35, 0.4]),
]  # fmt: skip


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_values_by_hand(divergence):
    for p, q in PAIRS:
        expected = by_hand(divergence, np.array(p), np.array(q))
        log_p, log_q = logs(*p), logs(*q)
        assert divergence.pointwise(log_p, log_q).sum().item() == pytest.approx(expected, rel=1e-9)
        assert evaluate(divergence, log_p, log_q)[0].item() == pytest.approx(expected, rel=1e-9)


def test_values_known_in_closed_form():
    """p = (¾, ¼), q = (¼, ¾): the log ratio is ±log 3, and the even mixture is uniform."""
    log_p, log_q = logs(0.75, 0.25), logs(0.25, 0.75)
    expected = {
        SymmetricKL(): log(3) / 2, SymmetricKL(0.9): log(3) / 2, SkewKL(0.5): 0.75 * log(1.5) - 0.25 * log(2),
        SkewReverseKL(0.5): 0.75 * log(1.5) - 0.25 * log(2), TotalVariation(): 0.5,
    }  # fmt: skip
    for divergence, value in expected.items():
        assert evaluate(divergence, log_p, log_q)[0].item() == pytest.approx(value), divergence


@pytest.mark.parametrize("divergence", ALL, ids=str)
@pytest.mark.parametrize("gap", [10.0, 1.0, 1e-3])
def test_terms_are_the_pointwise_value_and_its_derivative(divergence, gap):
    z_t = torch.randn(4, 101, dtype=torch.float64) * 3
    z_s = (z_t + gap * torch.randn_like(z_t)).requires_grad_()
    z_t.requires_grad_()
    expected = divergence.pointwise(z_t.log_softmax(-1), z_s.log_softmax(-1)).sum(-1)
    grads = torch.autograd.grad(expected.sum(), (z_t, z_s))
    value, *computed = evaluate(divergence, z_t.detach(), z_s.detach())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-13)
    for ours, theirs in zip(computed, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_value_keeps_its_digits_near_convergence(divergence):
    """At KL 4e-4 a plain Σ p·(log p − log q) in float32 loses 2e-3 to 9e-3 of the value."""
    z_t = torch.randn(16, 16384) * 2
    z_s = z_t + 0.028 * torch.randn_like(z_t)
    exact = evaluate(divergence, z_t.double(), z_s.double())[0]
    computed = evaluate(divergence, z_t, z_s)[0]
    torch.testing.assert_close(computed.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_extreme_logits_are_finite_and_right(divergence):
    z_t = torch.randn(8, 31, dtype=torch.float64) * 1e4
    z_s = torch.randn(8, 31, dtype=torch.float64) * 1e4
    expected = divergence.pointwise(z_t.log_softmax(-1), z_s.log_softmax(-1)).sum(-1)
    value, grad_t, grad_s = evaluate(divergence, z_t.float(), z_s.float())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    assert grad_t.isfinite().all()
    assert grad_s.isfinite().all()


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_entries_without_mass_on_both_sides_count_nothing(divergence):
    z_t, z_s = torch.randn(3, 40, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    whole = evaluate(divergence, z_t[:, :30], z_s[:, :30])
    masked = torch.arange(40) >= 30
    value, grad_t, grad_s = evaluate(divergence, z_t.masked_fill(masked, -inf), z_s.masked_fill(masked, -inf))
    torch.testing.assert_close(value, whole[0])
    torch.testing.assert_close(grad_t[:, :30], whole[1])
    torch.testing.assert_close(grad_s[:, :30], whole[2])
    assert not grad_t[:, 30:].any()
    assert not grad_s[:, 30:].any()


def test_mass_the_other_side_cannot_produce():
    """Forward KL is +inf where the student has no mass, 0·log 0 = 0 where the teacher has none, symmetric KL is +inf
    in both cases; JSD, skew KLs and total variation are bounded."""
    some, none = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -inf]])
    for pair in ((some, none), (none, some)):
        for lam in (0.1, 0.5, 0.9):
            assert evaluate(SymmetricKL(lam), *pair)[0].item() == inf
        assert evaluate(TotalVariation(), *pair)[0].item() == 0.5
    for alpha in (0.1, 0.9):
        # p = (½, ½), q = (1, 0): m = (1 − α/2, α/2); p and q exchanged: m = ((1 + α)/2, (1 − α)/2)
        half, whole = -(log(2 - alpha) + log(alpha)) / 2, log(2 / (1 + alpha))
        assert evaluate(SkewKL(alpha), some, none)[0].item() == pytest.approx(half)
        assert evaluate(SkewKL(alpha), none, some)[0].item() == pytest.approx(whole)
        assert evaluate(SkewReverseKL(alpha), none, some)[0].item() == pytest.approx(half)
        assert evaluate(SkewReverseKL(alpha), some, none)[0].item() == pytest.approx(whole)
    assert evaluate(ForwardKL(), some, none)[0].item() == inf
    assert evaluate(ReverseKL(), none, some)[0].item() == inf
    assert evaluate(ForwardKL(), none, some)[0].item() == pytest.approx(log(2))
    assert evaluate(ReverseKL(), some, none)[0].item() == pytest.approx(log(2))
    p, q, m = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), torch.tensor([0.75, 0.25])
    expected = 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).nan_to_num().sum()
    assert evaluate(JSD(0.5), some, none)[0].item() == pytest.approx(expected.item())


BOUNDED = [d for d in ALL if not isinstance(d, ForwardKL | ReverseKL | SymmetricKL)]
PARAMETERS = [
    (0.0, 0.0), (0.0, 0.7), (0.7, 0.0), (0.5, -0.5), (-0.8, 0.8), (-0.3, 1.3), (1.3, -0.3), (0.2, 0.7), (2.0, 1.0),
    (1e-6, 0.7), (0.7, -1e-6), (0.6, -0.6 + 1e-7), (0.1, 0.1), (0.01, 0.002), (-0.2, -0.3), (-0.5, 0.2),
    (0.1 + 0.2, -0.3),
]  # fmt: skip


@pytest.mark.parametrize("divergence", BOUNDED, ids=str)
def test_bounded_divergences_have_right_gradients_where_a_side_has_no_mass(divergence):
    """Autograd of the definition too, which the reference engine runs. Disjoint sides are the upper bound."""
    z_t, z_s = torch.randn(2, 3, 40, dtype=torch.float64)
    z_t[:, :10] = -inf
    z_s[:, 5:15] = -inf  # 0 to 4 the student's alone, 5 to 9 nobody's, 10 to 14 the teacher's alone
    leaves = z_t.clone().requires_grad_(), z_s.clone().requires_grad_()
    expected = divergence.pointwise(*(z.log_softmax(-1) for z in leaves)).sum(-1)
    value, *computed = evaluate(divergence, z_t, z_s)
    torch.testing.assert_close(value, expected.detach())
    for ours, theirs in zip(computed, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs)
    bound = {
        "jsd": lambda b: -b * log(b) - (1 - b) * log(1 - b), "skew_kl": lambda a: -log(a),
        "skew_reverse_kl": lambda a: -log(a), "total_variation": lambda: 1.0,
        "alpha_beta": lambda a, b: 1 / (a * b),
    }[divergence.name](*divergence.parameters)  # fmt: skip
    assert evaluate(divergence, logs(0.0, 1.0), logs(1.0, 0.0))[0].item() == pytest.approx(bound)


@pytest.mark.parametrize(("alpha", "beta"), PARAMETERS)
def test_alpha_beta_and_its_limits(alpha, beta):
    """Near them too, where the definition's terms are large and cancel; the gradient is the definition's derivative."""
    divergence, nearby = AlphaBeta(alpha, beta), [x if abs(x) > 1e-3 else 0.0 for x in (alpha, beta)]
    nearby[1] = -nearby[0] if abs(sum(nearby)) < 1e-3 else nearby[1]
    for p, q in PAIRS:
        expected = alpha_beta(*nearby, np.array(p), np.array(q))
        value = evaluate(divergence, logs(*p), logs(*q))[0].item()
        assert value == pytest.approx(expected, rel=1e-7 if nearby == [alpha, beta] else 0.01, abs=1e-11)
        assert divergence.pointwise(logs(*p), logs(*q)).sum().item() == pytest.approx(value, rel=1e-9)
    for gap in (1.0, 1e-2):
        test_terms_are_the_pointwise_value_and_its_derivative(divergence, gap)
    if not torch.cuda.is_available() and min(alpha, beta) >= 0:
        test_the_device_entry_is_the_same(divergence)


@pytest.mark.parametrize(("alpha", "beta"), PARAMETERS)
@pytest.mark.parametrize("gap", [3.0, 0.1, 0.01])
def test_alpha_beta_in_single_precision(alpha, beta, gap):
    """No worse than JSD and eight roundings of the log-probabilities, one row's down to e⁻⁷⁰; the sides exchanged with
    the parameters too."""
    generator = torch.Generator().manual_seed(0)
    z_t = 3 * torch.randn(4, 500, generator=generator)
    z_s = z_t + gap * torch.randn(4, 500, generator=generator)
    z_t[0, 0], z_s[0, 0] = 60, 60 + gap

    def errors(divergence, t, s):
        exact, ours = evaluate(divergence, t.double(), s.double()), evaluate(divergence, t, s)
        return [relative(a, b) for a, b in zip(ours, exact, strict=True)]

    allowed = max(errors(JSD(0.3), z_t, z_s)) + 8 * 6e-8 * 6 / min(1, gap)
    assert max(errors(AlphaBeta(alpha, beta), z_t, z_s)) < allowed
    assert max(errors(AlphaBeta(beta, alpha), z_s, z_t)) < allowed


def test_alpha_beta_where_a_side_has_no_mass():
    """Finite for positive parameters, and of a negative one infinite where its side has none; 0 where neither has."""
    some, none = logs(0.5, 0.5, 0.0), logs(1.0, 0.0, 0.0)
    for alpha, beta in ((0.2, 0.7), (1.3, 0.1)):
        found = evaluate(AlphaBeta(alpha, beta), some, none)[0].item()
        both = alpha + beta
        expected = (alpha / both * (0.5**both * 2) + beta / both - 0.5**alpha) / (alpha * beta)
        assert found == pytest.approx(expected)
        assert AlphaBeta(alpha, beta).pointwise(some, none).sum().item() == pytest.approx(expected)
    for (alpha, beta), pair in (((0.7, 0.0), (some, none)), ((0.0, 0.7), (none, some)), ((0.0, 0.0), (some, none))):
        assert evaluate(AlphaBeta(alpha, beta), *pair)[0].item() == inf
        assert AlphaBeta(alpha, beta).pointwise(*pair).sum().item() == inf


@pytest.mark.parametrize("alpha", [1e-12, 1e-6, 1 - 1e-6])
@pytest.mark.parametrize("cls", [SkewKL, SkewReverseKL])
def test_a_skew_near_its_ends_is_finite_in_float32(cls, alpha):
    """1 − α rounds to 1, and m to 0 where one side has no mass, unless it is kept from it."""
    for z_t, z_s in ((logs(0.5, 0.5), logs(1.0, 0.0)), (logs(1.0, 0.0), logs(0.5, 0.5))):
        expected = cls(alpha).pointwise(z_t, z_s).sum()
        value, grad_t, grad_s = evaluate(cls(alpha), z_t.float(), z_s.float())
        assert value.item() == pytest.approx(expected.item(), rel=0.5 if alpha < 1e-7 else 1e-4)
        assert grad_t.isfinite().all()
        assert grad_s.isfinite().all()


def test_ties_give_total_variation_no_gradient():
    """Entry 0 is a tie: of the others' a = ±p/2 and ±q/2 it sees its softmax's part alone; equal sides see nothing."""
    log_p, log_q = logs(0.25, 0.25, 0.5).requires_grad_(), logs(0.25, 0.35, 0.4).requires_grad_()
    f, a_p, a_q = TotalVariation().terms(log_p.exp(), log_q.exp(), log_ratio(log_p, log_q))
    torch.testing.assert_close(f, torch.tensor([[0.0, 0.05, 0.05]], dtype=torch.float64))
    torch.testing.assert_close(a_p, torch.tensor([[0.0, -0.125, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(a_q, torch.tensor([[0.0, 0.175, -0.2]], dtype=torch.float64))
    by_autograd = torch.autograd.grad(TotalVariation().pointwise(log_p, log_q).sum(), (log_p, log_q))
    for ours, theirs in zip((a_p, a_q), by_autograd, strict=True):
        torch.testing.assert_close(ours, theirs)
    z = torch.randn(3, 40, dtype=torch.float64)
    for gradient in evaluate(TotalVariation(), z, z)[1:]:
        assert not gradient.any()


def test_near_convergence_the_gradient_is_the_kls_times_a_constant():
    """1 for the KLs, β(1−β) for JSD, (1−α)² for the skew KLs, as docs/choosing.md says."""
    z_t = torch.randn(4, 101, dtype=torch.float64)
    z_s = z_t + 1e-5 * torch.randn_like(z_t)
    kl = evaluate(ForwardKL(), z_t, z_s)[2]
    factors = {
        SymmetricKL(): 1.0, SymmetricKL(0.9): 1.0, JSD(0.3): 0.21, SkewKL(0.1): 0.81, SkewReverseKL(0.2): 0.64,
        AlphaBeta(): 1.0, AlphaBeta(1.3, -0.3): 1.0,
    }  # fmt: skip
    for divergence, factor in factors.items():
        torch.testing.assert_close(evaluate(divergence, z_t, z_s)[2], factor * kl, rtol=1e-2, atol=1e-9)


@triton.jit
def entry_kernel(p, q, g, log_p, parameters, out, DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    p, q, g = tl.load(p + i), tl.load(q + i), tl.load(g + i)
    log_p, log_q = tl.load(log_p + i), tl.load(log_p + BLOCK + i)
    f, a_p, a_q = terms(DIVERGENCE, p, q, g, log_p, log_q, tl.load(parameters), tl.load(parameters + 1))
    tl.store(out + i, f)
    tl.store(out + BLOCK + i, a_p)
    tl.store(out + 2 * BLOCK + i, a_q)


def on_device(divergence, p, q, g, logarithms=None):
    """(f, a_p, a_q) of a power of two of entries, [3, n]. logarithms: of p and q, where those are rounded to 0."""
    parameters = torch.tensor([*divergence.parameters, 0.0, 0.0], dtype=p.dtype)
    out = torch.empty(3, len(p), dtype=p.dtype)
    logarithms = torch.cat(logarithms or [p.log(), q.log()])
    entry_kernel[(1,)](p, q, g, logarithms, parameters, out, DIVERGENCE=divergence.name, BLOCK=len(p))
    return out


@interpreted
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_the_device_entry_is_the_same(divergence):
    """Mass on both sides, near and far, on one, on neither (where g is NaN on the device), too little for its dtype
    beside none, and ties."""
    assert set(ENTRIES) == {d.name for d in ALL}
    assert ENTRIES[divergence.name].centred_p == divergence.centred_p
    assert ENTRIES[divergence.name].centred_q == divergence.centred_q
    block = 512
    z_t = torch.randn(block, dtype=torch.float64) * 3
    z_s = z_t + torch.randn(block, dtype=torch.float64) * torch.logspace(-6, 2, block, dtype=torch.float64)
    z_t[:20] = -inf
    z_s[10:30] = -inf
    z_s[0], z_t[20] = -1e4, -1e4
    z_s[30:50] = z_t[30:50]
    log_p, log_q = z_t - z_t.logsumexp(-1), z_s - z_t.logsumexp(-1)  # by one number, so that ties are ties
    p, q, g = log_p.exp(), log_q.exp(), log_p - log_q
    assert g[10:20].isnan().all()
    _, _, expected = divergence.solve(log_p.clone(), log_q.clone(), log_ratio(log_p, log_q))
    for ours, theirs in zip(on_device(divergence, p, q, g, [log_p, log_q]), expected, strict=True):
        assert not ours.isnan().any()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-15)


@interpreted
@pytest.mark.parametrize("cls", [SkewKL, SkewReverseKL])
def test_a_skew_near_its_end_is_finite_on_the_device(cls):
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    for sides in ((p, q), (q, p)):
        terms_there = on_device(cls(1e-12), *sides, sides[0].log() - sides[1].log())
        assert terms_there.isfinite().all()


def test_ends_that_are_defined_as_the_kls():
    assert get_divergence(JSD(0.0)) == ForwardKL()
    assert get_divergence(JSD(1.0)) == ReverseKL()
    assert get_divergence(SymmetricKL(0.0)) == ForwardKL()
    assert get_divergence("symmetric_kl", [1.0]) == ReverseKL()
    assert get_divergence(AlphaBeta(1.0, 0.0)) == ForwardKL()
    assert get_divergence("alpha_beta", [0.0, 1.0]) == ReverseKL()
    assert get_divergence(SkewKL(0.0)) == ForwardKL()
    assert get_divergence("skew_reverse_kl", [0.0]) == ReverseKL()


@pytest.mark.parametrize(("skew", "kl"), [(SkewKL, ForwardKL()), (SkewReverseKL, ReverseKL())])
def test_skew_tends_to_the_kl(skew, kl):
    """Unlike JSD, the skew divergences are continuous at their end."""
    z_t, z_s = torch.randn(2, 4, 30, dtype=torch.float64)
    for ours, theirs in zip(evaluate(skew(1e-9), z_t, z_s), evaluate(kl, z_t, z_s), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_names():
    for divergence in ALL:
        assert get_divergence(divergence.name, divergence.parameters) == divergence
    assert get_divergence("jsd") == JSD(beta=0.5)
    assert get_divergence("symmetric_kl") == SymmetricKL(lam=0.5)
    assert get_divergence("skew_kl") == SkewKL(alpha=0.1)
    assert get_divergence("skew_reverse_kl") == SkewReverseKL(alpha=0.1)


def test_errors():
    for alpha in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"SkewKL\(alpha=.*\): alpha must lie in \[0, 1\)"):
            SkewKL(alpha)
        with pytest.raises(ValueError, match=r"SkewReverseKL\(alpha=.*alpha must lie"):
            SkewReverseKL(alpha)
    with pytest.raises(ValueError, match="beta"):
        JSD(1.5)
    for wrong in (inf, float("nan"), "1", True, None):
        with pytest.raises(ValueError, match=r"AlphaBeta\(alpha=0.5, beta=.*\): expected finite numbers"):
            AlphaBeta(beta=wrong)
    for cls, name in ((JSD, "beta"), (SymmetricKL, "lam"), (SkewKL, "alpha"), (SkewReverseKL, "alpha")):
        for wrong in ("a", None, True, [0.5], 0.5j, torch.tensor(0.5, requires_grad=True), torch.tensor([0.1, 0.2])):
            with pytest.raises(TypeError, match=rf"{cls.__name__}\({name}=.*\): {name}.* expected a number in \[0, 1"):
                cls(wrong)
        with pytest.raises(ValueError, match=rf"{cls.__name__}\({name}=nan\): {name}.* must lie in \[0, 1"):
            cls(float("nan"))
        assert get_divergence(cls(torch.tensor(0.25))).parameters == cls(np.float32(0.25)).parameters == [0.25]
    with pytest.raises(ValueError, match=r"SymmetricKL\(lam=1.5\): lam, the share of KL\(student‖teacher\)"):
        SymmetricKL(1.5)
    with pytest.raises(ValueError, match="'kl' is unknown; expected one of forward_kl"):
        get_divergence("kl")
    with pytest.raises(TypeError, match="divergence is int"):
        get_divergence(3)
