"""Defaults, names and limits that training.md, troubleshooting.md and teachers.md in docs/ state are the code's."""

import inspect
import re

import documents

from kdfast import training
from kdfast.cli import arguments
from kdfast.cli.errors import CommandError, RunFailed, RunTerminated, UserError
from kdfast.cli.main import main
from kdfast.report import page
from kdfast.training import KDConfig, cache_from_server
from kdfast.training.cache.write import MAX_KL
from kdfast.training.config import DRAWN, KEPT
from kdfast.training.diagnostics import SIGNS, HealthThresholds
from kdfast.training.initialization.layers import LAYOUTS
from kdfast.training.recipes import CACHED, FEW_STRINGS, FROM_CACHE, RECIPES

TRAINING = documents.source("docs/training.md")


def section(page, heading):
    return re.split(r"\n#+ ", documents.source(page).split(f"# {heading}\n")[1])[0]


def names_in(table_row_cell):
    return re.findall(r"`(\w+)`", table_row_cell)


def first_cells(text):
    return [name for line in text.splitlines() if line.startswith("| `") for name in names_in(line.split("|")[1])]


def test_recipes():
    text = section("docs/training.md", "Recipes")
    assert sorted(first_cells(text)) == sorted(RECIPES)
    found = RECIPES["teacher_head"]
    assert (found.temperature, found.kd_weight, found.ce_weight) == (2, 0.7, 1)
    assert "τ is 2, the KD weight 0.7 and `ce_weight` 1" in text
    compressed = [name for name, recipe in RECIPES.items() if recipe.teacher == "compressed_head"]
    assert sorted(re.findall(r"\| `(\w+)` \| its head, compressed", text)) == sorted(compressed)
    assert {(RECIPES[name].kd_weight, RECIPES[name].kd_until) for name in compressed} == {(2.0, 0.5)}
    assert (RECIPES["shared_tokens"].temperature, RECIPES["shared_tokens"].kd_weight) == (1, 1)
    assert RECIPES["projector_refit"].projector_resolve_steps == 16
    assert RECIPES["projector_fixed"].projector_lr_multiplier == 5
    solving = [name for name, recipe in RECIPES.items() if recipe.student_init != "own"]
    overwriting = re.search(r"never overwrites a trained student;(.*?)\.", text, re.S)[1]
    assert sorted(names_in(overwriting)) == sorted(solving)
    families = re.search(r"one family \((.*?)\)", text)[1].replace(" or ", ", ").split(", ")
    assert [name.lower().replace("-", "") for name in families] == list(LAYOUTS)


def test_keys():
    parser = arguments._Parser("test")
    known = {action.dest for action in parser._actions}
    rows = section("docs/training.md", "From the command line").split("|---|---|\n")[1].split("\n\n")[0]
    assert len(names_in(rows)) > 12
    assert set(names_in(rows)) <= known
    assert set(first_cells(section("docs/training.md", "On-policy"))) <= known


def test_exit_codes():
    text = section("docs/training.md", "From the command line")
    for kind, said in ((RunFailed, "the run failed"), (UserError, "the request"), (RunTerminated, "terminated")):
        assert issubclass(kind, CommandError)
        assert re.search(rf"\b{kind.exit_code} \({said}", text)


def test_one_line_unless_an_error_is_unforeseen(monkeypatch, capsys):
    monkeypatch.setenv("KDFAST_TRACEBACK", "1")
    assert "shows the traceback of an unforeseen one" in section("docs/training.md", "From the command line")
    assert main(["distill", "nowhere.yaml"]) == UserError.exit_code
    assert capsys.readouterr().err == "kdfast: nowhere.yaml: no such file\n"


def test_checkpoints_and_reports():
    text = section("docs/training.md", "From the command line").replace("\n", " ")
    assert f"(every `save_steps` steps, by default {KDConfig.save_steps})" in text
    assert KDConfig.save_strategy == "steps"
    assert f"(within {page.EQUAL:.0%}; " in section("docs/training.md", "Runs side by side")


def test_when_a_run_dies():
    text = section("docs/troubleshooting.md", "When a run dies")
    named = {"ValueError", *(name for name in training.__all__ if name.endswith("Error"))}
    cells = [line.split("|")[4] for line in text.splitlines() if line.startswith("|")]
    assert len([name for cell in cells for name in names_in(cell)]) == 6
    assert {name for cell in cells for name in names_in(cell)} <= named
    assert f"| {RunTerminated.exit_code} | `TerminatedError` |" in text
    assert f"`ddp_timeout` ({KDConfig.ddp_timeout:,} seconds)" in text


def test_health():
    text, limits = section("docs/training.md", "Health"), HealthThresholds()
    assert sorted(first_cells(text)) == sorted(SIGNS)
    assert f"starts above {limits.initial_loss:g}," in text
    assert f"KL still above {limits.kl:g} after {limits.kl_after:.0%} of the run" in text
    assert f"perplexity above {limits.perplexity:,.0f} after {limits.perplexity_after:.0%}" in text
    assert f"after {KDConfig.max_skipped_steps} in a row" in text


def test_teachers():
    page = " ".join(documents.source("docs/teachers.md").split())
    assert f"what it kept: {DRAWN} ids drawn per token" in page
    assert f"n ids (`cache_samples`, {DRAWN})" in page
    assert f"ids (`cache_top_k`, {KEPT})" in page
    assert f"`compressed_kl`, {MAX_KL} nats" in page
    cached = RECIPES[CACHED]
    assert (FROM_CACHE.recipe, cached.student_init) == (CACHED, "own")
    assert f"`recipe: auto` becomes `cached`, with KD weight {cached.kd_weight} and **no solved start**" in page
    assert inspect.signature(cache_from_server).parameters["retries"].default == 6
    assert "A failed request is repeated up to six times" in page
    assert FEW_STRINGS == 0.5
    assert "`lm_only` if the teacher has less than half of the student's strings" in page
