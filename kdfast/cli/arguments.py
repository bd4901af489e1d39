"""A YAML file and the command line's overrides -> typed arguments, of `kdfast distill` and `kdfast cache` alike.

The YAML mapping becomes an argument list and the overrides are appended, so both go through one HfArgumentParser:
a type is checked in one place, the last one given wins, and `learning_rate: 5e-5`, a string to PyYAML, is a number.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from kdfast.cli.errors import UserError
from kdfast.cli.yaml_file import read_yaml
from kdfast.training import KDConfig
from kdfast.training.durable.errors import first_line
from kdfast.training.recipes import AUTO, CACHED, current_name

Command = Literal["distill", "cache"]
LM_ONLY = "lm_only"


def _key(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = _key(None, "the student to go on training: a name or a folder")
    student_config: str | None = _key(
        None, "a fresh student: a config.json, a folder with one, or a mapping with model_type and its settings"
    )
    teacher_model_name_or_path: str | None = _key(None, "the teacher; recipe lm_only needs none")
    tokenizer_name: str | None = _key(None, "default: the student's, or else the teacher's")
    dtype: str = _key("float32", "dtype of the student's weights; bf16: true gives mixed precision on top of float32")
    teacher_dtype: str = _key("auto", "dtype of the teacher's weights; auto is the one they were saved in")


@dataclass
class DataArguments:
    train_file: str | None = _key(None, "a file, folder or glob: text, JSON, JSON lines, CSV or parquet")
    eval_file: str | None = _key(None, "the same for evaluation; default: part of the training blocks, held out")
    dataset_name: str | None = _key(None, "a data set of the hub or a local folder, in place of train_file")
    dataset_config_name: str | None = _key(None, "its configuration")
    dataset_split: str = _key("train", "its split to train on")
    eval_dataset_split: str | None = _key(None, "its split to evaluate on")
    text_column: str = _key("text", "the column that holds the text")
    max_length: int = _key(1024, "tokens in a block")
    eval_fraction: float = _key(0.01, "share of the blocks held out where nothing is named for evaluation")


@dataclass
class CacheArguments:
    teacher_cache: str | None = _key(
        None, "folder that `kdfast cache` writes and `kdfast distill` trains from, in place of a live teacher"
    )
    cache_method: str = _key("top_k", "top_k, or sample: ids drawn at random and counted")
    cache_top_k: int = _key(64, "ids kept per token, at most 1024")
    cache_samples: int = _key(64, "ids drawn per token, at most 1024")
    cache_dtype: str = _key("float16", "float16 or float32, of log-probabilities")
    cache_temperatures: list[float] | None = _key(  # noqa: RUF009  (a field)
        None, "of the runs to come, besides 1; default: this configuration's"
    )
    cache_shard_tokens: int = _key(2**20, "about how many tokens go into a shard")


@dataclass
class RunArguments:
    overwrite_output_dir: bool = _key(False, "throw away the run that output_dir holds and start anew")


# and what a help page calls them
ARGUMENT_CLASSES: dict[Any, str] = {
    ModelArguments: "models",
    DataArguments: "data",
    CacheArguments: "teacher cache",
    RunArguments: "run",
    KDConfig: "training",
}


class Arguments(NamedTuple):
    model: ModelArguments
    data: DataArguments
    cache: CacheArguments
    run: RunArguments
    training: KDConfig
    given: dict[str, Any]  # what differs from the defaults, by key


class _Parser(HfArgumentParser):
    """Raises what argparse would print with the usage of 150 options, and accepts no abbreviated keys."""

    def __init__(self, source: str) -> None:
        super().__init__(list(ARGUMENT_CLASSES), allow_abbrev=False, add_help=False)
        self.source = source

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.source}: {message.removeprefix('argument ')}")


def parse(config: str, overrides: Sequence[str], command: Command = "distill") -> Arguments:
    """Return the arguments of `kdfast COMMAND config overrides...`; UserError names the key and where it stands."""
    return parse_mapping(config, read_yaml(config), overrides, command)


def parse_mapping(
    source: str, content: Mapping[str, Any], overrides: Sequence[str] = (), command: Command = "distill"
) -> Arguments:
    """Return the same for a mapping that is at hand; `source` is what an error calls it."""
    parser = _Parser(source)
    parsed, unknown = parser.parse_known_args(_as_arguments(source, content))
    if unknown:  # its keys are known: one that takes a single value was given a list
        raise UserError(f"{source}: {', '.join(unknown)} is too much: the key it is given to takes one value")
    parsed, unknown = _Parser("command line").parse_known_args(overrides, parsed)
    if unknown:
        _refuse("command line", unknown[0])
    namespace = vars(parsed)
    given = {key: value for key, value in namespace.items() if value != parser.get_default(key)}
    if "recipe" in given:
        given["recipe"] = current_name(given["recipe"])
    if problem := next(_problems(namespace, command), None):
        raise UserError(f"{source}: {problem}")
    resume = namespace["resume_from_checkpoint"]  # a path to transformers, which true and false are not
    namespace["resume_from_checkpoint"] = {"true": True, "false": False}.get(str(resume).lower(), resume)
    try:
        parts = [cls(**{key: namespace[key] for key in _names(cls)}) for cls in ARGUMENT_CLASSES]
    except (ValueError, ImportError) as error:  # what KDConfig and TrainingArguments make of the values
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # of many classes: not all values are checked there before they are used
        raise UserError(f"{source}: {type(error).__name__}: {first_line(error)}") from error
    model, data, cache, run, training = parts
    return Arguments(model, data, cache, run, training, given)


def _problems(given: Mapping[str, Any], command: Command) -> Iterator[str]:
    """Yield what is missing for `command` or excludes each other, in words of keys."""
    pairs = [("train_file", "dataset_name"), ("model_name_or_path", "student_config")]
    for one, other in pairs if command == "distill" else pairs[:1]:
        if (given[one] is None) == (given[other] is None):
            found = "neither" if given[one] is None else "both"
            yield f"{found} of {one} and {other} given; expected exactly one of the two"
    if given["eval_file"] is not None and given["eval_dataset_split"] is not None:
        yield "both of eval_file and eval_dataset_split given; expected one or neither"
    if given["eval_dataset_split"] is not None and given["dataset_name"] is None:
        yield "eval_dataset_split given without dataset_name; name an eval_file instead"
    if given["max_length"] < 2:
        yield f"max_length={given['max_length']}; expected at least 2 tokens"
    if not 0 < given["eval_fraction"] < 1:
        yield f"eval_fraction={given['eval_fraction']}; expected a number between 0 and 1"
    if command == "cache":  # what else a run needs may be there
        for key, what in (("teacher_cache", "the folder to write"), ("teacher_model_name_or_path", "a teacher")):
            if not given[key]:
                yield f"{key} is missing; name {what}"
        return
    recipe, cached = given["recipe"], bool(given["teacher_cache"])
    if recipe == CACHED and not cached:
        yield f"recipe {recipe!r} needs teacher_cache, a folder that `kdfast cache` wrote"
    if cached and recipe not in (AUTO, CACHED, LM_ONLY):
        yield (
            f"recipe {recipe!r} needs a live teacher, and teacher_cache is given; leave out one of them "
            f"(with a cache: recipe {CACHED}, or {LM_ONLY} to compare)"
        )
    if not cached and given["teacher_model_name_or_path"] is None and recipe != LM_ONLY:
        yield f"recipe {recipe!r} needs teacher_model_name_or_path, or teacher_cache; lm_only alone goes without"
    if not given["output_dir"]:
        yield "output_dir is missing; name the folder for the results"


def format_help(command: Command) -> str:
    """Return the usage and a line for each of the command's own keys; TrainingArguments' 120 are named, not listed."""
    lines = [f"usage: kdfast {command} CONFIG.yaml [--key value ...]"]
    trainers = {f.name for f in dataclasses.fields(TrainingArguments)} - {"output_dir"}
    width = max(60, shutil.get_terminal_size().columns - 2)
    for cls, title in ARGUMENT_CLASSES.items():
        if command == "cache" and cls in (RunArguments, KDConfig):
            continue
        lines += ["", f"{title}:"]
        for f in dataclasses.fields(cls):
            if f.init and f.name not in trainers:
                given = "" if f.default in (None, dataclasses.MISSING) else f" [{f.default}]"
                line = f"--{f.name:26} {f.metadata.get('help', '')}{given}"
                lines.append(textwrap.fill(line, width, initial_indent="  ", subsequent_indent=" " * 31))
    if command == "cache":
        more = (
            "The other keys of kdfast distill are keys too, so that one file serves both. What counts of them here: "
            "temperature, valid_vocab, seed, bf16, fp16, use_cpu, per_device_eval_batch_size."
        )
    else:
        more = "Every name of transformers.TrainingArguments is a key too."
    return "\n".join([*lines, "", textwrap.fill(more, width)])


def _as_arguments(source: str, content: Mapping[str, Any]) -> list[str]:
    arguments = []
    known = _known()
    for key, value in content.items():
        if key not in known:
            _refuse(source, str(key))
        if value is None:  # `key:` with nothing behind it: the default
            continue
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            arguments.append(f"--{key}={json.dumps(value)}")
        else:
            arguments.append(f"--{key}={value}")
    return arguments


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]


def _known() -> list[str]:
    return [name for cls in ARGUMENT_CLASSES for name in _names(cls)]


def _refuse(source: str, given: str) -> NoReturn:
    """Raise UserError for `given`, a key or what argparse could not place."""
    if source == "command line" and not given.startswith("-"):
        raise UserError(f"command line: {given!r} belongs to no key; write --key value")
    name = given.split("=")[0].lstrip("-").replace("-", "_")
    known = _known()
    near = [key for key in known if key.startswith(name)] or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise UserError(f"{source}: unknown key {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
