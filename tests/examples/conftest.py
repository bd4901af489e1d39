"""Small models, real text, and what an example's models read."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from byte_tokenizer import make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """(teacher, student, text, held-out text): what --use takes; random models over bytes, and a text that stays."""
    place = tmp_path_factory.mktemp("small")
    tokenizer = make_tokenizer()
    ends = {"bos_token_id": 256, "eos_token_id": 256, "vocab_size": 257, "n_positions": 128}
    torch.manual_seed(0)
    for name, layers, width in (("teacher", 2, 32), ("student", 1, 16)):
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=2, initializer_range=0.2, **ends, **NO_DROPOUT)
        GPT2LMHeadModel(config).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    quoted = text[:8000].replace("\n\n", '\n\n"""')  # two_vocabularies.py puts its new token at quotes
    (place / "train.txt").write_text(quoted, encoding="utf-8")
    (place / "eval.txt").write_text(text[8000:], encoding="utf-8")
    return tuple(str(place / name) for name in ("teacher", "student", "train.txt", "eval.txt"))


@pytest.fixture
def example(tmp_path, monkeypatch):
    """example("plain_loop") → the module, from its file, as `python examples/plain_loop.py` would have it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)  # nothing may be left behind

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    assert not [path for path in tmp_path.iterdir() if path.name != "datasets"]


class Read(NamedTuple):
    """One call of a backbone."""

    width: int
    ids: torch.Tensor
    hidden: torch.Tensor


@pytest.fixture
def reads(monkeypatch):
    """A list that every call of a GPT-2 backbone is appended to."""
    calls = []
    forward = GPT2Model.forward

    def recording(self, input_ids=None, **inputs):
        output = forward(self, input_ids=input_ids, **inputs)
        calls.append(Read(self.config.n_embd, input_ids, output.last_hidden_state))
        return output

    monkeypatch.setattr(GPT2Model, "forward", recording)
    return calls
