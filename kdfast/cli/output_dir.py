"""The state of an output_dir before a run: empty, an interrupted run to resume, a finished one, or foreign files.

`kdfast.json` is written first and says which run the folder belongs to; `summary.json` is written last and marks the
run as finished. In between come checkpoints, which appear only when complete. An earlier run's files are replaced only
under `overwrite_output_dir`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from kdfast.cli.errors import UserError
from kdfast.report.read_runs import RECORD, REPORT, STATE, SUMMARY
from kdfast.training.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from kdfast.training.cache.precompute import FOLDER
from kdfast.training.durable.atomic_io import write_text
from kdfast.training.recipes import current_name

RESULTS = (SUMMARY, REPORT, STATE, "config.json", "model.safetensors", ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# what overwrite_output_dir removes, including a projector's weights; the summary first, so that a rest is not finished
REMOVED = (
    *RESULTS, "*.safetensors", "*.safetensors.index.json", "checkpoint-*", "damaged-checkpoint-*", ".*.incomplete",
    ".incomplete", FOLDER,
)  # fmt: skip
OURS = re.compile(r"checkpoint-\d+|damaged-checkpoint-\d+(\.\d+)?")  # for a folder, the beginning of its name
# settings that may change between an interruption and the resume
FREE = {
    "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "run_name", "non_finite",
    "max_skipped_steps", "load_best_model_at_end",
}  # fmt: skip
FREE_PREFIXES = ("health", "logging_", "save_", "log_", "dataloader_", "push_to_hub", "hub_")
REMEDY = "Name another folder, or throw that run away with --overwrite_output_dir true"


def claim(output_dir: Path, given: Mapping[str, Any], overwrite: bool) -> None:
    """Claim the folder for this run. Raise UserError if that would destroy something or mix two runs."""
    record = output_dir / RECORD
    for path in (record, *(output_dir / name for name in RESULTS)):  # reading a pipe would block
        if path.exists() and not path.is_file():
            raise UserError(f"output_dir: {str(path)!r} is no file; move it away, or name another folder")
    held = [name for name in RESULTS if (output_dir / name).exists()]
    if output_dir.is_dir() and get_last_checkpoint(output_dir) is not None:
        held.append("checkpoints")
    if held and not record.exists():
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds {held[0]} of something else than a run of kdfast; name another "
            "folder"
        )
    if overwrite and record.exists():
        for path in [path for pattern in REMOVED for path in output_dir.glob(pattern)]:
            if "checkpoint-" in path.name and not path.name.startswith(".") and not OURS.fullmatch(path.name):
                continue  # the user's own copy
            if path.name == FOLDER and path.resolve() == Path(given.get("teacher_cache") or "").resolve():
                continue  # the new run is to learn from it
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif held and (changed := _changed_settings(record, given)):
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds a run with other settings ({'; '.join(changed)}). {REMEDY}"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(given, indent=2, default=str) + "\n")


def _changed_settings(record: Path, given: Mapping[str, Any]) -> list[str]:
    """Return 'key: then X, now Y' for every setting that differs from the run that the folder belongs to."""
    try:
        before = {**json.loads(record.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"output_dir: {str(record)!r} cannot be read ({error}), so whether the run there is this one cannot be "
            f"known. Restore it from a copy. {REMEDY}"
        ) from error
    now = json.loads(json.dumps(given, default=str))
    if before.get("include_num_input_tokens_seen") is False:  # the default, which former records spell out
        del before["include_num_input_tokens_seen"]
    if isinstance(before.get("recipe"), str):  # a run from before a recipe was renamed is the same run
        before["recipe"] = current_name(before["recipe"])
    return [
        f"{key}: then {before.get(key, 'default')}, now {now.get(key, 'default')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE and not key.startswith(FREE_PREFIXES)
    ]
