"""report.html: curves and a table a person can look at, in one file that needs nothing else.

The same page serves one run and several side by side. A run is its summary and its log, the list of dictionaries
that `transformers` keeps in `trainer_state.json`. Curves are inlined as SVG. A panel that no run has numbers for is
left out; a table cell that does not apply shows a dash.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from kdfast.report.curves import MADE_BY, PANELS, Curve, Panel, Style, differ_in_tokens, draw, panels, styles
from kdfast.report.read_runs import Run
from kdfast.training.durable.atomic_io import write_bytes, write_text

PAGE = Path(__file__).with_name("page.html")


def _number(digits: int, unit: float = 1.0) -> Callable[[Any], str]:
    return lambda value: f"{value / unit:,.{digits}f}" if isinstance(value, int | float) else str(value)


# header, key of the summary, format
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("unfinished", "unfinished", str),
    ("recipe", "recipe", str),
    ("student CE", "eval_ce", _number(4)),
    ("perplexity", "perplexity", _number(2)),
    ("KL(true‖student)", "kl_teacher_student", _number(4)),
    ("KL(true‖projected)", "kl_teacher_projected", _number(4)),
    ("KL the loss sees", "kd", _number(4)),
    ("tokens", "tokens", _number(0)),
    ("tokens/s", "tokens_per_second", _number(0)),
    ("seconds", "seconds", _number(1)),
    ("peak MiB", "peak_memory_bytes", _number(0, unit=2**20)),
)


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Return the header and one row per run, as strings; a column that is empty for every run is left out."""
    rows = [["run", *(header for header, _, _ in COLUMNS)]]
    for run in runs:
        values = ((run.summary.get(key), form) for _, key, form in COLUMNS)
        rows.append([run.name, *("–" if value is None else form(value) for value, form in values)])
    kept = [i for i in range(len(rows[0])) if any(row[i] != "–" for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def text_table(runs: Sequence[Run]) -> str:
    """Return the table for a terminal: the first column to the left, numbers to the right."""
    rows = table(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))])
        for name, *cells in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_report(path: Path, title: str, runs: Sequence[Run], note: str = "") -> None:
    """Write the page to `path`, replacing what was there only when it is complete."""
    figures = [_figure(panel, curves, runs) for panel, curves in panels(runs)]
    curves = ["<h2>Curves</h2>", _legend(runs), '<div class="panels">', *figures, "</div>"] if figures else []
    settings = (
        f"<details><summary>{html.escape(run.name)}</summary><pre>"
        f"{html.escape(json.dumps(run.summary, indent=2, ensure_ascii=False))}</pre></details>"
        for run in runs
    )
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        made_by=MADE_BY,
        title=html.escape(title),
        note=f"<p>{html.escape(note)}</p>" if note else "",
        table=_html_table(runs),
        health="\n".join(_health(runs)),
        curves="\n".join(curves),
        settings="\n".join(settings),
    )
    write_text(path, page)


def made_here(path: Path) -> bool:
    """Return whether an existing file is a page or picture of this module's, which a newer one may replace."""
    with path.open("rb") as file:
        start = file.read(1024).decode(errors="replace")
    return f'name="generator" content="{MADE_BY}"' in start or f"Software\0{MADE_BY}" in start


def png_names() -> list[str]:
    """Return the names of the files that `write_pngs` may write."""
    return [f"{_slug(panel)}.png" for panel in PANELS]


def write_pngs(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Write one picture of every panel that has a number in it, with title and legend, for a paper or a slide."""
    written = []
    for panel, curves in panels(runs):
        written.append(folder / f"{_slug(panel)}.png")
        write_bytes(written[-1], draw(panel, curves, runs, "png"))
    return written


def _slug(panel: Panel) -> str:
    return re.sub(r"[^a-z0-9]+", "-", panel.title.lower().replace("'", "")).strip("-")


def _html_table(runs: Sequence[Run]) -> str:
    header, *rows = table(runs)
    lines = ["<table>", "<tr>" + "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header) + "</tr>"]
    for look, (name, *cells) in zip(styles(runs), rows, strict=True):
        values = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr><td>{_swatch(look)} {html.escape(name)}</td>{values}</tr>")
    return "\n".join([*lines, "</table>"])


def _legend(runs: Sequence[Run]) -> str:
    """Return the names beside the curves, kept in sight while the page scrolls; one run alone needs none."""
    lines = "<p>Thin lines are training, marked ones evaluation. Where a quantity falls from far above in the first "
    lines += "fifth of training, the axis leaves that out."
    if differ_in_tokens(runs):
        lines += " The runs differ in tokens per step, so curves are drawn over the tokens seen."
    if len(runs) == 1:
        return f"{lines}</p>"
    entries = zip(styles(runs), runs, strict=True)
    names = "".join(f"<li>{_swatch(look)} {html.escape(run.name)}</li>" for look, run in entries)
    return f'{lines}</p>\n<ul class="legend">{names}</ul>'


MARKERS = {
    "o": '<circle cx="16" cy="6" r="3.2" fill="{0}"/>',
    "s": '<rect x="13" y="3" width="6" height="6" fill="{0}"/>',
    "^": '<path d="M16 2l4 7h-8z" fill="{0}"/>',
    "D": '<path d="M16 1.6l4.4 4.4-4.4 4.4-4.4-4.4z" fill="{0}"/>',
}


def _swatch(look: Style) -> str:
    """Return the run's line as it is in the panels."""
    color, dashes, marker = look
    dashed = f' stroke-dasharray="{" ".join(str(2 * d) for d in dashes)}"' if dashes else ""
    line = f'<line x1="0" y1="6" x2="32" y2="6" stroke="{color}" stroke-width="2"{dashed}/>'
    return f'<svg width="32" height="12" aria-hidden="true">{line}{MARKERS[marker].format(color)}</svg>'


def _figure(panel: Panel, curves: Sequence[Curve], runs: Sequence[Run]) -> str:
    last = {curve.run: curve.y[-1] for curve in curves}  # the evaluation's, where there is one
    values = "; ".join(f"{runs[run].name} {value:.4g}" for run, value in last.items())
    described = html.escape(f"{panel.title}, curves of {len(last)} run(s). Last values: {values}.")
    source = "data:image/svg+xml;base64," + base64.b64encode(draw(panel, curves, runs, "svg")).decode()
    image = f'<img width="480" height="290" alt="{described}" src="{source}">'
    return f'<figure id="{_slug(panel)}"><figcaption>{html.escape(panel.title)}</figcaption>{image}</figure>'


def health_messages(run: Run) -> list[str]:
    """Return 'step N: what was wrong', each once: from the lines of the log and from the summary."""
    noted = [(entry.get("step"), text) for entry in run.log for text in _list(entry.get("health"))]
    noted += [(found.get("step"), found.get("message")) for found in _list(run.summary.get("health"))]
    return list(dict.fromkeys(f"step {step}: {text}" if step is not None else str(text) for step, text in noted))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _health(runs: Sequence[Run]) -> list[str]:
    parts = []
    for run in runs:
        if messages := health_messages(run):
            items = "".join(f"<li>{html.escape(message)}</li>" for message in messages)
            parts.append(f"<h3>{html.escape(run.name)}</h3>\n<ul>{items}</ul>")
    return ["<h2>What the health check said</h2>", *parts] if parts else []
