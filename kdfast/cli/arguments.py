"""A YAML file plus command-line overrides, parsed to typed arguments for `kdfast distill` and `kdfast cache`.

The YAML mapping becomes an argument list and the overrides are appended, so both go through one HfArgumentParser:
types are checked in one place, the last value wins, and `learning_rate: 5e-5`, a string to PyYAML, is a number.
"""

# ruff: noqa: RUF009  (_key is a field(), not a default that is shared)

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from kdfast.cli import COMMANDS, as_sentence
from kdfast.cli.errors import UserError
from kdfast.inputs import did_you_mean
from kdfast.training import KDConfig
from kdfast.training.config import DATA, GROUPS, help_of
from kdfast.training.recipes import AUTO, CACHED, RECIPES, SELF, current_name

Command = Literal["distill", "cache", "data"]
LM_ONLY = "lm_only"
SEVERAL = "teacher_model_name_or_path"  # kept as JSON if it is a list

# keys of other libraries, and frequent guesses
ELSEWHERE = {
    **dict.fromkeys(("teacher", "teacher_model", "teacher_name_or_path"), "teacher_model_name_or_path"),
    **dict.fromkeys(("student", "student_model", "model", "model_name", "base_model"), "model_name_or_path"),
    **dict.fromkeys(("block_size", "cutoff_len", "max_seq_len", "max_seq_length", "sequence_len"), "max_length"),
    **dict.fromkeys(("batch_size", "micro_batch_size", "per_device_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("accumulation_steps", "gradient_accumulation"), "gradient_accumulation_steps"),
    **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
    **dict.fromkeys(("dataset_text_field", "text_field"), "text_column"),
    **dict.fromkeys(("device_map", "attn_implementation", "trust_remote_code", "model_revision"), "model_init_kwargs"),
    **{"torch_dtype": "dtype", "teacher_model_revision": "teacher_model_init_kwargs", "tokenizer": "tokenizer_name"},
    **{"lora": "use_peft", "lora_rank": "lora_r", "lora_target": "lora_target_modules"},
    **{"dataset": "dataset_name", "lr": "learning_rate", "optimizer": "optim"},
    **{"chat_template_path": "chat_template", "sample_packing": "packing"},
    **{"lmbda": "on_policy", "max_completion_length": "max_new_tokens", "num_generations": "generations_per_prompt"},
    **{"teacher_model_kind": "teacher_model_name_or_path", "ema_decay": "teacher_update_rate"},
    **dict.fromkeys(("server", "teacher_server", "kd_online_server_base_url"), "teacher_model_server_url"),
    **{"kd_online_server": "server_kind", "kd_online_topk": "cache_top_k", "max_tokens": "server_token_limit"},
}


def _key(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def read_json(given: str | None) -> Any:
    """Return a text's value as JSON or YAML in brackets, otherwise the text itself."""
    try:
        return yaml.load(given, _Loader) if given and given[0] in "[{" else given
    except yaml.YAMLError:
        return given


def dict_of(given: Any) -> dict[Any, Any]:
    """Return a mapping as it is, and a list as a mapping from numbers."""
    return dict(given) if isinstance(given, dict) else dict(enumerate(given))


@dataclass
class ModelArguments:
    model_name_or_path: str | None = _key(None, "The student to train further: a name on the hub, or a folder.")
    student_config: str | None = _key(
        None, "A fresh student instead: a config.json, its folder, or a mapping with model_type."
    )
    teacher_model_name_or_path: str | None = _key(
        None,
        "The teacher; a list of several, in which a folder of kdfast cache may be one; or self, the student as it is "
        "at the start. lm_only needs none.",
    )
    tokenizer_name: str | None = _key(None, "The tokenizer. Default: the student's, or else the teacher's.")
    dtype: str | None = _key(
        None, "The dtype of the student's weights. Default: float32; bf16: true then trains in mixed precision."
    )
    teacher_dtype: str | None = _key(None, "The dtype of the teacher's weights. Default: the one they were saved in.")
    model_init_kwargs: str | None = _key(
        None, "A mapping of further arguments of from_pretrained for the student, such as attn_implementation."
    )
    teacher_model_init_kwargs: str | None = _key(
        None, "The same for the teacher, such as quantization_config or device_map; for several, a list of mappings."
    )

    @property
    def teachers(self) -> dict[str | int, str]:
        """Return several teachers, by name or number; {} for one or none."""
        given = read_json(self.teacher_model_name_or_path)
        if isinstance(given, list | dict) and all(isinstance(name, str) for name in dict_of(given).values()):
            return dict_of(given)
        return {}

    @property
    def kwargs_of_teachers(self) -> list[Any]:
        """Return arguments of from_pretrained for each of `teachers`. Raise ValueError if their number is wrong."""
        given, n_teachers = read_json(self.teacher_model_init_kwargs), len(self.teachers)
        if not isinstance(given, list):
            return [self.teacher_model_init_kwargs] * n_teachers
        if len(given) != n_teachers:
            raise ValueError(
                f"teacher_model_init_kwargs has {len(given)} mappings; expected one for each of {n_teachers} teachers, "
                "or one for all"
            )
        return given


@dataclass
class AdapterArguments:
    use_peft: bool = _key(False, "Train a LoRA adapter on the student, whose own weights stay as they are.")
    lora_r: int = _key(16, "The adapter's rank.")
    lora_alpha: int = _key(32, "What the adapter adds is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = _key(0.05, "Dropout on the adapter's input.")
    lora_target_modules: list[str] | None = _key(
        None, "Names of the layers that get an adapter, a pattern, or all-linear. Default: PEFT's for the model."
    )
    lora_target_parameters: list[str] | None = _key(
        None, "Names of the parameters that get one, such as the packed weights of experts."
    )
    lora_modules_to_save: list[str] | None = _key(
        None, "Names of modules that are trained whole and saved with the adapter, such as lm_head."
    )
    use_rslora: bool = _key(False, "Multiply by lora_alpha / √lora_r instead.")
    use_dora: bool = _key(False, "Use DoRA, which trains the weights' magnitudes apart from their directions.")
    peft_config: str | None = _key(None, "A mapping of further fields of PEFT's LoraConfig, such as rank_pattern.")
    load_in_8bit: bool = _key(False, "Load the student's own weights in 8 bits, with bitsandbytes.")
    load_in_4bit: bool = _key(
        False, "Load them in 4 bits: QLoRA. For other kinds use quantization_config in model_init_kwargs."
    )
    bnb_4bit_quant_type: str = _key("nf4", "The 4-bit type: nf4 or fp4.")
    use_bnb_nested_quant: bool = _key(False, "With 4 bits, quantize the scales too.")
    bnb_4bit_quant_storage: str | None = _key(None, "With 4 bits, the dtype they are packed in. Default: uint8.")


@dataclass
class DataArguments:
    train_file: str | None = _key(
        None, "What to train on: a file, folder or glob of text, JSON, JSON lines, CSV or parquet."
    )
    eval_file: str | None = _key(None, "The same for evaluation. Default: part of the training rows, held out.")
    dataset_name: str | None = _key(None, "In place of train_file, a data set on the hub or in a local folder.")
    dataset_config_name: str | None = _key(None, "The data set's configuration.")
    dataset_split: str = _key("train", "The data set's split to train on.")
    eval_dataset_split: str | None = _key(None, "The data set's split to evaluate on.")
    streaming: bool = _key(False, "Read the training rows as they are needed. Needs max_steps and data to evaluate on.")
    eval_fraction: float = _key(0.01, "Share of the training rows held out if nothing else is named for evaluation.")


@dataclass
class SourceArguments:
    teacher_model_server_url: str | None = field(
        default=None,
        metadata={
            "help": "A vLLM or SGLang server that runs the teacher, such as http://host:port (also --server).",
            "aliases": ["--server"],
        },
    )
    server_kind: str = _key(
        "vllm", "vllm or sglang. Its API key is read from $KDFAST_SERVER_API_KEY or $OPENAI_API_KEY."
    )
    server_model: str | None = _key(None, "The model's name on the server. Default: the first that it serves.")
    server_concurrency: int = _key(4, "Requests at a time, each of per_device_eval_batch_size rows.")
    server_timeout: float = _key(300.0, "Seconds without an answer after which a request is sent again.")
    server_token_limit: int | None = _key(None, "Stop before more prompt tokens than this are sent.")
    teacher_logprobs: str | None = _key(
        None, "Log-probabilities made elsewhere, in place of a server: JSON lines, parquet or a data set."
    )
    logprobs_field: str | None = _key(None, "The column that holds them, if its name is not one that is known.")
    logprobs_temperature: float = _key(1.0, "The kd_temperature under which axolotl's target_logprobs were written.")


@dataclass
class RunArguments:
    overwrite_output_dir: bool = _key(False, "Delete the run in output_dir and its teacher_cache, and start again.")


# their headings on a help page; KDConfig has further GROUPS
ARGUMENT_CLASSES: dict[Any, str] = {
    ModelArguments: "models",
    AdapterArguments: "adapter",
    DataArguments: "data",
    SourceArguments: "a teacher on a server or in a file, for kdfast cache",
    RunArguments: "an earlier run",
    KDConfig: "output",
}
EPILOGS = {
    "distill": "Every name of transformers.TrainingArguments is a key too. A list is --key a b, a mapping is JSON.",
    "cache": "All keys of kdfast distill are accepted, so that one file serves both commands. Besides those above, "
    "kdfast cache uses temperature, teacher_tail, valid_vocab, seed, bf16, fp16, use_cpu and "
    "per_device_eval_batch_size. kdfast cache import FILE CONFIG.yaml is short for --teacher_logprobs FILE.",
    "data": "All keys of kdfast distill are accepted, so that one file serves both commands.",
}


class Arguments(NamedTuple):
    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    source: SourceArguments
    run: RunArguments
    training: KDConfig
    given: dict[str, Any]  # values that differ from the defaults, by key


class _Loader(yaml.SafeLoader):
    """A loader that runs no code from a file, and rejects aliases, which may contain themselves or grow to any size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{self.peek_event().anchor} is not taken; write the value out")
        return super().compose_node(parent, index)


def read_yaml(config: str) -> dict[str, Any]:
    """Return the mapping in a file. Raise UserError, naming the file, if its lines are not `key: value`."""
    path = Path(config)
    try:
        if not path.is_file():  # reading a pipe would block
            raise UserError(f"{config}: is no file" if path.exists() else f"{config}: no such file")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{config}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an impossible date
        why = "brackets within brackets, too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{config}: not valid YAML: {' '.join(why.split())}") from error
    if not isinstance(content, dict):
        what = "the file is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{config}: {what}; it must hold `key: value` lines")
    return content


class _Parser(HfArgumentParser):
    """A parser that raises what argparse would print with the usage of 150 options, and rejects abbreviated keys."""

    def __init__(self, source: str) -> None:
        super().__init__(list(ARGUMENT_CLASSES), allow_abbrev=False, add_help=False)
        self.source = source
        (several,) = [action for action in self._actions if action.dest == SEVERAL]
        several.nargs = "+"

    def spread(self, given: Sequence[str]) -> list[str]:
        """Return the arguments, with numbers in brackets (`--teacher_weights "[0.7, 0.3]"`) one by one."""
        listed = [action for action in self._actions if action.nargs == "+" and action.type in (int, float)]
        numbers = {name for action in listed for name in action.option_strings}
        return [
            one
            for before, now in zip(["", *given], given, strict=False)
            for one in (now.strip("[] ").replace(",", " ").split() if before in numbers and now[:1] == "[" else [now])
        ]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.source}: {message.removeprefix('argument ')}")


def parse_argv(argv: Sequence[str], command: Command) -> Arguments:
    """Return the arguments of `kdfast COMMAND *argv`, or print the help and exit, as argparse does."""
    if not argv or {"-h", "--help"} & set(argv):
        print(format_help(command), end="")
        raise SystemExit(0 if argv else 2)
    return parse(argv[0], argv[1:], command)


def parse(config: str, overrides: Sequence[str], command: Command = "distill") -> Arguments:
    """Return the arguments of `kdfast COMMAND config overrides...`. A UserError names the key and where it is set."""
    return parse_mapping(config, read_yaml(config), overrides, command)


def parse_mapping(
    source: str, content: Mapping[str, Any], overrides: Sequence[str] = (), command: Command = "distill"
) -> Arguments:
    """Return the arguments from a mapping; `source` is its name in errors."""
    parser = _Parser(source)
    defaults = vars(parser.parse_args([]))
    unknown = [f"--{key}" for key in content if key not in defaults]
    if not unknown:
        parsed, unknown = parser.parse_known_args(_as_arguments(content))
    if not unknown:
        parser.source = "command line"
        parsed, unknown = parser.parse_known_args(parser.spread(overrides), parsed)
    if unknown:
        parser.error(_explain(unknown[0], list(defaults)))
    source += " and command line" * bool(overrides)
    values = vars(parsed)
    if (names := values[SEVERAL]) is not None:
        values[SEVERAL] = names[0] if len(names) == 1 else json.dumps(names)
    given = {key: value for key, value in values.items() if value != defaults[key]}
    if "recipe" in given:
        given["recipe"] = current_name(given["recipe"])
    if problem := next(_problems(values, command), None):
        raise UserError(f"{source}: {problem}")
    resume = values["resume_from_checkpoint"]  # transformers expects a path, which true and false are not
    values["resume_from_checkpoint"] = {"true": True, "false": False}.get(str(resume).lower(), resume)
    try:
        return Arguments(*parser.parse_dict(values), given)  # type: ignore[call-arg]
    except Exception as error:  # of many classes: TrainingArguments uses some values unchecked
        kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
        raise UserError(f"{source}: {kind}{error}") from error


def _problems(given: Mapping[str, Any], command: Command) -> Iterator[str]:
    """Yield what `command` lacks, or what excludes each other, by key."""
    distills = command == "distill"
    for one, other in [("train_file", "dataset_name"), ("model_name_or_path", "student_config")][: 1 + distills]:
        if (given[one] is None) == (given[other] is None):
            found = "neither" if given[one] is None else "both"
            yield f"{found} of {one} and {other} given; expected exactly one of the two"
    elsewhere = [key for key in ("teacher_model_server_url", "teacher_logprobs") if given[key]]
    if len(elsewhere) > 1:
        yield f"both of {' and '.join(elsewhere)} given; expected one of them"
    live = ["teacher_model_name_or_path"] * (not elsewhere)
    needed = {"distill": ["output_dir"], "cache": ["teacher_cache", *live], "data": []}
    for key in needed[command]:
        if not given[key]:
            yield f"{key} is missing; kdfast {command} needs it"
    if (split := given["eval_dataset_split"]) is not None and (given["eval_file"] or not given["dataset_name"]):
        yield f"eval_dataset_split={split!r}; expected a dataset_name with it, and no eval_file"
    if given["max_length"] < 2:
        yield f"max_length={given['max_length']}; expected at least 2 tokens"
    if given["streaming"]:
        if command == "cache":
            yield "streaming: true, and a cache is of rows by their number; expected false"
        if given["eval_file"] is None and split is None:
            yield "streaming: true holds nothing out; expected an eval_file or eval_dataset_split with it"
        if distills and given["max_steps"] <= 0:
            yield f"streaming: true and max_steps={given['max_steps']}; expected its steps: it has no epochs"
    if not 0 < given["eval_fraction"] < 1:
        yield f"eval_fraction={given['eval_fraction']}; expected a number between 0 and 1"
    if given["use_peft"] and given["student_config"]:
        yield (
            "use_peft: true and a student_config: the fresh base would be kept nowhere, and its adapter is nothing "
            "without it. Train the student whole, or save the base first and name it (model_name_or_path)"
        )
    for key in (f.name for f in dataclasses.fields(AdapterArguments) if f.default != given[f.name]):
        if not given["use_peft"]:
            yield f"{key}={given[key]!r} without use_peft: true, and there is no adapter without it"
    live = given["teacher_model_name_or_path"]
    for key in ("teacher_dtype", "teacher_model_init_kwargs", "teacher_tokenizer_name_or_path"):
        if live == SELF and given[key]:
            yield f"{key}={given[key]!r}, and the teacher self is the student's own weights; leave it out"
    if n_teachers := len(ModelArguments(teacher_model_name_or_path=live).teachers):
        alone = [key for key in ("teacher_cache", "teacher_tokenizer_name_or_path") if given[key]]
        if command == "cache" or alone:
            what = f"{alone[0]}={given[alone[0]]!r}" if command != "cache" else "kdfast cache"
            yield f"{what} and {n_teachers} teachers in {SEVERAL}; expected one with it"
    if live == SELF and command == "cache":
        yield "teacher_model_name_or_path: self, and kdfast cache loads no student; expected a model's name or folder"
    if given["teacher_update_rate"] is not None and live != SELF:
        yield f"teacher_update_rate={given['teacher_update_rate']} without teacher_model_name_or_path: self"
    recipe, cached = given["recipe"], given["teacher_cache"]
    direct = RECIPES.get(recipe, RECIPES[LM_ONLY]).teacher in ("own_head", "compressed_head")
    fits = {LM_ONLY: True, CACHED: cached, AUTO: live or cached}.get(recipe, live and (direct or not cached))
    if distills and not fits:
        yield (
            f"recipe {recipe!r} with teacher_model_name_or_path={live!r} and teacher_cache={cached!r}; expected a "
            f"cache for {CACHED}, either for {AUTO}, a live teacher for every other one but {LM_ONLY}, and a cache "
            "besides only where that learns from the teacher's own head"
        )


def format_help(command: Command) -> str:
    """Return the usage and a line per key of the command's own; TrainingArguments' 120 are named, but not listed."""
    parser = argparse.ArgumentParser(
        usage=f"kdfast {command} CONFIG.yaml [--key value ...]",
        description=as_sentence(COMMANDS[command]),
        epilog=EPILOGS[command],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        add_help=False,
    )
    trainers = {f.name for f in dataclasses.fields(TrainingArguments)} - {"output_dir"}
    for cls, title in ARGUMENT_CLASSES.items():
        if (command != "distill" and cls in (RunArguments, AdapterArguments)) or (
            command != "cache" and cls is SourceArguments
        ):
            continue
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(cls):
            group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
            kept = command == "cache" and f.name.startswith(("teacher_cache", "cache_", "compressed_"))
            if (
                f.init
                and f.name not in trainers
                and (command == "distill" or cls is not KDConfig or kept or f.name in DATA)
            ):
                group.add_argument(f"--{f.name}", metavar="", help=help_of(f).replace("%", "%%"))
    return parser.format_help()


def _as_arguments(content: Mapping[str, Any]) -> list[str]:
    arguments = []
    for key, value in content.items():
        if isinstance(value, list) and not any(isinstance(one, dict) for one in value):
            arguments += [f"--{key}", *map(str, value)]
        elif value is not None:  # an empty `key:` means the default
            arguments.append(f"--{key}={json.dumps(value) if isinstance(value, dict | list) else value}")
    return arguments


def _explain(argument: str, known: Sequence[str]) -> str:
    """Return what is wrong with an argument that has no key or an unknown one."""
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no key; expected --key value, and one value where the key takes no list"
    name = argument.split("=")[0].lstrip("-").replace("-", "_")
    return f"unknown key {name!r}{did_you_mean(name, known, ELSEWHERE)}"
