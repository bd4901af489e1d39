"""Commands in the documents are run: each has its place here, and those that take seconds are run as they stand."""

import os
import re
import shutil

import chats
import documents
import pytest

from kdfast.cli.main import main

HERE = "tests/docs/test_commands_run.py"
COMMANDS = sorted({text for page in documents.pages() for _, text in documents.commands(page)})
# command: where it is run, as FILE::TEST, or the script that does it; models and text are those of FILE
RUN_IN = {
    r"kdfast (data|distill|merge) .*lora_chat.*": f"{HERE}::test_on_chats",
    r"kdfast (doctor|plan --student-width) .*": f"{HERE}::test_what_takes_seconds",
    r"kdfast plan --student .*": "tests/cli/test_plan.py::test_models_by_folder",
    r"kdfast (cache|distill) .*served\.yaml.*": "tests/examples/test_yaml.py::test_a_served_teacher",
    r"kdfast distill examples/gpt2\.yaml .*": "tests/examples/test_yaml.py::test_three_steps",
    r"kdfast cache CONFIG\.yaml": "tests/cli/test_cache.py::test_from_a_cache_as_from_the_live_teacher",
    r"kdfast cache import .*": "tests/cli/test_cache_sources.py::test_from_a_file_as_from_the_live_teacher",
    r"kdfast data CONFIG\.yaml": "tests/cli/test_rows.py::test_a_run_on_rows_that_are_no_text",
    r"kdfast distill CONFIG\.yaml.*": "tests/system/test_distill.py::test_the_same_command_leaves_a_finished_run_alone",
    r"kdfast report runs/(a|own) runs/.*": "tests/cli/test_report.py::test_a_real_run_finished_and_interrupted",
    r"kdfast demo|kdfast (distill|report) runs/demo.*": "tests/docs/test_code.py::test_code",  # first-model.md
    r"(accelerate launch|torchrun) .*": "tests/system/test_launch.py::test_two_processes_write_what_one_writes",
    r"python examples/\w+\.py.*": "tests/examples/test_examples.py::test_whole",
    r"(pip install|python3 -m venv) .*": "tests/system/package/install.py",  # make package
    r"make fuzz.*": "tests/fuzz/test_fuzz.py::test_two_minutes_of_each_kind",
    r"make (test|demo|bench)": "Makefile",  # the commands themselves; .ci/run has make test
    r"pytest bench/.*": "bench/test_loss.py",
}


def place(text):
    return next((place for command, place in RUN_IN.items() if re.fullmatch(command, text)), "")


def run_in(test):
    return [text for text in COMMANDS if place(text) == f"{HERE}::{test}"]


@pytest.mark.parametrize("text", COMMANDS)
def test_each_is_run_somewhere(text):
    assert place(text), f"nothing runs {text!r}: add the test that does to RUN_IN"
    file, _, test = place(text).partition("::")
    assert f"def {test}(" in (documents.ROOT / file).read_text(encoding="utf-8") or not test


def test_no_place_is_left_over():
    assert set(RUN_IN.values()) == {place(text) for text in COMMANDS}


@pytest.mark.parametrize("text", run_in("test_what_takes_seconds"))
def test_what_takes_seconds(text, capsys):
    assert main(text.split()[1:]) == 0
    assert "triton_chunked" in capsys.readouterr().out or " doctor " in text


def test_on_chats(tmp_path, monkeypatch):
    """README's commands, in its order; the models and chats are smaller than those of examples/lora_chat.py."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    chats.write_chat_example("runs/lora_chat")
    shutil.copy("runs/lora_chat/chats.jsonl", "runs/lora_chat/held_out.jsonl")
    os.symlink(documents.ROOT / "examples", "examples")
    texts = [text for _, text in documents.commands("README.md") if text in run_in("test_on_chats")]
    assert [text.split()[1] for text in texts] == ["data", "distill", "merge"]
    for text in texts:
        short = ["--max_steps", "2", "--use_cpu", "true"] if "distill " in text else []
        assert main([*text.split()[1:], *short]) == 0
    assert (tmp_path / "runs/lora_chat/distilled/adapter_model.safetensors").is_file()
    assert (tmp_path / "runs/lora_chat/distilled/merged/model.safetensors").is_file()
