"""Every YAML file for three steps, between small models whose widths are in the ratio of those it names."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from byte_tokenizer import make_tokenizer
from chats import assistant, user
from logprob_server import LogProbServer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from kdfast.cli.arguments import parse, parse_mapping
from kdfast.cli.cache import make_cache
from kdfast.cli.distill import run_distillation

ROOT = Path(__file__).resolve().parents[2]
SERVED = "served.yaml"
FILES = sorted(path.name for path in (ROOT / "examples").glob("*.yaml") if path.name != SERVED)
NO_NETWORK = {"dataset_name", "dataset_split", "eval_dataset_split"}
# a 32nd of the widths that the files name: gpt2-medium's 1024, gpt2's and distilgpt2's 768, and cpu.yaml's 256
TEMPLATE = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}"
TEMPLATE += "{% endgeneration %}{% endif %}{% endfor %}"
WIDTHS = {"gpt2.yaml": (32, 24), "cpu.yaml": (24, 8), "lora_chat.yaml": (32, 24), "self_distillation.yaml": (32, 24)}


@pytest.fixture
def model(tmp_path):
    """model(width) → folder of a random GPT-2 over bytes, with its tokenizer."""

    def make(width):
        folder = tmp_path / f"gpt2-{width}"
        ends = {"bos_token_id": 256, "eos_token_id": 256}
        torch.manual_seed(width)
        config = GPT2Config(n_layer=1, n_embd=width, n_head=2, n_positions=256, vocab_size=257, **ends)
        GPT2LMHeadModel(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def chats(tmp_path):
    """chats(settings): have them read fifty short ones."""

    def put(settings):
        pytest.importorskip("peft")
        rows = [{"messages": [user(f"{i}²?"), assistant(str(i * i))]} for i in range(50)]
        settings["train_file"] = settings["eval_file"] = str(tmp_path / "chats.jsonl")
        Path(settings["train_file"]).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        settings["chat_template"] = TEMPLATE

    return put


def read(name):
    return yaml.safe_load((ROOT / "examples" / name).read_text(encoding="utf-8"))


def three_steps(name, settings, out):
    settings["output_dir"] = str(out)
    run = run_distillation(
        parse_mapping(name, settings, ["--max_steps", "3", "--use_cpu", "true", "--disable_tqdm", "true"])
    )
    assert run.summary["steps"] == 3
    assert run.summary["eval_ce"] < 6
    assert json.loads((out / "summary.json").read_text())["recipe"] == run.summary["recipe"]
    return run.summary


@pytest.mark.parametrize("name", FILES)
def test_three_steps(name, model, chats, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    teacher, student = WIDTHS[name]
    settings = {key: value for key, value in read(name).items() if key not in NO_NETWORK}
    if settings["teacher_model_name_or_path"] != "self":
        settings["teacher_model_name_or_path"] = model(teacher)
    if "student_config" in settings:
        settings["student_config"] |= {"n_embd": student, "n_head": 2}
    else:
        settings["model_name_or_path"] = model(student)
    settings["train_file"] = str(ROOT / "kdfast" / "cli")
    if settings.get("assistant_only_loss"):
        chats(settings)
    settings["max_length"] = min(settings["max_length"], 32 if "use_peft" not in settings else 128)
    three_steps(name, settings, tmp_path / "out")


def test_a_served_teacher(model, chats, tmp_path, monkeypatch):
    """The two commands of served.yaml, and a server of as many entries and as short a context as it says."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("no_proxy", "*")
    settings = read(SERVED) | {"model_name_or_path": model(24), "teacher_cache": str(tmp_path / "answers")}
    chats(settings)
    teacher = AutoModelForCausalLM.from_pretrained(model(32)).eval()
    with LogProbServer(teacher, make_tokenizer(), "vllm", most=64).running() as server:
        server.context = 128
        make_cache(parse_mapping(SERVED, settings, ["--server", server.url, "--use_cpu", "true"], "cache"))
        assert len(server.prompts()) == 100  # training and evaluation rows, each once
    summary = three_steps(SERVED, settings, tmp_path / "out")
    assert summary["recipe"] == "cached"
    assert summary["kl_teacher_student"] > 0


def test_gpt2_is_the_original_setting():
    """gpt2-medium → gpt2, 1024 → 768, V = 50257; transformers' GPT2Config is gpt2's."""
    arguments = parse(str(ROOT / "examples/gpt2.yaml"), ["--bf16", "false", "--use_cpu", "true"])
    assert arguments.model.teacher_model_name_or_path == "gpt2-medium"
    assert arguments.model.model_name_or_path == "gpt2"
    assert (GPT2Config().n_embd, GPT2Config().vocab_size) == (768, 50257)
    assert arguments.training.temperature == 2.0
    assert arguments.training.learning_rate == 5e-5
    recipe = arguments.training.resolved("projector_fixed")  # as the file says: the original's three fixes
    assert (recipe.kd_weight, recipe.kd_ramp_start, recipe.kd_ramp) == (0.7, 0.1, 0.2)
    assert (recipe.projector_init, recipe.projector_lr_multiplier) == ("normal", 5.0)
