"""Runs on disk and their logs: finished, running or interrupted, ours or plain transformers'.

A folder is a run if it, or a checkpoint-N in it, contains a trainer_state.json. Any other folder stands for the runs
directly in it, which is how `kdfast demo` and most sweeps leave them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kdfast.training.on_policy.texts import Text, read_texts
from kdfast.training.recipes import AUTO

# in the folder of one of our runs: its identity, written first; its results, written last; the page
RECORD, SUMMARY, REPORT = "kdfast.json", "summary.json", "report.html"
STATE = "trainer_state.json"  # written by transformers in every run and checkpoint
ARGUMENTS = "training_args.json"  # written beside it by KDTrainer

# values of an evaluation, with the prefix eval_; the student's ce keeps it
EVALUATED = (
    "perplexity", "bits_per_byte", "kd", "kl_teacher_student", "kl_teacher_projected", "ce_projected", "agreement",
)  # fmt: skip


class RunsError(ValueError):
    """The error raised when there is no run to read, or one cannot be read; the message says which and why."""


class Run(NamedTuple):
    """One run in a report: its log as a `log_table`, and the contents of its summary.json."""

    name: str
    log: pd.DataFrame
    summary: dict[str, Any]
    texts: Sequence[Text] = ()  # written by student or teacher


def is_finished(path: Path) -> bool:
    """Return whether one of our runs is finished."""
    return (path / SUMMARY).is_file()


def log_table(history: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the numbers of a trainer's log_history by step; NaN where a line has none that can be drawn."""
    lines = [{k: v for k, v in line.items() if isinstance(v, int | float) and abs(v) < 1e100} for line in history]
    log = pd.DataFrame([line for line in lines if "step" in line] or {"step": []}, dtype=float).set_index("step")
    for prefix in ("", "eval_"):
        if f"{prefix}ce" in log and f"{prefix}perplexity" not in log:
            log[f"{prefix}perplexity"] = np.exp(log[f"{prefix}ce"].where(log[f"{prefix}ce"] < 200))
    return log


def summarize_log(log: pd.DataFrame, evaluation: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return a run's results: of its last `evaluation` (None = the log's) and of the training steps logged so far.

    tokens are the targets trained on. seconds are those of training steps, without evaluations and saving, added up
    from each line's speed, which survives interruptions. A number that does not apply is None.
    """
    if evaluation is None:
        evaluated = log[log["eval_ce"].notna()].iloc[-1].dropna() if "eval_ce" in log else {}
        evaluation = {str(key): value for key, value in evaluated.items()}
    most = log.max()
    speed = log.reindex(columns=["tokens_seen", "tokens_per_second"]).dropna()
    speed = speed[speed["tokens_per_second"] > 0]
    seconds = float((speed["tokens_seen"].diff().fillna(speed["tokens_seen"]) / speed["tokens_per_second"]).sum())
    tokens = int(most["tokens_seen"]) if "tokens_seen" in most else None
    return {
        "eval_ce": evaluation.get("eval_ce"),
        **{name: evaluation.get(f"eval_{name}") for name in EVALUATED},
        "tokens": tokens,
        "seconds": seconds or None,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "steps": None if log.empty else int(log.index.max()),
        "peak_memory_bytes": int(most["memory_bytes"]) if "memory_bytes" in most else None,
    }


def find_runs(arguments: Sequence[str]) -> list[Run]:
    """Return the runs of `PATH`s and `NAME=PATH`s, each once, under distinct names.

    Raises RunsError if there is none, if one cannot be read, or if two were given the same name.
    """
    found = list(dict.fromkeys(run for argument in arguments for run in _find(argument)))
    short = Counter(name or path.name for path, name in found)
    base = os.path.commonpath([path.parent for path, _ in found])
    names = [name or (path.name if short[path.name] == 1 else str(path.relative_to(base))) for path, name in found]
    if clash := next((name for name, times in Counter(names).items() if times > 1), None):
        raise RunsError(f"RUN: two runs are called {clash!r}; give them names of their own, NAME=PATH")
    return [read_run(path, name) for (path, _), name in zip(found, names, strict=True)]


def read_run(path: Path, name: str | None = None) -> Run:
    """Return one run's log, with its summary or, if it is unfinished, the results in its log."""
    try:
        states = _read_states(path)
    except RunsError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        states = _read_states(path)  # a running run has deleted that checkpoint: there is a newer one
    # a run trained past its end has a checkpoint newer than its own state
    state = max(states, key=lambda state: state.get("global_step") or 0, default={})
    history = state.get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise RunsError(f"{str(path)!r}: {STATE} has no log_history; expected the file transformers.Trainer writes")
    log = log_table(history)
    if is_finished(path):
        return Run(name or path.name, log, _read(path / SUMMARY), read_texts(path))
    ours = (path / RECORD).is_file()
    summary: dict[str, Any] = {}
    step, end = state.get("global_step") or 0, state.get("max_steps") or 0
    if ours or step < end:  # one of ours is finished when it has a summary
        summary["unfinished"] = f"step {step} of {end}"
    if ours:
        summary["recipe"] = _read(path / RECORD).get("recipe", AUTO)  # defaults are not recorded
    elif (settings := _states(path)[0].with_name(ARGUMENTS)).is_file():
        summary["recipe"] = _read(settings).get("recipe")
    noted = [(line.get("step"), line["health"]) for line in history if isinstance(line.get("health"), list)]
    health = [{"step": step, "message": message} for step, messages in noted for message in messages]
    return Run(name or path.name, log, {**summary, **summarize_log(log), "health": health}, read_texts(path))


def _find(argument: str) -> list[tuple[Path, str | None]]:
    """Return the folders of the runs that an argument stands for, and their names."""
    name, equals, rest = argument.partition("=")
    if not equals or os.path.isdir(os.path.expanduser(argument)):
        name, rest = "", argument
    elif not name or not rest:
        raise RunsError(f"RUN {argument!r}: expected PATH or NAME=PATH")
    path = Path(os.path.abspath(os.path.expanduser(rest)))  # gives "." a name, and keeps a symbolic link's own
    if not os.path.isdir(path):
        what = "is a file; give the folder it lies in" if os.path.exists(path) else "does not exist"
        raise RunsError(f"RUN {argument!r}: {str(path)!r} {what}")
    if _states(path):
        return [(path, name or None)]
    inside = sorted((child for child in path.glob("*") if _states(child)), key=_natural)
    if not inside:
        raise RunsError(
            f"RUN {argument!r}: no {STATE} in {str(path)!r}, in a checkpoint-N there, or in a run one level "
            "below. A run has one from its first checkpoint on (save_steps)"
        )
    return [(child, f"{name}/{child.name}" if name else None) for child in inside]


def _natural(path: Path) -> list[Any]:
    """Return a key that sorts seed-2 before seed-10; its pieces alternate between text and digits."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", path.name)]


def _states(path: Path) -> list[Path]:
    """Return the trainer_state.json of a run and of its newest checkpoint, as far as they exist."""
    saved = [file for file in path.glob(f"checkpoint-*/{STATE}") if re.fullmatch(r"checkpoint-\d+", file.parent.name)]
    newest = sorted(saved, key=lambda file: _natural(file.parent))[-1:]
    return [path / STATE, *newest] if os.path.isfile(path / STATE) else newest


def _read_states(path: Path) -> list[dict[str, Any]]:
    files = _states(path)
    return [_read(file) for file in (files[:1] if is_finished(path) else files)]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # errors of JSON and Unicode are ValueErrors
        raise RunsError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RunsError(f"{str(file)!r} holds a {type(content).__name__}; expected a JSON object")
    return content
