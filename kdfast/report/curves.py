"""Curves of runs side by side: which quantities have a panel, and how matplotlib draws one, without a display.

A run has the same color and dash in every panel. Training lines are thin. Evaluations, if there are any, are thick and
marked, and training is pale behind them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kdfast.report.read_runs import Run

MADE_BY = "kdfast report"  # in every file, so that ours can be told from a user's
DASHES = ("-", "--", ":", "-.")  # the next one whenever the style's colors are used up
STYLE: list[Any] = [
    "tableau-colorblind10",
    {
        "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "grid.color": "#e4e4e4",
        "legend.fontsize": 8, "legend.frameon": False, "legend.handlelength": 3,
        "svg.hashsalt": "kdfast",  # the same runs give the same picture
        "text.parse_math": False,  # a $ in a name begins no formula
    },
]  # fmt: skip


class Panel(NamedTuple):
    title: str
    keys: tuple[str, ...]  # in the log, of which the first found is drawn; evaluations have the prefix eval_
    logarithmic: bool = False
    scale: float = 1.0
    falls: bool = False  # from a high start: the axis ends where most of the fall is over

    @property
    def file(self) -> str:
        """Return the picture's file name, without its suffix."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower().replace("'", "")).strip("-")


PANELS = (
    Panel("Student cross entropy, nats", ("ce",), falls=True),
    Panel("Student perplexity", ("perplexity",), logarithmic=True, falls=True),
    Panel("KL(true teacher ‖ student)", ("kl_teacher_student",), falls=True),
    Panel("KL(true teacher ‖ projected teacher)", ("kl_teacher_projected",), falls=True),
    Panel("KL the loss sees, at its temperature", ("kd",), falls=True),
    Panel("KL on the student's own text", ("kd_on_policy",)),
    Panel("KL on the data's text", ("kd_data",)),
    Panel("Student's entropy on its own text, nats", ("entropy_on_policy",)),
    Panel("Length of generated text, tokens", ("completion_length",)),
    Panel("Share of generated text that ended by itself", ("eos_share",)),
    Panel("Share of repeated 4-grams", ("repetition",)),
    Panel("Projected teacher's cross entropy, nats", ("ce_projected",), falls=True),
    Panel("Agreement: same most likely token", ("agreement",)),
    Panel("Total loss", ("loss",), falls=True),
    Panel("Load-balancing loss of experts", ("aux_loss",)),
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


class Curve(NamedTuple):
    run: int  # index among the runs, which selects its style
    evaluated: bool
    points: pd.Series  # by step or by tokens


def differ_in_tokens(runs: Sequence[Run]) -> bool:
    """Return whether steps are not comparable: all runs count tokens, but differ in tokens per step."""
    logs = [run.log for run in runs if not run.log.empty]
    rates = [log["tokens_seen"].max() / max(log.index[-1], 1) if "tokens_seen" in log else np.nan for log in logs]
    return bool(rates) and bool(np.max(rates) > 1.05 * np.min(rates))  # masked and padded rows differ slightly


def panels(runs: Sequence[Run]) -> list[tuple[Panel, list[Curve]]]:
    """Return the panels for which any run has a finite number, with their curves."""
    logs = [run.log for run in runs]
    if differ_in_tokens(runs):  # an evaluation's line has no tokens, but lies between two that have
        logs = [log if log.empty else log.set_index(log["tokens_seen"].interpolate("index").fillna(0)) for log in logs]
    found = []
    for panel in PANELS:
        curves = []
        for run, log in enumerate(logs):
            for prefix in ("", "eval_"):
                logged = (log[prefix + key].dropna() for key in panel.keys if prefix + key in log)
                if (points := next((one for one in logged if not one.empty), None)) is not None:
                    curves.append(Curve(run, prefix != "", points * panel.scale))
        found += [(panel, curves)] if curves else []
    return found


def limits_after_the_fall(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the lowest value, and the highest that any curve has after the first fifth of its run."""
    late = [points[points.index >= 0.2 * points.index.max()].max() for _, _, points in curves]
    return min(points.min() for _, _, points in curves), max(late)


def draw(panel: Panel, curves: Sequence[Curve], runs: Sequence[Run], form: str) -> bytes:
    """Draw the panel as "svg", for a page with titles, or as "png" with its own; several runs get a legend."""
    import matplotlib.style
    from cycler import cycler
    from matplotlib.figure import Figure  # rather than pyplot: no global state, no display
    from matplotlib.ticker import EngFormatter, LogFormatter

    with matplotlib.style.context(STYLE):
        looks = list(cycler(linestyle=DASHES) * matplotlib.rcParams["axes.prop_cycle"])
        figure = Figure(figsize=(6, 3.6 + 0.05 * len(runs)), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens seen" if differ_in_tokens(runs) else "optimizer step")
        both = {curve.evaluated for curve in curves} == {True, False}
        drawn = {}  # a run's line in the legend: its evaluations, if there are any
        for run, evaluated, points in curves:
            (drawn[run],) = axes.plot(
                points.index, points, linewidth=1.8 if evaluated else 1.2, **looks[run % len(looks)]
            )
            if evaluated or len(points) == 1:  # a line of one point would be invisible
                drawn[run].set(marker="o", markersize=4, zorder=3)
            elif both:
                drawn[run].set_alpha(0.45)
        if panel.falls:
            axes.dataLim.intervaly = limits_after_the_fall(curves)
        if panel.logarithmic:
            axes.set_yscale("log")
            for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.8)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if form == "png":
            axes.set_title(panel.title + "\nthick: evaluation, pale: training" * both)
        if len(runs) > 1:  # matplotlib drops a label that begins with _
            labels = ["\u200a" + runs[run].name for run in drawn]
            columns = max(1, min(4, 84 // (10 + max(map(len, labels)))))
            figure.legend(list(drawn.values()), labels, loc="outside lower center", ncols=columns)
        buffer = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else {"Software": MADE_BY}
        figure.savefig(buffer, format=form, metadata=metadata, dpi=180)
    return buffer.getvalue()
