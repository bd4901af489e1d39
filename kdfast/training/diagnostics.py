"""Signs of a run going wrong, read from its log: numbers in, sentences out.

`Log` reads the lines and keeps a history. Each row of `SIGNS` has a function that says whether the current line can
show the sign, and one that returns whether it does, with a sentence. `HealthThresholds` has the limits; docs/log.md
says where their defaults come from.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

HISTORY = 200  # log lines searched for the lowest value
NOISE = 2.5  # in mean steps from line to line: smoothed values further apart than this differ by more than noise


@dataclass(frozen=True)
class HealthThresholds:
    """The limits beyond which `HealthCallback` warns; all are > 0.

    Shares are shares of the run, of a loss or of a KL, as each field says. Raises ValueError naming a field that is
    not a number > 0.
    """

    initial_loss: float = 10.0  # loss of the first log line, without an anchor; the loss of guessing, if higher
    kl: float = 5.0  # the KL in the loss, nats
    kl_after: float = 0.2  # share of the run after which `kl` applies
    perplexity: float = 10_000.0  # of evaluation or training text
    perplexity_after: float = 0.4  # share of the run after which `perplexity` applies
    window: int = 5  # log lines in a smoothed value; lines without a sign after which it is gone
    rising: float = 0.1  # smoothed loss above its lowest value, as a share of that
    oscillation_window: int = 12  # log lines searched for an oscillation
    oscillation: float = 0.2  # median step between log lines, as a share of the loss
    projected_after: float = 0.1  # share of the run after which the projected teacher is judged
    follower_ratio: float = 0.85  # KL(true ‖ projected) over KL(true ‖ student): above it, hardly nearer
    follower_kd: float = 0.35  # τ²·KL in the loss over KL(true ‖ student): below it, the two are one
    follower_margin: float = 0.05  # without the true teacher's head: nats by which the projected CE has to be lower
    follower_nats: float = 0.15  # without it: τ²·KL below which student and projected teacher are one
    misleading_margin: float = 0.3  # nats of cross entropy by which the projected teacher is worse than the student
    misleading_after: float = 0.2  # share of the run after which `misleading_margin` applies
    decay: float = 0.2  # nats of the projected teacher's cross entropy above its lowest value
    repetition: float = 0.5  # share of a completion's 4-grams that it repeats, over the last `window` lines
    repetition_entropy: float = 0.3  # nats of the student's entropy on its own text, below which it has collapsed

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name.endswith("window")
            right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not right or value <= 0 or (whole and (value < 3 or value != int(value))):
                raise ValueError(f"{field.name}={value!r}; expected {'an int ≥ 3' if whole else 'a number > 0'}")

    @classmethod
    def of(cls, given: HealthThresholds | Mapping[str, Any] | None) -> HealthThresholds:
        """Return the defaults, updated by `given`. Raise ValueError naming an unknown or wrong threshold."""
        if isinstance(given, HealthThresholds):
            return given
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given or {} if name not in known]:
            raise ValueError(f"{unknown[0]!r} is no threshold; expected some of {', '.join(known)}")
        return cls(**(given or {}))


# about generated text: length, share that ended by itself, repeated 4-grams, the student's entropy
WRITTEN = ("completion_length", "eos_share", "repetition", "entropy_on_policy")


class Compared(NamedTuple):
    """The comparison of student and projected teacher in one line, or the mean of several."""

    kd: float  # τ²·KL, as in the loss
    ce: float
    ce_projected: float


class Log:
    """The lines of one run, read in order.

    Attributes of the last line: `raw`, as it was logged; `line`, its finite numbers, without "eval_"; `text`,
    "training", "evaluation" or ""; `progress`, the share of the run done; `first`, whether it is the first with a loss;
    `projected`, the comparison with a projected teacher; `noise`, nats of cross entropy below which a difference in it
    means nothing. `ces_projected` lists the cross entropies judged so far.
    """

    projected: Compared | None

    def __init__(self, limits: HealthThresholds, vocabulary: int = 1, *, drawn: bool = False) -> None:
        self.limits, self.guessing, self.drawn = limits, math.log(vocabulary), drawn
        self.ces_projected: deque[float] = deque(maxlen=HISTORY)  # smoothed; from evaluations once there is one
        self._started = self._evaluated = False
        self._temperature: float | None = None
        # (loss without the KD term; τ²·KL, or None in steps of KD weight 0)
        self._losses: deque[tuple[float, float | None]] = deque(maxlen=HISTORY)
        self._window: deque[Compared] = deque(maxlen=limits.window)
        self._steps: deque[float] = deque(maxlen=HISTORY)  # changes of the projected CE between lines of training
        self.written: deque[tuple[float, ...]] = deque(maxlen=limits.window)  # of lines with generated text, `WRITTEN`

    def read(self, line: Mapping[str, Any], progress: float) -> dict[str, str | None]:
        """Return kind → sentence, or None if the sign was checked and absent. `progress`: share of the run done."""
        numbers = {k: float(v) for k, v in line.items() if isinstance(v, int | float) and math.isfinite(v)}
        self.raw, self.line, self.progress = line, numbers, progress
        self.text = "training" if "loss" in line else "evaluation" if "eval_ce" in line else ""
        if self.text == "evaluation":
            self.line = {name.removeprefix("eval_"): value for name, value in numbers.items()}
        self.first, self.projected, self.noise = False, None, 0.0
        if self.trains("loss"):
            self._read_loss()
        if self.trains("eos_share"):
            self.written.append(tuple(self.line.get(name, math.nan) for name in WRITTEN))
        if self._temperature is not None and progress > self.limits.projected_after:
            self._read_projected(self._temperature)
        judged = {kind: says(self) for kind, (is_judged, says) in SIGNS.items() if is_judged(self)}
        return {kind: sentence if there else None for kind, (there, sentence) in judged.items()}

    def trains(self, name: str) -> bool:
        """Return whether this is a line of training that contains the number `name`."""
        return self.text == "training" and name in self.line

    @property
    def nats(self) -> float:
        """Return τ²·KL in a line of training, or 0."""
        return self.line.get("temperature", 0.0) ** 2 * self.line.get("kd", 0.0)

    @property
    def losses(self) -> list[float]:
        """Return the losses so far under the current KD weight, so that a ramp alone raises no loss; [] without one."""
        weight = self.line.get("kd_weight", 0.0)
        known = ((rest, kd) for rest, kd in self._losses if kd is not None or weight == 0)
        return [rest + weight * (kd or 0.0) for rest, kd in known] if self.trains("loss") else []

    @property
    def rates(self) -> str:
        """Return the learning rates to name in advice: the projector's, if the line has one."""
        projected = {"ce_projected", "eval_ce_projected"} & self.raw.keys()
        return "learning_rate or projector_lr" if projected else "learning_rate"

    @property
    def or_less_kd(self) -> str:
        return ", or lower kd_weight" if "kd" in self.line else ""

    @property
    def bad(self) -> list[str]:
        """Return the names of the losses that are not finite."""
        tested = (name for name in ("loss", "eval_loss", "eval_ce") if isinstance(self.raw.get(name), int | float))
        return [name for name in tested if not math.isfinite(self.raw[name])]

    def _read_loss(self) -> None:
        self.first, self._started = not self._started, True
        temperature = self.line.get("temperature", self._temperature)
        if temperature != self._temperature:
            self._losses.clear()  # the KL at another temperature is not comparable
            self._window.clear()
            self._temperature = temperature
        weight, nats = self.line.get("kd_weight", 0.0), self.nats
        self._losses.append((self.line["loss"] - weight * nats, nats if "kd" in self.line else None))

    def _read_projected(self, temperature: float) -> None:
        """Read the projected teacher's values. From the first evaluation on, only evaluations count."""
        names = ("kd", "ce", "ce_projected", *(["temperature"] if self.text == "training" else []))
        if not self.text or not set(names) <= self.line.keys():
            return
        kd, ce, ce_projected = (self.line[name] for name in names[:3])
        now = Compared(temperature**2 * kd, ce, ce_projected)
        if self.text == "evaluation":
            if not self._evaluated:
                self.ces_projected.clear()
            self.projected, self._evaluated = now, True
        else:
            if self._window:
                self._steps.append(abs(ce_projected - self._window[-1].ce_projected))
            self._window.append(now)
            if not self._evaluated and len(self._window) == self.limits.window:
                self.projected = Compared(*map(fmean, zip(*self._window, strict=True)))
                self.noise = NOISE * fmean(self._steps)
        if self.projected is not None:
            self.ces_projected.append(self.projected.ce_projected)


Sign = tuple[bool, str]  # whether the sign is present; the sentence


def _non_finite(log: Log) -> Sign:
    """Check the logged losses. (A step that was left out is reported where that happens.)"""
    ramp = ", ramp the KD weight (kd_ramp=0.2)" if {"kd", "eval_kd"} & log.raw.keys() else ""
    return bool(log.bad), "".join(f"{name} is {log.raw[name]}. Lower {log.rates}{ramp}" for name in log.bad[:1])


def _initial_loss(log: Log) -> Sign:
    line, limit = log.line, max(log.limits.initial_loss, 1.05 * log.guessing)
    ce, kd = line.get("ce", math.inf), 0.0
    if "ce_projected" in line:  # a fixed teacher may be far away at first
        kd = line.get("kd_weight", 0.0) * log.nats
    loss = min(line["loss"], ce + kd)
    said = f"the loss starts at {loss:.4g}, above {limit:.4g}"
    if ce > limit:
        return loss > limit, f"{said}. Do labels and tokenizer belong to the student?"
    return loss > limit, (
        f"{said}: {kd:.4g} of it is the KD term, to a projected teacher. Do both models take the same token ids? A "
        "ramped KD weight (kd_ramp=0.2) starts lower; no student was better for it"
    )


def _kl(log: Log) -> Sign:
    return log.line["kd"] > log.limits.kl, (
        f"the KL that the loss sees is {log.line['kd']:.4g} after {log.progress:.0%} of the run, above "
        f"{log.limits.kl:g}: student and teacher are still far apart. Do both models take the same token ids? "
        f"Raise {log.rates}"
    )


def _perplexity(log: Log) -> Sign:
    ce = log.line["ce"]
    return ce > math.log(log.limits.perplexity), (
        f"perplexity on {log.text} text is {math.exp(ce) if ce < 700 else math.inf:,.0f} after {log.progress:.0%} of "
        f"the run, above {log.limits.perplexity:,.0f}: the student hardly learns. Check tokenizer and data, raise "
        f"learning_rate{log.or_less_kd}"
    )


def _rising(log: Log) -> Sign:
    losses, n = log.losses, int(log.limits.window)
    smooth = [fmean(losses[i - n : i]) for i in range(n, len(losses) + 1)]
    noise = fmean(abs(b - a) for a, b in pairwise(losses))
    now, lowest = smooth[-1], min(smooth)
    return now - lowest > max(log.limits.rising * abs(lowest), NOISE * noise), (
        f"the loss rises: {now:.4g} over the last {n} log lines, {lowest:.4g} at its lowest. Lower "
        f"{log.rates}, clip more (max_grad_norm){log.or_less_kd}"
    )


def _oscillating(log: Log) -> Sign:
    losses = log.losses[-int(log.limits.oscillation_window) :]
    steps = [b - a for a, b in pairwise(losses)]
    turns = sum(a * b < 0 for a, b in pairwise(steps))
    swing, level = median(map(abs, steps)), abs(fmean(losses))
    # noise also turns at two places of three; only a large swing is an oscillation
    return turns >= 0.6 * (len(steps) - 1) and swing > log.limits.oscillation * level, (
        f"the loss oscillates: {turns} turns in {len(losses)} log lines, by {swing:.3g} from line to line at a "
        f"mean of {level:.4g}. Lower learning_rate, or take larger batches (gradient_accumulation_steps)"
    )


def _follows(log: Log) -> Sign:
    """Judge by the KL to the true teacher if evaluations log it, otherwise by cross entropies."""
    now, limits = log.projected, log.limits
    assert now is not None
    near = now.kd < limits.follower_nats
    student, projected = (log.line.get(f"kl_teacher_{which}") for which in ("student", "projected"))
    if log.text == "evaluation" and student is not None and projected is not None:
        other = not near and now.ce_projected > now.ce + limits.misleading_margin
        follows = now.kd < limits.follower_kd * student and projected > limits.follower_ratio * student and not other
        seen = f"KL(true ‖ projected) is {projected:.4g} and KL(true ‖ student) {student:.4g}, while"
    else:
        follows = near and now.ce - now.ce_projected < limits.follower_margin
        seen = f"its own cross entropy is {now.ce_projected:.4g} to the student's {now.ce:.4g}, and"
    return follows, (
        f"the projected teacher follows the student: {seen} τ²·KL between the two is only {now.kd:.3g}. A low KL is no "
        "evidence of learning here: compare with recipe='lm_only'. Take the teacher's own head where it has the "
        "student's vocabulary (recipe='auto', or 'teacher_head')"
    )


def _misleads(log: Log) -> Sign:
    now, limits = log.projected, log.limits
    assert now is not None
    far = now.kd >= limits.follower_nats and log.progress > limits.misleading_after
    return far and now.ce - now.ce_projected < -limits.misleading_margin, (
        f"the projected teacher is worse than the student: its own cross entropy is {now.ce_projected:.4g} to the "
        f"student's {now.ce:.4g} (τ²·KL {now.kd:.3g}), and the KD term draws the student there. Train the projector "
        "(anchor_weight=1, a higher projector_lr), or lower kd_weight"
    )


def _decays(log: Log) -> Sign:
    now, lowest = log.ces_projected[-1], min(log.ces_projected)
    return now - lowest > max(log.limits.decay, log.noise), (
        f"the projected teacher gets worse: its own cross entropy is {now:.4g} and was {lowest:.4g} before: the head "
        "below it moves on, or the KD term drags it. Lower projector_lr or learning_rate, or anchor it "
        "(teacher_grad='none', anchor_weight=1)"
    )


def _collapses(log: Log) -> Sign:
    """Look for text that repeats itself with certainty, and for texts that never end."""
    finite = ([x for x in values if not math.isnan(x)] for values in zip(*log.written, strict=True))
    length, ended, repeated, entropy = (fmean(values) if values else math.nan for values in finite)
    if repeated > log.limits.repetition and entropy < log.limits.repetition_entropy:
        return True, (
            f"the student's own text collapses: {repeated:.0%} of its 4-grams repeat, at an entropy of {entropy:.2g} "
            "nats. Lower learning_rate, mix in data (on_policy=0.5), or take divergence='forward_kl'; some of the "
            "texts are in completions.jsonl"
        )
    return ended == 0, (
        f"none of the last texts that were generated came to an end within {length:.0f} tokens. Raise max_new_tokens, "
        "or check that completions of the data end with the end-of-text token of generation_config"
    )


# kind → whether the last line can show it; the check
SIGNS: dict[str, tuple[Callable[[Log], bool], Callable[[Log], Sign]]] = {
    "non_finite": (lambda log: bool(log.bad) or ("loss" in log.raw and not log.raw.get("skipped_steps")), _non_finite),
    "initial_loss": (lambda log: log.first, _initial_loss),
    "kl": (lambda log: log.trains("kd") and not log.drawn and log.progress > log.limits.kl_after, _kl),
    "perplexity": (
        lambda log: log.text != "" and "ce" in log.line and log.progress > log.limits.perplexity_after, _perplexity,
    ),
    "rising": (lambda log: len(log.losses) > log.limits.window, _rising),
    "oscillating": (lambda log: len(log.losses) >= log.limits.oscillation_window, _oscillating),
    "follows": (lambda log: log.projected is not None, _follows),
    "misleads": (lambda log: log.projected is not None, _misleads),
    "decays": (lambda log: log.projected is not None, _decays),
    "collapses": (lambda log: log.trains("eos_share") and len(log.written) == log.limits.window, _collapses),
}  # fmt: skip
