"""`kdfast cache CONFIG.yaml`: the teacher over the training and evaluation text, once, kept in `teacher_cache`.

The configuration may be that of `kdfast distill`, which then trains from the cache and loads no teacher. The same
command again resumes an interrupted one, and leaves a complete cache alone.
"""

from __future__ import annotations

from pathlib import Path

import torch

from kdfast.cli.arguments import Arguments, parse_argv
from kdfast.cli.data import load_text
from kdfast.cli.errors import RunFailed, UserError
from kdfast.training import load_teacher
from kdfast.training.cache.description import CacheSummary, is_complete
from kdfast.training.cache.read import TeacherCache
from kdfast.training.cache.write import cache_teacher
from kdfast.training.data.text import check_positions
from kdfast.training.durable.errors import first_line
from kdfast.training.durable.processes import by_first, leave, print_once
from kdfast.training.hf import is_dispatched
from kdfast.training.recipes import CACHED


def cache(argv: list[str]) -> int:
    """Do what the command line says; return the exit code."""
    arguments = parse_argv(argv, "cache")
    summary = make_cache(arguments)
    print_once(f"{arguments.training.teacher_cache}: {summary}")
    leave()
    return 0


def make_cache(arguments: Arguments) -> CacheSummary:
    """Make, complete or find the cache that the arguments ask for.

    Raises UserError where they cannot be run, RunFailed where it cannot be written.
    """
    training, models = arguments.training, arguments.model
    assert training.teacher_cache is not None  # parse saw to it
    assert models.teacher_model_name_or_path is not None
    folder = Path(training.teacher_cache)
    options = training.cache_options(training.resolved(CACHED).temperatures, "top_k")
    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None  # as for a live teacher
    try:
        tokenizer, train, evaluation, *_ = load_text(arguments)
        teacher = load_teacher(
            models.teacher_model_name_or_path,
            tokenizer=tokenizer,
            valid_vocab=training.valid_vocab,
            dtype=models.teacher_dtype,
            model_init_kwargs=models.teacher_model_init_kwargs,
        )
        check_positions("teacher", teacher, training.max_length)
        if not is_dispatched(teacher):
            teacher.to(training.device)  # type: ignore[arg-type]
        complete = is_complete(folder)
        with torch.autocast(training.device.type, autocast, enabled=autocast is not None):
            summary = cache_teacher(
                teacher,
                {"train": train, "eval": evaluation},
                folder,
                tokenizer=tokenizer,
                valid_vocab=training.valid_vocab,
                batch_size=training.per_device_eval_batch_size,
                name=models.teacher_model_name_or_path,
                tell=lambda text: print_once(f"{folder}: {text}"),
                **options,
            )
        if complete:
            by_first(lambda: TeacherCache(folder).summary)  # its checksums
            print_once(f"{folder}: complete already; remove the folder to make it again")
    except ValueError as error:  # which names cache_teacher's arguments: here they are keys
        name, _, rest = str(error).partition("=")
        count = "cache_top_k" if options["method"] == "top_k" else "cache_samples"
        keys = {"k": count, "temperatures": "cache_temperatures"}
        raise UserError(f"{keys[name]}={rest}" if name in keys else str(error)) from error
    except OSError as error:
        raise RunFailed(
            f"{folder}: {first_line(error)}. Once that is mended (a full disk: make room), the same command goes on "
            "from the last complete shard"
        ) from error
    return summary
