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
import logging
import os
import sys

from kdfast._version import __version__
from kdfast.cli import COMMANDS, as_sentence
from kdfast.cli.errors import CommandError, RunTerminated, UserError, unforeseen

DTYPES = ("bfloat16", "float16", "float32", "float64")
EPILOG = """kdfast COMMAND --help lists a command's options. Examples:

  kdfast demo
  kdfast distill CONFIG.yaml --learning_rate 1e-4"""
CONFIGURED = ("distill", "cache", "data")  # their keys are declared by dataclasses that need transformers
TRAINING_PART = ("transformers", "datasets", "accelerate", "tokenizers", "yaml", "matplotlib", "psutil", "tqdm")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    _print_what_can_be_printed()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # so that a failure is caught here, not as Python exits
    except BrokenPipeError:  # `kdfast plan … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's flush as it exits
        return 128 + 13  # SIGPIPE, which Windows lacks
    except CommandError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from what is complete", 130)
    except Exception as error:
        if os.environ.get("KDFAST_TRACEBACK") == "1":
            raise
        return _fail(unforeseen(error), 1)


def _fail(message: str, code: int) -> int:
    """Print one line and return the exit code. If all processes of a launch stop, only the first one prints."""
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
    logging.getLogger("transformers.modeling_utils").addFilter(_is_news)
    function = getattr(importlib.import_module(f"kdfast.cli.{command}"), command)
    return function(argv[1:]) if command in CONFIGURED else function(**given)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop transformers' warning of a missing mask: our batches have one if padded, and their texts may end in pads."""
    return "passing in an `attention_mask`" not in record.getMessage()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kdfast",
        description="Distill large-vocabulary language models whose logits don't fit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kdfast {__version__}", help="print the version")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    commands = {
        name: subparsers.add_parser(name, help=what, description=as_sentence(what)) for name, what in COMMANDS.items()
    }
    merge, report, demo, doctor = (commands[name].add_argument for name in ("merge", "report", "demo", "doctor"))
    merge("run", metavar="RUN", help="output_dir of a run with use_peft, or one of its checkpoints")
    merge("--output", metavar="DIR", help="a new folder to write to (default: RUN/merged)")
    merge("--dtype", choices=DTYPES, help="dtype to write (default: the base's); merging is in float32")
    report("runs", nargs="+", metavar="RUN", help="output_dir of a run, or a folder of runs; NAME=RUN names it")
    report("--output", default="report.html", metavar="FILE", help="the page to write (default: %(default)s)")
    report("--png", metavar="DIR", help="also write one picture per panel into this folder")
    report("--title", default="kdfast report", help="the page's title (default: %(default)s)")
    demo("--quick", action="store_true", help="run toy sizes: seconds, and numbers that mean nothing")
    where = "folder for the results; a new one beside it if a finished demo is there (default: %(default)s)"
    demo("--output-dir", default="runs/demo", metavar="DIR", help=where)
    demo("--cache-dir", metavar="DIR", help="folder that keeps the teacher (default: $XDG_CACHE_HOME/kdfast/demo)")
    demo("--seed", type=int, default=0, metavar="N", help="seed of students and batches (default: %(default)s)")
    doctor("--tokens", type=int, default=8192, metavar="N", help="tokens per step (default: %(default)s)")
    doctor("--vocab", type=int, default=50257, metavar="V", help="size of the vocabulary (default: %(default)s)")
    width = "the student's hidden size (default: %(default)s)"
    doctor("--student-width", type=int, default=768, metavar="Hs", help=width)
    doctor("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the head (default: %(default)s)")
    doctor("--scratch-bytes", type=int, metavar="BYTES", help="fused_kd_loss's scratch_bytes (default: the engine's)")
    if argv[:1] == ["plan"]:
        from kdfast.cli import plan

        plan.add_arguments(commands["plan"], DTYPES)
    return parser.parse_args(argv[:1] if argv and argv[0] in CONFIGURED else argv)


def _print_what_can_be_printed() -> None:
    """Print τ and → as question marks if the terminal or file cannot encode them (Windows)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")
