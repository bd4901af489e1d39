"""Checkpoints that were damaged after they were written: found, named, and passed over or refused."""

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import fault_runs
import pytest
import torch
from fault_runs import damage, join, output, start
from safetensors.torch import load_file, save_file

from kdfast.training.durable import checksums
from kdfast.training.durable.errors import DamagedCheckpointError, TerminatedError
from kdfast.training.durable.resume import find_problem


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoint-2, -4 and -6, and what it came to."""
    folder = tmp_path_factory.mktemp("finished")
    fault_runs.train(fault_runs.make(folder))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def files(checkpoint):
    return sorted(path.name for path in checkpoint.iterdir())


def test_every_damage_to_every_file_is_found(folder):
    whole, broken = folder / "run/checkpoint-6", folder / "broken"
    assert find_problem(whole) is None
    names = files(whole)
    assert {"model.safetensors", "logit_projector.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < {
        *names
    }
    assert {"trainer_state.json", "config.json", checksums.NAME} < {*names}
    for name in names:
        for how in ("flip", "cut", "delete", "empty"):
            shutil.copytree(whole, broken)
            if how == "delete":
                (broken / name).unlink()
            elif how == "empty":
                (broken / name).write_bytes(b"")
            else:
                damage(broken / name, how)
            found = checksums.find_damage(broken)
            assert found is not None, (name, how)
            # a byte of the list itself may be a digit of another file's sum
            assert name in found or name == checksums.NAME, (found, name, how)
            shutil.rmtree(broken)


def test_every_line_of_the_list_counts(folder):
    """Cut at the end of a line, it looks well-formed."""
    path = folder / "run/checkpoint-6" / checksums.NAME
    lines = path.read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        path.write_text("".join(lines[:kept]))
        assert f"{checksums.NAME} is damaged" in checksums.find_damage(path.parent)


def state_of(text):
    return lambda folder: (folder / "trainer_state.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: [path.unlink() for path in folder.iterdir()], "it has no trainer_state.json"),
        (state_of("{"), "trainer_state.json cannot be read"),
        (state_of('["a"]'), "trainer_state.json cannot be read"),
        (state_of('{"global_step": "2", "max_steps": 6}'), "trainer_state.json has no global_step and max_steps"),
        (state_of('{"global_step": 2, "max_steps": 6, "log_history": [1]}'), "trainer_state.json has no log_history"),
        (lambda folder: os.mkfifo(folder / "scaler.pt"), "scaler.pt is no file"),  # whoever opens it waits
    ],
)
def test_checksums_that_match_do_not_make_a_checkpoint(folder, finished, change, expected):
    """What a run did not write, or was changed with its checksums, is passed over like what is damaged."""
    change(folder / "run/checkpoint-6")
    checksums.write(folder / "run/checkpoint-6")
    assert expected in find_problem(folder / "run/checkpoint-6")
    fault_runs.train(fault_runs.make(folder), resume=True)
    assert fault_runs.same_end(folder, finished)


def test_a_pipe_in_a_files_place_is_not_waited_for(folder):
    checkpoint = folder / "run/checkpoint-6"
    for name in ("config.json", checksums.NAME):
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)
        assert f"{name} is no file" in find_problem(checkpoint)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", {"state": {}}),
        ("scheduler.pt", 1),
        ("rng_state.pth", {}),
        ("model.safetensors", {"transformer.wte.weight": torch.ones(3, 3)}),
    ],
)
def test_a_state_that_is_of_something_else_is_named(folder, name, content):
    """Its checksum is right, and it holds data alone."""
    checkpoint = folder / "run/checkpoint-4"
    if name == "model.safetensors":
        save_file(content, checkpoint / name, {"format": "pt"})
    else:
        torch.save(content, checkpoint / name)
    checksums.write(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint-4' cannot be loaded: .* Go on from another"):
        fault_runs.make(folder).train(resume_from_checkpoint=str(checkpoint))


def test_sha256sum_reads_the_list_and_notes_may_lie_beside(folder):
    checkpoint = folder / "run/checkpoint-6"
    (checkpoint / "notes.txt").write_text("mine")
    assert checksums.find_damage(checkpoint) is None
    command = ["sha256sum", "--check", "--strict", "--quiet", checksums.NAME]
    assert subprocess.run(command, cwd=checkpoint, check=False).returncode == 0


def test_true_passes_over_a_damaged_one_says_so_and_keeps_it(folder, finished, caplog):
    damage(folder / "run/checkpoint-6/model.safetensors")
    broken = (folder / "run/checkpoint-6/model.safetensors").read_bytes()
    with caplog.at_level(logging.WARNING, "kdfast"):
        fault_runs.train(fault_runs.make(folder), resume=True)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("kdfast")]
    assert f"{folder}/run/checkpoint-6 is passed over: model.safetensors" in said
    assert f"The run goes on from {folder}/run/checkpoint-4; it is kept as damaged-checkpoint-6" in said
    assert (folder / "run/damaged-checkpoint-6/model.safetensors").read_bytes() == broken
    assert fault_runs.same_end(folder, finished)
    assert find_problem(folder / "run/checkpoint-6") is None


def test_two_damaged_ones_are_both_passed_over_and_names_do_not_clash(folder, finished):
    (folder / "run/damaged-checkpoint-4").mkdir()
    damage(folder / "run/checkpoint-6/trainer_state.json", "cut")
    (folder / "run/checkpoint-4" / checksums.NAME).unlink()
    fault_runs.train(fault_runs.make(folder), resume=True)
    assert fault_runs.same_end(folder, finished)
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6",
        "damaged-checkpoint-4", "damaged-checkpoint-4.1", "damaged-checkpoint-6",
    ]  # fmt: skip


def test_one_that_was_named_is_refused_and_a_complete_one_named(folder):
    damage(folder / "run/checkpoint-6/optimizer.pt", "cut")
    named = str(folder / "run/checkpoint-6")
    with pytest.raises(DamagedCheckpointError, match=r"optimizer\.pt \(\d+ bytes\) is damaged") as caught:
        fault_runs.make(folder).train(resume_from_checkpoint=named)
    assert f"resume_from_checkpoint='{named}' cannot be gone on from" in str(caught.value)
    assert f"The newest complete one is {folder}/run/checkpoint-4" in str(caught.value)
    assert caught.value.checkpoint == str(folder / "run/checkpoint-4")
    assert Path(named).is_dir()


def test_where_all_are_damaged_nothing_is_touched(folder):
    for step in (2, 4, 6):
        damage(folder / f"run/checkpoint-{step}/scheduler.pt")
    every = r"checkpoint-6: scheduler\.pt.*checkpoint-4: .*checkpoint-2: "
    with pytest.raises(DamagedCheckpointError, match=every) as caught:
        fault_runs.make(folder).train(resume_from_checkpoint=True)
    assert "Restore one from a copy" in str(caught.value)
    assert files(folder / "run") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_true_without_any(tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint=True: no checkpoint-N in"):
        fault_runs.make(tmp_path).train(resume_from_checkpoint=True)


def test_a_damaged_best_model_is_not_loaded(folder):
    trainer = fault_runs.make(folder)
    trainer.state.best_model_checkpoint = str(folder / "run/checkpoint-4")
    damage(folder / "run/checkpoint-4/model.safetensors")
    expected = r"the best model, .*run/checkpoint-4, cannot be loaded: model\.safetensors.*load_best_model_at_end=false"
    with pytest.raises(DamagedCheckpointError, match=expected) as caught:
        trainer._load_best_model()
    assert "resume" not in str(caught.value)


def test_the_best_model_of_a_run_that_was_moved_is_found(folder):
    trainer = fault_runs.make(folder)
    trainer.state.best_model_checkpoint, trainer.state.best_global_step = "gone/checkpoint-4", 4
    trainer._load_best_model()
    expected = load_file(folder / "run/checkpoint-4/model.safetensors")
    weights = trainer.model.student.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_resumed_run_that_was_moved_knows_its_best_model(folder):
    state = folder / "run/checkpoint-4/trainer_state.json"
    content = json.loads(state.read_text()) | {"best_model_checkpoint": "gone/checkpoint-2", "best_global_step": 2}
    state.write_text(json.dumps(content))
    checksums.write(state.parent)
    trainer = fault_runs.make(folder, save_strategy="no", max_steps=5)
    trainer.train(resume_from_checkpoint=str(state.parent))
    assert trainer.state.best_model_checkpoint == str(folder / "run/checkpoint-2")


def test_what_was_found_complete_once_is_read_again(folder):
    trainer = fault_runs.make(folder)
    best = trainer.state.best_model_checkpoint = trainer.find_checkpoint(str(folder / "run/checkpoint-4"))
    trainer._load_best_model()
    damage(Path(best) / "model.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors"):
        trainer._load_best_model()


def resume_from(trainer, step):
    trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / f"checkpoint-{step}"))


def test_a_bad_checkpoint_stops_all_processes(folder):
    damage(folder / "run/checkpoint-4/config.json")
    codes = join(start(folder, resume_from, 4, ranks=2))
    assert codes == [3, 3], output(folder)
    for rank in (0, 1):
        assert "DamagedCheckpointError" in output(folder, rank)
        assert "config.json" in output(folder, rank)
        assert f"The newest complete one is {folder}/run/checkpoint-6" in output(folder, rank)


def test_sigterm_promises_nothing_without_an_optimizers_state(tmp_path):
    """Nor is a run gone on with that would start its optimizer and its schedule anew."""
    with pytest.raises(TerminatedError, match=r"checkpoint-4 was saved.*cannot be gone on from: save_only_") as told:
        fault_runs.train(fault_runs.make(tmp_path, save_only_model=True), before_step=fault_runs.terminate_at_3)
    assert "The same command" not in str(told.value)
    trainer = fault_runs.make(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-4': it was saved with save_only_model=True.*Start a new run"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0
