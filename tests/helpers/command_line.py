"""A corner of a disk to distil in: text, a tokenizer with one id per byte, a teacher, and a config that names them."""

import pytest
import torch
import yaml
from byte_tokenizer import make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from kdfast.cli.main import main

CONFIG = {
    "student_config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64},
    "teacher_model_name_or_path": "teacher",
    "train_file": "text.txt",
    "max_length": 32,
    "recipe": "projector_fixed",
    "output_dir": "out",
    "max_steps": 4,
    "learning_rate": "5e-3",  # a string to PyYAML, which wants 5.0e-3
    "per_device_train_batch_size": 2,
    "logging_steps": 3,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Folder of a teacher with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=257, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, teacher, monkeypatch):
    """The current directory: config.yaml, text.txt, teacher/; nothing else is written to or read from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "teacher").symlink_to(teacher)
    (tmp_path / "text.txt").write_text("".join(f"{i}: {i * i} is the square of {i}\n" for i in range(100)))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def kdfast(capsys):
    """kdfast("distill", …) → (exit code, stdout, stderr)."""

    def call(*argv):
        capsys.readouterr()
        code = main(list(argv))
        out, err = capsys.readouterr()
        return code, out, err

    return call
