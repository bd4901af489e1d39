"""Several teachers in a configuration: a list, a mapping from names, and a column that sends rows to them."""

import json

import pytest
import torch
import yaml
from byte_tokenizer import make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from kdfast.cli.arguments import parse

ENDS = {"bos_token_id": 256, "eos_token_id": 256}


@pytest.fixture
def configured(place):
    """Write c.yaml, of the teachers models/small and models/wide unless others are given; return its name."""
    for seed, (name, width) in enumerate((("small", 32), ("wide", 48))):
        torch.manual_seed(seed)
        config = GPT2Config(n_layer=1, n_embd=width, n_head=2, n_positions=64, vocab_size=257, **ENDS)
        GPT2LMHeadModel(config).save_pretrained(f"models/{name}")
        make_tokenizer().save_pretrained(f"models/{name}")
    lines = [{"text": f"{i}: {i * i}\n" * 3, "teacher_id": ("small", "wide")[i % 2]} for i in range(60)]
    (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(**more):
        config = yaml.safe_load((place / "config.yaml").read_text())
        config |= {"teacher_model_name_or_path": ["models/small", "models/wide"], "recipe": "teacher_head"}
        (place / "c.yaml").write_text(yaml.safe_dump({**config, "max_steps": 2, **more}))
        return "c.yaml"

    return write


def summary(place, out="out"):
    return json.loads((place / out / "summary.json").read_text())


def evaluated(place, out="out"):
    log = json.loads((place / out / "trainer_state.json").read_text())["log_history"]
    return next(line for line in log if "eval_loss" in line)


def test_a_list_with_weights(configured, place, kdfast):
    code, out, err = kdfast("distill", configured(teacher_weights=[0.7, 0.3], eval_strategy="steps", eval_steps=1))
    assert code == 0, err
    assert "2 teachers, each of every row, by their weights: small (0.7), wide (0.3)" in out
    found = evaluated(place)
    assert found["eval_kd"] == pytest.approx(0.7 * found["eval_kd_small"] + 0.3 * found["eval_kd_wide"], rel=1e-5)
    parameters = sum(GPT2LMHeadModel.from_pretrained(f"models/{name}").num_parameters() for name in ("small", "wide"))
    assert summary(place)["teacher_parameters"] == parameters


def test_on_the_command_line(configured, place, kdfast):
    names = ["--teacher_model_name_or_path", "models/wide", "models/small", "--output_dir", "other"]
    code, out, err = kdfast("distill", configured(), *names)
    assert code == 0, err
    assert "by their weights: wide (0.5), small (0.5)" in out
    for teachers in ("{code: models/wide, math: models/small}", '{"code": "models/wide", "math": "models/small"}'):
        read = parse("c.yaml", ["--teacher_model_name_or_path", teachers, "--teacher_weights", "[0.7, 0.3]"])
        assert read.model.teachers == {"code": "models/wide", "math": "models/small"}
        assert read.training.teacher_weights == [0.7, 0.3]


def test_rows_that_name_their_teacher(configured, place, kdfast):
    settings = {"train_file": "rows.jsonl", "packing": False, "eval_fraction": 0.2, "eval_strategy": "steps"}
    code, out, err = kdfast("distill", configured(**settings, eval_steps=1))
    assert code == 0, err
    assert "2 teachers, each of the rows whose 'teacher_id' names it: small, wide" in out
    assert {"eval_kl_teacher_student_small", "eval_kl_teacher_student_wide"} <= evaluated(place).keys()


def test_blocks_would_join_rows_of_several(configured, kdfast):
    code, _, err = kdfast("distill", configured(train_file="rows.jsonl"))
    assert code == 2
    assert "the column 'teacher_id' of train_file 'rows.jsonl' sends each row to a teacher, and packing=None" in err


def test_names_of_ones_own(configured, place, kdfast):
    given = {"code": "models/small", "math": "models/wide"}
    kwargs = [{"dtype": "bfloat16"}, {"attn_implementation": "eager"}]
    code, out, err = kdfast("distill", configured(teacher_model_name_or_path=given, teacher_model_init_kwargs=kwargs))
    assert code == 0, err
    assert "by their weights: code (0.5), math (0.5)" in out
    assert "teacher code 0.0M parameters, teacher math" in out


def test_a_cache_beside_one_that_runs(configured, place, kdfast):
    options = {"cache_method": "top_k", "cache_top_k": 257, "cache_dtype": "float32", "cache_temperatures": [2.0]}
    one = configured(teacher_model_name_or_path="models/wide", teacher_cache="kept/wide", **options)
    assert kdfast("cache", one)[0] == 0
    found = []
    for second, out in (("models/wide", "live"), ("kept/wide", "mixed")):
        given = {"output_dir": out, "teacher_model_name_or_path": ["models/small", second], "eval_strategy": "steps"}
        code, said, err = kdfast("distill", configured(**given, teacher_weights=[0.7, 0.3], eval_steps=1))
        assert code == 0, err
        assert "by their weights: small (0.7), wide (0.3)" in said
        found.append(evaluated(place, out))
    for key in ("eval_kd", "eval_kd_small", "eval_kd_wide", "eval_ce"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teacher_cache": "kept"}, "teacher_cache='kept' and 2 teachers in teacher_model_name_or_path"),
        ({"teacher_weights": [1]}, "teacher_weights=[1.0]; expected a number ≥ 0, not all of them 0, for each of 2"),
        ({"teacher_model_init_kwargs": [{}, {}, {}]}, "has 3 mappings; expected one for each of 2 teachers"),
        ({"teacher_column": "domain"}, "teacher_column='domain', and train_file 'text.txt' has no such column"),
        ({"teacher_model_name_or_path": ["models/small", "models/no"]}, "teacher_model_name_or_path='models/no'"),
    ],
)
def test_what_is_wrong_is_named(configured, kdfast, more, message):
    code, _, err = kdfast("distill", configured(**more))
    assert code == 2
    assert message in err.splitlines()[-1]


def test_a_cache_is_of_one(configured, kdfast):
    code, _, err = kdfast("cache", configured(teacher_cache="kept"))
    assert code == 2
    assert "kdfast cache and 2 teachers in teacher_model_name_or_path; expected one with it" in err
