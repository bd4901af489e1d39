"""`kdfast distill`, whole runs of four steps: what is written, going on, leaving alone, and refusing."""

import errno
import json
import math
import os
import shutil
import signal

import pytest
import torch
import yaml
from fault_runs import damage
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdfast.cli import distill
from kdfast.training import NonFiniteLossError

KEYS = {
    "eval_ce", "perplexity", "kl_teacher_student", "kl_teacher_projected", "tokens", "seconds", "peak_memory_bytes",
    "engine", "recipe", "versions",
}  # fmt: skip


def summary(place, name="out"):
    return json.loads((place / name / "summary.json").read_text())


def steps(place, name="out"):
    log = json.loads((place / name / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in log if "loss" in entry]


def results(place, name="out"):
    """Contents of the files that a run is about."""
    return {file: (place / name / file).read_bytes() for file in ("summary.json", "report.html", "model.safetensors")}


def test_a_run_writes_summary_report_student_and_projector(place, kdfast):
    code, out, _ = kdfast("distill", "config.yaml")
    assert code == 0
    found = summary(place)
    assert found.keys() >= KEYS
    assert found["recipe"] == "projector_fixed"
    assert found["engine"] == "torch"
    assert found["tokens"] == 4 * 2 * 31  # steps, blocks a step, targets of a block of 32: the tail is counted too
    assert found["perplexity"] == pytest.approx(math.exp(found["eval_ce"]))
    assert found["kl_teacher_student"] > 0
    assert found["kl_teacher_projected"] > 0
    assert 1e7 < found["peak_memory_bytes"] < 1e11
    assert found["versions"]["kdfast"]
    assert f"{found['eval_ce']:.4f}" in out  # the table

    out_dir = place / "out"
    student = AutoModelForCausalLM.from_pretrained(out_dir)
    assert student.config.n_embd == 16
    assert AutoTokenizer.from_pretrained(out_dir)("é")["input_ids"]
    assert (out_dir / "logit_projector.safetensors").exists()
    page = (out_dir / "report.html").read_text()
    assert "data:image/svg+xml" in page
    assert f"{found['eval_ce']:.4f}" in page
    assert steps(place) == [3, 4]  # logging_steps, and the last one


def test_the_summary_says_what_was_wrong(place, kdfast):
    assert kdfast("distill", "config.yaml", "--health_thresholds", '{"perplexity": 2}')[0] == 0
    (finding,) = (finding for finding in summary(place)["health"] if finding["kind"] == "perplexity")
    assert finding["step"] in (3, 4)
    assert "above 2" in finding["message"]


def test_recipes_without_a_teacher_or_a_projector_have_nulls(place, kdfast):
    assert kdfast("distill", "config.yaml", "--recipe", "teacher_head", "--output_dir", "own")[0] == 0
    assert summary(place, "own")["kl_teacher_projected"] is None
    assert summary(place, "own")["kl_teacher_student"] > 0
    assert not (place / "own/logit_projector.safetensors").exists()

    config = yaml.safe_load((place / "config.yaml").read_text())
    del config["teacher_model_name_or_path"]
    (place / "alone.yaml").write_text(yaml.safe_dump({**config, "tokenizer_name": "teacher"}))
    assert kdfast("distill", "alone.yaml", "--recipe", "lm_only", "--output_dir", "alone")[0] == 0
    assert summary(place, "alone")["kl_teacher_student"] is None
    assert summary(place, "alone")["kd"] is None
    assert summary(place, "alone")["teacher_parameters"] is None


def test_a_finished_run_goes_on_training_as_a_model_of_its_own(place, kdfast):
    assert kdfast("distill", "config.yaml", "--output_dir", "first")[0] == 0
    config = yaml.safe_load((place / "config.yaml").read_text())
    del config["student_config"]
    (place / "second.yaml").write_text(yaml.safe_dump({**config, "model_name_or_path": "first"}))
    assert kdfast("distill", "second.yaml")[0] == 0
    assert summary(place)["eval_ce"] < summary(place, "first")["eval_ce"]


def test_the_same_command_leaves_a_finished_run_alone(place, kdfast):
    kdfast("distill", "config.yaml")
    before = results(place)
    code, out, _ = kdfast("distill", "config.yaml", "--logging_steps", "1")  # not what makes it another run
    assert code == 0
    assert "finished already" in out
    assert results(place) == before

    record = place / "out/kdfast.json"  # as it was written before recipes had other names, with a default spelled out
    written = {**json.loads(record.read_text()), "recipe": "run5", "include_num_input_tokens_seen": False}
    record.write_text(json.dumps(written))
    assert kdfast("distill", "config.yaml", "--recipe", "run5")[0] == 0
    assert kdfast("distill", "config.yaml")[0] == 0
    assert results(place) == before

    code, _, err = kdfast("distill", "config.yaml", "--learning_rate", "1e-4")
    assert code == 2
    assert "other settings (learning_rate: then 0.005, now 0.0001)" in err
    assert results(place) == before

    (place / "out/checkpoint-2-mine").mkdir()
    assert kdfast("distill", "config.yaml", "--recipe", "teacher_head", "--overwrite_output_dir", "true")[0] == 0
    assert (place / "out/checkpoint-2-mine").is_dir(), "a copy of the user's"
    assert summary(place)["recipe"] == "teacher_head"
    assert results(place)["model.safetensors"] != before["model.safetensors"]
    assert not (place / "out/logit_projector.safetensors").exists()  # the earlier run's


# between two steps, and after the last one but before the evaluation; svd_init solves its start anew, which trained
# weights have to be loaded over
@pytest.mark.parametrize(("recipe", "checkpoint"), [("projector_fixed", 2), ("projector_fixed", 4), ("svd_init", 4)])
def test_an_interrupted_run_ends_as_an_unbroken_one(place, kdfast, recipe, checkpoint):
    kdfast("distill", "config.yaml", "--recipe", recipe)
    whole = results(place)
    for name in ("summary.json", "report.html", "model.safetensors", "config.json", "trainer_state.json"):
        (place / "out" / name).unlink()
    if checkpoint == 2:
        shutil.rmtree(place / "out/checkpoint-4")
    code, out, _ = kdfast("distill", "config.yaml", "--recipe", recipe)
    assert code == 0
    assert f"going on from out/checkpoint-{checkpoint}" in out
    assert results(place)["model.safetensors"] == whole["model.safetensors"]
    same = ("eval_ce", "kl_teacher_student", "kl_teacher_projected", "tokens", "steps")
    assert {key: summary(place)[key] for key in same} == {key: json.loads(whole["summary.json"])[key] for key in same}


def test_a_record_that_cannot_be_read_is_named(place, kdfast):
    """Whether this run is that one cannot be known: nothing is trained over."""
    (place / "out").mkdir()
    (place / "out/summary.json").write_text("{}")
    for content in (b"{", b"[]", b"\xff"):
        (place / "out/kdfast.json").write_bytes(content)
        code, _, err = kdfast("distill", "config.yaml")
        assert code == 2
        assert "kdfast: output_dir: 'out/kdfast.json' cannot be read" in err


@pytest.mark.parametrize("name", ["kdfast.json", "summary.json", "trainer_state.json", "report.html"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_no_file_in_a_files_place_is_waited_for(place, kdfast, name, make):
    (place / "out").mkdir()
    make(place / "out" / name)
    code, _, err = kdfast("distill", "config.yaml")
    assert code == 2
    assert f"kdfast: output_dir: 'out/{name}' is no file; move it away" in err


def test_what_nobody_foresaw_is_one_line_too(place, kdfast, monkeypatch):
    def fail(self, **_):
        raise LookupError("line one\nline two")

    monkeypatch.setattr(distill.KDTrainer, "train", fail)
    code, _, err = kdfast("distill", "config.yaml")
    assert code == 1
    told = err.splitlines()[-1]
    assert told.startswith("kdfast: unforeseen LookupError in distill.py, line ")
    assert told.endswith(": line one line two. KDFAST_TRACEBACK=1 shows the traceback")
    monkeypatch.setenv("KDFAST_TRACEBACK", "1")
    with pytest.raises(LookupError):
        kdfast("distill", "config.yaml")


def test_a_run_that_failed_before_its_first_step_may_change_its_settings(place, kdfast):
    assert kdfast("distill", "config.yaml", "--train_file", "gone.txt")[0] == 2
    assert kdfast("distill", "config.yaml")[0] == 0


def test_going_on_or_not_may_be_asked_for(place, kdfast):
    assert kdfast("distill", "config.yaml", "--resume_from_checkpoint", "false", "--max_steps", "2")[0] == 0
    (place / "out/summary.json").unlink()
    code, _, err = kdfast("distill", "config.yaml", "--resume_from_checkpoint", "false", "--max_steps", "2")
    assert code == 2
    assert "resume_from_checkpoint: false, and 'out' holds checkpoints" in err
    assert kdfast("distill", "config.yaml", "--resume_from_checkpoint", "true", "--max_steps", "2")[0] == 0


def test_an_output_dir_that_cannot_be_made_is_named(place, kdfast):
    code, _, err = kdfast("distill", "config.yaml", "--output_dir", "text.txt/out")
    assert code == 2
    assert "kdfast: output_dir: [Errno 20] Not a directory" in err
    code, _, err = kdfast("distill", "config.yaml", "--output_dir", "a\0b")
    assert code == 2
    assert "kdfast: output_dir: embedded null byte" in err


def test_a_folder_that_holds_something_else_is_left_alone(place, kdfast, teacher):
    before = (teacher / "model.safetensors").read_bytes()
    code, _, err = kdfast("distill", "config.yaml", "--output_dir", "teacher", "--overwrite_output_dir", "true")
    assert code == 2
    assert "'teacher' holds config.json of something else" in err
    assert (teacher / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--train_file", "gone.txt"], "train_file: 'gone.txt' does not exist"),
        (["--train_file", "empty.txt"], "train_file: 'empty.txt' is empty"),
        (["--eval_file", "empty.txt"], "eval_file: 'empty.txt' is empty"),
        (["--train_file", "tiny.txt"], "'tiny.txt' holds 1 document(s) and not one full block of max_length=32"),
        (["--max_length", "65", "--per_device_train_batch_size", "1"], "max_length=65 is more than the 64 positions"),
        (["--text_column", "body"], "has no column 'body'"),
        (["--teacher_model_name_or_path", "./no", "--tokenizer_name", "teacher"], "teacher_model_name_or_path='./no'"),
        (["--tokenizer_name", "./gone"], "tokenizer_name: no tokenizer could be loaded from './gone'"),
        (["--student_config", "{}"], "student_config={} has no model_type"),
        (["--student_config", "{model"], "is not valid JSON"),
        (["--student_config", '{"model_type": "gpt2", "n_layers": 1}'], "'n_layers' is not a setting"),
        (["--engine", "fast"], "engine='fast'; expected one of auto"),
    ],
)
def test_what_does_not_work_is_one_line_on_stderr(place, kdfast, overrides, expected):
    (place / "empty.txt").touch()
    (place / "tiny.txt").write_text("tiny")
    code, _, err = kdfast("distill", "config.yaml", *overrides)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("kdfast: ")]
    assert expected in line
    assert "Traceback" not in err
    assert not (place / "out/summary.json").exists()


def test_a_loss_that_is_not_finite_is_exit_code_1_and_no_summary(place, kdfast, monkeypatch):
    def diverge(self, **_):
        raise NonFiniteLossError("step 3: the loss is nan.", 3, None)

    monkeypatch.setattr(distill.KDTrainer, "train", diverge)
    code, _, err = kdfast("distill", "config.yaml")
    assert (code, err.splitlines()[-1]) == (1, "kdfast: step 3: the loss is nan.")
    assert not (place / "out/summary.json").exists()


def test_an_interruption_is_exit_code_130(place, kdfast, monkeypatch):
    def interrupt(self, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill.KDTrainer, "train", interrupt)
    code, _, err = kdfast("distill", "config.yaml")
    assert code == 130
    assert "the same command goes on" in err


def test_sigterm_saves_and_is_exit_code_143(place, kdfast, monkeypatch):
    loss = distill.KDTrainer.compute_loss

    def terminate(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(distill.KDTrainer, "compute_loss", terminate)
    code, _, err = kdfast("distill", "config.yaml")
    assert code == 143
    assert "kdfast: step 3: SIGTERM was received and out/checkpoint-3 was saved" in err
    assert not (place / "out/summary.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    code, out, _ = kdfast("distill", "config.yaml")
    assert code == 0
    assert "going on from out/checkpoint-3" in out
    assert steps(place) == [3, 4]


def test_damaged_checkpoints(place, kdfast, caplog):
    kdfast("distill", "config.yaml")
    whole = results(place)
    for name in ("summary.json", "report.html", "model.safetensors", "trainer_state.json"):
        (place / "out" / name).unlink()
    damage(place / "out/checkpoint-4/optimizer.pt")
    code, _, err = kdfast("distill", "config.yaml", "--resume_from_checkpoint", "out/checkpoint-4")
    assert code == 1
    assert "kdfast: resume_from_checkpoint='out/checkpoint-4' cannot be gone on from: optimizer.pt" in err
    assert kdfast("distill", "config.yaml", "--resume_from_checkpoint", "gone")[0] == 2

    assert kdfast("distill", "config.yaml")[0] == 0
    assert "out/checkpoint-4 is passed over: optimizer.pt" in caplog.text
    assert results(place)["model.safetensors"] == whole["model.safetensors"]
    assert (place / "out/damaged-checkpoint-4").is_dir()

    assert kdfast("distill", "config.yaml", "--overwrite_output_dir", "true", "--max_steps", "2")[0] == 0
    assert sorted(path.name for path in (place / "out").glob("*checkpoint*")) == ["checkpoint-2"]
    damage(place / "out/checkpoint-2/optimizer.pt")
    (place / "out/summary.json").unlink()
    code, _, err = kdfast("distill", "config.yaml", "--max_steps", "2")
    assert code == 1
    assert "no checkpoint in 'out' can be gone on from" in err


def test_a_finished_run_without_its_best_model(place, kdfast):
    """It says which one is meant, and can be completed with the last step's or with the best one put back."""
    best = ["--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "true"]
    best += ["--metric_for_best_model", "ce", "--greater_is_better", "true"]  # so that the first is it
    assert kdfast("distill", "config.yaml", *best)[0] == 0
    whole = results(place)
    assert json.loads((place / "out/trainer_state.json").read_text())["best_global_step"] == 2, "it learns"
    weights = place / "out/checkpoint-2/model.safetensors"
    (place / "out/summary.json").unlink()
    damage(weights)
    code, _, err = kdfast("distill", "config.yaml", *best)
    assert code == 1
    assert "kdfast: the best model, out/checkpoint-2, cannot be loaded: model.safetensors" in err
    assert "Restore it from a copy, or keep the last step's model: load_best_model_at_end=false" in err
    assert "resume" not in err.splitlines()[-1]

    damage(weights)  # the same bit: as it was
    assert kdfast("distill", "config.yaml", *best)[0] == 0
    assert results(place)["model.safetensors"] == whole["model.safetensors"]

    (place / "out/summary.json").unlink()
    shutil.rmtree(weights.parent)
    code, _, err = kdfast("distill", "config.yaml", *best)
    assert code == 1
    assert "kdfast: the best model, out/checkpoint-2, cannot be loaded: there is no such folder" in err
    assert kdfast("distill", "config.yaml", *best, "--load_best_model_at_end", "false")[0] == 0
    last = (place / "out/checkpoint-4/model.safetensors").read_bytes()
    assert results(place)["model.safetensors"] == last != whole["model.safetensors"]


def test_a_run_without_optimizer_states_is_not_gone_on_with(place, kdfast):
    given = ["--save_only_model", "true"]
    assert kdfast("distill", "config.yaml", *given)[0] == 0
    whole = results(place)
    (place / "out/summary.json").unlink()
    assert kdfast("distill", "config.yaml", *given)[0] == 0  # nothing is left to train
    assert results(place)["model.safetensors"] == whole["model.safetensors"]

    (place / "out/summary.json").unlink()
    shutil.rmtree(place / "out/checkpoint-4")
    code, _, err = kdfast("distill", "config.yaml", *given)
    assert code == 2
    assert "kdfast: resume_from_checkpoint='out/checkpoint-2': it was saved with save_only_model=True" in err
    assert not (place / "out/summary.json").exists()
    torch.save({}, place / "out/checkpoint-2/optimizer.bin")
    code, _, err = kdfast("distill", "config.yaml", *given)
    assert code == 2
    assert "out/checkpoint-2': its optimizer's state, optimizer.bin, was written by FSDP2" in err


def test_a_full_disk_is_exit_code_1(place, kdfast, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/summary.json")

    monkeypatch.setattr(distill, "write_summary", full)
    code, _, err = kdfast("distill", "config.yaml")
    assert code == 1
    assert "kdfast: [Errno 28] No space left on device: 'out/summary.json'. The same command goes on" in err


def test_help_and_no_config(kdfast, capsys):
    for argv, code in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as done:
            kdfast("distill", *argv)
        assert done.value.code == code
        assert "--teacher_model_name_or_path" in capsys.readouterr().out


def test_the_bar_shows_loss_kl_weight_and_speed(place, kdfast):
    code, out, err = kdfast("distill", "config.yaml", "--disable_tqdm", "false", "--eval_strategy", "steps")
    assert code == 0
    bar = err.replace("\r", "\n").split("4/4")[-1]
    for label in ("loss ", "CE ", "KL ", "weight 0.70", "tok/s "):
        assert label in bar
    assert "KL(true‖student)" in out
