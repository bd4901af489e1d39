"""`kdfast distill` as several processes, by torchrun and by accelerate launch: what one process does, said once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import server
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM

from kdfast.cli.errors import RunTerminated
from kdfast.cli.main import main

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "accelerate"
LAUNCHERS = ("torchrun", "accelerate")
SETTINGS = ["--save_steps", "4", "--eval_fraction", "0.05"]


def launch_accelerate(*arguments):
    """(exit code, what was said) of `kdfast distill` in two processes, under FSDP2."""
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={RECIPES / 'fsdp2.yaml'}"]
    command += ["--main_process_port=0", "-m", "kdfast", "distill", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout + done.stderr


def launch(place, *arguments):
    """(exit codes, what each said) of `kdfast distill` in two processes that have of torchrun what it sets; the real
    one is in test_faults.py."""
    processes = server.start(place / "said", 2, distill, place, arguments)
    codes = server.join(processes)
    return codes, [(place / "said" / f"output-{rank}.txt").read_text() for rank in (0, 1)]


def distill(place, arguments):
    os.chdir(place)
    return main(["distill", *arguments])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_write_what_one_writes(place, kdfast, launcher):
    config = yaml.safe_load((place / "config.yaml").read_text())
    config["student_config"] |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # each process draws its own
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    assert kdfast("distill", "config.yaml", *SETTINGS, "--output_dir", "one")[0] == 0
    arguments = ("config.yaml", *SETTINGS, "--per_device_train_batch_size", "1")
    if launcher == "torchrun":
        codes, said = launch(place, *arguments)
        assert codes == [0, 0], said
        out = "".join(said)
    else:
        code, out = launch_accelerate(*arguments)
        assert code == 0, out[-3000:]
    alone, found = (json.loads((place / name / "summary.json").read_text()) for name in ("one", "out"))
    for key in ("eval_ce", "kl_teacher_student", "kl_teacher_projected", "tokens", "steps"):
        assert found[key] == pytest.approx(alone[key], rel=1e-4), key
    assert {path.name for path in (place / "out").iterdir()} == {path.name for path in (place / "one").iterdir()}
    assert AutoModelForCausalLM.from_pretrained(place / "out").config.n_embd == 16
    for line in ("out: recipe projector_fixed", "'train_runtime'", "are in out", "student CE "):
        assert out.count(line) == 1, line


def test_what_the_first_process_finds_wrong_all_say(place):
    """None is left to wait for it, and to fail with an error of the communication."""
    codes, said = launch(place, "config.yaml", "--output_dir", "teacher")
    assert codes == [2, 2]
    for name, told in zip(("kdfast", "kdfast (process 1)"), said, strict=True):
        assert f"{name}: output_dir: 'teacher' holds config.json of something else" in told
        assert "gloo" not in told
        assert "Connection" not in told


def test_the_recipes_are_configurations_accelerate_takes():
    for name, kind in (("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")):
        config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
        assert config.distributed_type == kind
        assert config.num_processes == 2


@pytest.mark.parametrize(("rank", "said"), [("0", "kdfast: saved, stopped\n"), ("1", "")])
def test_a_stop_that_all_processes_make_is_said_once(kdfast, monkeypatch, rank, said):
    def stop(_):
        raise RunTerminated("saved, stopped")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("kdfast.cli.distill.distill", stop)
    code, _, err = kdfast("distill", "config.yaml")
    assert (code, err) == (143, said)


def test_another_process_says_who_it_is(kdfast, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code, _, err = kdfast("distill", "no.yaml")
    assert code == 2
    assert err.startswith("kdfast (process 1): ")
