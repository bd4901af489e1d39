"""summary.json: a run and its results in one flat file; null where a number does not apply."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kdfast.engines import resolve
from kdfast.report.read_runs import log_table, summarize_log
from kdfast.training.cache.read import cached_blocks
from kdfast.training.config import KDConfig
from kdfast.training.durable.atomic_io import write_text
from kdfast.training.trainer import KDTrainer
from kdfast.versions import versions


def summarize(trainer: KDTrainer, evaluation: dict[str, float]) -> dict[str, Any]:
    """Return the summary of a trained run and its last `evaluation`; `summarize_log` computes the results."""
    model, device = trainer.model, trainer.args.device
    on_gpu = device.type == "cuda"
    used = [*(blocks.cache for blocks in cached_blocks(trainer.train_dataset)), *model.sides.caches.values()]
    evaluated = [blocks.cache.description.method for blocks in cached_blocks(trainer.eval_dataset)]
    caches: dict[Any, Any] = {cache.folder: cache for cache in used}
    return {
        "recipe": model.recipe.name,
        **summarize_log(log_table(trainer.state.log_history), evaluation),
        "teacher_seconds": (trainer.solve_seconds + sum(cache.summary.seconds for cache in caches.values())) or None,
        "kl_is_lower_bound": "top_k" in evaluated,  # the other ids count as one
        "eval_tokens": evaluation.get("eval_tokens"),
        "engine": engine_of(trainer.args, model.student),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device.type}, {torch.get_num_threads()} threads",
        "student_parameters": model.student.num_parameters(),
        "student_trained_parameters": model.student.num_parameters(only_trainable=True),
        "teacher_parameters": sum(one.num_parameters() for one in model.teachers.values()) or None,
        "operations_per_token": sum(trainer.price),
        "times_lm_only": trainer.price.ratio,
        "seed": trainer.args.seed,
        "starts": [start._asdict() for start in trainer.starts],
        "health": [dataclasses.asdict(finding) for finding in trainer.health.findings] if trainer.health else [],
        "settings": dataclasses.asdict(model.recipe),
        "data": {name: dataclasses.asdict(counts) for name, counts in trainer.counts.items()},
        "versions": versions(),
    }


def engine_of(args: KDConfig, student: PreTrainedModel) -> str:
    """Return the engine that trains `student` in batches of at least 1024 tokens."""
    weight = student.get_output_embeddings().weight
    return resolve(args.engine, args.device, weight.dtype, tokens=1024, vocab=weight.shape[0])


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write the file, which is complete or absent."""
    write_text(path, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
