"""What stops a run from outside, each with a message that says what happened and how to go on.

All have `checkpoint`, the newest one that is complete, or None.
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

logger = logging.getLogger(__name__)

GO_ON = "The same command, or resume_from_checkpoint=True, goes on from it."
# what gloo, NCCL and the store say of a peer that is gone; torch has a class of its own only for some of them
_LOST_PEER = re.compile(r"gloo|NCCL|connection (was )?(closed|reset|refused)|broken pipe|timed out waiting", re.I)
_FAILED_WRITE = re.compile(r"inline_container|PytorchStreamWriter|file write failed")  # torch.save gives no reason


class RunStoppedError(RuntimeError):
    """`checkpoint`: the newest complete one, or None."""

    def __init__(self, message: str, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class TerminatedError(RunStoppedError):
    """SIGTERM was received; the run has saved a checkpoint and stopped."""


class LostProcessError(RunStoppedError):
    """Another process of the run died or cannot be reached."""


class CheckpointWriteError(RunStoppedError):
    """A checkpoint could not be written, as on a full disk."""


class DamagedCheckpointError(RunStoppedError):
    """A checkpoint to go on from is damaged, incomplete or holds code."""


def kept(checkpoint: str | None) -> str:
    """How a message ends."""
    return f"The last complete checkpoint is {checkpoint}. {GO_ON}" if checkpoint else "No checkpoint was saved yet."


@contextmanager
def naming_lost_processes(step: Callable[[], int], last_checkpoint: Callable[[], str | None]) -> Iterator[None]:
    """A failed communication is a LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunStoppedError) or not _is_lost_peer(error):
            raise
        checkpoint = last_checkpoint()
        message = (
            f"after step {step()}: another process of this run has died or does not answer ({_first_line(error)}). Its "
            "own output, the launcher's or the kernel's log (out of memory?) says why. This process stops too; start "
            f"all of them again. {kept(checkpoint)}"
        )
        logger.error(message)  # at once: a launcher that sees the other one dead may end this process any moment
        raise LostProcessError(message, checkpoint) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return isinstance(error, torch.distributed.DistError) or bool(_LOST_PEER.search(str(error)))


@contextmanager
def naming_failed_writes(folder: Path, last_checkpoint: Callable[[], str | None]) -> Iterator[None]:
    """A failure to write `folder` is a CheckpointWriteError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _FAILED_WRITE.search(str(error)):
            raise
        checkpoint = last_checkpoint()
        raise CheckpointWriteError(
            f"{str(folder)!r} could not be written: {_first_line(error)}. {_free_space(folder)} free there; make room, "
            f"or check quota and permissions. Nothing of it was kept. {kept(checkpoint)}",
            checkpoint,
        ) from error


def _free_space(folder: Path) -> str:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB are"


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(" This is typically caused")[0].rstrip(".")  # gloo's advice
