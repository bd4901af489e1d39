"""What an output_dir holds before a run: nothing, an interrupted run to resume, a finished one, or strange files.

`kdfast.json` is written first and says which run the folder belongs to; `summary.json` is written last and says that
the run is finished. Between them lie checkpoints, which appear only when complete. Nothing of an earlier run is
replaced unless `overwrite_output_dir` asks for it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from kdfast.cli.errors import UserError
from kdfast.report.read_runs import RECORD, REPORT, STATE, SUMMARY, is_finished
from kdfast.training.durable.atomic_io import write_text
from kdfast.training.recipes import current_name

MODEL_FILES = ("config.json", "model.safetensors")
CHECKPOINTS = ("checkpoint-*", "damaged-checkpoint-*", ".*.incomplete", ".incomplete")

# settings that may change between an interruption and the resume without making it another run
FREE = {
    "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "run_name", "non_finite",
    "max_skipped_steps", "load_best_model_at_end",
}  # fmt: skip
FREE_PREFIXES = ("health", "logging_", "save_", "log_", "dataloader_", "push_to_hub", "hub_")


def changed_settings(output_dir: Path, given: Mapping[str, Any]) -> list[str]:
    """Return 'key: then X, now Y' of every setting that differs from the run the folder belongs to."""
    try:
        before = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError(f"it holds a {type(before).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"output_dir: {str(output_dir / RECORD)!r} cannot be read ({error}), so whether the run there is this one "
            "cannot be told. Restore it from a copy, name another folder, or throw that run away with "
            "--overwrite_output_dir true"
        ) from error
    now = json.loads(json.dumps(given, default=str))
    for settings in (before, now):
        if isinstance(settings.get("recipe"), str):  # a run of before a recipe's name changed is the same run
            settings["recipe"] = current_name(settings["recipe"])
    return [
        f"{key}: then {before.get(key, 'default')}, now {now.get(key, 'default')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE and not key.startswith(FREE_PREFIXES)
    ]


def claim(output_dir: Path, given: Mapping[str, Any], overwrite: bool) -> None:
    """Make the folder this run's own. Raises UserError where that would destroy something, or mix two runs."""
    record = output_dir / RECORD
    for name in (RECORD, SUMMARY, REPORT, STATE):  # a pipe would be waited for, and a folder not replaced
        if (output_dir / name).exists() and not (output_dir / name).is_file():
            raise UserError(f"output_dir: {str(output_dir / name)!r} is no file; move it away, or name another folder")
    if not record.exists():
        strange = [name for name in (SUMMARY, REPORT, STATE, *MODEL_FILES) if (output_dir / name).exists()]
        if strange or (output_dir.is_dir() and _has_results(output_dir)):
            raise UserError(
                f"output_dir: {str(output_dir)!r} holds {strange[0] if strange else 'checkpoints'} of something "
                "else than a run of kdfast; name another folder"
            )
    elif overwrite:
        _remove_run(output_dir)
    elif _has_results(output_dir) and (changed := changed_settings(output_dir, given)):
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds a run with other settings ({'; '.join(changed)}). Name another "
            "folder, or throw that run away with --overwrite_output_dir true"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(given, indent=2, default=str) + "\n")


def _has_results(output_dir: Path) -> bool:
    return is_finished(output_dir) or get_last_checkpoint(output_dir) is not None


def _remove_run(output_dir: Path) -> None:
    """Remove results and checkpoints of a run, and no other file."""
    (output_dir / SUMMARY).unlink(missing_ok=True)  # first: what is half removed is not finished
    for path in [path for pattern in CHECKPOINTS for path in output_dir.glob(pattern)]:
        shutil.rmtree(path)
    weights = [*output_dir.glob("*.safetensors"), *output_dir.glob("*.safetensors.index.json")]  # a projector's too
    for path in [*weights, *(output_dir / name for name in (REPORT, STATE, *MODEL_FILES))]:
        path.unlink(missing_ok=True)
