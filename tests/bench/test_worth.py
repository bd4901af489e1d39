"""The experiment at equal seconds: its plan is one that `kdfast distill` accepts, and what its table makes of runs."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "recipes"


@pytest.fixture
def worth(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import worth

    yield worth
    for name in ("setting", "contenders", "experiment", "worth"):
        sys.modules.pop(name, None)


def test_every_contender_is_a_run_that_kdfast_distill_accepts(worth, tmp_path):
    from kdfast.cli.arguments import parse_mapping
    from kdfast.training.recipes import RECIPES

    jobs = worth.plan([])
    assert {job.case for job in jobs} >= {"little", "plenty", "moved"}
    assert len({job.path(tmp_path) for job in jobs}) == len(jobs), "two jobs, one folder"
    for job in jobs:
        arguments = parse_mapping(
            job.contender, {**worth.settings(tmp_path, job), "output_dir": str(job.path(tmp_path))}
        )
        assert arguments.training.resolved().name in RECIPES
        assert arguments.training.max_steps == job.steps
        assert arguments.training.seed == job.seed


def test_rows_of_several_seeds_come_first_a_seed_of_all_before_the_next(worth):
    jobs = worth.plan([])
    several = [
        job for job in jobs if any(other._replace(seed=1) == job._replace(seed=1) for other in jobs if other.seed)
    ]
    assert jobs[: len(several)] == several
    assert [job.seed for job in several] == sorted(job.seed for job in several)
    assert {job.seed for job in jobs[len(several) :]} == {0}
    assert {(job.case, "svd_init" in job.contender) for job in worth.plan(["plenty", "svd_init"])} == {("plenty", True)}


def run(contender, steps, seed, ce):
    row = {"case": "little", "contender": contender, "steps": steps, "seed": seed}
    return {**row, "eval_ce": ce, "kl_teacher_student": 0.5, "tokens": 100 * steps}


def test_the_table(worth):
    """LM only costs 1 s per hundred tokens, the other as much again and 2 s before the first step."""
    result = {
        "prices": {
            "little": {
                "lm_only": {"per_token": 0.01, "before": 0.0},
                "svd_init": {"per_token": 0.02, "before": 2.0},
            },
        },
        "runs": [
            run("lm_only", 4, 0, 6.0),
            run("lm_only", 16, 0, 5.0),
            run("lm_only", 4, 1, 6.2),
            run("lm_only", 16, 1, 5.4),
            run("svd_init", 3, 0, 4.0),
            run("svd_init", 4, 0, 4.5),
            run("svd_init", 4, 1, 4.9),
        ],
    }
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in worth.table("little", result).splitlines()[2:]
    ]
    assert lines[0] == ["lm_only", "400", "4", "2", "6.100 ± 0.100", "", "", "0.500"]
    # 8 s are half of the way from 4 to 16 in logarithms: LM only is at 5.5 by then
    assert lines[2] == ["svd_init", "300", "8", "1", "4.000", "", "-1.500", "0.500"]
    # 10 s: 6 − log(10/4)/log 4 = 5.339, 6.2 − 0.8·0.661 = 5.671
    assert lines[3] == ["svd_init", "400", "10", "2", "4.700 ± 0.200", "-1.400 ± 0.100", "-0.805 ± 0.034", "0.500"]


def test_lm_only_is_that_of_its_best_learning_rate(worth):
    result = {
        "prices": {},
        "runs": [
            run("lm_only", 4, 0, 6.0),
            run("lm_only learning_rate=2e-3", 4, 0, 5.0),
            run("lm_only learning_rate=4e-3", 4, 0, 5.5),
            run("svd_init", 4, 0, 4.5),
        ],
    }
    *_, last = worth.table("little", result).splitlines()
    assert last == "| svd_init | 400 |  | 1 | 4.500 | -0.500 |  | 0.500 |"


def test_lm_only_that_has_got_worse_is_taken_at_its_best_and_one_that_has_not_is_not_extrapolated(worth):
    price = worth.Price(1.0, 0.0)
    worse = {4: {0: {"tokens": 4, "eval_ce": 5.0}}, 16: {0: {"tokens": 16, "eval_ce": 5.5}}}
    better = {4: {0: {"tokens": 4, "eval_ce": 5.0}}, 16: {0: {"tokens": 16, "eval_ce": 4.5}}}
    assert worth._within(20.0, 0, worse, price) == 5.0
    assert worth._within(8.0, 0, worse, price) == 5.0
    assert worth._within(20.0, 0, better, price) is None
    assert worth._within(8.0, 0, better, price) == pytest.approx(4.75)
    assert worth._within(2.0, 0, better, price) is None
    assert worth._within(8.0, 1, better, price) is None


def test_a_contender_costs_what_the_one_does_that_computes_the_same(worth):
    prices = {
        case: {name: worth.Price(float(number) + 100 * (case == "wide"), 2.0) for number, name in enumerate(names)}
        for case, names in worth.PRICED.items()
    }
    number = worth.PRICED["little"].index
    assert worth.price(prices, "little", "svd_blocks learning_rate=3e-4 ce_weight=0").per_token == number("svd_blocks")
    live = number(f"svd_init {worth.LIVE}")
    assert worth.price(prices, "plenty", "svd_init").per_token == live / 2, "KD in half of the run, LM only costs 0"
    assert worth.price(prices, "plenty", "svd_init kd_until=1").per_token == live
    assert worth.price(prices, "little", f"svd_init {worth.LIVE} kd_until=1").per_token == live
    head = number(f"compressed_head {worth.LIVE}")
    assert worth.price(prices, "moved", "compressed_head teacher=adapted kd_until=1") == (head, 2)
    assert worth.price(prices, "little", "svd_blocks cache_top_k=16") is None, "it keeps something else"
    assert worth.price(prices, "wide", "lm_only") == (100, 2), "other models, other prices"


def test_the_published_tables_are_what_the_runs_came_to(worth):
    folder = FOLDER.parent / "results"
    result = json.loads((folder / "worth.json").read_text())
    assert {row["contender"] for row in result["runs"]} <= {job.contender for job in worth.plan([])}
    published = (folder / "worth.md").read_text()
    for case in dict.fromkeys(row["case"] for row in result["runs"]):
        assert f"### {case}\n\n{worth.table(case, result)}\n" in published


def test_the_readme_says_what_the_runs_came_to():
    readme = (FOLDER.parents[1] / "README.md").read_text()
    little = (FOLDER.parent / "results" / "worth.md").read_text().split("### ")[1].replace("-", "−")
    runs = [[cell.strip() for cell in line.split("|")] for line in little.splitlines() if line.startswith("| ")]
    recipes = tuple(f"| `{name}" for name in ("lm_only", "projector_fixed", "teacher_head", "svd_"))
    rows = [line.replace("**", "").split("|") for line in readme.splitlines() if line.startswith(recipes)]
    assert len(rows) == 4
    for _, name, ce, seconds, by_tokens, by_seconds, _ in rows:
        (run,) = (run for run in runs if (run[5], run[3]) == (ce.strip(), seconds.strip()))
        assert run[6].startswith(by_tokens.strip()), name
        assert run[7].startswith(by_seconds.strip()), name
