"""A real distillation on this machine, without downloads or a GPU: what `kdfast demo` runs.

The text is the installed Python's own library, with one file in twenty held out. The tokenizer is a byte-level BPE
trained on it; the teacher is trained on it too and cached under a key made of text and settings. The students get
little of that text, several times over: the case in which a teacher is worth its seconds. There is a student for each
recipe, with the same tokens and learning rate, and another of LM only with as many seconds as the best one took,
including its start and its teacher's run over the text. A table and a sentence show the results.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from kdfast.demo.toy_models import SmallSizes, small_gpt2
from kdfast.demo.toy_text import PREPARED, cache_root, library_text, once, prepare
from kdfast.report.page import EQUAL, text_table, whole_seconds, write_report
from kdfast.report.read_runs import REPORT, SUMMARY, Run, is_finished
from kdfast.report.summary import write_summary
from kdfast.training.durable.atomic_io import write_text
from kdfast.training.recipes import AUTO

ALONE, LONGER = "lm_only", "lm_only_longer"
RECIPES = (ALONE, "projector", "projector_fixed", "teacher_head", AUTO)

RunSettings = Callable[[str, Path, dict[str, Any]], Run]  # (name, parent, settings) → the run in parent/name


@dataclass(frozen=True)
class DemoSizes(SmallSizes):
    """Sizes of a demo: those of small models, plus what differs between teacher and students."""

    teacher_batch: int = 16
    teacher_rate: float = 2e-3
    student_steps: int = 400
    student_characters: int = 300_000  # of the teacher's text, from its beginning


# ten minutes on two CPU cores; and a check that everything works, whatever its results
FULL = DemoSizes(
    characters=10**9, excerpt=1500, vocabulary=4096, teacher_layers=4, teacher_width=256, teacher_steps=500,
    student_width=128, learning_rate=1e-3,
)  # fmt: skip
QUICK = DemoSizes(
    characters=500_000, excerpt=300, vocabulary=512, context=64, teacher_layers=1, teacher_width=128, teacher_steps=6,
    teacher_batch=4, student_layers=1, student_width=64, student_steps=6, student_characters=1500, learning_rate=1e-3,
)  # fmt: skip


def run_demo(run: RunSettings, sizes: DemoSizes, output_dir: str, cache_dir: str | None, seed: int) -> None:
    """Run the demo from the text to the printed table; `run` does what `kdfast distill` does with settings.

    Raises DataError if Python's library does not exist as text.
    """
    start = time.perf_counter()
    train, evaluation = library_text(sizes.characters, sizes.excerpt)
    key = _key(sizes, seed, [*train, *evaluation])
    cache = cache_root(cache_dir, "demo") / key
    print(f"Text: {len(train)} files of Python's library to train on, {len(evaluation)} held out. Kept in {cache}.")
    prepare(cache, train, evaluation, sizes.vocabulary)
    little = "".join(train)[: sizes.student_characters]
    once(_little(cache, sizes), lambda folder: write_text(folder / "text.py", little))
    print(
        f"Teacher: {sizes.teacher_layers} layers of {sizes.teacher_width}, {sizes.teacher_steps} steps of "
        f"{sizes.teacher_batch * sizes.context} tokens."
    )
    teacher = run("teacher", cache, _settings(cache, sizes, seed))

    output = _unfinished(Path(output_dir), key)
    note = (
        f"Students: {sizes.student_layers} layers of width {sizes.student_width}, a vocabulary of {sizes.vocabulary}, "
        f"learning rate {sizes.learning_rate}, steps of {sizes.batch * sizes.context} tokens, {sizes.student_steps} of "
        f"them but for {LONGER}. Their text: the first {len(little):,} characters of the teacher's "
        f"{sum(map(len, train)):,}. Seed {seed}: one seed, one small setting."
    )
    print(f"{note} Results go to {output}.")
    students = [run(recipe, output, _settings(cache, sizes, seed, recipe)) for recipe in RECIPES]
    alone, *distilled = students
    best = min(distilled, key=lambda student: student.summary["eval_ce"])
    longer = replace(sizes, student_steps=_steps_in_as_many_seconds(alone, best))
    students.insert(1, run(LONGER, output, _settings(cache, longer, seed, ALONE)))

    runs = [teacher, *students]
    write_report(output / REPORT, "kdfast demo", runs, note)
    write_summary(output / SUMMARY, {run.name: run.summary for run in runs})
    verdict = _verdict(runs, best) if sizes != QUICK else "Toy sizes: everything works, and the figures mean nothing."
    print(f"\n{text_table(runs)}\n\n{verdict}")
    print(f"Curves: {output / REPORT}. {time.perf_counter() - start:.0f} seconds in all.")


def _steps_in_as_many_seconds(alone: Run, best: Run) -> int:
    """Return how many steps of LM only fit into `best`'s time, at the median speed of `alone`."""
    tokens_per_step = alone.summary["tokens"] / alone.summary["steps"]
    speed = alone.log["tokens_per_second"].median()  # the first line includes compiling
    return max(1, round((whole_seconds(best.summary) or 0.0) * speed / tokens_per_step))


def _verdict(runs: list[Run], best: Run) -> str:
    """Return, in words, what the figures of teacher, LM only, longer LM only and the rest say about the best recipe."""
    teacher, alone, longer, *_ = runs

    def came(run: Run) -> str:
        made = run.summary.get("teacher_seconds")
        teachers = f", {made:.3g} of them the start and the teacher's run over the text" if made else ""
        tokens, seconds = run.summary["tokens"], whole_seconds(run.summary) or 0.0
        return f"{run.summary['eval_ce']:.3f} ({tokens:,} tokens, {seconds:.3g} seconds{teachers})"

    recipe = best.summary["recipe"]
    name = best.name if recipe == best.name else f"{best.name} ({recipe})"
    case = (
        f"Little text, which is read {best.log['epoch'].max():.1f} times, and a teacher that has learned from "
        f"{teacher.summary['tokens']:,} tokens: the best recipe, {name}, ended at {came(best)}. LM only ended at "
        f"{came(alone)} with as many tokens, and at {came(longer)} with the seconds."
    )
    by_tokens, by_seconds = (best.summary["eval_ce"] - run.summary["eval_ce"] for run in (alone, longer))
    ratio = (whole_seconds(longer.summary) or 0.0) / (whole_seconds(best.summary) or inf)
    if by_tokens >= 0:
        return f"{case} Distillation is worth nothing here: LM only is as good with as many tokens."
    if by_seconds < 0 and ratio >= 1 - EQUAL:
        return f"{case} Distillation is worth its seconds here: {by_seconds:+.3f} ({by_tokens:+.3f} at equal tokens)."
    if by_seconds >= 0 and ratio <= 1 + EQUAL:
        return f"{case} Distillation is worth its text here, {by_tokens:+.3f}, and not its seconds, {by_seconds:+.3f}."
    return f"{case} The seconds are too far apart to compare: leave the machine to the demo, and run it again."


def _little(cache: Path, sizes: DemoSizes) -> Path:
    return cache / f"first-{sizes.student_characters}"


def _key(sizes: DemoSizes, seed: int, texts: list[str]) -> str:
    """Return a hash of everything that the teacher depends on."""
    settings = [sizes.vocabulary, _settings(Path(), sizes, seed)]
    return hashlib.sha256(json.dumps([settings, texts]).encode()).hexdigest()[:16]


def _unfinished(wanted: Path, key: str) -> Path:
    """Return `wanted`, `wanted-2`, …: the first that is new or has an interrupted demo with the same settings."""

    def is_ours(path: Path) -> bool:
        mark = path / "demo-key"
        return mark.is_file() and mark.read_text() == key and not is_finished(path)

    path, number = wanted, 1
    while path.exists() and not is_ours(path):
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    path.mkdir(parents=True, exist_ok=True)
    (path / "demo-key").write_text(key)
    return path


def _settings(cache: Path, sizes: DemoSizes, seed: int, recipe: str | None = None) -> dict[str, Any]:
    """Return settings for `kdfast distill`: the teacher's, or those of a student with `recipe`."""
    text = {key: str(cache / name) for key, name in PREPARED.items()}
    of: dict[str, Any]
    if recipe is None:
        of, layers, width, steps = {"recipe": ALONE}, sizes.teacher_layers, sizes.teacher_width, sizes.teacher_steps
        batch, rate = sizes.teacher_batch, sizes.teacher_rate
    else:
        of = {"recipe": recipe, "teacher_model_name_or_path": str(cache / "teacher")}
        if recipe == "teacher_head":
            of["precompute_teacher_log_probs"] = False  # to show the cost of a live teacher
        layers, width, steps = sizes.student_layers, sizes.student_width, sizes.student_steps
        batch, rate = sizes.batch, sizes.learning_rate
        text["train_file"] = str(_little(cache, sizes))
    return {
        **of,
        "student_config": {"model_type": "gpt2", **small_gpt2(layers, width, sizes.context)},
        **text,
        "max_length": sizes.context,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 4 * sizes.batch,
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "logging_steps": max(1, steps // 40),
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // 2),
        "save_steps": max(1, steps // 4),
        "save_total_limit": 1,
        "seed": seed,
    }
