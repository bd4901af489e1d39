"""Finding runs on a disk and reading their logs: finished, running or interrupted, ours or plain transformers'.

A folder is a run if it, or a checkpoint-N in it, holds a trainer_state.json. A folder that is none stands for the runs
directly in it, which is how `kdfast demo` and most sweeps leave them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdfast.report.summary import summarise_log

# in the folder of a run of ours: which run it is, written first; what came of it, written last; the page
RECORD, SUMMARY, REPORT = "kdfast.json", "summary.json", "report.html"
STATE = "trainer_state.json"  # transformers', in every run and checkpoint


class RunsError(ValueError):
    """There is no run to read, or it cannot be read; the message says which and why."""


class Run(NamedTuple):
    """What a report is made of."""

    name: str
    log: Sequence[dict[str, Any]]  # of trainer_state.json: entries with "step" and any of the keys in curves.PANELS
    summary: dict[str, Any]


class Found(NamedTuple):
    path: Path
    name: str | None  # None: after its folder


def is_finished(path: Path) -> bool:
    """Return whether a run of ours has come to its end."""
    return (path / SUMMARY).is_file()


def find_runs(arguments: Sequence[str]) -> list[Run]:
    """Return the runs of `PATH`s and `NAME=PATH`s, each once, under names of their own.

    Raises RunsError where there is none, where one cannot be read, or where two were given the same name.
    """
    found = dict.fromkeys(run for argument in arguments for run in _find(argument))
    return [read_run(run.path, name) for run, name in zip(found, _names(list(found)), strict=True)]


def read_run(path: Path, name: str | None = None) -> Run:
    """Return one run's log, with its summary or, where it is unfinished, what the log says."""
    state = _last_state(path)
    log = state.get("log_history")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise RunsError(
            f"{str(path)!r}: {STATE} has no log_history; expected the file transformers.Trainer writes"
        )
    if is_finished(path):
        return Run(name or path.name, log, _read(path / SUMMARY))
    summary = summarise_log(log)
    if (path / RECORD).is_file():
        summary = {"recipe": _read(path / RECORD).get("recipe"), **summary}
    step, end = state.get("global_step") or 0, state.get("max_steps") or 0
    if (path / RECORD).is_file() or step < end:  # ours is finished when its summary is there
        summary = {"unfinished": f"step {step} of {end}", **summary}
    return Run(name or path.name, log, summary)


def _find(argument: str) -> list[Found]:
    name: str | None = None
    path = Path(argument).expanduser()
    if "=" in argument and not _is_dir(argument, path):
        name, _, rest = argument.partition("=")
        path = Path(rest).expanduser()
        if not name or not rest:
            raise RunsError(f"RUN {argument!r}: expected PATH or NAME=PATH")
    path = Path(os.path.abspath(path))  # "." has a name then, and a symbolic link keeps its own
    if not _is_dir(argument, path):
        what = "is a file; give the folder it lies in" if path.exists() else "does not exist"
        raise RunsError(f"RUN {argument!r}: {str(path)!r} {what}")
    try:
        if _states(path):
            return [Found(path, name)]
        inside = [child for child in sorted(path.iterdir(), key=_natural) if child.is_dir() and _states(child)]
    except OSError as error:
        raise RunsError(f"RUN {argument!r}: cannot be read: {error}") from error
    if not inside:
        raise RunsError(
            f"RUN {argument!r}: no {STATE} in {str(path)!r}, in a checkpoint-N there, or in a run one level "
            "below. A run has one from its first checkpoint on (save_steps)"
        )
    return [Found(child, f"{name}/{child.name}" if name else None) for child in inside]


def _is_dir(argument: str, path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a name that is too long
        raise RunsError(f"RUN {argument!r}: {error.strerror}") from error


def _natural(path: Path) -> list[Any]:
    """Sort seed-2 before seed-10; the pieces alternate between text and digits."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", path.name)]


def _names(found: Sequence[Found]) -> list[str]:
    """Return given names as they are; others after the folder, with as many parents in front as tell them apart."""
    depths = [1] * len(found)
    while True:
        names = [run.name or "/".join(run.path.parts[-d:]) for run, d in zip(found, depths, strict=True)]
        count = Counter(names)
        longer = [i for i, run in enumerate(found) if count[names[i]] > 1 and not run.name]
        longer = [i for i in longer if depths[i] < len(found[i].path.parts) - 1]
        if not longer:
            break
        for i in longer:
            depths[i] += 1
    if clash := next((name for name in names if count[name] > 1), None):
        raise RunsError(f"RUN: two runs are called {clash!r}; give them names of their own, NAME=PATH")
    return names


def _states(path: Path) -> list[Path]:
    """Return every trainer_state.json of a run: its own, then the checkpoints', newest first."""
    numbered = ((int(found[1]), p) for p in path.iterdir() if (found := re.fullmatch(r"checkpoint-(\d+)", p.name)))
    folders = [path, *(p for _, p in sorted(numbered, reverse=True))]
    return [p / STATE for p in folders if (p / STATE).is_file()]


def _last_state(path: Path) -> dict[str, Any]:
    """Return the run's own state, or the newest checkpoint's where that is further: a run trained past its end."""
    read = []
    for file in _states(path):
        try:
            read.append(_read(file))
        except FileNotFoundError:  # a run that is still going has replaced this checkpoint
            continue
        if file.parent != path or is_finished(path):
            break
    if not read:
        raise RunsError(f"{str(path)!r}: its checkpoints are gone, removed while they were read; try again")
    return max(read, key=lambda state: state.get("global_step") or 0)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # JSON's and Unicode's errors are ValueErrors
        raise RunsError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RunsError(f"{str(file)!r} holds a {type(content).__name__}; expected a JSON object")
    return content
