"""What every run of the experiment shares: text, tokenizer, teacher, students, budget. Made once, then read.

Text is Python's own library, a twentieth of its files held out, a byte-level BPE of 4096 tokens trained on the rest.
The teacher has sixteen times the tokens of a fresh student. Two widths: 192, whose ratio to the teacher's 256 is that
of 768 to 1024, and 128. A pretrained student has seen four times a fresh one's tokens of the same text, without a
teacher, and is then given half a fresh one's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kdfast.cli.demo import run_settings
from kdfast.demo.toy_models import small_gpt2
from kdfast.demo.toy_text import PREPARED, library_text
from kdfast.demo.toy_text import prepare as prepare_text
from kdfast.report.read_runs import Run, is_finished, read_run

VOCABULARY = 4096
CONTEXT = 128
BATCH = 4  # blocks a step
STEPS = {False: 256, True: 128}  # by pretrained
TEACHER = {"layers": 4, "width": 256}
TEACHER_STEPS, TEACHER_BATCH = 1024, 16
PRETRAINING_STEPS = 1024
WIDTHS = (192, 128)
STUDENT_LAYERS = 2
EXCERPT = 1500  # characters of a held-out file


class Case(NamedTuple):
    """A student to distil into."""

    width: int
    pretrained: bool

    @property
    def name(self) -> str:
        return f"{'pretrained' if self.pretrained else 'fresh'}-{self.width}"


CASES = {case.name: case for case in (Case(width, pretrained) for pretrained in (False, True) for width in WIDTHS)}


def prepare(
    root: Path,
    cases: Iterable[Case],
    *,
    vocabulary: int = VOCABULARY,
    teacher_steps: int = TEACHER_STEPS,
    quick: bool = False,
) -> None:
    """Text, tokenizer, teacher and the pretrained students of `cases` under `root`, unless they are there."""
    train, evaluation = library_text(500_000 if quick else 10**9, EXCERPT)
    root.mkdir(parents=True, exist_ok=True)
    prepare_text(root, train, evaluation, vocabulary)
    scale = 128 if quick else 1
    teacher = settings(root, **TEACHER, steps=teacher_steps // scale, batch=TEACHER_BATCH, learning_rate=2e-3, seed=0)
    run(root / "teacher", {"recipe": "lm_only", **teacher})
    for width in sorted({case.width for case in cases if case.pretrained}):
        student = settings(
            root, STUDENT_LAYERS, width, steps=PRETRAINING_STEPS // scale, batch=BATCH, learning_rate=2e-3, seed=1000
        )
        run(root / f"pretrained-{width}", {"recipe": "lm_only", **student})


def student(root: Path, case: Case, learning_rate: float, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Settings of a run, without the recipe's; `steps` other than the case's are for trying things out."""
    steps = steps or STEPS[case.pretrained]
    keys = settings(root, STUDENT_LAYERS, case.width, steps=steps, batch=BATCH, learning_rate=learning_rate, seed=seed)
    keys["teacher_model_name_or_path"] = str(root / "teacher")
    if case.pretrained:
        del keys["student_config"]
        keys["model_name_or_path"] = str(root / f"pretrained-{case.width}")
    return keys


def settings(
    root: Path, layers: int, width: int, *, steps: int, batch: int, learning_rate: float, seed: int
) -> dict[str, Any]:
    return {
        "student_config": {"model_type": "gpt2", **small_gpt2(layers, width, CONTEXT)},
        **{key: str(root / name) for key, name in PREPARED.items()},
        "max_length": CONTEXT,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 16,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "logging_steps": max(1, steps // 32),
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // 2),
        "save_strategy": "no",
        "seed": seed,
        "data_seed": seed,
        "disable_tqdm": True,
    }


def run(path: Path, keys: dict[str, Any]) -> Run:
    """What `kdfast distill path.yaml` does; a finished run is read."""
    if is_finished(path):
        return read_run(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return run_settings(path.name, path.parent, keys)


def first_files(folder: Path, size: int) -> str:
    """The first files of a folder that come to `size` bytes."""
    text = ""
    for path in sorted(folder.iterdir()):
        text += path.read_text(encoding="utf-8")
        if len(text.encode()) >= size:
            break
    return text
