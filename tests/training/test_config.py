import logging
from dataclasses import asdict

import pytest
from transformers import HfArgumentParser, TrainingArguments

from kdfast.schedules import Constant, Piecewise, Ramp
from kdfast.training import RECIPES, KDConfig
from kdfast.training.recipes import ALIASES, get_recipe


def test_recipes_say_what_they_are():
    plain, fixed, own = RECIPES["projector"], RECIPES["projector_fixed"], RECIPES["teacher_head"]
    assert (plain.projector_init, plain.projector_lr_multiplier, plain.router_lr_multiplier) == ("default", 1.0, 1.0)
    assert plain.kd_weight_schedule() == Constant(0.7)
    assert (fixed.projector_init, fixed.projector_lr_multiplier, fixed.router_lr_multiplier) == ("normal", 5.0, 2.0)
    assert fixed.kd_weight_schedule() == Ramp(0.7, start=0.1, until=0.2)
    assert (own.teacher, own.kd_weight_schedule()) == ("own_head", Constant(0.7))
    assert RECIPES["lm_only"].teacher == "none"
    assert {name for name, recipe in RECIPES.items() if recipe.temperature != 2.0} == {"shared_tokens"}
    assert {recipe.ce_weight for recipe in RECIPES.values()} == {1.0}


def test_a_recipe_by_name_is_that_recipe(config):
    assert config(recipe="projector_fixed").resolved() == RECIPES["projector_fixed"]


@pytest.mark.parametrize(("former", "now"), ALIASES.items())
def test_a_former_name_is_that_recipe(config, former, now):
    args = config(recipe=former)
    assert args.recipe == now, "what is logged and stored has the name of now"
    assert args.resolved().name == args.resolved(former).name == now
    assert RECIPES[former] is RECIPES[now] is get_recipe(former)


def test_auto_needs_the_models(tmp_path):
    args = KDConfig(output_dir=str(tmp_path))
    assert args.recipe == "auto"
    with pytest.raises(ValueError, match="depends on the models"):
        args.resolved()
    assert args.resolved("teacher_head") == RECIPES["teacher_head"]


def test_explicit_values_win_and_zero_is_a_value(config):
    given = {"temperature": 3.0, "kd_ramp": 0.0, "kd_weight": 0.4, "projector_lr": 1e-2}
    resolved = config(recipe="projector_fixed", **given).resolved()
    assert (resolved.temperature, resolved.kd_weight, resolved.projector_lr) == (3.0, 0.4, 1e-2)
    assert resolved.kd_weight_schedule() == Constant(0.4)
    assert resolved.projector_init == "normal", "what was not given stays the recipe's"


@pytest.mark.parametrize("recipe", ["svd_init", "svd_blocks"])
def test_there_is_a_loss_to_the_end(config, recipe):
    assert config(recipe=recipe, ce_weight=0.0).resolved().kd_until == 1
    with pytest.raises(ValueError, match=r"kd_until=0.5 and ce_weight=0; after the KD term nothing"):
        config(recipe=recipe, ce_weight=0.0, kd_until=0.5).resolved()


def test_temperature_steps(config):
    resolved = config(temperature_steps=[3.0, 2.0, 1.5]).resolved()
    assert resolved.temperature_schedule() == Piecewise([3.0, 2.0, 1.5])


def test_what_a_recipe_has_no_use_for_is_left_out_with_a_log_line(config, caplog):
    args = config(recipe="lm_only", kd_weight=0.5, projector_lr=1e-2, ce_weight=2.0)
    with caplog.at_level(logging.WARNING, logger="kdfast"):
        resolved = args.resolved()
    assert resolved == type(resolved)(**{**asdict(RECIPES["lm_only"]), "ce_weight": 2.0})
    assert "recipe='lm_only' has no use for kd_weight, projector_lr" in caplog.text


def test_defaults_that_differ_from_training_arguments(config):
    args = config()
    assert isinstance(args, TrainingArguments)
    assert args.logging_nan_inf_filter is False
    assert args.report_to == []


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_ce", False), ("ce", False), ("kl_teacher_student", False), ("loss", False), ("agreement", True),
        ("eval_web_ce", False), ("web_ce", False), ("eval_web_kd", False), ("eval_web_loss", False),
        ("eval_web_perplexity", False), ("eval_web_kl_teacher_projected", False), ("eval_web_ce_projected", False),
        ("eval_web_agreement", True), ("eval_ce_data_agreement", True), ("eval_ce_agreement", True),
        ("eval_agreement_ce", False), ("eval_kl_teacher_student_ce", False), ("eval_a_loss_agreement", True),
        ("eval_web_runtime", False), ("eval_web_samples_per_second", True), ("eval_slice", True), ("my_loss", False),
    ],
)  # fmt: skip
def test_the_best_model_has_the_lowest_cross_entropy(config, metric, greater):
    # TrainingArguments alone takes every metric that does not end in "loss" for one that should be large
    assert config(metric_for_best_model=metric).greater_is_better is greater
    for given in (True, False):
        assert config(metric_for_best_model=metric, greater_is_better=given).greater_is_better is given


@pytest.mark.parametrize("metric", ["eval_student_entropy", "web_teacher_entropy", "eval_tokens"])
def test_of_what_is_neither_good_nor_bad_the_direction_has_to_be_given(config, metric):
    with pytest.raises(ValueError, match=f"metric_for_best_model='{metric}'.*greater_is_better"):
        config(metric_for_best_model=metric)
    assert config(metric_for_best_model=metric, greater_is_better=True).greater_is_better


def test_an_argument_parser_reads_every_field():
    def parse(words):
        return HfArgumentParser(KDConfig).parse_args_into_dataclasses(f"--use_cpu true {words}".split())[0]

    args = parse("--output_dir out --recipe projector --temperature 1.5 --projector_lr 1e-2 --learning_rate 3e-4")
    assert (args.recipe, args.temperature, args.projector_lr, args.learning_rate) == ("projector", 1.5, 1e-2, 3e-4)
    assert parse("--temperature_steps 3 2").temperature_steps == [3.0, 2.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "run6"}, "recipe='run6' is unknown; expected one of lm_only, projector, projector_fixed"),
        ({"temperature": 0.0}, "temperature=0.0; expected a number > 0"),
        ({"temperature": "2"}, "temperature='2'; expected a number"),
        ({"kd_weight": -0.1}, "kd_weight=-0.1"),
        ({"ce_weight": float("nan")}, "ce_weight=nan"),
        ({"kd_until": -0.1}, "kd_until=-0.1; expected a fraction"),
        ({"kd_ramp": 1.2}, "kd_ramp=1.2; expected a fraction"),
        ({"temperature_steps": []}, "temperature_steps=\\[\\]"),
        ({"temperature_steps": [2.0], "temperature": 2.0}, "expected one of them"),
        ({"divergence": "chi2"}, "divergence='chi2' is unknown"),
        ({"divergence": 2}, "divergence=2; expected a name"),
        ({"projector_init": "zero"}, "projector_init='zero'; expected one of default, normal"),
        ({"teacher_grad": "some"}, "teacher_grad='some'"),
        ({"engine": "fast"}, "engine='fast'; expected one of auto, "),
        ({"scratch_bytes": 0}, "scratch_bytes=0"),
        ({"valid_vocab": 2.5}, "valid_vocab=2.5"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    ],
)
def test_bad_values_are_named(config, given, message):
    with pytest.raises(ValueError, match=message):
        config(**given)
