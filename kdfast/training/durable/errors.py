"""Errors for what stops a run from outside; each message says what happened and how to resume.

All have `checkpoint`: the newest complete one, or None.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)

# messages of gloo and NCCL that only a lost peer causes; torch has classes of its own only for errors of sockets and of
# the store
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|closed connection|pair closure"
    r"|timed out (waiting \d+ms|connecting)|(socket|connect|wait|collective operation) timeout"
    r"|remote (process|peer|error)|ncclRemoteError|NCCL communicator was aborted",
    re.I,
)
# messages of torch.save, which give no reason
_FAILED_WRITE = re.compile(r"inline_container|PytorchStreamWriter|file write failed|Parent directory")
_NO_FOLDER = re.compile(r"No such file or directory|Parent directory .* does not exist", re.S)


class RunStoppedError(RuntimeError):
    """The base of these errors; `checkpoint` is the newest complete one, or None."""

    def __init__(self, message: str, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class TerminatedError(RunStoppedError):
    """The error after SIGTERM, once the run has saved a checkpoint and stopped."""


class LostProcessError(RunStoppedError):
    """The error raised when another process of the run has died or cannot be reached."""


class CheckpointWriteError(RunStoppedError):
    """The error raised when a checkpoint cannot be written, for example because the disk is full."""


class DamagedCheckpointError(RunStoppedError):
    """The error raised when the checkpoint to resume from is damaged, incomplete or contains code."""


def kept(checkpoint: str | None) -> str:
    """Return the end of a message: the last complete checkpoint, and what to do."""
    if checkpoint is None:
        return "No checkpoint was saved yet."
    return f"The last complete checkpoint is {checkpoint}. {how_to_resume(checkpoint)}"


def how_to_resume(checkpoint: str) -> str:
    """Return what to do. (If the run resumed from an earlier checkpoint, later ones of the former run exist.)"""
    if not any(Path(checkpoint).glob("optimizer*")):
        return "It holds no optimizer and schedule (save_only_model), and cannot be gone on from."
    newest = get_last_checkpoint(Path(checkpoint).parent)
    if newest is None or Path(newest) == Path(checkpoint):
        return "The same command, or resume_from_checkpoint=True, goes on from it."
    return (
        f"resume_from_checkpoint={checkpoint!r} goes on from it; True and the same command would take "
        f"{Path(newest).name}, which is of an earlier run"
    )


@contextmanager
def naming_lost_processes(step: Callable[[], int], last_checkpoint: Callable[[], str | None]) -> Iterator[None]:
    """Turn a failed communication into a LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunStoppedError) or not is_lost_peer(error):
            raise
        raise _lost_process(error, step(), last_checkpoint()) from error


def _lost_process(error: BaseException, step: int, checkpoint: str | None) -> LostProcessError:
    message = (
        f"after step {step}: another process of this run has died or does not answer ({first_line(error)}). Its "
        "own output, the launcher's or the kernel's log (out of memory?) says why. This process stops too; start "
        f"all of them again. {kept(checkpoint)}"
    )
    logger.error(message)  # at once, because a launcher that sees the other process dead may end this one
    return LostProcessError(message, checkpoint)


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a communication failed because another process is gone."""
    named = isinstance(error, (DistNetworkError, DistStoreError)) or _LOST_PEER.search(str(error)) is not None
    return named and torch.distributed.is_initialized()


@contextmanager
def naming_failed_writes(
    folder: Path, step: Callable[[], int], last_checkpoint: Callable[[], str | None]
) -> Iterator[None]:
    """Turn a failure to write `folder` into a CheckpointWriteError, or a LostProcessError if another one removed it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        if (why := _failed_write(error)) is None:
            raise
        checkpoint = last_checkpoint()
        if torch.distributed.is_initialized() and _NO_FOLDER.search(why):  # a failing process removes it
            raise _lost_process(error, step(), checkpoint) from error
        raise CheckpointWriteError(
            f"{str(folder)!r} could not be written: {why}. {_free_space(folder)} free there; make room, or check quota "
            f"and permissions. What is half written is removed, at the latest by the next start. {kept(checkpoint)}",
            checkpoint,
        ) from error


def _failed_write(error: BaseException) -> str | None:
    if isinstance(error, CheckpointException):  # of shards: raised in all processes, with each one's error
        causes = ((rank, _failed_write(cause)) for rank, (cause, _) in sorted(error.failures.items()))
        return next((f"process {rank}: {why}" for rank, why in causes if why), None)
    if isinstance(error, OSError | SafetensorError) or _FAILED_WRITE.search(str(error)):
        return first_line(error)
    return None


def _free_space(folder: Path) -> str:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB are"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without a final period."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(" This is typically caused")[0].rstrip(".")  # advice from gloo
