"""`kdfast report`: which folders are runs, what they are called, and what is not overwritten. Logs are made up here;
one run is real."""

import json
import re
import shutil

import pytest

from kdfast.report import read_runs
from kdfast.report.page import minus_lm_only
from kdfast.report.read_runs import find_runs

LOG = [
    {"step": 1, "loss": 3.0, "ce": 3.0, "tokens_seen": 10, "tokens_per_second": 5.0, "memory_bytes": 2**30},
    {"step": 2, "loss": 2.0, "ce": 2.0, "tokens_seen": 20, "tokens_per_second": 10.0, "memory_bytes": 2**29},
    {"step": 2, "eval_loss": 2.5, "eval_ce": 2.5, "eval_perplexity": 12.18},
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def state(path, step=2, end=2, log=LOG):
    write(path / "trainer_state.json", {"global_step": step, "max_steps": end, "log_history": log})


def finished(path, **summary):
    write(path / "kdfast.json", {"recipe": "run5"})
    state(path)
    write(path / "summary.json", {"recipe": "run5", "eval_ce": 2.5, **summary})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*arguments):
    return [run.name for run in find_runs(arguments)]


def test_a_real_run_finished_and_interrupted(place, kdfast):
    assert kdfast("distill", "config.yaml", "--recipe", "lm_only")[0] == 0
    shutil.copytree(place / "out", place / "stopped")
    for name in ("summary.json", "trainer_state.json"):
        (place / "stopped" / name).unlink()
    shutil.rmtree(place / "stopped/checkpoint-4")

    code, out, _ = kdfast("report", ".", "--png", "pictures", "--title", "Two <runs>")
    assert code == 0
    assert re.search("^run +out +stopped$", out, re.MULTILINE)  # a column for each
    assert re.search("^unfinished +– +step 2 of 4$", out, re.MULTILINE)
    assert "2 runs in report.html" in out
    page = (place / "report.html").read_text()
    assert "<h1>Two &lt;runs&gt;</h1>" in page
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert {"Student perplexity", "Learning rate of the student", "Memory, MiB", "Tokens per second"} <= set(captions)
    assert len(list((place / "pictures").iterdir())) == len(captions)


def test_of_an_unfinished_run_the_newest_checkpoint_counts(here):
    write(here / "run/kdfast.json", {"recipe": "run4"})
    for step in (2, 10, 9):
        state(here / f"run/checkpoint-{step}", step, 50, [*LOG, {"step": step, "loss": 1.0, "health": ["it rises"]}])
    (run,) = find_runs(["run"])
    assert run.log.index[-1] == 10
    expected = {
        "unfinished": "step 10 of 50", "recipe": "run4", "eval_ce": 2.5, "perplexity": 12.18, "tokens": 20,
        "seconds": 3.0, "steps": 10, "peak_memory_bytes": 2**30, "kd": None,
        "health": [{"step": 10, "message": "it rises"}],
    }  # fmt: skip
    assert {key: run.summary[key] for key in expected} == expected
    state(here / "run/checkpoint-50", 50, 50)  # the last evaluation is still to come
    assert find_runs(["run"])[0].summary["unfinished"] == "step 50 of 50"


def test_a_run_of_kdtrainer_alone_has_its_recipe_and_is_compared_with(here):
    for name, ce in (("auto", 2.5), ("lm_only", 3.0)):
        state(here / name, log=[*LOG[:2], {**LOG[2], "eval_ce": ce}])
        write(here / name / "training_args.json", {"recipe": name})
    runs = find_runs(["auto", "lm_only"])
    assert [run.summary["recipe"] for run in runs] == ["auto", "lm_only"]
    assert minus_lm_only(runs[0], runs, "tokens") == -0.5


def test_a_checkpoint_that_goes_while_it_is_read(here, monkeypatch):
    for step in (2, 4):
        state(here / f"run/checkpoint-{step}", step, 9)
    listed = read_runs._states

    def going(path):
        found = listed(path)
        shutil.rmtree(here / "run/checkpoint-4", ignore_errors=True)
        return found

    (here / "run/kdfast.json").write_text("{}")
    monkeypatch.setattr(read_runs, "_states", going)
    run = read_runs.read_run(here / "run")
    assert run.summary["unfinished"] == "step 2 of 9"
    assert run.summary["recipe"] == "auto"  # the default, which the record leaves out


def test_runs_of_plain_transformers(here):
    plain = [{"step": 5, "loss": 2.0, "learning_rate": 1e-3, "epoch": 1.0}, {"step": 5, "eval_loss": 1.5}]
    state(here / "done/checkpoint-10", 10, 10, plain)
    state(here / "goes on", 10, 20, plain)  # trained to 10 once, then further
    state(here / "goes on/checkpoint-15", 15, 20, plain)
    done, goes_on = find_runs(["done", "goes on"])
    assert "unfinished" not in done.summary
    assert goes_on.summary["unfinished"] == "step 15 of 20"


def test_a_folder_of_runs_stands_for_them_in_natural_order(here):
    for name in ("seed-10", "seed-2", "b"):
        finished(here / "sweep" / name)
    (here / "sweep/notes").mkdir()
    write(here / "sweep/summary.json", {})  # as the demo leaves it
    assert names("sweep") == ["b", "seed-2", "seed-10"]
    assert names("mine=sweep") == ["mine/b", "mine/seed-2", "mine/seed-10"]
    assert names("sweep", "sweep/b", "./sweep/seed-2/") == ["b", "seed-2", "seed-10"]  # each once


def test_names_that_clash_get_their_parents_in_front(here):
    for path in ("x/a/run5", "y/a/run5", "y/b/run5", "alone"):
        finished(here / path)
    assert names("x/a", "y/a", "y/b", "alone") == ["x/a/run5", "y/a/run5", "y/b/run5", "alone"]
    assert names("x/a/run5", "run5=y/a/run5") == ["x/a/run5", "run5"]  # a name that was given stays
    finished(here / "a=b")
    assert names("a=b") == ["a=b"]  # a folder that is there


def test_what_a_user_made_is_never_overwritten(here, kdfast):
    finished(here / "run")
    (here / "report.html").write_text("<h1>My kdfast report</h1>")
    code, _, err = kdfast("report", "run")
    assert code == 2
    assert "--output: 'report.html' is not of kdfast report, and stays" in err
    assert (here / "report.html").read_text() == "<h1>My kdfast report</h1>"

    (here / "png").mkdir()
    (here / "png/total-loss.png").write_bytes(b"mine")
    code, _, err = kdfast("report", "run", "--output", "new/page.html", "--png", "png")
    assert code == 2
    assert "--png" in err
    assert not (here / "new").exists()  # nothing is written where not everything can be
    (here / "png/total-loss.png").unlink()
    for _ in range(2):  # its own it replaces
        assert kdfast("report", "run", "--output", "new/page.html", "--png", "png")[0] == 0
    assert [path.name for path in (here / "new").iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gone"], "RUN 'gone': '{here}/gone' does not exist"),
        (["a=gone"], "RUN 'a=gone': '{here}/gone' does not exist"),
        (["=run"], "RUN '=run': expected PATH or NAME=PATH"),
        (["run/summary.json"], "is a file; give the folder it lies in"),
        (["empty"], "no trainer_state.json in '{here}/empty', in a checkpoint-N there, or in a run one level below"),
        (["broken"], "'{here}/broken/trainer_state.json' cannot be read: Expecting property name"),
        (["list"], "'{here}/list/trainer_state.json' holds a list; expected a JSON object"),
        (["logless"], "'{here}/logless': trainer_state.json has no log_history"),
        (["a=run", "a=other"], "RUN: two runs are called 'a'"),
        (["run", "--output", "empty"], "--output: 'empty' is a folder"),
        (["run", "--output", "run/summary.json/x.html"], "the report cannot be written"),
    ],
)
def test_what_does_not_work_is_one_line_on_stderr(here, kdfast, arguments, expected):
    finished(here / "run")
    finished(here / "other")
    (here / "empty").mkdir()
    write(here / "broken/trainer_state.json", "{")
    write(here / "list/trainer_state.json", [])
    write(here / "logless/trainer_state.json", {})
    code, _, err = kdfast("report", *arguments)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("kdfast: ")
    assert expected.format(here=here) in line
    assert not (here / "report.html").exists()
