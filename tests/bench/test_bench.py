"""The benchmark itself: its truth is autograd's, contenders are checked and never dropped, its tables say who loses."""

import json
import math
import os
import re
import statistics
import subprocess
import sys

import measure
import pytest
import records
import report
import scaling
import torch
import torch.nn.functional as F
import truth
from communication import NUMBERS, Step, predicted
from compare import LIMITS, check, figures
from methods import BY_NAME, METHODS
from methods.floors import recorded
from methods.method import Method
from workloads import TEMPERATURE, WORKLOADS, Inputs, Workload

TEACHERS = ["projected", "head", "none"]
TRL = "TRL ChunkedDivergence"
FLOORS = ["floor A (whole products)", "floor B (our products)"]


def tiny(teacher="head", dtype=torch.float32):
    # 70 tokens are two blocks of the truth's; 1111 ids are more than it checks of W
    return Workload("tiny", teacher, 70, 1111, 16, 24, dtype)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_truth_is_autograd_in_float64(teacher):
    inputs = Inputs(tiny(teacher))
    hs, W = (leaf.detach().double().requires_grad_() for leaf in (inputs.hs, inputs.W))
    if teacher == "none":
        loss = F.cross_entropy(hs @ W.T, inputs.labels)
    else:
        P = inputs.P.detach().double().requires_grad_() if teacher == "projected" else None
        z_t = inputs.ht.double() @ (inputs.Wt.double().T if P is None else P.T @ W.T)
        log_q, log_p = ((z / TEMPERATURE).log_softmax(-1) for z in (hs @ W.T, z_t))
        loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
    loss.backward()
    exact = truth.truth(inputs)
    torch.testing.assert_close(exact.value, loss.detach())
    torch.testing.assert_close(exact.gradients["hidden"], hs.grad)
    torch.testing.assert_close(exact.gradients["weight"], W.grad[: truth.CHECKED])
    if teacher != "none":
        torch.testing.assert_close(exact.entropy, entropy.detach())
    if teacher == "projected":
        torch.testing.assert_close(exact.gradients["projector"], P.grad)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_contender_that_can_run_is_right(teacher, dtype):
    """Here KL is large. Liger's gradients are taken from bf16 logits and added up in bf16."""
    inputs = Inputs(tiny(teacher, dtype))
    exact = truth.truth(inputs)
    ran = []
    for method in METHODS:
        if method.compiles:  # a compilation: `pytest bench`
            continue
        row = check(method, inputs, exact)
        if "missing" in row:
            assert row["missing"].endswith(("is not installed", "needs a GPU", "cannot do this case")), row
            continue
        ran.append(method.name)
        if not method.is_floor and not (dtype == torch.bfloat16 and method.name.startswith("Liger")):
            limit = 2 * LIMITS[dtype]  # few tokens: rounding averages out less
            assert all(error < limit for error in row["errors"].values()), (method.name, row["errors"])
        assert all(leaf.grad is None for leaf in inputs.leaves.values())
    assert {*FLOORS, "kdfast torch", "kdfast reference", "eager"} <= set(ran)


def test_a_wrong_gradient_is_shown_as_that():
    inputs = Inputs(tiny())
    wrong = Method("wrong", lambda inputs: 1.01 * BY_NAME["eager"].loss(inputs), {"head": "?"})
    row = check(wrong, inputs, truth.truth(inputs))
    assert not row["right"]
    assert row["errors"]["hidden"] == pytest.approx(0.01, rel=1e-3)
    without = Method("without", lambda inputs: BY_NAME["eager"].loss(inputs) - inputs.W.sum() * 0, {"head": "?"})
    assert check(without, inputs, truth.truth(inputs))["right"]
    detached = Method("detached", lambda inputs: (inputs.hs * 1).sum(), {"head": "?"})
    assert math.isinf(check(detached, inputs, truth.truth(inputs))["errors"]["weight"])


def test_trainers_that_are_compared_take_the_same_step():
    pytest.importorskip("trl", reason="pip install trl")
    import on_policy

    both = on_policy.make_models(size := on_policy.Size(97, 32, 64))
    for pair in on_policy.CONTENDERS.values():
        gradients = []
        for name in pair:
            on_policy.make_step(name, size, both)(2, 3, 5)
            gradients.append([p.grad for p in both[0].parameters()])
        for theirs, ours in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_contender_that_fails_is_listed():
    def fails(inputs):
        raise RuntimeError("no such thing")

    row = check(Method("fails", fails, {"head": "?"}), Inputs(tiny()), None)
    assert row == {"missing": "RuntimeError: no such thing"}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_floor_b_makes_the_operations_of_the_problem(teacher):
    workload = tiny(teacher)
    forward, step = recorded(Inputs(workload))
    assert sum(call.operations for call in forward) == workload.operations(backward=False)
    assert sum(call.operations for call in step) == workload.operations(backward=True)


def test_inputs_at_a_distance_share_the_student():
    """A projected teacher's hidden states are rotated, and its projector turns them back: the student's logits."""
    workload = Workload("near", "projected", 8, 100, 16, 16)
    inputs = Inputs(workload, distance=0.0)
    torch.testing.assert_close(F.linear(inputs.ht, inputs.P), inputs.hs)
    assert not torch.allclose(inputs.ht, inputs.hs)


def test_workloads_have_names_of_their_own():
    names = [str(workload) for workload in WORKLOADS]
    assert len(set(names)) == len(names)
    assert {"projected", "head", "none"} == {workload.teacher for workload in WORKLOADS}


@pytest.mark.slow
def test_the_replayed_clock(tmp_path):
    """pytest-benchmark's statistics are of the times measured before."""
    (tmp_path / "test_it.py").write_text(
        "import pytest, clock\n"
        "CLOCK = clock.Replay()\n"
        "@pytest.mark.benchmark(timer=CLOCK)\n"
        "def test_it(benchmark):\n"
        "    benchmark.pedantic(CLOCK.play([0.25, 0.5, 1.5]), rounds=3)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json=it.json", "test_it.py"]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}  # xdist's among them
    environment = ours | {"PYTHONPATH": str(measure.ROOT / "bench")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (found,) = json.loads((tmp_path / "it.json").read_text())["benchmarks"]
    assert found["stats"]["rounds"] == 3
    assert (found["stats"]["min"], found["stats"]["median"], found["stats"]["max"]) == (0.25, 0.5, 1.5)


def test_an_entry_is_added_to_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "path", lambda benchmark, *_: tmp_path / f"{benchmark}.json")
    records.add("loss", "a", {"rows": {"x": 1}})
    records.add("loss", "b", {"rows": {}})
    records.add("loss", "a", {"rows": {"x": 2}})
    entries = json.loads((tmp_path / "loss.json").read_text())["entries"]
    assert list(entries) == ["a", "b"]
    assert entries["a"]["rows"] == {"x": 2}
    assert entries["a"]["machine"]["torch"] == torch.__version__
    assert [file.name for file in tmp_path.iterdir()] == ["loss.json"]


def made_up(**times):
    """An entry with these steps' seconds, as test_loss.py writes it."""
    workload = tiny()
    rows = {}
    for name, seconds in times.items():
        name = {"floor_a": FLOORS[0], "floor_b": FLOORS[1], "ours": "kdfast torch"}.get(name, name)
        rows[name] = {"operations": "3u(Hs)+u(Ht)", "ours": name == "kdfast torch", "floor": name in FLOORS}
        rows[name] |= {"whole_logits": name == "eager", "forward": [seconds / 3] * 2, "step": [seconds, seconds]}
        if name not in FLOORS:
            rows[name] |= {"errors": {"value": 0.0, "hidden": 1e-6, "weight": 2e-6}, "right": True}
            rows[name] |= {"peak_bytes": 100 << 20}
    for row in rows.values():
        row |= figures(workload, row, rows)
    rows["fla fused KL"] = {"missing": "needs a GPU"}
    sizes = {"tokens": 70, "vocab": 1111, "student_width": 16, "teacher_width": 24, "dtype": "fp32", "rounds": 2}
    machine = measure.machine() | {"device": "no known GPU"}
    return {"machine": machine, "workload": "original", "teacher": "head", **sizes, "rows": rows}


def test_the_report_names_who_is_faster_and_who_did_not_run():
    entry = made_up(floor_a=0.8, floor_b=1.0, ours=2.0, eager=1.6, **{TRL: 1.0})
    near = {("head", "fp32", TRL): 0.05, ("head", "fp32", "kdfast torch"): 1e-5}
    (line,) = [line for line in report.verdicts({"x": entry}, near) if "kdfast torch" in line]
    assert f"{TRL} (2.00×, gradients 5% off at KL 0.001)" in line
    assert "eager (1.25×)" in line
    assert "50% (below the aim)" in line
    table = "\n".join(report.table(entry, near))
    assert "Not run: fla fused KL (needs a GPU)." in table
    assert "5e-02 ✗" in table
    assert "eagerᴺ" in table
    predicted, seconds = report.planned(entry, "kdfast torch")
    assert seconds is None, "known GPUs only"
    line = f"| 0 of 1 | {predicted / (100 << 20):.2f} (original, head, fp32) |"
    assert line in "\n".join(report.planner({"x": entry}))


def test_the_picture_is_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    sweep = {
        f"N{n}": made_up(floor_a=0.8, floor_b=1.0, ours=n / 100) | {"workload": f"N{n}", "tokens": n}
        for n in (100, 200)
    }
    report.pictures(sweep, {}, tmp_path, "cpu")
    assert (tmp_path / "bench-cpu.png").stat().st_size > 10_000


def test_the_tables_of_several_gpus():
    assert (measure.ROOT / "bench/results/scaling.md").read_text() == scaling.page(), "stale: python bench/scaling.py"


def test_what_several_processes_communicate():
    """docs/distributed.md has the bytes of the formulas, which were counted, and the largest groups."""
    text = " ".join((measure.ROOT / "docs/distributed.md").read_text().split())
    entries = json.loads((measure.ROOT / "bench/results/communication-cpu.json").read_text())["entries"]
    runs = [entries[f"{ranks} processes"] for ranks in (2, 4)]
    titles = {
        "ours": "vocabulary-parallel",
        "gathered logits": "gathering the logits",
        "gathered head": "gathering the head",
    }
    for method, title in titles.items():
        sizes = [predicted(Step(1024, 50257, 768, run["ranks"]))[method] for run in runs]
        cells = " | ".join(f"{size / 2**20:.3g} MiB" for size in sizes)
        assert re.search(rf"\| {title} \| [^|]+ \| {cells} \|", text), f"{title}: {cells}"
        if method != "gathered head":
            assert [run[method]["bytes"] for run in runs] == pytest.approx(sizes, rel=1e-3)
    assert 4 * NUMBERS == 60
    assert f"We measured {runs[0]['ratio']:.2f} times the time of one process, with two processes" in text
    largest = [scaling.limit(262144, link) for link in (scaling.NVLINK, scaling.NETWORK)]
    hidden = (
        "At V = 262144 it should hide its communication on up to {:.0f} GPUs over NVLink, and on up to {:.0f} over a"
    )
    assert hidden.format(*largest) in text


def test_the_table_of_the_readme():
    """Seconds, MiB and gradients' errors there are those in bench/results."""
    loss, accuracy = (records.read(name, "cpu", measure.ROOT / "bench/results") for name in ("loss", "accuracy"))
    near = report.near_convergence(accuracy)
    names = ("kdfast torch", TRL, "Liger chunked JSD (beta=0)", "eager", "eager, torch.compile")

    def measured(entry, name):
        row = loss[entry]["rows"].get(name, {})
        if "step" not in row:
            return "–"
        return f"{statistics.median(row['step']):.2f} s, {row['peak_bytes'] / 2**20:.0f} MiB"

    rows = {
        "teacher's own head, fp32": [measured("original-head-fp32", name) for name in names],
        "the same, bf16": [measured("original-head-bf16", name) for name in names],
        "gradients' error, bf16, KL 1e-3": [f"{100 * near['head', 'bf16', name]:.2g}%" for name in names],
        "through a projector, fp32": [measured("original-projected-fp32", name) for name in names],
    }
    text = (measure.ROOT / "README.md").read_text().replace("**", "")
    for title, cells in rows.items():
        assert f"| {title} | {' | '.join(cells)} |" in text
