"""Signs of a run that goes wrong, read from its log lines: numbers in, sentences out; nothing else is touched.

A sign is judged when a line tells something about it, and then it is there (a sentence) or it is not (None). Which
numbers count as wrong is `HealthThresholds`; docs/log.md says where its defaults come from.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

HISTORY = 200  # log lines in which the lowest value is looked for
NOISE = 2.5  # mean steps from line to line: further apart, two smoothed values differ by more than noise


@dataclass(frozen=True)
class HealthThresholds:
    """From where on something is said. Shares are of the run, of a loss or of a KL, as each line says; all are > 0.

    Raises ValueError naming the threshold that is no number > 0.
    """

    initial_loss: float = 10.0  # loss of the first log line, without an anchor; or that of guessing, if it is more
    kl: float = 5.0  # the KL the loss sees, nats
    kl_after: float = 0.2  # share of the run after which `kl` applies
    perplexity: float = 10_000.0  # of evaluation or training text
    perplexity_after: float = 0.4  # share of the run after which `perplexity` applies
    window: int = 5  # log lines in a smoothed value; looks after which a sign that is not seen has gone
    rising: float = 0.1  # smoothed loss above its lowest value, as a share of that
    oscillation_window: int = 12  # log lines looked at for an oscillation
    oscillation: float = 0.2  # median step between log lines, as a share of the loss
    projected_after: float = 0.1  # share of the run after which the projected teacher is judged
    follower_ratio: float = 0.85  # KL(true ‖ projected) over KL(true ‖ student): above it, hardly nearer
    follower_kd: float = 0.35  # τ²·KL that the loss sees over KL(true ‖ student): below it, the two are one
    follower_margin: float = 0.05  # without the true teacher's head: nats by which the projected CE has to be lower
    follower_nats: float = 0.15  # without it: τ²·KL below which student and projected teacher are one
    misleading_margin: float = 0.3  # nats of cross entropy by which the projected teacher is worse than the student
    misleading_after: float = 0.2  # share of the run after which `misleading_margin` applies
    decay: float = 0.2  # nats of the projected teacher's cross entropy above its lowest value

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name.endswith("window")
            right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not right or value <= 0 or (whole and (value < 3 or value != int(value))):
                raise ValueError(f"{field.name}={value!r}; expected {'an int ≥ 3' if whole else 'a number > 0'}")

    @classmethod
    def of(cls, given: HealthThresholds | Mapping[str, Any] | None) -> HealthThresholds:
        """The defaults with what is given in their place. Raises ValueError naming what is unknown or wrong."""
        if isinstance(given, HealthThresholds):
            return given
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given or {} if name not in known]:
            raise ValueError(f"{unknown[0]!r} is no threshold; expected some of {', '.join(known)}")
        return cls(**(given or {}))


class _Projected(NamedTuple):
    """What one line tells of student and projected teacher."""

    kd: float  # τ²·KL, as the loss sees it
    ce: float
    ce_projected: float


class Signs:
    """Reads the lines of one run in their order."""

    def __init__(self, thresholds: HealthThresholds, vocabulary: int = 1) -> None:
        self._limits = thresholds
        self._guessing = math.log(vocabulary)
        self._first = True
        self._losses: deque[tuple[float, float]] = deque(maxlen=HISTORY)  # without the KD term; τ²·KL
        self._temperature: float | None = None
        self._projected: deque[_Projected] = deque(maxlen=thresholds.window)
        self._evaluated = False  # evaluation says more of the projected teacher than training: heard once, it decides
        self._ces_projected: deque[float] = deque(maxlen=HISTORY)  # smoothed; of evaluation as soon as there is one
        self._noise: deque[float] = deque(maxlen=HISTORY)  # steps of the projected CE from line to line of training

    def read(self, line: Mapping[str, Any], progress: float) -> dict[str, str | None]:
        """Kind → sentence, or None where the sign is judged and not there. `progress` is the share of the run done."""
        numbers = {k: float(v) for k, v in line.items() if isinstance(v, int | float) and math.isfinite(v)}
        found = _non_finite(line)
        if "loss" in line:
            found |= self._training(numbers, progress)
        elif "eval_ce" in line:
            found |= self._evaluation({k.removeprefix("eval_"): v for k, v in numbers.items()}, progress)
        return found

    def _training(self, line: dict[str, float], progress: float) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        if self._first and "loss" in line:
            self._first = False
            found["initial_loss"] = self._initial_loss(line)
        if "kd" in line and progress > self._limits.kl_after:
            found["kl"] = self._kl(line, progress)
        if "ce" in line:
            found |= self._perplexity(line, progress, "training")
        found |= self._course(line)
        if {"kd", "ce", "ce_projected", "temperature"} <= line.keys() and progress > self._limits.projected_after:
            if self._projected:
                self._noise.append(abs(line["ce_projected"] - self._projected[-1].ce_projected))
            self._projected.append(_Projected(_nats(line), line["ce"], line["ce_projected"]))
            if not self._evaluated and len(self._projected) == self._limits.window:
                mean = _Projected(*map(fmean, zip(*self._projected, strict=True)))
                found |= self._teacher(mean, progress, NOISE * fmean(self._noise))
        return found

    def _evaluation(self, line: dict[str, float], progress: float) -> dict[str, str | None]:
        found = self._perplexity(line, progress, "evaluation") if "ce" in line else {}
        if not {"kd", "ce", "ce_projected"} <= line.keys() or self._temperature is None:
            return found
        if progress <= self._limits.projected_after:
            return found
        now = _Projected(self._temperature**2 * line["kd"], line["ce"], line["ce_projected"])
        if not self._evaluated:
            self._evaluated = True
            self._ces_projected.clear()
        found |= self._teacher(now, progress)
        if {"kl_teacher_student", "kl_teacher_projected"} <= line.keys():
            student, projected = line["kl_teacher_student"], line["kl_teacher_projected"]
            found["follows"] = self._follows_by_kl(now, student, projected)
        return found

    def _initial_loss(self, line: dict[str, float]) -> str | None:
        limit = max(self._limits.initial_loss, 1.05 * self._guessing)
        ce, kd = line.get("ce", math.inf), 0.0
        if "ce_projected" in line:  # a teacher that does not move is far away at first, and that is no fault
            kd = line.get("kd_weight", 0.0) * _nats(line)
        if (loss := min(line["loss"], ce + kd)) <= limit:
            return None
        said = f"the loss starts at {loss:.4g}, above {limit:.4g}"
        if ce > limit:
            return f"{said}. Do labels and tokenizer belong to the student?"
        return (
            f"{said}: {kd:.4g} of it is the KD term, to a projected teacher. Do both models take the same token ids? A "
            "ramped KD weight (kd_ramp=0.2) starts lower; no student was better for it"
        )

    def _kl(self, line: dict[str, float], progress: float) -> str | None:
        if line["kd"] <= self._limits.kl:
            return None
        return (
            f"the KL that the loss sees is {line['kd']:.4g} after {progress:.0%} of the run, above "
            f"{self._limits.kl:g}: student and teacher are still far apart. Do both models take the same token ids? "
            f"Raise {_rates(line)}"
        )

    def _perplexity(self, line: dict[str, float], progress: float, text: str) -> dict[str, str | None]:
        ce = line["ce"]
        if progress <= self._limits.perplexity_after:
            return {}
        if ce <= math.log(self._limits.perplexity):
            return {"perplexity": None}
        perplexity = math.exp(ce) if ce < 700 else math.inf
        return {
            "perplexity": f"perplexity on {text} text is {perplexity:,.0f} after {progress:.0%} of the run, above "
            f"{self._limits.perplexity:,.0f}: the student hardly learns. Check tokenizer and data, raise "
            f"learning_rate{_or_less_kd(line)}"
        }

    def _course(self, line: dict[str, float]) -> dict[str, str | None]:
        """Rising and oscillating. Losses are compared under the KD weight of now: a ramp alone raises no loss."""
        if "loss" not in line:
            return {}
        temperature, weight = line.get("temperature"), line.get("kd_weight", 0.0)
        if temperature is not None and temperature != self._temperature:
            self._losses.clear()  # KL at another temperature is another number
            self._projected.clear()
            self._temperature = temperature
        kd = _nats(line)
        self._losses.append((line["loss"] - weight * kd, kd))
        losses = [rest + weight * kd for rest, kd in self._losses]
        found: dict[str, str | None] = {}
        if len(losses) > self._limits.window:
            found["rising"] = self._rising(losses, line)
        if len(losses) >= self._limits.oscillation_window:
            found["oscillating"] = self._oscillating(losses[-int(self._limits.oscillation_window) :])
        return found

    def _rising(self, losses: list[float], line: dict[str, float]) -> str | None:
        n = int(self._limits.window)
        smooth = [fmean(losses[i - n : i]) for i in range(n, len(losses) + 1)]
        noise = fmean(abs(b - a) for a, b in pairwise(losses))
        now, lowest = smooth[-1], min(smooth)
        if now - lowest <= max(self._limits.rising * abs(lowest), NOISE * noise):
            return None
        return (
            f"the loss rises: {now:.4g} over the last {n} log lines, {lowest:.4g} at its lowest. Lower "
            f"{_rates(line)}, clip more (max_grad_norm){_or_less_kd(line)}"
        )

    def _oscillating(self, losses: list[float]) -> str | None:
        steps = [b - a for a, b in pairwise(losses)]
        turns = sum(a * b < 0 for a, b in pairwise(steps))
        swing, level = median(map(abs, steps)), abs(fmean(losses))
        # noise turns at two places of three as well: it is the swing that tells
        if turns < 0.6 * (len(steps) - 1) or swing <= self._limits.oscillation * level:
            return None
        return (
            f"the loss oscillates: {turns} turns in {len(losses)} log lines, by {swing:.3g} from line to line at a "
            f"mean of {level:.4g}. Lower learning_rate, or take larger batches (gradient_accumulation_steps)"
        )

    def _teacher(self, now: _Projected, progress: float, noise: float = 0.0) -> dict[str, str | None]:
        """The projected teacher, judged by cross entropies."""
        self._ces_projected.append(now.ce_projected)
        found: dict[str, str | None] = {"follows": None, "misleads": None, "decays": self._decays(noise)}
        gained, values = now.ce - now.ce_projected, f"{now.ce_projected:.4g} to the student's {now.ce:.4g}"
        if now.kd < self._limits.follower_nats:
            if gained < self._limits.follower_margin:
                found["follows"] = (
                    f"the projected teacher follows the student: its own cross entropy is {values}, and τ²·KL between "
                    f"them only {now.kd:.3g}. {_REMEDY}"
                )
        elif gained < -self._limits.misleading_margin and progress > self._limits.misleading_after:
            found["misleads"] = (
                f"the projected teacher is worse than the student: its own cross entropy is {values} (τ²·KL "
                f"{now.kd:.3g}), and the KD term draws the student there. Train the projector (anchor_weight=1, a "
                "higher projector_lr), or lower kd_weight"
            )
        return found

    def _follows_by_kl(self, now: _Projected, student: float, projected: float) -> str | None:
        limits = self._limits
        other = now.kd >= limits.follower_nats and now.ce_projected > now.ce + limits.misleading_margin
        if other or now.kd >= limits.follower_kd * student or projected <= limits.follower_ratio * student:
            return None
        return (
            f"the projected teacher follows the student: KL(true ‖ projected) is {projected:.4g} and KL(true ‖ "
            f"student) {student:.4g}, while τ²·KL between the two is only {now.kd:.3g}. {_REMEDY}"
        )

    def _decays(self, noise: float) -> str | None:
        now, lowest = self._ces_projected[-1], min(self._ces_projected)
        if now - lowest <= max(self._limits.decay, noise):
            return None
        return (
            f"the projected teacher gets worse: its own cross entropy is {now:.4g} and was {lowest:.4g} "
            "before: the head below it moves on, or the KD term drags it. Lower projector_lr or learning_rate, or "
            "anchor it (teacher_grad='none', anchor_weight=1)"
        )


_REMEDY = (
    "A low KL is no evidence of learning here: compare with recipe='lm_only'. Take the teacher's own head where it has "
    "the student's vocabulary (recipe='auto', or 'teacher_head')"
)


def _rates(line: Mapping[str, Any]) -> str:
    """Learning rates of what is trained: a projector's where the line tells of one."""
    return "learning_rate or projector_lr" if {"ce_projected", "eval_ce_projected"} & line.keys() else "learning_rate"


def _or_less_kd(line: Mapping[str, float]) -> str:
    return ", or lower kd_weight" if "kd" in line else ""


def _nats(line: Mapping[str, float]) -> float:
    """τ²·KL of a line of training."""
    return line.get("temperature", 0.0) ** 2 * line.get("kd", 0.0)


def _non_finite(line: Mapping[str, Any]) -> dict[str, str | None]:
    """Only what is logged; a step that was left out is reported by whoever left it out."""
    tested = [name for name in ("loss", "eval_loss", "eval_ce") if isinstance(line.get(name), int | float)]
    if bad := [name for name in tested if not math.isfinite(line[name])]:
        ramp = ", ramp the KD weight (kd_ramp=0.2)" if {"kd", "eval_kd"} & line.keys() else ""
        return {"non_finite": f"{bad[0]} is {line[bad[0]]}. Lower {_rates(line)}{ramp}"}
    return {"non_finite": None} if "loss" in tested and not line.get("skipped_steps") else {}
