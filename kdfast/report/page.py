"""report.html: curves and a table for people, in one self-contained file.

The same page serves one run and several side by side; page.html is its template. Curves are inlined as SVG. A panel
without numbers is left out; a table cell that does not apply shows a dash.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from kdfast.report.curves import MADE_BY, PANELS, Curve, Panel, differ_in_tokens, draw, panels
from kdfast.report.read_runs import Run
from kdfast.training.durable.atomic_io import write_bytes, write_text
from kdfast.training.on_policy.texts import Text

PAGE = Path(__file__).with_name("page.html")
COLUMNS = {  # header: key of the summary, digits, unit
    "unfinished": ("unfinished", 0, 1),
    "recipe": ("recipe", 0, 1),
    "student CE": ("eval_ce", 4, 1),
    "minus LM only, equal tokens": ("minus_lm_only_tokens", 0, 1),
    "minus LM only, equal seconds": ("minus_lm_only_seconds", 0, 1),
    "perplexity": ("perplexity", 2, 1),
    "KL(true‖student)": ("kl_teacher_student", 4, 1),
    "KL(true‖projected)": ("kl_teacher_projected", 4, 1),
    "KL the loss sees": ("kd", 4, 1),
    "tokens": ("tokens", 0, 1),
    "steps": ("steps", 0, 1),
    "tokens/s": ("tokens_per_second", 0, 1),
    "seconds": ("seconds", 1, 1),
    "teacher's seconds": ("teacher_seconds", 1, 1),
    "operations × LM only": ("times_lm_only", 2, 1),
    "peak MiB": ("peak_memory_bytes", 0, 2**20),
}


def table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row of text per run, without columns that are empty for every run."""
    summaries = [{**run.summary, **_differences(run, runs), **_bounds(run.summary)} for run in runs]
    rows = {header: [_cell(one.get(key), *form) for one in summaries] for header, (key, *form) in COLUMNS.items()}
    cells = pd.DataFrame(rows, index=[run.name for run in runs]).rename_axis(columns="run")
    return cells.loc[:, (cells != "–").any()]


def whole_seconds(summary: Mapping[str, Any]) -> float | None:
    """Return the seconds of training, plus those of solved starts and of the teacher's run over the text before it."""
    seconds = summary.get("seconds")
    return None if seconds is None else seconds + (summary.get("teacher_seconds") or 0.0)


BUDGETS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "tokens": lambda summary: summary.get("tokens"),
    "seconds": whole_seconds,
}
EQUAL = 0.1  # fraction of a budget within which two count as equal


def minus_lm_only(run: Run, runs: Sequence[Run], budget: str) -> float | None:
    """Return the run's cross entropy minus that of LM only at equal "tokens" or "seconds", in nats.

    LM only is the finished `lm_only` run of a student of this size on this evaluation text whose own budget is nearest
    and at most a tenth off; None if there is none. Nothing is extrapolated, or read off a curve whose learning rate
    was another.
    """
    of, mine = BUDGETS[budget], run.summary
    own, ce = of(mine), mine.get("eval_ce")
    if own is None or ce is None or mine.get("recipe") == "lm_only" or "unfinished" in mine:
        return None
    found = []
    for other in (other.summary for other in runs if other.summary.get("recipe") == "lm_only"):
        theirs, their_ce = of(other), other.get("eval_ce")
        same = all(other.get(key) == mine.get(key) for key in ("student_parameters", "eval_tokens"))
        if theirs is not None and their_ce is not None and same and "unfinished" not in other:
            found.append((abs(theirs - own), their_ce))
    off, nearest = min(found, default=(inf, 0.0))
    return ce - nearest if off <= EQUAL * own else None


def _differences(run: Run, runs: Sequence[Run]) -> dict[str, str]:
    """Return the differences from LM only as text."""
    differences = {f"minus_lm_only_{budget}": minus_lm_only(run, runs, budget) for budget in BUDGETS}
    return {name: f"{value:+.3f}" for name, value in differences.items() if value is not None}


def _bounds(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the KL as text if it is a lower bound, as from a cache of the likeliest ids."""
    kl = summary.get("kl_teacher_student") if summary.get("kl_is_lower_bound") else None
    return {} if kl is None else {"kl_teacher_student": f"≥ {kl:.4f}"}


def _cell(value: Any, digits: int, unit: int) -> str:
    if value is None:
        return "–"
    return f"{value / unit:,.{digits}f}" if isinstance(value, int | float) else str(value)


def narrow_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the table with one row per run or one column per run, whichever is narrower as text."""
    rows = table(runs)
    return min(rows, rows.T.rename_axis(index=None, columns="run"), key=lambda cells: _text(cells).index("\n"))


def text_table(runs: Sequence[Run]) -> str:
    """Return the table for a terminal."""
    return _text(narrow_table(runs))


def _text(cells: pd.DataFrame) -> str:
    return cells.to_string(col_space=[len(header) + 1 for header in cells])


def write_report(path: Path, title: str, runs: Sequence[Run], note: str = "") -> None:
    """Write the page to `path`; an earlier page is replaced only when the new one is complete."""
    page = jinja2.Template(PAGE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True)
    with pd.option_context("display.max_colwidth", None):
        cells = narrow_table(runs).to_html(border=0)
    text = page.render(
        made_by=MADE_BY,
        title=title,
        note=note,
        table=cells,
        runs=runs,
        by_tokens=differ_in_tokens(runs),
        figures=[_figure(panel, curves, runs) for panel, curves in panels(runs)],
        texts={run.name: some for run in runs if (some := _some(run.texts))},
        settings={run.name: json.dumps(run.summary, indent=2, ensure_ascii=False) for run in runs},
    )
    write_text(path, text)


def _some(texts: Sequence[Text]) -> list[Text]:
    """Return the texts of the first, the middle and the last step that has some."""
    steps = sorted({text.step for text in texts})
    shown = {steps[0], steps[len(steps) // 2], steps[-1]} if steps else set()
    return [text for text in texts if text.step in shown]


def _figure(panel: Panel, curves: Sequence[Curve], runs: Sequence[Run]) -> dict[str, str]:
    last = {curve.run: curve.points.iloc[-1] for curve in curves}  # the evaluation's, if there is one
    values = "; ".join(f"{runs[run].name} {value:.4g}" for run, value in last.items())
    described = f"{panel.title}, curves of {len(last)} run(s). Last values: {values}."
    image = base64.b64encode(draw(panel, curves, runs, "svg")).decode()
    return {"id": panel.file, "title": panel.title, "described": described, "image": image}


def made_here(path: Path) -> bool:
    """Return whether a file is a page or picture from this module, which a newer one may replace."""
    with path.open("rb") as file:
        start = file.read(1024).decode(errors="replace")
    return f'name="generator" content="{MADE_BY}"' in start or f"Software\0{MADE_BY}" in start


def png_names() -> list[str]:
    """Return the names of all files that `write_pngs` may write."""
    return [f"{panel.file}.png" for panel in PANELS]


def write_pngs(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Write a picture of every panel with numbers, with title and legend, for a paper or a slide; return the files."""
    pictures = {folder / f"{panel.file}.png": draw(panel, curves, runs, "png") for panel, curves in panels(runs)}
    for path, picture in pictures.items():
        write_bytes(path, picture)
    return list(pictures)
