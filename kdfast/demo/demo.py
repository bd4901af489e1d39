"""A real distillation on this machine, with nothing downloaded and no GPU needed: what `kdfast demo` runs.

Text is Python's own library as it is installed here, one file in twenty held out; the tokenizer is a byte-level BPE
trained on it; the teacher is trained on it and kept in the cache, under a key made of text and settings. Then, at
the same budget of tokens and the same learning rate, one student for each recipe. The table shows what came out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.demo.toy_models import small_gpt2
from kdfast.demo.toy_text import cache_root, library_text, once, train_tokenizer, write_files
from kdfast.report.page import text_table, write_report
from kdfast.report.read_runs import REPORT, SUMMARY, Run, is_finished
from kdfast.report.summary import write_summary

RECIPES = ("lm_only", "projector", "projector_fixed", "teacher_head", "svd_init")  # the last is what auto takes here

RunSettings = Callable[[str, Path, dict[str, Any]], Run]  # (name, parent, settings) → the run in parent/name


@dataclass(frozen=True)
class Sizes:
    """What the demo trains. The defaults fit ten minutes of two CPU cores."""

    files: int = 10_000  # at most
    excerpt: int = 2000  # characters of a held-out file
    vocabulary: int = 8192
    context: int = 128
    batch: int = 4  # blocks per step
    teacher_layers: int = 4
    teacher_width: int = 256
    teacher_steps: int = 1000
    student_layers: int = 2
    student_width: int = 128
    student_steps: int = 400
    learning_rate: float = 1e-3
    evaluations: int = 2


QUICK = Sizes(
    files=60, excerpt=300, vocabulary=512, context=64, teacher_layers=1, teacher_width=32, teacher_steps=6,
    student_layers=1, student_width=16, student_steps=6,
)  # fmt: skip


def run_demo(run: RunSettings, sizes: Sizes, output_dir: str, cache_dir: str | None, seed: int) -> None:
    """Do everything from the text to the printed table; `run` does what `kdfast distill` does with settings.

    Raises DataError where Python's library is not there as text.
    """
    start = time.perf_counter()
    train, evaluation = library_text(sizes.files, sizes.excerpt)
    print(
        f"Text: {len(train)} files of Python's library to train on, {_megabytes(train):.1f} MB; "
        f"{len(evaluation)} held out, {_megabytes(evaluation):.2f} MB."
    )
    key = _key(sizes, seed, [*train, *evaluation])
    cache = cache_root(cache_dir, "demo") / key
    once(cache / "train", lambda path: write_files(path, train))
    once(cache / "eval", lambda path: write_files(path, evaluation))
    once(cache / "tokenizer", lambda path: train_tokenizer(path, train, sizes.vocabulary))

    tokens = sizes.batch * sizes.context
    print(
        f"Teacher: {sizes.teacher_layers} layers of width {sizes.teacher_width}, {sizes.teacher_steps} steps of "
        f"{tokens} tokens. Kept in {cache}."
    )
    teacher = run("teacher", cache, _settings(cache, sizes, seed))

    output = _unfinished(Path(output_dir), key)
    print(
        f"Students: {sizes.student_layers} layers of width {sizes.student_width}, {sizes.student_steps} steps of "
        f"{tokens} tokens each, learning rate {sizes.learning_rate}, seed {seed}. Results go to {output}."
    )
    students = [run(recipe, output, _settings(cache, sizes, seed, recipe)) for recipe in RECIPES]

    note = (
        f"Python library text, a vocabulary of {sizes.vocabulary}; every student had {sizes.student_steps} steps of "
        f"{tokens} tokens at learning rate {sizes.learning_rate}. One seed, one small setting."
    )
    runs = [teacher, *students]
    write_report(output / REPORT, "kdfast demo", runs, note)
    write_summary(output / SUMMARY, {run.name: run.summary for run in runs})
    print(f"\n{text_table(runs)}\n\n{note}\n{_against_lm_only(students)}")
    print(f"Curves: {output / REPORT}. {time.perf_counter() - start:.0f} seconds in all.")


def _megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def _key(sizes: Sizes, seed: int, texts: list[str]) -> str:
    """Return a hash of all that the teacher depends on."""
    digest = hashlib.sha256(json.dumps([sizes.vocabulary, _settings(Path(), sizes, seed)]).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def _unfinished(wanted: Path, key: str) -> Path:
    """Return `wanted`, or `wanted-2`, …: the first that is new, or holds an interrupted demo of the same settings."""
    for i in itertools.count(1):
        path = wanted if i == 1 else wanted.with_name(f"{wanted.name}-{i}")
        mark = path / "demo-key"
        if not path.exists():
            path.mkdir(parents=True)
            mark.write_text(key)
            return path
        if mark.exists() and mark.read_text() == key and not is_finished(path):
            return path
    raise AssertionError("unreachable")


def _settings(cache: Path, sizes: Sizes, seed: int, recipe: str | None = None) -> dict[str, Any]:
    """Return the teacher's settings for `kdfast distill`, or those of a student with `recipe`."""
    if recipe is None:
        of, layers, width, steps = {"recipe": "lm_only"}, sizes.teacher_layers, sizes.teacher_width, sizes.teacher_steps
    else:
        of = {"recipe": recipe, "teacher_model_name_or_path": str(cache / "teacher")}
        layers, width, steps = sizes.student_layers, sizes.student_width, sizes.student_steps
    return {
        **of,
        "student_config": {"model_type": "gpt2", **small_gpt2(layers, width, sizes.context)},
        "tokenizer_name": str(cache / "tokenizer"),
        "train_file": str(cache / "train"),
        "eval_file": str(cache / "eval"),
        "max_length": sizes.context,
        "per_device_train_batch_size": sizes.batch,
        "per_device_eval_batch_size": 2 * sizes.batch,
        "max_steps": steps,
        "learning_rate": sizes.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "logging_steps": max(1, steps // 40),
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // sizes.evaluations),
        "save_steps": max(1, steps // 4),
        "save_total_limit": 1,
        "seed": seed,
    }


def _against_lm_only(students: list[Run]) -> str:
    baseline, *others = (run.summary["eval_ce"] for run in students)
    differences = ", ".join(f"{r.name} {ce - baseline:+.3f}" for r, ce in zip(students[1:], others, strict=True))
    return f"Student CE against {students[0].name}, in nats, where less is better: {differences}."
