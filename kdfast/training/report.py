"""report.html: curves and a table a person can look at, in one file that needs nothing else.

The same page serves one run and several side by side. A run is its summary and its log, the list of dictionaries
that `transformers` keeps in `trainer_state.json`. Curves are drawn by matplotlib and inlined as SVG. A panel that
no run has numbers for is left out; a table cell that does not apply shows a dash.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdfast.training.files import write_text

# Okabe and Ito's colours, which stay apart for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


class Run(NamedTuple):
    name: str
    log: Sequence[dict[str, Any]]  # entries with "step" and any of the keys in PANELS
    summary: dict[str, Any]


class Curve(NamedTuple):
    key: str
    label: str
    style: str  # matplotlib's format string, without the colour


def _trained_and_evaluated(key: str) -> tuple[Curve, ...]:
    return Curve(key, "training", "-"), Curve(f"eval_{key}", "evaluation", "o--")


# One colour is one run in every panel; the line style says which quantity
PANELS: tuple[tuple[str, tuple[Curve, ...]], ...] = (
    ("Student cross entropy, nats", _trained_and_evaluated("ce")),
    ("The KL that the loss sees, at its temperature", _trained_and_evaluated("kd")),
    (
        "KL of the true teacher, on evaluation text",
        (
            Curve("eval_kl_teacher_student", "to the student", "o-"),
            Curve("eval_kl_teacher_projected", "to the projected teacher", "s:"),
        ),
    ),
    ("Projected teacher's cross entropy on the labels, nats", _trained_and_evaluated("ce_projected")),
    ("Agreement: same most likely token", _trained_and_evaluated("agreement")),
    ("Total loss", _trained_and_evaluated("loss")),
    ("KD weight", (Curve("kd_weight", "", "-"),)),
    ("Temperature", (Curve("temperature", "", "-"),)),
    ("Learning rate", (Curve("learning_rate", "student", "-"), Curve("lr_projector", "projector", "--"))),
    ("Gradient norm before clipping", (Curve("grad_norm", "", "-"),)),
    ("Tokens per second", (Curve("tokens_per_second", "", "-"),)),
)


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


# header, key of the summary, format
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("recipe", "recipe", str),
    ("student CE", "eval_ce", _number(4)),
    ("perplexity", "perplexity", _number(2)),
    ("KL(true‖student)", "kl_teacher_student", _number(4)),
    ("KL(true‖projected)", "kl_teacher_projected", _number(4)),
    ("KL the loss sees", "kd", _number(4)),
    ("tokens", "tokens", _number(0)),
    ("tokens/s", "tokens_per_second", _number(0)),
    ("seconds", "seconds", _number(1)),
    ("peak MiB", "peak_memory_bytes", lambda value: f"{value / 2**20:,.0f}"),
)


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Header and one row a run, as strings; a column that is empty for every run is left out."""
    rows = [["run", *(header for header, _, _ in COLUMNS)]]
    for run in runs:
        values = ((run.summary.get(key), form) for _, key, form in COLUMNS)
        rows.append([run.name, *("–" if value is None else form(value) for value, form in values)])
    kept = [i for i in range(len(rows[0])) if any(row[i] != "–" for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def text_table(runs: Sequence[Run]) -> str:
    """The table for a terminal: the first column to the left, numbers to the right."""
    rows = table(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))])
        for name, *cells in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_report(path: Path, title: str, runs: Sequence[Run], note: str = "") -> None:
    """Writes the page to `path`, replacing what was there only when it is complete."""
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(note)}</p>" if note else "",
        _html_table(runs),
        "<p>KL(true‖…) uses the teacher's own head on evaluation text at temperature 1. The KL the loss sees is not "
        "evidence of learning where the teacher goes through a projector that is trained: a projected teacher that "
        "imitates the student makes it small. Its fidelity is KL(true‖projected).</p>",
        *(f'<figure><img alt="{html.escape(panel)}" src="{image}"></figure>' for panel, image in _images(runs)),
        *(
            f"<details><summary>{html.escape(run.name)}: summary</summary><pre>"
            f"{html.escape(json.dumps(run.summary, indent=2, ensure_ascii=False))}</pre></details>"
            for run in runs
        ),
    ]
    page = PAGE.format(title=html.escape(title), body="\n".join(filter(None, parts)))
    write_text(path, page)


def _html_table(runs: Sequence[Run]) -> str:
    header, *rows = table(runs)
    lines = ["<table>", "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
    for i, (name, *cells) in enumerate(rows):
        swatch = f'<span style="color:{COLOURS[i % len(COLOURS)]}">&#9632;</span>'
        values = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr><td>{swatch} {html.escape(name)}</td>{values}</tr>")
    return "\n".join([*lines, "</table>"])


def _images(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(panel's title, data URI) of every panel that has a number in it."""
    from matplotlib.figure import Figure  # not pyplot: no global state and no display

    images = []
    for title, curves in PANELS:
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.add_subplot(title=title, xlabel="optimiser step")
        for i, run in enumerate(runs):
            for curve in curves:
                steps, values = _points(run.log, curve.key)
                if steps:
                    axes.plot(steps, values, curve.style, color=COLOURS[i % len(COLOURS)], markersize=4, linewidth=1.3)
        if not axes.lines:
            continue
        axes.grid(alpha=0.3)
        if len(curves) > 1:  # line styles only: colours stand in the table
            for curve in curves:
                axes.plot([], [], curve.style, color="black", markersize=4, linewidth=1.3, label=curve.label)
            axes.legend(frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg")
        images.append((title, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()))
    return images


def _points(log: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(e["step"], e[key]) for e in log if isinstance(e.get(key), int | float) and math.isfinite(e[key])]
    return [step for step, _ in points], [value for _, value in points]


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; }}
body {{ margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
table {{ font-size: 13.5px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .55rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ display: inline-block; margin: .5rem .5rem .5rem 0; width: 36rem; max-width: 100%; }}
img {{ width: 100%; }}
pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
