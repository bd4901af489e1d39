"""The benchmark of a whole training step, at a tiny size: its contenders agree, and its results are complete."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

# installed as the package alone, and where transformers is not, there is no benchmark to test
pytest.importorskip("transformers")

import step
import step_results
import test_step as bench

SETTING = step.Setting("tiny", 16)
PLAN = bench.Plan(SETTING, (1, 2), rounds=1, search=True, budget=1 << 30, fresh_process=False)


@pytest.fixture
def without_trl(monkeypatch):
    """Importing it takes longer than all the rest."""
    for module in ("trl", "trl.experimental.gkd.gkd_trainer", "trl.kernels.chunked_divergence"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture
def fixed_peaks(monkeypatch):
    """1 MiB and 100 MiB a sequence, 150 for those who make logits; nothing is run."""

    def peak(setting, name, size):
        return {"peak_bytes": (1 + size * (100 if name.startswith("kdfast") else 150)) << 20, "gradient_bytes": 1}

    monkeypatch.setattr(bench, "peak_of_step", peak)


def check_agreement(made, names):
    differences = made.differences(made.batch(3))
    assert names <= set(differences)
    for name, found in differences.items():
        assert found["loss_difference"] < 1e-5, name
        assert found["gradient_difference"] < 1e-4, name
    return differences


def test_contenders_compute_the_same_loss(without_trl):
    check_agreement(step.Bench(SETTING), {"kdfast, teacher's own head", step.EAGER})


def test_contenders_compute_the_same_loss_with_checkpointing(without_trl):
    check_agreement(step.Bench(replace(SETTING, checkpointing=True)), {"kdfast, teacher's own head", step.EAGER})


def test_trl_computes_the_same_loss():
    trl = {"eager, TRL's generalized_jsd_loss", "chunked, TRL's KL + torch's cross entropy"}
    made = step.Bench(SETTING, [*trl, step.EAGER])
    if made.missing:
        pytest.skip(str(made.missing))
    check_agreement(made, trl)


def test_a_divisor_off_by_one_would_show(without_trl, monkeypatch):
    made = step.Bench(SETTING)
    monkeypatch.setattr(step, "KD_WEIGHT", 0.7 * 8 / 9)  # eager reads it now, kdfast has read it
    found = made.differences(made.batch(1))["kdfast, teacher's own head"]
    loss, gradient = bench.TOLERANCE["float32"]
    assert found["loss_difference"] > 10 * loss
    assert found["gradient_difference"] > 10 * gradient


def test_results_are_complete_and_missing_contenders_listed(without_trl, fixed_peaks, tmp_path):
    path = tmp_path / "results" / "step.json"
    bench.measured(PLAN, path)
    result = json.loads(path.read_text())
    pair = result["pairs"]["tiny"]
    assert result["machine"]["torch"]
    assert step.Setting(**pair["setting"]) == SETTING
    assert [row["contender"] for row in pair["rows"]] == [contender.name for contender in step.CONTENDERS]
    for row in pair["rows"]:
        if "TRL" in row["contender"]:
            assert "trl" in row["missing"]
            assert row["batches"] == {}
            continue
        assert row["missing"] is None
        assert ("loss_difference" in row) == (row["contender"] != "kdfast, projected teacher")
        assert set(row["batches"]) == {"1", "2"}
        for at in row["batches"].values():
            assert at["seconds"] == at["all_seconds"][0] > 0
            assert at["loss_share"] > 0
            assert len(at["all_seconds"]) == len(at["all_loss_seconds"]) == 1
            assert at["peak_bytes"] > 0
        assert row["largest"]["verified"]
        assert row["largest"]["batch"] == (10 if row["contender"].startswith("kdfast") else 6)
    text = "\n".join(step_results.lines(result))
    for contender in step.CONTENDERS:
        assert f"| {contender.name} |" in text
    assert "not installed" in text
    assert "901 MiB | 1051 MiB, does not fit" in text
    assert "Where kdfast loses" in text
    for row in pair["rows"]:  # as after an interruption
        row["batches"] = {}
        row.pop("largest", None)
    text = "\n".join(step_results.lines(result))
    assert text.count("not measured yet") == 3
    assert "loses" not in text


def test_other_pairs_in_the_file_are_kept(without_trl, fixed_peaks, tmp_path):
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"pairs": {"gpt2": {"title": "earlier"}}}))
    plan = bench.Plan(SETTING, (1,), rounds=1, search=False, budget=None, fresh_process=False)
    assert bench.measured(plan, path)["pairs"]["gpt2"] == {"title": "earlier"}
    assert list(json.loads(path.read_text())["pairs"]) == ["gpt2", "tiny"]


def test_losing_cases_are_named():
    def row(name, seconds, peak, largest):
        return {
            "contender": name,
            "batches": {"4": {"seconds": seconds, "peak_bytes": peak}},
            "largest": {"batch": largest},
        }

    ours, other = row("kdfast, x", 2.0, 150, 4), row("eager, y", 1.0, 100, 5)
    assert list(step_results.losing({"rows": [ours, other]})) == [
        "kdfast, x, 4 sequences: slower than eager, y (100%)",
        "kdfast, x, 4 sequences: more memory than eager, y (50%)",
        "kdfast, x: eager, y fits a larger batch",
    ]
    assert not list(
        step_results.losing({"rows": [other | {"contender": "kdfast, z"}, ours | {"contender": "eager, w"}]})
    )


@pytest.mark.parametrize(
    "bytes_at",
    [
        lambda size: 10 + 7 * size,
        lambda size: 10 + 7 * size + 30 * (size > 3),  # a buffer that is allocated from some size on
        lambda size: 200 + 3 * max(0, size - 20),  # flat where the table measured
    ],
)
def test_largest_batch_is_the_last_that_fits(bytes_at):
    asked = []

    def peak(size):
        asked.append(size)
        return {"peak_bytes": bytes_at(size)}

    found = bench.largest_batch(peak, {size: peak(size) for size in (1, 4)}, budget=1000, attempts=12)
    assert bytes_at(found["batch"]) <= 1000 < bytes_at(found["batch"] + 1)
    assert found["verified"]
    assert len(asked) == len(set(asked)) == len(found["tries"])


def test_largest_batch_where_not_even_one_sequence_fits():
    found = bench.largest_batch(lambda size: pytest.fail("nothing to try"), {1: {"peak_bytes": 2000}}, budget=1000)
    assert (found["batch"], found["verified"]) == (0, True)


def test_largest_batch_until_out_of_memory():
    def peak(size):
        return {"out_of_memory": True, "room": 1000} if 90 * size > 1000 else {"peak_bytes": 90 * size, "room": 1000}

    found = bench.largest_batch(peak, {1: peak(1), 2: peak(2)}, budget=None)
    assert (found["batch"], found["verified"]) == (11, True)
    # without a line to look along it doubles, then halves
    assert bench.largest_batch(peak, {1: peak(1)}, budget=None, attempts=12)["batch"] == 11


def test_largest_batch_says_what_it_did_not_verify():
    assert not bench.largest_batch(lambda size: {"timed_out": True}, {1: {"peak_bytes": 1}}, budget=1000)["verified"]
    slow = bench.largest_batch(lambda size: {"peak_bytes": 1}, {1: {"peak_bytes": 1}}, budget=1000, attempts=2)
    assert slow["batch"] > 1
    assert not slow["verified"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the resident set is Linux's")
def test_memory_is_measured_in_a_process_of_its_own():
    found = step.peak_in_fresh_process(SETTING, "kdfast, teacher's own head", 2)
    assert found["peak_bytes"] >= 0  # how much it is depends on what the process held already
    assert "seconds" not in found  # is the timed steps' in the row it goes into
    assert step.peak_in_fresh_process(SETTING, step.EAGER, 2, most_seconds=0.01) == {"timed_out": True}
