"""`kdfast cache CONFIG.yaml`: run the teacher once over the training and evaluation text, and keep `teacher_cache`.

The teacher runs here or on a server; `kdfast cache import FILE CONFIG.yaml` reads a file of its log-probabilities.

The configuration may be that of `kdfast distill`, which then trains from the cache and loads no teacher. Repeating the
command resumes an interrupted cache, and leaves a complete one alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdfast.cli.arguments import Arguments, SourceArguments, parse_argv
from kdfast.cli.data import load_text
from kdfast.cli.errors import RunFailed, UserError
from kdfast.training import KDConfig, cache_from_server, cache_teacher, import_log_probs, load_teacher
from kdfast.training.cache.description import CacheSummary, is_complete
from kdfast.training.cache.read import TeacherCache
from kdfast.training.data.text import check_positions
from kdfast.training.durable.errors import first_line
from kdfast.training.durable.processes import by_first, leave, print_once
from kdfast.training.hf import is_dispatched
from kdfast.training.recipes import CACHED


def cache(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    if argv[:1] == ["import"] and not {"-h", "--help"} & set(argv):
        if len(argv) < 3 or argv[2].startswith("-"):
            raise UserError(f"cache {' '.join(argv)}; expected kdfast cache import FILE CONFIG.yaml")
        argv = [argv[2], "--teacher_model_server_url=", "--teacher_logprobs", argv[1], *argv[3:]]
    arguments = parse_argv(argv, "cache")
    summary = make_cache(arguments)
    print_once(f"{arguments.training.teacher_cache}: {summary}")
    leave()
    return 0


def make_cache(arguments: Arguments) -> CacheSummary:
    """Make, complete or find the cache for these arguments.

    Raises UserError if they cannot be run, RunFailed if the cache cannot be written.
    """
    training, models, source = arguments.training, arguments.model, arguments.source
    folder = Path(str(training.teacher_cache))  # parse requires it
    taus = training.resolved(CACHED).temperatures
    elsewhere = source.teacher_model_server_url or source.teacher_logprobs
    options = training.cache_options(taus, "top_k" if elsewhere else "hidden")
    counts = {"k": "cache_top_k" if options["method"] == "top_k" else "cache_samples"}
    try:
        if elsewhere and options["method"] != "top_k":
            raise ValueError(
                f"cache_method={options['method']!r} and {elsewhere!r}; expected top_k, all that it can say"
            )
        if source.teacher_model_server_url and {*taus} != {1.0} and training.teacher_tail is None:
            raise ValueError(
                f"temperature={max(taus):g}, and of the ids that a server leaves out the mass is known at 1 alone; "
                "expected temperature: 1, or teacher_tail: renormalize_both, bucket or renormalize, which says what "
                "they are at others"
            )
        tokenizer, train, evaluation, *_ = load_text(arguments)
        given: dict[str, Any] = {
            "splits": {"train": train, "eval": evaluation},
            "folder": folder,
            "tokenizer": tokenizer,
            "name": models.teacher_model_name_or_path,
            "tell": lambda text: print_once(f"{folder}: {text}"),
        }
        complete = is_complete(folder)
        if elsewhere:
            summary = _from_elsewhere(source, training, options, given)
        else:
            summary = _from_model(arguments, options, given)
        if complete:
            by_first(lambda: TeacherCache(folder).summary)  # checks its checksums
            print_once(f"{folder}: complete already; remove the folder to make it again")
    except ValueError as error:  # it names Python arguments; here they are keys
        name, _, rest = str(error).partition("=")
        keys = {"temperatures": "cache_temperatures", "url": "teacher_model_server_url", **counts}
        keys |= {name: f"server_{name}" for name in ("kind", "concurrency", "token_limit")}
        keys |= {"rank": "compressed_rank", "max_kl": "compressed_kl", "dtype": "cache_dtype"}
        raise UserError(f"{keys[name]}={rest}" if name in keys else str(error)) from error
    except ConnectionError as error:
        raise RunFailed(
            f"{folder}: {first_line(error)}. Start the server, or correct its address (--server); the same command "
            "then goes on from the last complete shard"
        ) from error
    except OSError as error:
        raise RunFailed(
            f"{folder}: {first_line(error)}. Once that is mended (a full disk: make room), the same command goes on "
            "from the last complete shard"
        ) from error
    return summary


def _from_model(arguments: Arguments, options: dict[str, Any], given: dict[str, Any]) -> CacheSummary:
    training, models = arguments.training, arguments.model
    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None  # as a live teacher runs
    assert models.teacher_model_name_or_path is not None
    teacher = load_teacher(
        models.teacher_model_name_or_path,
        tokenizer=given["tokenizer"],
        valid_vocab=training.valid_vocab,
        dtype=models.teacher_dtype,
        model_init_kwargs=models.teacher_model_init_kwargs,
    )
    check_positions("teacher", teacher, training.max_length)
    if not is_dispatched(teacher):
        teacher.to(training.device)  # type: ignore[arg-type]
    with torch.autocast(training.device.type, autocast, enabled=autocast is not None):
        return cache_teacher(
            teacher,
            valid_vocab=training.valid_vocab,
            batch_size=training.per_device_eval_batch_size,
            **given,
            **options,
        )


def _from_elsewhere(
    source: SourceArguments, training: KDConfig, options: dict[str, Any], given: dict[str, Any]
) -> CacheSummary:
    given = {**given, "dtype": options["dtype"], "shard_tokens": options["shard_tokens"]}
    if source.teacher_logprobs is not None:
        return import_log_probs(
            source.teacher_logprobs,
            k=training.cache_top_k,
            temperatures=options["temperatures"],
            logprobs_field=source.logprobs_field,
            logprobs_temperature=source.logprobs_temperature,
            **given,
        )
    return cache_from_server(
        str(source.teacher_model_server_url),
        kind=source.server_kind,  # type: ignore[arg-type]  # checked there
        k=options["k"],
        model=source.server_model,
        batch_size=training.per_device_eval_batch_size,
        concurrency=source.server_concurrency,
        timeout=source.server_timeout,
        token_limit=source.server_token_limit,
        **given,
    )
