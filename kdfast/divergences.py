"""Divergences between the teacher's distribution p (t) and the student's q (s): one class each.

Every divergence is a sum over the vocabulary, D = Σᵥ f(log pᵥ, log qᵥ), and is written twice:

`pointwise(log_p, log_q)`  the definition, differentiable by autograd. The reference engine sums it.
`terms(p, q, g)`           for the fused engines, with g = log p − log q: the summand f, arranged to keep its digits
                           when p ≈ q, and its derivatives a_p = ∂f/∂log p, a_q = ∂f/∂log q.

The gradient with respect to logits z, where log p = log_softmax(z/τ), is (a − softmax·Σa)/τ. If Σa is zero by
construction (`centred_p`, `centred_q`), the gradient is known without a second pass.

Near convergence Σ p·g loses three digits in float32, because its first-order part cancels only in the sum. Adding
q − p, whose sum is exactly zero, makes every summand non-negative and of second order, p·(g + expm1(−g)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf, log
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """The summand of each entry [rows, V], and its derivatives with respect to log p and log q."""

    f: Tensor
    a_p: Tensor
    a_q: Tensor


_CLASSES: dict[str, type[Divergence]] = {}  # every subclass, by its `key`


@dataclass(frozen=True)
class Divergence:
    """Base class of divergences from the teacher's distribution p to the student's q.

    A subclass defines `name`, `pointwise` and `terms`; any fields must be numbers."""

    name: ClassVar[str]
    key: ClassVar[str] = ""  # by which operators find the class; for the classes in this file, the name
    centred_p: ClassVar[bool] = False
    centred_q: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.key = f"{cls.__qualname__} {len(_CLASSES)}"  # two classes may have the same name
        _CLASSES[cls.key] = cls

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        raise NotImplementedError

    def terms(self, p: Tensor, q: Tensor, g: Tensor) -> Terms:
        raise NotImplementedError

    def solve(self, log_p: Tensor, log_q: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Terms]:
        """Return p and q, written over their logarithms, and `terms`. Engines call this."""
        p, q = log_p.exp_(), log_q.exp_()
        return p, q, Terms(*self.terms(p, q, g))

    @property
    def parameters(self) -> list[float]:
        """Return the dataclass fields that are arguments, in order. Operators rebuild the divergence from these and
        `key`."""
        return [float(getattr(self, name)) for name in _arguments(self)]


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """Forward KL, KL(teacher‖student) = Σ p·(log p − log q), mass-covering. Hinton et al. 2015, arXiv:1503.02531."""

    name: ClassVar[str] = "forward_kl"
    centred_q: ClassVar[bool] = True

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_p, log_q)

    def terms(self, p: Tensor, q: Tensor, g: Tensor) -> Terms:
        d = difference(p, q, g)
        a_p = weighted(p, g)
        return Terms(a_p + d, a_p, d)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """Reverse KL, KL(student‖teacher) = Σ q·(log q − log p), mode-seeking. Gu et al. 2024, arXiv:2306.08543."""

    name: ClassVar[str] = "reverse_kl"
    centred_p: ClassVar[bool] = True

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_q, log_p)

    def terms(self, p: Tensor, q: Tensor, g: Tensor) -> Terms:
        return _swap(ForwardKL().terms(q, p, -g))


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    """Symmetric KL, (1−λ)·KL(p‖q) + λ·KL(q‖p): forward KL at λ = 0, reverse KL at 1.

    At λ = ½, the default, it is ½ Σ (p − q)·(log p − log q), half of Jeffreys' J (Kullback and Leibler 1951). The code
    of DistiLLM (Ko et al. 2024) has λ = 0.9. Infinite if either side has mass where the other has none. Raises
    ValueError for a λ (`lam`) outside [0, 1].
    """

    lam: float = 0.5
    name: ClassVar[str] = "symmetric_kl"

    def __post_init__(self) -> None:
        _check_share(self, "lam", of=", the share of KL(student‖teacher),")

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (1 - self.lam) * _kl(log_p, log_q) + self.lam * _kl(log_q, log_p)

    def terms(self, p: Tensor, q: Tensor, g: Tensor) -> Terms:
        d, by_p, by_q = difference(p, q, g), weighted(p, g), weighted(q, g)
        # f = a_p + a_q without its cancellation: half the sum of both KLs plus a rest, of third order or infinite
        uneven = (by_p + by_q + 2 * d).mul_(0.5 - self.lam).masked_fill_(g.isinf(), 0.0)
        a_p, a_q = by_p.mul_(1 - self.lam).sub_(self.lam * d), by_q.mul_(-self.lam).add_((1 - self.lam) * d)
        return Terms(weighted(d, g).mul_(-0.5).add_(uneven), a_p, a_q)


@dataclass(frozen=True)
class JSD(Divergence):
    """Jensen–Shannon divergence, β·KL(p‖m) + (1−β)·KL(q‖m) with m = β p + (1−β) q.

    β = 0 is *defined* as forward KL and β = 1 as reverse KL, as in GKD (Agarwal et al. 2024, arXiv:2306.13649). It is
    discontinuous there: as β → 0 the formula tends to 0. Raises ValueError for a β outside [0, 1].
    """

    beta: float = 0.5
    name: ClassVar[str] = "jsd"

    def __post_init__(self) -> None:
        _check_share(self, "beta")

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = _log_mixture(log_p, log_q, self.beta)
        return self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m)

    def terms(self, p: Tensor, q: Tensor, g: Tensor) -> Terms:
        # log m/p = log1p((1−β)·expm1(−g)) is safe for g ≥ 0, log m/q = log1p(β·expm1(g)) for g ≤ 0; they differ by g
        other = (g >= 0).to(g.dtype).mul_(1 - 2 * self.beta).add_(self.beta)
        mixed = expm1(-g.abs()).mul_(other).log1p_()
        a_p = weighted(p, mixed + (-g).clamp_min_(0)).mul_(-self.beta)
        a_q = weighted(q, mixed + g.clamp_min(0)).mul_(self.beta - 1)
        return Terms(a_p + a_q, a_p, a_q)


@dataclass(frozen=True)
class _Skew(Divergence):
    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_share(self, "alpha", "[0, 1)")


@dataclass(frozen=True)
class SkewKL(_Skew):
    """Skew KL, KL(p‖m) with m = α p + (1−α) q, which is at most −log α. Ko et al. 2024, arXiv:2402.03898."""

    name: ClassVar[str] = "skew_kl"

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_p, _log_mixture(log_p, log_q, self.alpha))

    def terms(self, p: Tensor, q: Tensor, g: Tensor) -> Terms:
        # f = p·log(p/m) + (1−α)·(q − p): the addition sums to zero and makes every summand of second order. Where
        # p < e⁻⁸⁰ q it makes no difference, so expm1(−g) may stop there; of_q keeps the rounded m = p·(1 + x) > 0
        of_q = min(1 - self.alpha, 1 - torch.finfo(g.dtype).eps)
        x = expm1((-g).clamp_max_(80.0)).mul_(of_q)  # (m − p)/p
        a_q = (q / (1 + x)).mul_(-of_q)  # without (1−α)·q, which changes no gradient and would swamp it for p ≪ q
        r = x / (1 + x)  # (m − p)/m
        a_p = (r * self.alpha).sub_(x.log1p_()).mul_(p)
        return Terms(r.mul_(q).mul_(of_q).add_(a_p), a_p, a_q)


@dataclass(frozen=True)
class SkewReverseKL(_Skew):
    """Skew reverse KL, KL(q‖m) with m = (1−α) p + α q, which is at most −log α. Ko et al. 2024, arXiv:2402.03898."""

    name: ClassVar[str] = "skew_reverse_kl"

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return SkewKL(self.alpha).pointwise(log_q, log_p)

    def terms(self, p: Tensor, q: Tensor, g: Tensor) -> Terms:
        return _swap(SkewKL(self.alpha).terms(q, p, -g))


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Total variation, ½ Σ |p − q|, at most 1; subgradient 0 where p = q. Wen et al. 2023, arXiv:2307.15190.

    Its gradient does not shrink with p − q, so it scales as 1/τ where other divergences' scale as 1/τ². The factor τ²
    therefore overweights it by τ: divide `kd_weight` by τ to compare.
    """

    name: ClassVar[str] = "total_variation"

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs() / 2

    def terms(self, p: Tensor, q: Tensor, g: Tensor) -> Terms:
        half = g.sign().mul_(0.5)
        return Terms(difference(p, q, g).abs_().mul_(0.5), p * half, q * half.neg_())


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """α-β divergence, −1/(αβ) Σ (p^α·q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)), or its limit if α, β or α+β is 0.

    Forward KL at α = 1, β = 0; reverse KL at 0 and 1; four times the squared Hellinger distance at ½ and ½;
    ½ Σ (log p − log q)² at 0 and 0. The limits are those of Cichocki, Cruces and Amari, Entropy 13, 2011: at β = 0 they
    have a factor 1/α², where the code of ABKD (Wang et al. 2025, arXiv:2505.04560) has 1/α. Unless α+β = 1, a sparse
    teacher needs tail="bucket" or "renormalize_both". Raises ValueError for a number that is not finite.
    """

    alpha: float = 0.5
    beta: float = 0.5
    name: ClassVar[str] = "alpha_beta"

    def __post_init__(self) -> None:
        for value in (self.alpha, self.beta):
            if not isinstance(value, Real) or isinstance(value, bool) or not -inf < value < inf:
                raise ValueError(f"AlphaBeta(alpha={self.alpha}, beta={self.beta}): expected finite numbers")

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        # a sum of two differences divided by α and β, or by two of α, β, α+β, such that none is nearly 0
        alpha, beta, both = self.alpha, self.beta, self.alpha + self.beta
        empty = log_p.isneginf() & log_q.isneginf()
        log_p, log_q = log_p.masked_fill(empty, 0.0), log_q.masked_fill(empty, 0.0)
        p, q = _power(log_p, both, log_q, 0.0), _power(log_p, 0.0, log_q, both)
        pq = _power(log_p, alpha, log_q, beta)

        def over(number: float, end: Tensor, start: Tensor) -> Tensor:  # (end − start)/number, log end/start = number·g
            none = start == 0
            g = log_p.masked_fill(none, 0.0) - log_q.masked_fill(none, 0.0)
            if not number:
                return start * g
            far = (number * g).abs() > 1
            return torch.where(far | none, end - start, start * torch.expm1(number * g.masked_fill(far, 0.0))) / number

        if alpha == beta == 0:
            return (log_p - log_q).square() / 2
        if alpha * beta >= 0:
            return (over(beta, p, pq) - over(alpha, pq, q)) / both
        if abs(alpha) > abs(beta):
            return (over(beta, p, pq) - over(both, p, q)) / alpha
        return (over(both, p, q) - over(alpha, pq, q)) / beta

    def terms(self, p: Tensor, q: Tensor, g: Tensor) -> Terms:
        return self._terms(p.log(), q.log(), g)

    def solve(self, log_p: Tensor, log_q: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Terms]:
        if type(self).terms is not AlphaBeta.terms:  # a subclass has its own
            return super().solve(log_p, log_q, g)
        terms = self._terms(log_p, log_q, g)  # from logarithms: a small power does not underflow where p does
        return log_p.exp_(), log_q.exp_(), terms

    def _terms(self, log_p: Tensor, log_q: Tensor, g: Tensor) -> Terms:
        alpha, beta, both = self.alpha, self.beta, self.alpha + self.beta
        empty = log_p.isneginf() & log_q.isneginf()
        log_p, log_q = log_p.masked_fill(empty, 0.0), log_q.masked_fill(empty, 0.0)
        p, q = _power(log_p, both, log_q, 0.0), _power(log_p, 0.0, log_q, both)
        pq = _power(log_p, alpha, log_q, beta)

        def over(number: float, end: Tensor, start: Tensor) -> Tensor:  # as in `pointwise`, to full relative precision
            return difference(start, end, -number * g).div_(number) if number else weighted(start, g)

        a_p, a_q = over(beta, p, pq), over(alpha, pq, q).neg_()
        if alpha == beta == 0:
            return Terms(g.square() / 2, a_p, a_q)
        if alpha * beta >= 0:
            f = (a_p + a_q) / both
        elif abs(alpha) > abs(beta):
            f = (a_p - over(both, p, q)) / alpha
        else:
            f = (over(both, p, q) + a_q) / beta
        x, y = -alpha * g, beta * g  # near 0, where f cancels, it is g²·pq·exp[0, x, y], a divided difference
        series = 0.5 + (x + y) / 6 + (x * x + x * y + y * y) / 24 + (x + y) * (x * x + y * y) / 120
        near = torch.maximum(x.abs(), y.abs()) < (2.0**-12 if g.dtype == torch.float64 else 2.0**-4)
        return Terms(torch.where(near, g.square() * pq * series, f), a_p, a_q)


DIVERGENCES: dict[str, type[Divergence]] = {
    cls.name: cls
    for cls in (ForwardKL, ReverseKL, SymmetricKL, JSD, SkewKL, SkewReverseKL, TotalVariation, AlphaBeta)
}
_LIMITS: tuple[tuple[type[Divergence], list[float], list[float]], ...] = (  # the parameters of forward and reverse KL
    (JSD, [0.0], [1.0]),
    (SymmetricKL, [0.0], [1.0]),
    (SkewKL, [0.0], [1.0]),  # α = 1 is refused
    (SkewReverseKL, [1.0], [0.0]),
    (AlphaBeta, [1.0, 0.0], [0.0, 1.0]),
)
for _name, _class in DIVERGENCES.items():  # the kernels know these by name
    _class.key = _name


def get_divergence(divergence: str | Divergence, parameters: Sequence[float] = ()) -> Divergence:
    """Return the instance that a name (with its parameters) or an instance stands for.

    JSD and symmetric KL at 0 and 1, the skew divergences at 0, and α-β at (1, 0) and (0, 1) become the KL they equal.

    Raises ValueError for an unknown name or a parameter out of range, TypeError for anything else.
    """
    if isinstance(divergence, str):
        cls = DIVERGENCES.get(divergence) or _CLASSES.get(divergence)
        if cls is None:
            raise ValueError(f"divergence={divergence!r} is unknown; expected one of {', '.join(DIVERGENCES)}")
        return get_divergence(_built(cls, parameters))
    if not isinstance(divergence, Divergence):
        what = f"the class {divergence.__name__}" if isinstance(divergence, type) else type(divergence).__name__
        raise TypeError(
            f"divergence is {what}; expected a name ({', '.join(DIVERGENCES)}) or an instance such as "
            "kdfast.JSD(beta=0.5)"
        )
    if divergence.key not in DIVERGENCES and not torch.compiler.is_compiling():
        _check_own(divergence)
    own = type(divergence)
    for cls, forward, reverse in _LIMITS:
        if isinstance(divergence, cls) and own.pointwise is cls.pointwise and own.terms is cls.terms:
            given = divergence.parameters[: len(forward)]
            if given in (forward, reverse):
                return ForwardKL() if given == forward else ReverseKL()
    return divergence


def _arguments(divergence: Divergence) -> list[str]:
    return [field.name for field in fields(divergence) if field.init]


def _built(cls: type[Divergence], parameters: Sequence[float]) -> Divergence:
    names = _arguments(object.__new__(cls))  # torch.compile reads a class's fields only from an instance
    return cls(**dict(zip(names, parameters, strict=False)))


def _check_share(divergence: Divergence, name: str, interval: str = "[0, 1]", of: str = "") -> None:
    """Raise TypeError if a field is not a number, ValueError if it is outside `interval`, "[0, 1]" or "[0, 1)"."""
    value = getattr(divergence, name)
    what = f"{type(divergence).__name__}({name}={value!r}): {name}{of}"
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number and not (isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad):
        raise TypeError(f"{what} is {type(value).__name__}; expected a number in {interval}, which gets no gradient")
    if not 0.0 <= value <= 1.0 or (value == 1.0 and interval == "[0, 1)"):
        raise ValueError(f"{what} must lie in {interval}")


def _check_own(divergence: Divergence) -> None:
    """Raise TypeError if a user's divergence is incomplete or cannot be rebuilt from its fields."""
    cls, numbers = type(divergence), _arguments(divergence)
    lacks = [name for name in ("pointwise", "terms") if getattr(cls, name) is getattr(Divergence, name)]
    if not isinstance(getattr(cls, "name", None), str):
        lacks.insert(0, "name")
    if lacks:
        raise TypeError(
            f"divergence is an instance of {cls.__name__}, which lacks {', '.join(lacks)}; expected a subclass of "
            "kdfast.Divergence with name, pointwise and terms (CONTRIBUTING.md)"
        )
    computed = {field.name for field in fields(divergence) if not field.init}
    for name, value in vars(divergence).items():
        if name not in computed and (name not in numbers or not isinstance(value, Real)):
            what = type(value).__name__ if name in numbers else "no dataclass field"
            raise TypeError(
                f"divergence is an instance of {cls.__name__}, whose {name} is {what}; engines build it once more from "
                "its fields, which must be numbers. Make the class a @dataclass(frozen=True) that has no others"
            )
    given = dict(zip(numbers, divergence.parameters, strict=True))
    try:
        again = _built(cls, divergence.parameters).parameters
    except Exception as error:
        raise TypeError(
            f"divergence is an instance of {cls.__name__}, which engines build once more from its fields, and "
            f"{cls.__name__}(**{given}) raises {type(error).__name__}: {error}"
        ) from error
    if str(again) != str(divergence.parameters):  # as text, NaN equals itself
        raise TypeError(
            f"divergence is an instance of {cls.__name__}, which engines build once more from its fields, and "
            f"{cls.__name__}(**{given}) has others: {again}. Keep the fields as they are given"
        )


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return g = log p − log q, or 0 where neither has mass (−inf − −inf)."""
    return _nan_to_zero(log_p - log_q)


def weighted(p: Tensor, x: Tensor) -> Tensor:
    """Return p·x with 0·∞ = 0."""
    return _nan_to_zero(p * x)


def _nan_to_zero(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # inductor does not vectorize nan_to_num
        return torch.where(x == x, x, 0.0)
    return x.nan_to_num_(nan=0.0, posinf=inf, neginf=-inf)


def expm1(x: Tensor) -> Tensor:
    """Return exp(x) − 1 to full relative precision: torch.expm1, except that inductor would turn it into exp(x) − 1."""
    if not torch.compiler.is_compiling():
        return torch.expm1(x)
    series = torch.ones_like(x)
    for n in range(15 if x.dtype == torch.float64 else 8, 1, -1):
        series = 1 + x * (1 / n) * series
    return torch.where(x.abs() < 0.5, x * series, x.exp() - 1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p·(log p − log q), with 0 and finite gradients where p is 0 or underflows."""
    p = log_p.exp()
    empty = p == 0
    return p * (log_p.masked_fill(empty, 0.0) - log_q.masked_fill(empty, 0.0))


def difference(p: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """Return q − p to full relative precision: ±max(p, q)·expm1(−|g|), which never overflows."""
    return expm1(-g.abs()).mul_(torch.maximum(p, q)).copysign_(-g)


def _power(log_p: Tensor, alpha: float, log_q: Tensor, beta: float) -> Tensor:
    """Return p^α·q^β, where 0⁰ = 1."""
    zero = torch.zeros_like(log_p)
    return ((alpha * log_p if alpha else zero) + (beta * log_q if beta else zero)).exp()


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Return log m for m = weight·p + (1−weight)·q, with finite gradients where p or q is 0; 0 where both are."""
    empty = log_p.isneginf() & log_q.isneginf()
    log_p, log_q = log_p.masked_fill(empty, 0.0), log_q.masked_fill(empty, 0.0)
    return torch.logaddexp(log_p + log(weight), log_q + log(1 - weight))


def _swap(terms: Terms) -> Terms:
    return Terms(terms.f, terms.a_q, terms.a_p)
