"""Errors that the command line prints as one line on stderr, instead of a traceback."""

from __future__ import annotations

import signal
import traceback
from pathlib import Path

OURS = Path(__file__).parents[1]


class CommandError(Exception):
    """An error that ends a command with a line on stderr and `exit_code`."""

    exit_code = 1


class UserError(CommandError):
    """A request that cannot be run; the message says what was given and what to do."""

    exit_code = 2


class RunFailed(CommandError):
    """A run that started well and cannot continue."""


class RunTerminated(CommandError):
    """A run that saved a checkpoint on SIGTERM and stopped; the exit code is that of SIGTERM."""

    exit_code = 128 + signal.SIGTERM


def unforeseen(error: Exception) -> str:
    """Return one line for an unforeseen error: kdfast's, or a library's about an unchecked value."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(OURS)]
    where = f" in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
    text = " ".join(str(error).split())
    text = text if len(text) <= 500 else f"{text[:500]}…"
    return f"unforeseen {type(error).__name__}{where}: {text}. KDFAST_TRACEBACK=1 shows the traceback"
