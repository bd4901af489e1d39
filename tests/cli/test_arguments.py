"""YAML and the command line end in typed values; what does not fit is one line that names the key and the place."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from kdfast.cli.arguments import ARGUMENT_CLASSES, ELSEWHERE, format_help, parse, parse_mapping
from kdfast.cli.errors import UserError

LEAST = {"student_config": "c", "train_file": "t", "recipe": "lm_only", "output_dir": "o", "use_cpu": True}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"

    def write(text):
        path.write_text(text)
        return str(path)

    return write


def test_types_come_from_the_dataclasses(config):
    arguments = parse(
        config(
            yaml.safe_dump(LEAST) + "learning_rate: 5e-5\nmax_steps: 7\nbf16: false\nseed: 3\n"
            "lr_scheduler_kwargs: {num_cycles: 2}\ntemperature_steps: [3, 2, 1.5]\nkd_weight:\n"
        ),
        ["--max_steps", "9", "--learning-rate=1e-3", "--eval_on_start"],
    )
    training = arguments.training
    assert (training.learning_rate, training.max_steps, training.seed) == (1e-3, 9, 3)  # the last one given wins
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert training.temperature_steps == [3.0, 2.0, 1.5]
    assert training.kd_weight is None
    assert training.eval_on_start is True
    assert arguments.given["learning_rate"] == 1e-3
    assert "weight_decay" not in arguments.given


def test_a_mapping_as_student_config_survives(config):
    text = yaml.safe_dump({**LEAST, "student_config": {"model_type": "gpt2", "n_layer": 2, "scale_attn_weights": True}})
    given = parse(config(text), []).model.student_config
    assert yaml.safe_load(given) == {"model_type": "gpt2", "n_layer": 2, "scale_attn_weights": True}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("# a comment alone", "the file is empty"),
        ("- a list", "holds a list"),
        ("a: [1", "not valid YAML: .*line 1"),
        ("a: b: c", "not valid YAML: .*line 1"),
        ("temprature: 2", "unknown key 'temprature'; did you mean 'temperature'?"),
        ("teacher_model: x", "unknown key 'teacher_model'; did you mean 'teacher_model_name_or_path'?"),
        ("qqqq: x", "unknown key 'qqqq'$"),
        ("2: x", "unknown key '2'"),
        ("temperature: warm", "--temperature: invalid float value: 'warm'"),
        ("max_steps: [1, 2]", "'2' belongs to no key; expected --key value, and one value where the key takes no list"),
        ("bf16: perhaps", "--bf16"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name(config, text, expected):
    path = config(text)
    with pytest.raises(UserError, match=expected) as error:
        parse(path, [])
    assert str(error.value).startswith(path + ":")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.yaml: no such file"):
        parse(str(tmp_path / "gone.yaml"), [])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match=r"binary\.yaml: not valid YAML: 'utf-8' codec can't decode byte 0xff"):
        parse(str(tmp_path / "binary.yaml"), [])
    with pytest.raises(UserError, match="x: File name too long"):
        parse("x" * 300, [])


def test_aliases_that_never_end(config):
    """Nor any others: they are not taken."""
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]  # 9 to the power of 11
    many = "\n".join(["a0: &a0 [x]", *lines, "temperature_steps: *a11"])
    for text in ("student_config: &a {b: *a}", "temperature_steps: &a [1, *a]", many, "seed: &a 1\nmax_steps: *a"):
        with pytest.raises(UserError, match=r"not valid YAML: the alias \*\w+ is not taken; write the value out"):
            parse(config(text), [])


@pytest.mark.parametrize("text", ["[" * 5000, "recipe: " + "{" * 3000, "seed: !!timestamp 2001-99-99", "<<: *a"])
def test_yaml_that_python_chokes_on(config, text):
    with pytest.raises(UserError, match="not valid YAML"):
        parse(config(text), [])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--temprature", "2"], "^command line: unknown key 'temprature'; did you mean 'temperature'?"),
        (["--temp", "2"], "^command line: unknown key 'temp'"),  # no abbreviations: they would change with new keys
        (["--max-step=2"], "^command line: unknown key 'max_step'; did you mean 'max_steps'"),
        (["stray"], "^command line: 'stray' belongs to no key"),
        (["--temperature"], "^command line: --temperature: expected one argument"),
        (["--temperature", "-1"], "and command line: temperature=-1.0; expected a number > 0"),
        (["--recipe", "run9", "--teacher_model_name_or_path", "t"], "recipe='run9' is unknown; expected one of"),
        (["--divergence", "kl"], "divergence"),
    ],
)
def test_what_is_wrong_with_an_override_is_said(config, overrides, expected):
    with pytest.raises(UserError, match=expected) as error:
        parse(config(yaml.safe_dump(LEAST)), overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"student_config": None}, "neither of model_name_or_path and student_config"),
        ({"model_name_or_path": "m"}, "both of model_name_or_path and student_config"),
        ({"train_file": None}, "neither of train_file and dataset_name"),
        ({"dataset_name": "d"}, "both of train_file and dataset_name"),
        ({"eval_dataset_split": "test"}, "eval_dataset_split='test'; expected a dataset_name with it, and no eval_fi"),
        (
            {"train_file": None, "dataset_name": "d", "eval_dataset_split": "test", "eval_file": "e"},
            "eval_dataset_split='test'; expected a dataset_name",
        ),
        ({"recipe": "projector_fixed"}, "recipe 'projector_fixed' with teacher_model_name_or_path=None and"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"max_length": 1}, "max_length=1"),
        ({"eval_fraction": 1.5}, r"eval_fraction=1\.5"),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_said(change, expected):
    with pytest.raises(UserError, match=f"^here: {expected}"):
        parse_mapping("here", {**LEAST, **change})


@pytest.mark.parametrize(
    ("given", "expected"),
    [("true", True), (True, True), ("False", False), (None, None), ("out/checkpoint-4", "out/checkpoint-4")],
)
def test_resuming_is_true_false_or_a_path(config, given, expected):
    assert parse_mapping("here", {**LEAST, "resume_from_checkpoint": given}).training.resume_from_checkpoint == expected
    if isinstance(given, str):
        override = ["--resume_from_checkpoint", given]
        assert parse(config(yaml.safe_dump(LEAST)), override).training.resume_from_checkpoint == expected


def test_help_lists_our_keys_and_not_the_trainers():
    text = format_help("distill")
    for key in ("--teacher_model_name_or_path", "--train_file", "--projector_lr", "--recipe", "--output_dir"):
        assert key in text
    assert "--weight_decay" not in text
    assert "Every name of transformers.TrainingArguments" in text


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(example):
    assert parse(str(example), ["--bf16", "false"]).training.recipe == "auto"


# what people type who come from TRL, axolotl or LLaMA-Factory: the key it is here, or no suggestion at all
TYPED = {
    **dict.fromkeys(["bf16_full", "fp32", "use_vllm"]),
    "lmbda": "on_policy",
    **dict.fromkeys(["device_map", "attn_implementation", "trust_remote_code"], "model_init_kwargs"),
    "torch_dtype": "dtype",
    **dict.fromkeys(["projector", "teacher_temperature", "warmup_ratio", "fp8"]),
    **dict.fromkeys(["val_set_size", "adapter", "eval_dataset", "tf16", "stage", "test"]),
    "bf61": "bf16",
    "lora": "use_peft",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "teacher_model": "teacher_model_name_or_path",
    "base_model": "model_name_or_path",
    "learning_rat": "learning_rate",
    "learningRate": "learning_rate",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "dataset_text_field": "text_column",
    "sample_packing": "packing",
    "chat_template_path": "chat_template",
    "weight_decy": "weight_decay",
    "reciep": "recipe",
    "accumulation_steps": "gradient_accumulation_steps",
    "per_device_batch_size": "per_device_train_batch_size",
}


@pytest.mark.parametrize(("typed", "meant"), TYPED.items())
def test_a_suggestion_is_right_or_there_is_none(typed, meant):
    with pytest.raises(UserError) as raised:
        parse_mapping("here", {typed: 1})
    assert str(raised.value).endswith(f"unknown key {typed!r}" + (f"; did you mean {meant!r}?" if meant else ""))


def test_every_name_from_elsewhere_leads_to_a_key():
    keys = {field.name for cls in ARGUMENT_CLASSES for field in dataclasses.fields(cls)}
    assert {*ELSEWHERE.values()} <= keys
    assert not ELSEWHERE.keys() & keys
