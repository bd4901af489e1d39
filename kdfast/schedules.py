"""Schedules for the KD weight and the temperature: functions of progress, the finished fraction of a run in [0, 1].

    kd_weight, temperature = Ramp(0.7), Piecewise([3.0, 2.0, 1.5])
    for step, batch in enumerate(batches):
        loss = fused_kd_loss(…, kd_weight=kd_weight(step / n_steps), temperature=temperature(step / n_steps))

Each is a frozen dataclass: comparable, picklable, with a readable repr. Progress outside [0, 1] counts as the nearer
end. Any other callable of one float works as well.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` at progress 0 to `end` at progress 1."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * _clamp(progress)


@dataclass(frozen=True)
class Ramp:
    """A warm-up: `start + (target − start)·progress/until` while progress < until, then `target`.

    Ramp(0.7): 0.10 at 0 %, 0.25 at 5 %, 0.40 at 10 %, 0.55 at 15 %, 0.70 from 20 % on.
    """

    target: float
    start: float = 0.1
    until: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.until <= 1:
            raise ValueError(f"until={self.until!r}; expected the fraction of the run the ramp takes, in [0, 1]")

    def __call__(self, progress: float) -> float:
        progress = _clamp(progress)
        if progress >= self.until:
            return self.target
        return self.start + (self.target - self.start) * progress / self.until


@dataclass(frozen=True)
class Until:
    """`schedule` while progress < `end`, then 0: KD in the first part of a run only."""

    schedule: Schedule
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.end <= 1:
            raise ValueError(f"end={self.end!r}; expected the fraction of the run that `schedule` is for, in [0, 1]")

    def __call__(self, progress: float) -> float:
        return self.schedule(progress) if progress < self.end else 0.0


@dataclass(frozen=True)
class Piecewise:
    """Constant values one after the other: `values[i]` up to `boundaries[i]`, the last one to the end.

    boundaries  len(values) − 1 increasing fractions in (0, 1); None divides the run into equal parts.
    At a boundary the next value applies: Piecewise([3.0, 2.0, 1.5])(1/3) is 2.0.
    """

    values: Sequence[float]
    boundaries: Sequence[float] | None = None

    def __post_init__(self) -> None:
        values = tuple(self.values)
        if not values:
            raise ValueError("values is empty; expected at least one value, such as [3.0, 2.0, 1.5]")
        given = self.boundaries
        boundaries = tuple(i / len(values) for i in range(1, len(values))) if given is None else tuple(given)
        marks = (0.0, *boundaries, 1.0)
        if len(boundaries) != len(values) - 1 or any(a >= b for a, b in pairwise(marks)):
            raise ValueError(
                f"boundaries={list(boundaries)} with {len(values)} values; expected {len(values) - 1} increasing "
                "fractions of the run strictly between 0 and 1"
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "boundaries", boundaries)

    def __call__(self, progress: float) -> float:
        assert self.boundaries is not None
        return self.values[bisect_right(self.boundaries, _clamp(progress))]


def _clamp(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)
