"""Curves of runs side by side: which quantities have a panel, and how one is drawn.

A run has one color, one dash and one marker in every panel. Lines of training are thin; evaluations, where there are
any, are thick and marked, and training is pale behind them. matplotlib draws, without a display.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdfast.report.read_runs import Run

# Okabe and Ito's colors, which stay apart for color-blind readers
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# (dashes, marker), the next one each time the colors are used up; matplotlib's and SVG's unit is the line's width
STYLES = (((), "o"), ((4, 1.5), "s"), ((1, 1.2), "^"), ((5, 1.5, 1, 1.5), "D"))
SEED = re.compile(r"(^|[-_./ ])(seed|s)[-_= ]?\d+(?=$|[-_./ ])|[-_./ ]\d+$", re.IGNORECASE)  # in a run's name
MADE_BY = "kdfast report"  # in every file, so that one of ours is known from a user's own


class Panel(NamedTuple):
    title: str
    keys: tuple[str, ...]  # in the log; the first one a run has. Evaluations have the prefix eval_
    logarithmic: bool = False
    scale: float = 1.0
    falls: bool = False  # from far above: the axis ends where most of that is over


PANELS = (
    Panel("Student cross entropy, nats", ("ce",), falls=True),
    Panel("Student perplexity", ("perplexity",), logarithmic=True, falls=True),
    Panel("KL(true teacher ‖ student)", ("kl_teacher_student",), falls=True),
    Panel("KL(true teacher ‖ projected teacher)", ("kl_teacher_projected",), falls=True),
    Panel("KL the loss sees, at its temperature", ("kd",), falls=True),
    Panel("Projected teacher's cross entropy, nats", ("ce_projected",), falls=True),
    Panel("Agreement: same most likely token", ("agreement",)),
    Panel("Total loss", ("loss",), falls=True),
    Panel("KD weight", ("kd_weight",)),
    Panel("Temperature", ("temperature",)),
    Panel("Learning rate of the student", ("lr_student", "learning_rate")),
    Panel("Learning rate of the projector", ("lr_projector",)),
    Panel("Learning rate of routers", ("lr_router",)),
    Panel("Learning rate of other parameters", ("lr_other",)),
    Panel("Gradient norm before clipping", ("grad_norm",), falls=True),
    Panel("Tokens per second", ("tokens_per_second",)),
    Panel("Memory, MiB", ("memory_bytes",), scale=2**-20),
)


class Style(NamedTuple):
    color: str
    dashes: tuple[float, ...]
    marker: str


class Curve(NamedTuple):
    run: int  # its place among the runs, which is its style
    evaluated: bool
    x: list[float]
    y: list[float]


def styles(runs: Sequence[Run]) -> list[Style]:
    """Return one style per run; if there are more runs than colors, seeds of one thing share a color if they can."""
    things = list(dict.fromkeys(SEED.sub("", run.name) for run in runs))
    places, seen = [], Counter[str]()
    for run in runs:
        thing = SEED.sub("", run.name)
        places.append((seen[thing], things.index(thing)))
        seen[thing] += 1
    if len(runs) <= len(COLORS) or len(things) > len(COLORS) or max(seen.values()) > len(STYLES):
        places = [divmod(i, len(COLORS)) for i in range(len(runs))]
    return [Style(COLORS[color], *STYLES[row % len(STYLES)]) for row, color in places]


def panels(runs: Sequence[Run]) -> list[tuple[Panel, list[Curve]]]:
    """Return the panels that any run has a finite number for, with its curves."""
    by_tokens = differ_in_tokens(runs)
    found = ((panel, _curves(panel, runs, by_tokens)) for panel in PANELS)
    return [(panel, curves) for panel, curves in found if curves]


def _curves(panel: Panel, runs: Sequence[Run], by_tokens: bool) -> list[Curve]:
    found = []
    for i, run in enumerate(runs):
        for prefix in ("", "eval_"):
            logged = (_points(run.log, prefix + key) for key in panel.keys)
            if points := next(filter(None, logged), None):
                steps, values = zip(*points, strict=True)
                x = np.interp(steps, *_tokens_at(run.log)).tolist() if by_tokens else list(steps)
                found.append(Curve(i, prefix != "", x, [value * panel.scale for value in values]))
    return found


def differ_in_tokens(runs: Sequence[Run]) -> bool:
    """Return whether steps would compare unlike things: runs that all count tokens, and not equally many per step."""
    rates = []
    for run in runs:
        steps, tokens = _tokens_at(run.log)
        if any("loss" in entry or "eval_loss" in entry for entry in run.log):
            if not tokens[-1]:
                return False
            rates.append(tokens[-1] / steps[-1])
    return bool(rates) and max(rates) > 1.05 * min(rates)  # masked and padded rows make small differences


def _tokens_at(log: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return (steps, tokens seen by then); an evaluation's line has no tokens and lies between two that do."""
    points = [(0.0, 0.0), *_points(log, "tokens_seen")]
    return [step for step, _ in points], [tokens for _, tokens in points]


def _points(log: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) where the log has one that can be drawn; perplexity is ce's where it is not logged."""
    points = []
    for entry in log:
        value = entry.get(key)
        if value is None and key.endswith("perplexity"):
            ce = entry.get(key.replace("perplexity", "ce"))
            value = math.exp(ce) if isinstance(ce, int | float) and ce < 700 else None
        step = entry.get("step")
        if isinstance(value, int | float) and abs(value) < 1e100 and isinstance(step, int | float):
            points.append((step, value))  # neither NaN nor what overflows an axis
    return points


def draw(panel: Panel, curves: Sequence[Curve], runs: Sequence[Run], form: str) -> bytes:
    """Draw the panel as "svg", for a page that has titles and legend, or as "png" with both."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state and no display
    from matplotlib.ticker import EngFormatter, LogFormatter

    figure = Figure(figsize=(4.8, 2.9) if form == "svg" else (7.2, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens seen" if differ_in_tokens(runs) else "optimizer step")
    looks = styles(runs)
    both = {curve.evaluated for curve in curves} == {True, False}
    drawn = {}  # a run's evaluations, where there are any, stand for it in the legend
    for run, evaluated, x, y in curves:
        color, dashes, marker = looks[run]
        (line,) = axes.plot(x, y, color=color, linewidth=1.8 if evaluated else 1.2, zorder=3 if evaluated else 2)
        line.set_dashes(dashes)
        if evaluated or len(x) == 1:  # a line of one point is nothing to see without
            line.set(marker=marker, markersize=4.5, markevery=max(1, len(x) // 20))
        if both and not evaluated:
            line.set_alpha(0.45)
        drawn[run] = line
    if panel.logarithmic:
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.8)))
    if panel.falls and (limits := _settled(curves, panel.logarithmic)):
        axes.set_ylim(limits)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    if form == "png":
        axes.set_title(panel.title)
        if both:
            axes.set_xlabel(f"{axes.get_xlabel()}; thin: training, marked: evaluation")
        # $ begins a formula, and matplotlib drops a label that begins with _
        labels = ["\u200a" + runs[run].name.replace("$", r"\$") for run in drawn]
        columns = max(1, min(4, 84 // (8 + max(map(len, labels)))))
        lines = list(drawn.values())
        figure.legend(
            lines, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=3.2
        )
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "kdfast"}):  # the same page for the same runs
        metadata = {"Date": None} if form == "svg" else {"Software": MADE_BY}
        figure.savefig(buffer, format=form, metadata=metadata, dpi=150)
    return buffer.getvalue()


def _settled(curves: Sequence[Curve], logarithmic: bool) -> tuple[float, float] | None:
    """Return limits around all that comes after the first fifth; None where that is too little to go by."""
    start = 0.2 * max(curve.x[-1] for curve in curves)
    late = [value for curve in curves for x, value in zip(curve.x, curve.y, strict=True) if x > start]
    low, high = min(value for curve in curves for value in curve.y), max(late, default=-math.inf)
    if max(len(curve.x) for curve in curves) < 10 or low >= high:
        return None
    if logarithmic:
        margin = (high / low) ** 0.05
        return low / margin, high * margin
    margin = 0.05 * (high - low)
    return low - margin, high + margin
