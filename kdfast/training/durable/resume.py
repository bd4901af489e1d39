"""Which checkpoint a run goes on from: the one that was named, or the newest complete one.

Before anything is loaded every file is compared with SHA256SUMS, and pickles are seen to hold data alone. A checkpoint
that was named and is damaged stops the run. `resume_from_checkpoint=True` asks for the newest that is usable: a damaged
one is passed over with a warning, and renamed to damaged-checkpoint-N, so that nobody takes it for one again and
nothing of it is lost. All processes come to the same answer.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from kdfast.training.durable import checksums, safe_load
from kdfast.training.durable.atomic_io import flush
from kdfast.training.durable.errors import DamagedCheckpointError, RunStoppedError, first_line, is_lost_peer

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(run: Path) -> list[Path]:
    """Those visible in a run's folder, newest first, complete or not."""
    found = [path for path in run.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """N of checkpoint-N; −1 of any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def last_complete(run: Path, besides: Path | None = None) -> str | None:
    """The newest one that can be gone on from; reads it whole."""
    return next((str(path) for path in checkpoints(run) if path != besides and find_problem(path) is None), None)


def find_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    return checksums.find_damage(folder) or safe_load.find_refused(folder) or _find_lacking(folder)


def _find_lacking(folder: Path) -> str | None:
    """Checksums say that files are as they were, not that all are there, or that a run wrote them."""
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        return f"it has no {path.name}"
    try:
        state = TrainerState.load_from_json(str(path))
    except Exception as error:  # of many classes: it takes whatever JSON there is
        return f"{path.name} cannot be read: {first_line(error)}"
    if not all(type(number) is int and number >= 0 for number in (state.global_step, state.max_steps)):
        return f"{path.name} has no global_step and max_steps"
    if not isinstance(state.log_history, list) or not all(isinstance(entry, dict) for entry in state.log_history):
        return f"{path.name} has no log_history"
    return None


def common_problem(folder: Path, reads: bool, gather: Callable[[Any], Sequence[Any]]) -> str | None:
    """`find_problem` of the processes that read, told to all."""
    return next((found for found in gather(find_problem(folder) if reads else None) if found), None)


@contextmanager
def naming_failed_reads(folder: str | Path | None) -> Iterator[None]:
    """A failure to load a checkpoint whose files are whole is a DamagedCheckpointError; one of communication is not."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # of many classes: nobody checks what a state looks like
        if isinstance(error, (RunStoppedError, MemoryError, torch.OutOfMemoryError)):
            raise
        if isinstance(error, OSError) and error.errno == errno.EIO:  # the disk's fault, not the file's
            raise
        if isinstance(error, RuntimeError) and is_lost_peer(error):
            raise
        cause: Any = error
        if isinstance(error, CheckpointException):  # of shards, with the error of each process
            cause = next((failed for failed, _ in error.failures.values()), error)
        raise DamagedCheckpointError(
            f"{str(folder)!r} cannot be loaded: {type(cause).__name__}: it {safe_load.explain(cause)}. Its files are "
            "as their checksums say: they were written for another model, recipe or optimizer, or changed together. Go "
            "on from another checkpoint, or start anew in another output_dir"
        ) from error


def choose(
    given: str | bool,
    run: Path,
    *,
    reads: bool,
    renames: bool,
    gather: Callable[[Any], Sequence[Any]],
    warn: Callable[[str], None],
) -> str | None:
    """The checkpoint to go on from, the same in all processes; None where True finds none at all.

    Args:
        given: a path, or True for the newest complete one in `run`.
        reads, renames: whether this process reads the files, and renames damaged ones.
        gather: every process's value, the first process's first.
        warn: called with what is passed over.

    Raises:
        ValueError: there is no such folder.
        DamagedCheckpointError: the one that was named is damaged, or all there are.
    """

    def problem(folder: Path) -> str | None:
        return common_problem(folder, reads, gather)

    if not isinstance(given, bool):
        return _named(Path(given), problem, gather)
    damaged: list[tuple[Path, str]] = []
    for name in gather([path.name for path in checkpoints(run)])[0]:
        folder = run / name
        if (found := problem(folder)) is None:
            for other, why in damaged:
                aside = _free_name(other)
                warn(f"{other} is passed over: {why}. The run goes on from {folder}; it is kept as {aside.name}")
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


def _named(folder: Path, problem: Callable[[Path], str | None], gather: Callable[[Any], Sequence[Any]]) -> str:
    if not all(gather(folder.is_dir())):
        raise ValueError(f"resume_from_checkpoint={str(folder)!r}: no such folder; expected a checkpoint-N")
    if (found := problem(folder)) is None:
        return str(folder)
    other = last_complete(folder.parent, besides=folder)
    advice = f"The newest complete one is {other}: resume from that, or from True" if other else "No other is complete"
    raise DamagedCheckpointError(
        f"resume_from_checkpoint={str(folder)!r} cannot be gone on from: {found}. {advice}", other
    )


def _free_name(folder: Path) -> Path:
    names = [folder.with_name(f"damaged-{folder.name}{suffix}") for suffix in ("", *(f".{i}" for i in range(1, 1000)))]
    return next(path for path in names if not path.exists())
