"""`kdfast demo --quick`: the whole way from text to table, in toy sizes."""

import json
import re

import pytest

from kdfast.demo import demo
from kdfast.demo.toy_text import library_text
from kdfast.report.read_runs import Run, log_table


@pytest.fixture
def quick(tmp_path, monkeypatch, kdfast):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folders = ("--output-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache"))
    return lambda *more: kdfast("demo", "--quick", *folders, *more)


@pytest.mark.slow
def test_from_text_to_table_twice(tmp_path, quick):
    code, out, _ = quick()
    assert code == 0
    (_, *names), *rows = (re.split(r"  +", line.strip()) for line in out.split("\n\n")[1].splitlines())
    assert names == ["teacher", demo.ALONE, demo.LONGER, *demo.RECIPES[1:]]
    table = dict(zip(names, next(cells for what, *cells in rows if what == "student CE"), strict=True))
    summaries = json.loads((tmp_path / "runs/summary.json").read_text())
    assert len({summaries[recipe]["tokens"] for recipe in demo.RECIPES}) == 1  # the same budget for every student
    assert summaries[demo.LONGER]["student_parameters"] == summaries["auto"]["student_parameters"]
    for recipe in demo.RECIPES:
        assert f"{summaries[recipe]['eval_ce']:.4f}" == table[recipe]
    assert next(cells for what, *cells in rows if what == "tokens")[0] == "1,512"  # the teacher's
    assert "Toy sizes: everything works, and the figures mean nothing.\nCurves: " in out
    page = (tmp_path / "runs/report.html").read_text()
    assert all(f"<th>{name}</th>" in page for name in table)

    (teacher,) = (tmp_path / "cache").glob("*/teacher/model.safetensors")
    trained = teacher.stat().st_mtime_ns
    first = (tmp_path / "runs/summary.json").read_bytes()
    code, out, _ = quick()
    assert code == 0
    assert "teacher: finished already" in out
    assert teacher.stat().st_mtime_ns == trained
    assert (tmp_path / "runs/summary.json").read_bytes() == first  # results are kept, the second ones lie beside
    second = json.loads((tmp_path / "runs-2/summary.json").read_text())
    for found in (summaries, second):
        del found[demo.LONGER]  # of as many steps as this machine takes
    assert {r: s["eval_ce"] for r, s in second.items()} == {r: s["eval_ce"] for r, s in summaries.items()}


def run(name, recipe, ce, tokens, seconds, *, speeds=(), parameters=9, **more):
    summary = {"recipe": recipe, "eval_ce": ce, "tokens": tokens, "steps": tokens // 500, "seconds": seconds}
    log = [{"step": step, "epoch": step / 2, "tokens_per_second": speed} for step, speed in enumerate(speeds)]
    return Run(name, log_table(log), {**summary, "student_parameters": parameters, **more})


@pytest.mark.parametrize(
    ("ce", "ce_longer", "seconds_longer", "said"),
    [
        (5.0, 5.5, 48.0, "Distillation is worth its seconds here: -0.500 (-1.000 at equal tokens)."),
        (5.0, 4.75, 48.0, "Distillation is worth its text here, -1.000, and not its seconds, +0.250."),
        (5.0, 4.75, 30.0, "Distillation is worth its text here, -1.000, and not its seconds, +0.250."),
        (6.0, 5.0, 48.0, "Distillation is worth nothing here: LM only is as good with as many tokens."),
        (5.0, 5.5, 96.0, "Distillation is worth its seconds here: -0.500 (-1.000 at equal tokens)."),
        (5.0, 5.5, 30.0, "The seconds are too far apart to compare: leave the machine to the demo, and run it again."),
    ],
)
def test_the_verdict_is_the_figures(ce, ce_longer, seconds_longer, said):
    teacher = run("teacher", "lm_only", 4.0, 10_000, 200.0, parameters=99)
    alone = run("lm_only", "lm_only", 6.0, 2000, 10.0)
    longer = run("lm_only_longer", "lm_only", ce_longer, 9600, seconds_longer)
    best = run("auto", "svd_init", ce, 2000, 20.0, teacher_seconds=30.0, speeds=[1, 1, 1, 1, 1])
    assert demo._verdict([teacher, alone, longer, best], best) == (
        "Little text, which is read 2.0 times, and a teacher that has learned from 10,000 tokens: the best recipe, "
        f"auto (svd_init), ended at {ce:.3f} (2,000 tokens, 50 seconds, 30 of them the start and the teacher's run "
        f"over the text). LM only ended at 6.000 (2,000 tokens, 10 seconds) with as many tokens, and at "
        f"{ce_longer:.3f} (9,600 tokens, {seconds_longer:.0f} seconds) with the seconds. {said}"
    )


def test_lm_only_gets_the_seconds_of_the_best_recipe():
    """10 s of training and 30 s of its teacher, at 200 tokens/s: the first line's speed has what is compiled once."""
    alone = run("lm_only", "lm_only", 6.0, 2000, 20.0, speeds=[20, 200, 200, 210])
    best = run("auto", "svd_init", 5.0, 2000, 10.0, teacher_seconds=30.0)
    assert demo._steps_in_as_many_seconds(alone, best) == 40 * 200 // 500


def test_an_interrupted_demo_goes_on_in_its_folder(tmp_path):
    assert demo._unfinished(tmp_path / "runs", "a").name == "runs"
    assert demo._unfinished(tmp_path / "runs", "a").name == "runs"
    assert demo._unfinished(tmp_path / "runs", "b").name == "runs-2"  # other settings
    (tmp_path / "runs/summary.json").touch()
    assert demo._unfinished(tmp_path / "runs", "a").name == "runs-3"


def test_text_is_split_by_files_and_bounded():
    sizes = demo.FULL
    train, evaluation = library_text(sizes.characters, sizes.excerpt)
    assert len(train) > 10 * len(evaluation) > 100
    assert not any(excerpt in text for excerpt in evaluation if len(excerpt) > 200 for text in train)
    assert all(len(excerpt) <= sizes.excerpt for excerpt in evaluation)
    assert library_text(sizes.characters, sizes.excerpt) == (train, evaluation)
    few = library_text(demo.QUICK.characters, demo.QUICK.excerpt)[0]
    assert few == train[: len(few)]
    assert sum(map(len, few[:-1])) < demo.QUICK.characters <= sum(map(len, few))


def test_the_teacher_is_kept_under_all_it_depends_on():
    key = demo._key(demo.QUICK, 0, ["a", "b"])
    assert key == demo._key(demo.QUICK, 0, ["a", "b"])
    other_seed, other_text = demo._key(demo.QUICK, 1, ["a", "b"]), demo._key(demo.QUICK, 0, ["ab"])
    assert len({key, other_seed, other_text, demo._key(demo.FULL, 0, ["a", "b"])}) == 4
