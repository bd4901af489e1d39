"""summary.json: what a run was and what came of it, in one flat file. null is where a number does not apply."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kdfast.engines import resolve
from kdfast.training.config import KDConfig
from kdfast.training.durable.atomic_io import write_text
from kdfast.training.metrics import PeakMemory
from kdfast.training.trainer import KDTrainer
from kdfast.versions import versions

# of an evaluation, whose keys have the prefix eval_; the student's ce keeps it
EVALUATED = ("perplexity", "kd", "kl_teacher_student", "kl_teacher_projected", "ce_projected", "agreement")


def summarise(trainer: KDTrainer, evaluation: dict[str, float], peak: PeakMemory) -> dict[str, Any]:
    """Return the summary of a trained run and of its last `evaluation`.

    tokens are targets trained on, those before a resume included; seconds are those of the training steps, without
    evaluations and saving; kd is the KL the loss sees (at its temperature, without τ²), on the evaluation text.
    """
    model = trainer.model
    tokens, seconds = trainer.state.num_input_tokens_seen, training_seconds(trainer.state.log_history)
    return {
        "recipe": model.recipe.name,
        "eval_ce": evaluation.get("eval_ce"),
        **{name: evaluation.get(f"eval_{name}") for name in EVALUATED},
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "steps": trainer.state.global_step,
        "eval_tokens": evaluation.get("eval_tokens"),
        "peak_memory_bytes": peak.read(),
        "peak_memory_of": peak.what,
        "engine": engine_of(trainer.args, model.student),
        "device": peak.device_name,
        "student_parameters": model.student.num_parameters(),
        "teacher_parameters": None if model.teacher is None else model.teacher.num_parameters(),
        "seed": trainer.args.seed,
        "starts": [start._asdict() for start in trainer.starts],
        "health": [dataclasses.asdict(finding) for finding in trainer.health.findings] if trainer.health else [],
        "settings": dataclasses.asdict(model.recipe),
        "versions": versions(),
    }


def summarise_log(log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `summarise` would say, as far as a log shows: of a run that is still going, or was interrupted."""
    evaluation: dict[str, Any] = next((entry for entry in reversed(log) if "eval_ce" in entry), {})
    tokens = max((entry["tokens_seen"] for entry in log if "tokens_seen" in entry), default=None)
    seconds = training_seconds(log)
    return {
        "eval_ce": evaluation.get("eval_ce"),
        **{name: evaluation.get(f"eval_{name}") for name in EVALUATED},
        "tokens": tokens,
        "seconds": seconds or None,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "steps": max((entry["step"] for entry in log if "step" in entry), default=None),
        "peak_memory_bytes": max((entry["memory_bytes"] for entry in log if "memory_bytes" in entry), default=None),
    }


def engine_of(args: KDConfig, student: PreTrainedModel) -> str:
    """Return the engine that trains `student` in batches of 1024 tokens and more."""
    weight = student.get_output_embeddings().weight
    return resolve(args.engine, args.device, weight.dtype, tokens=1024, vocab=weight.shape[0])


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write the file, which is complete or not there."""
    write_text(path, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def training_seconds(log: Sequence[dict[str, Any]]) -> float:
    """Add up the training seconds from the speed each line of the log notes: the log outlives an interruption."""
    seconds, before = 0.0, 0
    for entry in log:
        if entry.get("tokens_per_second") and "tokens_seen" in entry:
            seconds += (entry["tokens_seen"] - before) / entry["tokens_per_second"]
            before = entry["tokens_seen"]
    return seconds
