"""`kdfast demo`: kdfast.demo with runs of `kdfast distill`, each with a file of its settings beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml

from kdfast.cli.arguments import parse
from kdfast.cli.distill import run_distillation
from kdfast.cli.errors import UserError
from kdfast.demo.demo import FULL, QUICK, run_demo
from kdfast.report.read_runs import Run
from kdfast.training.data.text import DataError


def demo(*, quick: bool, output_dir: str, cache_dir: str | None, seed: int) -> int:
    """Run the demo, from the text to the table; return the exit code."""
    datasets.disable_progress_bars()  # of loading and tokenizing, which take seconds; training has its own
    transformers.utils.logging.disable_progress_bar()
    try:
        run_demo(run_settings, QUICK if quick else FULL, output_dir, cache_dir, seed)
    except DataError as error:
        raise UserError(str(error)) from error
    return 0


def run_settings(name: str, parent: Path, settings: dict[str, Any]) -> Run:
    """Write the settings to parent/name.yaml and run `kdfast distill` with them, into parent/name."""
    config = parent / f"{name}.yaml"
    config.write_text(yaml.safe_dump({**settings, "output_dir": str(parent / name)}, sort_keys=False))
    return run_distillation(parse(str(config), []))
