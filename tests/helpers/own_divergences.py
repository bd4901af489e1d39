"""Divergences that are not the package's own."""

from dataclasses import dataclass, field
from typing import ClassVar

from kdfast import Divergence, ForwardKL
from kdfast.divergences import Terms, difference


@dataclass(frozen=True)
class Hellinger(Divergence):
    """weight/2·Σ (√p − √q)²."""

    weight: float = 1.0
    name: ClassVar[str] = "hellinger"

    def pointwise(self, log_p, log_q):
        return self.weight * ((log_p / 2).exp() - (log_q / 2).exp()).square() / 2

    def terms(self, p, q, g):
        p, q = p.sqrt(), q.sqrt()
        d = self.weight * difference(p, q, g / 2)
        return d * d / (2 * self.weight), -p * d / 2, q * d / 2  # a tuple will do


@dataclass(frozen=True, kw_only=True)
class Weighted(Divergence):
    """w·KL(p‖q), of a keyword and a field that is computed."""

    w: float
    half: float = field(init=False)
    name: ClassVar[str] = "weighted"

    def __post_init__(self):
        object.__setattr__(self, "half", self.w / 2)

    def pointwise(self, log_p, log_q):
        return 2 * self.half * ForwardKL().pointwise(log_p, log_q)

    def terms(self, p, q, g):
        return Terms(*(2 * self.half * each for each in ForwardKL().terms(p, q, g)))


class Doubled(ForwardKL):
    """Under another's name, and without a field."""

    def pointwise(self, log_p, log_q):
        return 2 * super().pointwise(log_p, log_q)

    def terms(self, p, q, g):
        return Terms(*(2 * each for each in super().terms(p, q, g)))
