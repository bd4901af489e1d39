"""`kdfast distill | cache | data | merge | report | demo | doctor | plan`.

Exit codes: 0 done, 1 the run failed (a loss that is not finite, a full disk, a process that died, an error that was
not foreseen), 2 the request cannot be run, 130 interrupted, 141 the output is no longer read, 143 terminated after a
checkpoint was saved. Subcommands are imported when called: `kdfast doctor` and `kdfast plan` work without the training
part.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import sys

from kdfast._version import __version__
from kdfast.cli.errors import CommandError, RunTerminated, UserError, unforeseen

DTYPES = ("bfloat16", "float16", "float32", "float64")
COMMANDS = {
    "distill": "distill a teacher into a student, as CONFIG.yaml says",
    "cache": "run a teacher over a text once and keep what a student learns from",
    "data": "what CONFIG.yaml's rows become: the first one with its targets, counts, what is skipped",
    "merge": "a whole model of a run's adapter and its base",
    "report": "curves and a table of several runs side by side, finished or not, in one page",
    "demo": "a real distillation on this machine, from its own text to one table",
    "doctor": "versions, devices, the engine and chunk `auto` picks, what `kernels` resolves to",
    "plan": "memory and largest N of a loss, for eager and every engine",
}
CONFIGURED = ("distill", "cache", "data")  # whose keys dataclasses declare that need transformers
TRAINING_PART = ("transformers", "datasets", "accelerate", "tokenizers", "yaml", "matplotlib", "psutil", "tqdm")


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    _print_what_can_be_printed()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, where its failure has a name, and not as Python ends
    except BrokenPipeError:  # `kdfast plan … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes as it ends
        return 128 + 13  # SIGPIPE, which Windows does not have
    except CommandError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from what is complete", 130)
    except Exception as error:
        if os.environ.get("KDFAST_TRACEBACK") == "1":
            raise
        return _fail(unforeseen(error), 1)


def _fail(message: str, code: int) -> int:
    """Print one line and return the exit code. A stop that all processes of a launch make is said by the first."""
    process = os.environ.get("RANK", "0")
    if process == "0" or code != RunTerminated.exit_code:
        print(f"kdfast: {message}" if process == "0" else f"kdfast (process {process}): {message}", file=sys.stderr)
    return code


def _run(argv: list[str]) -> int:
    given = vars(_parse(argv))
    command = given.pop("command")
    missing = [name for name in TRAINING_PART if importlib.util.find_spec(name) is None]
    if missing and command not in ("doctor", "plan"):
        raise UserError(f"{command} needs {', '.join(missing)}: pip install 'kdfast[train]'")
    function = getattr(importlib.import_module(f"kdfast.cli.{command}"), command)
    return function(argv[1:]) if command in CONFIGURED else function(**given)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kdfast",
        description="Knowledge distillation of large-vocabulary language models whose logits don't fit.",
    )
    parser.add_argument("--version", action="version", version=f"kdfast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands = {name: subparsers.add_parser(name, help=what) for name, what in COMMANDS.items()}
    merge, report, demo, doctor = (commands[name].add_argument for name in ("merge", "report", "demo", "doctor"))
    merge("run", metavar="RUN", help="output_dir of a run with use_peft, or a checkpoint of it")
    merge("--output", metavar="DIR", help="a folder that is made (default: RUN/merged)")
    merge("--dtype", choices=DTYPES, help="of what is written (default: the base's); it is merged in float32")
    report("runs", nargs="+", metavar="RUN", help="output_dir of a run, or a folder of such; NAME=RUN gives it a name")
    report("--output", default="report.html", metavar="FILE", help="the page (default: %(default)s)")
    report("--png", metavar="DIR", help="also one picture for each panel, into this folder")
    report("--title", default="kdfast report", help="of the page (default: %(default)s)")
    demo("--quick", action="store_true", help="toy sizes: seconds, and numbers that mean nothing")
    where = "results go here, or beside it where an earlier demo is finished (default: %(default)s)"
    demo("--output-dir", default="runs/demo", help=where)
    demo("--cache-dir", help="the teacher is kept here (default: $XDG_CACHE_HOME/kdfast/demo)")
    demo("--seed", type=int, default=0)
    doctor("--tokens", type=int, default=8192, help="N, tokens per step (default: %(default)s)")
    doctor("--vocab", type=int, default=50257, help="V (default: %(default)s)")
    doctor("--student-width", type=int, default=768, help="Hs (default: %(default)s)")
    doctor("--dtype", choices=DTYPES, default="bfloat16", help="the head's (default: %(default)s)")
    doctor("--scratch-bytes", type=int, help="as in fused_kd_loss (default: the engine's)")
    if argv[:1] == ["plan"]:
        from kdfast.cli import plan

        plan.add_arguments(commands["plan"], DTYPES)
    return parser.parse_args(argv[:1] if argv and argv[0] in CONFIGURED else argv)


def _print_what_can_be_printed() -> None:
    """Show τ and → as question marks where the terminal, or the file written to, lacks such letters (Windows)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")
