"""What the command line turns into one line on stderr, instead of a traceback."""


class UserError(Exception):
    """What the user gave cannot be run; the message says what it was and what to do. Exit code 2."""


class RunFailed(Exception):
    """A run that began well and cannot go on. Exit code 1."""


class RunTerminated(Exception):
    """A run that saved a checkpoint on SIGTERM and stopped. Exit code 143, as of a process that SIGTERM ended."""
