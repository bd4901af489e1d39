"""The models' files in a checkpoint, and which checkpoints of a run stay.

    config.json, model.safetensors, …   the student, as `save_pretrained` writes it: plain `from_pretrained` reads it
    adapter_config.json, adapter_model.safetensors   instead, for a student with an adapter
    logit_projector.safetensors         the projector, if there is one (with a probe's head)
    hidden_loss.safetensors             the maps of the hidden-state loss, if there is one
    teacher.safetensors                 the teacher's weights, if they are an average of the student's

All weights are safetensors, so reading them runs no code. atomic_io.py says how a folder appears only when complete.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from kdfast.training.adapters import adapted_layer, load_adapter, save_adapter
from kdfast.training.durable.atomic_io import INCOMPLETE, REPLACED, delete, discard
from kdfast.training.durable.resume import checkpoints, step_of
from kdfast.training.fsdp import load_full_state, reshard
from kdfast.training.model import DistillationModel

PARTS = ("logit_projector", "hidden_loss")  # trained modules beside the student, each with a file of its own


def save_models(folder: Path, model: DistillationModel, state: dict[str, Tensor] | None = None) -> None:
    """Write the student and other trained parts. `state` (gathered from shards) replaces `model.state_dict()`."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in (state or model.saved_state(model.state_dict())).items():
        part, _, key = name.partition(".")
        parts[part][key] = tensor
    student = parts.pop("student")
    with _without_bars():
        if adapted_layer(model.student) is not None:
            save_adapter(folder, model.student, student)
        else:
            model.student.save_pretrained(folder, state_dict=student)
    for part, tensors in parts.items():
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / f"{part}.safetensors", {"format": "pt"})


def load_models(folder: Path, model: DistillationModel) -> None:
    """Load in place what `save_models` wrote. Raises ValueError if a file or a weight is missing."""
    if adapted_layer(model.student) is not None:
        reshard(model.student)
        load_adapter(folder, model.student)
    elif not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is not a checkpoint: it has no config.json of a whole student")
    else:
        with _without_bars():
            read: Any = type(model.student).from_pretrained
            loaded, report = read(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{str(folder)!r} lacks weights of the student: {', '.join(missing)}")
        load_full_state(model.student, loaded.state_dict())
    model.loaded = True
    for name in PARTS:
        if (module := getattr(model, name)) is not None:
            path = folder / f"{name}.safetensors"
            if not path.is_file():
                raise ValueError(f"{str(folder)!r} has no {path.name}; it was saved by a recipe without one")
            load_full_state(module, load_file(path))
    if model.average is not None:
        path = folder / "teacher.safetensors"
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} has no {path.name}; it was saved without teacher_update_rate")
        model.average.load(load_file(path))


def rotate(run: Path, limit: int | None, best: str | None, *, ended: bool = False) -> None:
    """Delete the oldest checkpoints beyond `limit`, but not the best one, nor the newest unless the run has `ended`.

    transformers does the same, but deletes file by file under the checkpoint's name.
    """
    if not limit or limit < 0:
        return
    visible = sorted(checkpoints(run), key=lambda folder: (folder.stat().st_mtime, step_of(folder)))
    kept = Path(best).resolve() if best else None
    spare = [path for path in (visible if ended else visible[:-1]) if path.resolve() != kept]
    for path in spare[: max(len(visible) - limit, 0)]:
        delete(path)


def recover(run: Path) -> None:
    """Clean up after an interrupted run: rename back what was being replaced, and remove what is half written."""
    for old in run.glob(f".checkpoint-*{REPLACED}"):
        final = run / old.name.removeprefix(".").removesuffix(REPLACED)
        if not final.exists():
            old.rename(final)
    for folder in (*run.glob(f".checkpoint-*{INCOMPLETE}"), run / INCOMPLETE):  # the last one is of the final model
        discard(folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Turn off the progress bars of saved files, which would break up the run's."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
