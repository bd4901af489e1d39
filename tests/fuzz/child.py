"""What a case of the command line runs in: a process forked off, watched, that may write to one folder only.

The parent has torch and transformers imported, so a child costs milliseconds. A child that does not end in time is
killed with all it started. What Python writes outside its folder, and any program it starts, is refused and told.
"""

import contextlib
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60
MEMORY = 24 << 30  # bytes of addresses, of which torch maps many
FILE = 256 << 20  # bytes
CRASHED = 70  # exit code of an exception that came through
CHANGES = {  # audited events that change the disk → which arguments are paths
    "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.symlink": (1,), "os.link": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "shutil.rmtree": (0,),
}  # fmt: skip
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "socket.connect")
ANYWHERE = ("/dev/null", "/dev/shm")


@dataclass(frozen=True)
class Ended:
    code: int  # −1: it did not end in time; −N: ended by signal N
    out: str
    err: str
    forbidden: list[str]  # what it tried outside its folder
    seconds: float


def run(act: Callable[[], int], place: Path, seconds: float = SECONDS) -> Ended:
    """`act()`, whose result is the exit code, in a process of its own with the current directory `place/work`.

    `place` is all it may write to; what it says is kept there too.
    """
    work = place / "work"
    work.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(act, place, work)
    status = _wait(pid, begin + seconds)
    said = {name: (place / name).read_text(errors="replace") if (place / name).exists() else "" for name in NAMES}
    code = -1 if status is None else os.waitstatus_to_exitcode(status)
    return Ended(code, said["out"], said["err"], said["forbidden"].splitlines(), time.monotonic() - begin)


LOOK_UP = ("lscpu", "uname", "ldconfig", "gcc", "fc-list", "sh")
NAMES = ("out", "err", "forbidden")


def _wait(pid: int, end: float) -> int | None:
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _kill(pid)
            return status
        time.sleep(0.005)
    _kill(pid)
    os.waitpid(pid, 0)
    return None


def _kill(pid: int) -> None:
    """It, and what it has left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _child(act: Callable[[], int], place: Path, work: Path) -> None:
    code = CRASHED
    try:
        os.setsid()
        os.chdir(work)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error at the write, as of a full disk
        _confine(place)
        code = act()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _confine(place: Path) -> None:
    told = os.open(place / "forbidden", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    allowed = (os.path.realpath(place), os.path.realpath("/proc/self"), *ANYWHERE)

    def outside(path) -> bool:
        if path is None or isinstance(path, int):
            return False
        # the folder is what counts: a link in it that is removed or replaced is not where it leads
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        found = os.path.join(os.path.realpath(folder), name)
        return not any(found == root or found.startswith(root + "/") for root in allowed)

    def refuse(what: str) -> None:
        os.write(told, (what.replace("\n", "\\n") + "\n").encode(errors="replace"))
        raise PermissionError(1, f"the fuzzer forbids {what}")

    def watch(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and outside(path):
                refuse(f"open {path!r} {mode} {flags:o}")
        elif event in CHANGES:
            for i in CHANGES[event]:
                if outside(arguments[i]):
                    refuse(f"{event} {arguments[i]!r}")
        elif event in STARTS and not _harmless(event, arguments):
            refuse(f"{event} {arguments!r}"[:300])

    sys.addaudithook(watch)


def _harmless(event: str, arguments: tuple) -> bool:
    """What libraries look up about the machine."""
    if event == "socket.connect":
        return arguments[0].family == socket.AF_UNIX
    return event == "subprocess.Popen" and os.path.basename(str(arguments[0])) in LOOK_UP


def fresh(place: Path) -> Path:
    """An empty `place/work`."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "work").mkdir(parents=True)
    return place / "work"
