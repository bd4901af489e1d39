"""What the command line turns into one line on stderr, instead of a traceback."""

from __future__ import annotations

import traceback
from pathlib import Path

OURS = Path(__file__).parents[1]


class UserError(Exception):
    """What the user gave cannot be run; the message says what it was and what to do. Exit code 2."""


class RunFailed(Exception):
    """A run that began well and cannot go on. Exit code 1."""


class RunTerminated(Exception):
    """A run that saved a checkpoint on SIGTERM and stopped. Exit code 143, as of a process that SIGTERM ended."""


def unforeseen(error: Exception) -> str:
    """One line for an error that nobody has thought of: kdfast's, or a library's about a value nobody checks."""
    told = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(OURS)]
    where = f" in {Path(told[-1].filename).name}, line {told[-1].lineno}" if told else ""
    text = " ".join(str(error).split())
    text = text if len(text) <= 500 else f"{text[:500]}…"
    return f"unforeseen {type(error).__name__}{where}: {text}. KDFAST_TRACEBACK=1 shows the traceback"
