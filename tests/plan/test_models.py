"""Models from their configuration, without weights, and what the planner does not import."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from kdfast.plan import models

LLAMA = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 160, "vocab_size": 500,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 500}


@pytest.fixture
def folder(tmp_path):
    def make(model_type, **settings):
        AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
        return tmp_path

    return make


@pytest.mark.parametrize(("model_type", "settings"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_sizes(folder, model_type, settings):
    path = folder(model_type, **settings)
    found = models.describe(str(path), "--student")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert (found.width, found.vocab, found.head_tied) == (64, 500, model_type == "gpt2")
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_nothing_there(tmp_path):
    for name in (str(tmp_path), "nobody/has-this"):
        with pytest.raises(ValueError, match="--student-width"):
            models.describe(name, "--student")


def test_nothing_more_is_imported():
    """`import kdfast` does not import the planner, the planner neither transformers nor Triton's kernels."""
    code = (
        "import sys, kdfast; assert 'kdfast.plan' not in sys.modules; import kdfast.plan, kdfast.plan.models; "
        "sys.exit(sorted({'transformers', 'datasets', 'kdfast.training'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
