"""The experiment's book-keeping: what is run next, which rate is kept, and what the table makes of it. No training."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "recipes"
MODULES = ("setting", "contenders", "experiment", "results")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import experiment
    import results

    yield experiment, results
    for name in MODULES:
        sys.modules.pop(name, None)


def finish(job, root, ce):
    path = job.path(root)
    path.mkdir(parents=True)
    summary = dict.fromkeys(("kl_teacher_student", "kl_teacher_projected", "ce_projected", "kd", "agreement"), 0.5)
    summary |= {"eval_ce": ce, "tokens": 1, "seconds": 1.0, "health": [], "starts": [], "versions": {}}
    (path / "summary.json").write_text(json.dumps(summary))


def run_all(plan, root, ce):
    made = []
    while (job := plan.next(root, 3)) is not None:
        made.append((job.case.name, job.name, job.rate, job.seed))
        finish(job, root, ce(job))
    return made


def test_rates_are_tried_at_one_seed_and_the_best_is_kept(bench, tmp_path):
    experiment, _ = bench
    import setting

    lowest = min(experiment.RATES[False])
    wanted = lowest / 2  # outside of what is tried at first
    plan = experiment.Plan(setting.CASES["fresh-192"], "run4")
    made = run_all(plan, tmp_path, lambda job: 1 + abs(job.rate - wanted))
    tuning = [("fresh-192", "run4", rate, 0) for rate in (*experiment.RATES[False], wanted, wanted / 2)]
    assert made == [*tuning, ("fresh-192", "run4", wanted, 1), ("fresh-192", "run4", wanted, 2)]
    # a variant takes that rate and all seeds; the narrower student too, without trying again
    made = run_all(experiment.Plan(setting.CASES["fresh-128"], "run5"), tmp_path, lambda job: 1.0)
    assert made == [("fresh-128", "run5", wanted, seed) for seed in range(3)]


def test_a_run_that_stopped_at_a_nan_is_the_worst(bench, tmp_path):
    experiment, _ = bench
    import setting

    plan = experiment.Plan(setting.CASES["fresh-192"], "run4")
    for job in plan.tuning(tmp_path):
        if job.rate == max(experiment.RATES[False]):
            job.path(tmp_path).mkdir(parents=True)
            (job.path(tmp_path) / "failed").write_text("loss is nan")
        else:
            finish(job, tmp_path, 5.0 if job.rate == sorted(experiment.RATES[False])[1] else 6.0)
    assert plan.rate(tmp_path) == sorted(experiment.RATES[False])[1]
    assert plan.next(tmp_path, 3).seed == 1


def test_no_run_is_begun_twice(bench, tmp_path):
    experiment, _ = bench
    import setting

    case = setting.CASES["fresh-192"]
    plans = [experiment.Plan(case, name) for name in ("run4", "run5", "lm_only")]
    first = experiment._next(plans, tmp_path, 3, [])
    second = experiment._next(plans, tmp_path, 3, [first])
    assert (first.name, second.name) == ("run4", "lm_only"), "run5 waits for run4's rate"
    assert experiment._next(plans, tmp_path, 3, [first, second]) is None


def test_every_contender_is_a_run_that_kdfast_distill_accepts(bench, tmp_path):
    """Keys and values are checked by the command line's own parser."""
    import contenders
    import setting

    from kdfast.cli.arguments import parse_mapping
    from kdfast.training.recipes import RECIPES

    for pretrained, group in ((False, contenders.FRESH), (True, contenders.PRETRAINED)):
        for name, keys in group.items():
            settings = setting.student(tmp_path, setting.Case(192, pretrained), 1e-3, 0)
            keys = {key: 192 if value == contenders.WIDTH else value for key, value in keys.items()}
            arguments = parse_mapping(name, {**settings, **keys, "output_dir": str(tmp_path)})
            assert arguments.training.resolved().name in RECIPES
            assert contenders.TUNED_AS.get(name, name) in group


def test_the_table(bench, tmp_path):
    experiment, results = bench
    import setting

    case = setting.CASES["fresh-192"]
    better = {"lm_only": 6.0, "true_head": 5.0, "run4": 5.99}
    rate = sorted(experiment.RATES[False])[1]
    for name, ce in better.items():
        run_all(experiment.Plan(case, name), tmp_path, lambda job, ce=ce: ce + 0.1 * job.seed + (job.rate != rate))
    rows = results.collect(tmp_path)
    lines = results._table(rows).splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["true_head", "run4", "lm_only"]
    assert lines[0].startswith(f"| true_head | {rate:g} | 3 | {5.1:.3f} ± 0.100 | -1.000 ± 0.000 | ✓✓ |")
    assert "-0.010 ± 0.000 | ✓ |" in lines[1], "the same with every seed, but within the seeds' spread"
    assert sum(row["counts"] for row in rows) == 9
    assert len(rows) == 15
