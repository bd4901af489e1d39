"""A real distillation on this machine, with nothing downloaded and no GPU needed: what `kdfast demo` runs.

Text is Python's own library as it is installed here, one file in twenty held out; the tokenizer is a byte-level BPE
trained on it; the teacher is trained on it and kept in the cache, under a key made of text and settings. Then, at
the same budget of tokens and the same learning rate, one student for each recipe. The table shows what came out.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdfast.demo.toy_models import SmallSizes, small_gpt2
from kdfast.demo.toy_text import PREPARED, cache_root, library_text, prepare
from kdfast.report.page import text_table, write_report
from kdfast.report.read_runs import REPORT, SUMMARY, Run, is_finished
from kdfast.report.summary import write_summary

RECIPES = ("lm_only", "projector", "projector_fixed", "teacher_head", "svd_init")  # the last is what auto takes here

RunSettings = Callable[[str, Path, dict[str, Any]], Run]  # (name, parent, settings) → the run in parent/name


# ten minutes of two CPU cores; and whether it works, not what comes out
FULL = SmallSizes(
    characters=10**9, vocabulary=8192, teacher_layers=4, teacher_width=256, teacher_steps=1000, student_width=128,
    student_steps=400, learning_rate=1e-3,
)  # fmt: skip
QUICK = SmallSizes(
    characters=500_000, excerpt=300, vocabulary=512, context=64, teacher_layers=1, teacher_width=32, teacher_steps=6,
    student_layers=1, student_width=16, student_steps=6, learning_rate=1e-3,
)  # fmt: skip


def run_demo(run: RunSettings, sizes: SmallSizes, output_dir: str, cache_dir: str | None, seed: int) -> None:
    """Do everything from the text to the printed table; `run` does what `kdfast distill` does with settings.

    Raises DataError where Python's library is not there as text.
    """
    start = time.perf_counter()
    train, evaluation = library_text(sizes.characters, sizes.excerpt)
    key = _key(sizes, seed, [*train, *evaluation])
    cache = cache_root(cache_dir, "demo") / key
    print(f"Text: {len(train)} files of Python's library to train on, {len(evaluation)} held out. Kept in {cache}.")
    prepare(cache, train, evaluation, sizes.vocabulary)
    tokens = f"of {sizes.batch * sizes.context} tokens"
    print(f"Teacher: {sizes.teacher_layers} layers of {sizes.teacher_width}, {sizes.teacher_steps} steps {tokens}.")
    teacher = run("teacher", cache, _settings(cache, sizes, seed))

    output = _unfinished(Path(output_dir), key)
    note = (
        f"Students of Python library text: {sizes.student_layers} layers of width {sizes.student_width}, a vocabulary "
        f"of {sizes.vocabulary}, {sizes.student_steps} steps {tokens} each at learning rate {sizes.learning_rate}, "
        f"seed {seed}. One seed, one small setting."
    )
    print(f"{note} Results go to {output}.")
    students = [run(recipe, output, _settings(cache, sizes, seed, recipe)) for recipe in RECIPES]

    runs = [teacher, *students]
    write_report(output / REPORT, "kdfast demo", runs, note)
    write_summary(output / SUMMARY, {run.name: run.summary for run in runs})
    ce = {student.name: student.summary["eval_ce"] for student in students}
    differences = ", ".join(f"{name} {ce[name] - ce[RECIPES[0]]:+.3f}" for name in RECIPES[1:])
    print(f"\n{text_table(runs)}\n\nStudent CE against {RECIPES[0]}, in nats, where less is better: {differences}.")
    print(f"Curves: {output / REPORT}. {time.perf_counter() - start:.0f} seconds in all.")


def _key(sizes: SmallSizes, seed: int, texts: list[str]) -> str:
    """Return a hash of all that the teacher depends on."""
    settings = [sizes.vocabulary, _settings(Path(), sizes, seed)]
    return hashlib.sha256(json.dumps([settings, texts]).encode()).hexdigest()[:16]


def _unfinished(wanted: Path, key: str) -> Path:
    """Return `wanted`, or `wanted-2`, …: the first that is new, or holds an interrupted demo of the same settings."""

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


def _settings(cache: Path, sizes: SmallSizes, seed: int, recipe: str | None = None) -> dict[str, Any]:
    """Return the teacher's settings for `kdfast distill`, or those of a student with `recipe`."""
    if recipe is None:
        of, layers, width, steps = {"recipe": "lm_only"}, sizes.teacher_layers, sizes.teacher_width, sizes.teacher_steps
    else:
        of = {"recipe": recipe, "teacher_model_name_or_path": str(cache / "teacher")}
        layers, width, steps = sizes.student_layers, sizes.student_width, sizes.student_steps
    return {
        **of,
        "student_config": {"model_type": "gpt2", **small_gpt2(layers, width, sizes.context)},
        **{key: str(cache / name) for key, name in PREPARED.items()},
        "max_length": sizes.context,
        "per_device_train_batch_size": sizes.batch,
        "per_device_eval_batch_size": 2 * sizes.batch,
        "max_steps": steps,
        "learning_rate": sizes.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "logging_steps": max(1, steps // 40),
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // 2),
        "save_steps": max(1, steps // 4),
        "save_total_limit": 1,
        "seed": seed,
    }
