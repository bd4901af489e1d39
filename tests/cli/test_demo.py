"""`kdfast demo --quick`: the whole way from text to table, in toy sizes."""

import json

import pytest

from kdfast.demo import demo
from kdfast.demo.toy_text import library_text


@pytest.fixture
def quick(tmp_path, monkeypatch, kdfast):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folders = ("--output-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache"))
    return lambda *more: kdfast("demo", "--quick", *folders, *more)


@pytest.mark.slow
def test_from_text_to_table_twice(tmp_path, quick):
    code, out, _ = quick()
    assert code == 0
    table = {line.split()[0]: line.split() for line in out.split("\n\n")[1].splitlines()[1:]}
    assert list(table) == ["teacher", "lm_only", "projector", "projector_fixed", "teacher_head", "svd_init"]
    summaries = json.loads((tmp_path / "runs/summary.json").read_text())
    assert len({summaries[recipe]["tokens"] for recipe in demo.RECIPES}) == 1  # the same budget for every student
    for recipe in demo.RECIPES:
        assert f"{summaries[recipe]['eval_ce']:.4f}" in table[recipe]
    assert "Student CE against lm_only" in out
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
    assert {r: s["eval_ce"] for r, s in second.items()} == {r: s["eval_ce"] for r, s in summaries.items()}


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
