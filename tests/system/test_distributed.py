"""Several processes do what one does with the whole batch: losses, metrics, every gradient, and what is saved.

One launch of 2 and one of 4 processes (distributed_runs.py) make all results; what one process makes is made here.
"""

import dataclasses
import os
from pathlib import Path

import distributed_runs
import pytest
import server
import torch
from distributed_runs import SCENARIOS, Scenario
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CASES = [(n, scenario) for n in (2, 4) for scenario in SCENARIOS[n]]
NOT_COMPARED = ("runtime", "per_second", "memory", "time")


def launch(processes, folder):
    """distributed_runs.py in so many processes; what they said."""
    server.join(server.start(folder, processes, server.run_file, Path(distributed_runs.__file__), folder))
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("output-*.txt")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all workers of pytest-xdist, so that each launch is made once."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "distributed"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="module")
def several(folder):
    """several(2): what each of two processes found, by rank; launched at the first call."""
    results = {}

    def get(processes):
        if processes not in results:
            runs, told = folder / str(processes), folder / f"{processes}.txt"
            with FileLock(folder / f"{processes}.lock"):
                if not told.exists():
                    told.write_text(launch(processes, runs))
            files = [runs / f"results-{rank}.pt" for rank in range(processes)]
            assert all(file.exists() for file in files), told.read_text()[-5000:]
            results[processes] = [torch.load(file, weights_only=False) for file in files]
        return results[processes]

    return get


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of a scenario."""
    results = {}

    def get(scenario, dtype=None):
        dtype = dtype or scenario.dtype
        scenario = dataclasses.replace(scenario, how="ddp", shard_teacher=False, dtype=dtype)
        if scenario not in results:
            results[scenario] = distributed_runs.run(scenario, tmp_path_factory.mktemp("alone"), processes=1)
        return results[scenario]

    return get


def assert_same_logs(found, expected, rel):
    keys = {key for key in expected if not any(word in key for word in NOT_COMPARED)}
    assert keys <= found.keys()
    for key in sorted(keys):
        assert found[key] == pytest.approx(expected[key], rel=rel, abs=1e-9), key


@pytest.mark.parametrize(("processes", "scenario"), CASES, ids=lambda x: x.name if isinstance(x, Scenario) else str(x))
def test_it_is_one_process_with_the_whole_batch(several, alone, processes, scenario):
    every, expected = [result[scenario.name] for result in several(processes)], alone(scenario)
    found = every[0]
    assert found["gradients"].keys() == expected["gradients"].keys()
    # Trainer's sum of losses and the metrics are fp32 whatever the model is
    for key in ("steps", "evaluated"):
        pairs = zip(found[key], expected[key], strict=True) if key == "steps" else [(found[key], expected[key])]
        for ours, theirs in pairs:
            assert_same_logs(ours, theirs, rel=2e-5 if scenario.dtype == "float32" else 5e-7)
    for other in every[1:]:
        for name, weight in found["weights"].items():
            assert torch.equal(other["weights"][name], weight), name

    if scenario.dtype == "float64":
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-12, atol=0.0)
        for key in ("gradients", "weights"):
            for name, value in expected[key].items():
                atol = 1e-12 * value.abs().max().item() + 1e-17
                torch.testing.assert_close(
                    found[key][name], value, rtol=1e-10, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
                )
    else:
        truth = alone(scenario, "float64")
        whole = torch.stack([g.norm() for g in truth["gradients"].values()]).norm()
        for name, true in truth["gradients"].items():
            ours, one = ((result["gradients"][name].double() - true).norm() for result in (found, expected))
            # sums in another order: a few units of fp32's 6e-8, of this gradient and of those it was made from
            assert ours <= one + 1e-6 * true.norm() + 1e-8 * whole, name
        ours, one = ((result["losses"] - truth["losses"]).abs() for result in (found, expected))
        assert (ours <= one + 1e-6 * truth["losses"]).all()


@pytest.mark.parametrize("kind", ["ddp", "full", "sharded"])
def test_a_resumed_run_is_the_unbroken_one(several, folder, kind):
    for result in several(2):
        found = result[f"checkpoint-{kind}"]
        for name, weight in found["unbroken"].items():
            assert torch.equal(found["resumed"][name], weight), name
        moved = [name for name, weight in found["unbroken"].items() if not torch.equal(found["again"][name], weight)]
        assert len(moved) == len(found["unbroken"])

    # plain from_pretrained reads the student; the projector lies beside it
    run = folder / "2" / f"checkpoint-{kind}" / "unbroken"
    files = {path.name for path in run.iterdir()}
    optimizer = {"ddp": "optimizer.pt", "full": "optimizer.bin", "sharded": "optimizer_0"}[kind]
    saved = {path.name for path in (run / "checkpoint-4").iterdir()}
    assert files >= {"checkpoint-2", "checkpoint-4", "model.safetensors", "config.json"}
    assert not {name for name in files | saved if "fsdp" in name or "incomplete" in name}
    assert saved >= {"model.safetensors", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json", optimizer}
    for path in (run, run / "checkpoint-4"):
        with safe_open(path / "model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) is (kind == "sharded")  # tied: once  # noqa: SIM118
        student, report = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        for name, weight in student.named_parameters():
            assert torch.equal(weight, found["unbroken"][f"student.{name}"]), name


@pytest.mark.parametrize("scenario", distributed_runs.ADAPTED, ids=lambda scenario: scenario.name)
def test_a_resumed_adapter_is_the_unbroken_one(several, folder, scenario):
    name = f"checkpoint-{scenario.name}"
    for result in several(2):
        for weight, value in result[name]["unbroken"].items():
            assert torch.equal(result[name]["resumed"][weight], value), weight
    run = folder / "2" / name / "unbroken"
    for path in (run, run / "checkpoint-4"):
        assert {"adapter_model.safetensors", "adapter_config.json"} <= {file.name for file in path.iterdir()}
        assert not (path / "model.safetensors").exists()
        saved = load_file(path / "adapter_model.safetensors")
        trained = {key: value for key, value in result[name]["unbroken"].items() if key.startswith("student.")}
        assert len(saved) == len(trained)
        for weight, value in trained.items():
            key = weight.replace("student.", "base_model.model.", 1).replace(".modules_to_save", "")
            assert torch.equal(saved[key.replace(".default", "")], value), weight


def test_a_checkpoint_of_two_processes_is_gone_on_with_by_one(several, folder, tmp_path):
    found = several(2)[0]["checkpoint-ddp"]
    checkpoint = folder / "2" / "checkpoint-ddp" / "unbroken" / "checkpoint-2"
    trainer = distributed_runs.make_trainer(Scenario(), tmp_path, processes=1, max_steps=4)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in distributed_runs.weights_of(trainer).items():
        torch.testing.assert_close(weight, found["unbroken"][name], rtol=1e-10, atol=1e-12)


def test_the_best_model_is_loaded_in_the_end(several):
    for result in several(2):
        found = result["best"]
        assert found["loaded"] == pytest.approx(min(found["evaluated"]), rel=1e-12)
        assert found["loaded"] == pytest.approx(found["best"], rel=1e-12)
        assert found["evaluated"][0] < found["evaluated"][1]


def test_generated_text_is_each_processes_own_and_the_same_under_fsdp_and_after_a_resume(several):
    results = several(2)
    for result in results:
        ddp, fsdp = (result[f"on_policy-{how}"] for how in ("ddp", "fsdp"))
        assert all(torch.equal(*pair) for pair in zip(ddp["texts"], fsdp["texts"], strict=True))
        for name, weight in ddp["weights"].items():
            torch.testing.assert_close(fsdp["weights"][name], weight, rtol=1e-9, atol=1e-12)
        for one in (ddp, fsdp):
            assert all(torch.equal(*pair) for pair in zip(one["texts"][2:], one["resumed"]["texts"], strict=True))
            assert all(torch.equal(weight, one["resumed"]["weights"][name]) for name, weight in one["weights"].items())
    first, second = (result["on_policy-ddp"]["texts"][0] for result in results)
    assert first.shape != second.shape or not torch.equal(first, second)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_step_that_is_bad_on_one_process_is_left_out_on_all(several, how):
    told = [result[f"skip-{how}"] for result in several(2)]
    assert [each["changed"] for each in told] == [[1, 3], [1, 3]]
    assert told[0]["weights"] == told[1]["weights"]
    assert told[0]["skipped"] == [0, 1, 0]
    assert ["another process" in each["finding"] for each in told] == [True, False]
    if how == "fsdp":  # a weight that is NaN in the second process's shard: neither saves
        assert ["1 parameter(s) hold NaN" in each["not_saved"] for each in told] == [True, True]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_mixed_precision_keeps_weights_sums_loss_and_counts_in_fp32(several, alone, how):
    found, expected = several(2)[0][f"bf16-{how}"], alone(Scenario(dtype="float32"))
    assert set(found["dtypes"].values()) == {torch.float32}
    assert found["dtypes"].keys() >= {"kd_weight", "loss", "tokens", "ce"}
    assert not found["rounded"]  # gradients, summed over processes in fp32
    for ours, exact in zip(found["steps"], expected["steps"], strict=True):
        assert ours["loss"] == pytest.approx(exact["loss"], rel=2e-2)
        assert ours["loss"] != pytest.approx(exact["loss"], rel=1e-6)  # it is computed in bf16
        assert ours["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5e-2)
