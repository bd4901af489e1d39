"""Which checkpoint a run resumes from: the one it names, or the newest complete one.

Before anything is loaded, every file is compared with SHA256SUMS, and pickles are checked to hold only data. A damaged
checkpoint that was named stops the run. `resume_from_checkpoint=True` asks for the newest usable one: a damaged one is
passed over with a warning and renamed to damaged-checkpoint-N, so that it is not tried again and nothing is lost. All
processes come to the same answer.
"""

from __future__ import annotations

import errno
import itertools
import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from kdfast.training.durable import checksums, safe_load
from kdfast.training.durable.atomic_io import flush
from kdfast.training.durable.errors import DamagedCheckpointError, RunStoppedError, first_line, is_lost_peer

logger = logging.getLogger(__name__)

# files of the optimizer's state in a checkpoint, by who wrote it
WRITERS = {
    "optimizer.pt": "one process or DDP",
    "optimizer.bin": "FSDP2 with FULL_STATE_DICT",
    "optimizer_0": "FSDP2 with SHARDED_STATE_DICT",
}

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(run: Path) -> list[Path]:
    """Return the visible checkpoints in a run's folder, newest first, complete or not."""
    found = [path for path in run.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return N for checkpoint-N, −1 for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def find_problem(folder: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None."""
    return checksums.find_damage(folder) or safe_load.find_refused(folder) or _find_lacking(folder)


def _find_lacking(folder: Path) -> str | None:
    """Return what is missing. (Checksums say that files are intact, not that all are there.)"""
    name = TRAINER_STATE_NAME
    try:
        state = TrainerState.load_from_json(str(folder / name))
    except FileNotFoundError:
        return f"it has no {name}"
    except Exception as error:  # of many classes, since the file may hold any JSON
        return f"{name} cannot be read: {first_line(error)}"
    if not all(type(number) is int and number >= 0 for number in (state.global_step, state.max_steps)):
        return f"{name} has no global_step and max_steps"
    well_formed = isinstance(state.log_history, list) and all(isinstance(entry, dict) for entry in state.log_history)
    return None if well_formed else f"{name} has no log_history"


def common_problem(folder: Path) -> str | None:
    """Return, in all processes, the problem that `find_problem` finds in one process of each node."""
    found = gather_object([find_problem(folder) if PartialState().is_local_main_process else None])
    return next(filter(None, found), None)


def best_checkpoint(state: TrainerState, run: Path) -> Path | None:
    """Return the best checkpoint, looked for in `run` first since the folder may have moved, else as recorded."""
    recorded, own = state.best_model_checkpoint, run / f"checkpoint-{state.best_global_step}"
    if state.best_global_step and (own.is_dir() or recorded is None or not Path(recorded).is_dir()):
        return own
    return Path(recorded) if recorded is not None else None


def check_optimizer(checkpoint: Path, fsdp_plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Raise ValueError if the optimizer's state is missing, or was saved by another way of launching."""
    expected = "optimizer.pt"
    if fsdp_plugin is not None:
        whole = "FULL_STATE_DICT" in str(fsdp_plugin.state_dict_type)
        expected = "optimizer.bin" if whole else "optimizer_0"
    found = [name for name in WRITERS if (checkpoint / name).exists()]
    if not found:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r}: it was saved with save_only_model=True, without optimizer "
            "and schedule, and cannot be gone on from. Start a new run from its student (model_name_or_path) in "
            "another output_dir"
        )
    if expected not in found:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r}: its optimizer's state, {found[0]}, was written by "
            f"{WRITERS[found[0]]}, and this launch is {WRITERS[expected]}. Launch it the same way, or start a new run "
            "from its student (model_name_or_path)"
        )


@contextmanager
def naming_failed_reads(folder: str | None, readers: Sequence[str] = ()) -> Iterator[None]:
    """Turn a failure to load a checkpoint whose files are intact into a DamagedCheckpointError.

    `readers`: names of functions that load; errors raised outside them, or by communication, stay as they are. ()
    means that everything inside the context is loading.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # of many classes, since a state is loaded unchecked
        called = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if readers and not called.intersection(readers):
            raise
        if isinstance(error, (RunStoppedError, MemoryError, torch.OutOfMemoryError)):
            raise
        if isinstance(error, OSError) and error.errno == errno.EIO:  # the disk failed, not the file
            raise
        if isinstance(error, RuntimeError) and is_lost_peer(error):
            raise
        cause: Any = error
        if isinstance(error, CheckpointException):  # of shards, with each process's error
            cause = next((failed for failed, _ in error.failures.values()), error)
        raise DamagedCheckpointError(
            f"{str(folder)!r} cannot be loaded: {type(cause).__name__}: it {safe_load.explain(cause)}. Its files are "
            "as their checksums say: they were written for another model, recipe or optimizer, or changed together. Go "
            "on from another checkpoint, or start anew in another output_dir"
        ) from error


def choose(given: str | bool, run: Path, *, renames: bool) -> str | None:
    """Return the checkpoint to resume from, the same in all processes; None if `given` is True and there is none.

    Args:
        given: a path, or True for the newest complete checkpoint in `run`.
        renames: whether this process renames damaged ones.

    Raises:
        ValueError: there is no such folder.
        DamagedCheckpointError: the named checkpoint is damaged, or all of them are.
    """
    if not isinstance(given, bool):
        return _named(Path(given))
    damaged: list[tuple[Path, str]] = []
    for name in gather_object([[path.name for path in checkpoints(run)]])[0]:
        folder = run / name
        if (found := common_problem(folder)) is None:
            for other, why in damaged:
                aside = _free_name(other)
                if PartialState().is_main_process:
                    logger.warning(
                        f"{other} is passed over: {why}. The run goes on from {folder}; it is kept as {aside.name}"
                    )
                if renames:
                    other.rename(aside)
                    flush(run)
            return str(folder)
        damaged.append((folder, found))
    if damaged:
        all_of_them = "; ".join(f"{folder.name}: {why}" for folder, why in damaged)
        raise DamagedCheckpointError(
            f"no checkpoint in {str(run)!r} can be gone on from ({all_of_them}). Restore one from a copy, or start "
            "anew in another output_dir"
        )
    return None


def _named(folder: Path) -> str:
    if not all(gather_object([folder.is_dir()])):
        raise ValueError(f"resume_from_checkpoint={str(folder)!r}: no such folder; expected a checkpoint-N")
    if (found := common_problem(folder)) is None:
        return str(folder)
    others = (path for path in checkpoints(folder.parent) if path != folder)
    other = next((str(path) for path in others if find_problem(path) is None), None)
    advice = f"The newest complete one is {other}: resume from that, or from True" if other else "No other is complete"
    raise DamagedCheckpointError(
        f"resume_from_checkpoint={str(folder)!r} cannot be gone on from: {found}. {advice}", other
    )


def _free_name(folder: Path) -> Path:
    aside = folder.with_name(f"damaged-{folder.name}")
    others = (Path(f"{aside}.{number}") for number in itertools.count(1))
    return next(path for path in itertools.chain([aside], others) if not path.exists())
