"""Models from their configuration: sizes, and the activations a backbone keeps, against the same model with weights."""

import pytest
import torch
from torch.profiler import profile
from transformers import AutoConfig

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
def test_sizes_and_activations(folder, model_type, settings):
    path = folder(model_type, **settings)
    found = models.describe(path, "--student", sequence_length=64)
    model = models._build(AutoConfig.from_pretrained(path))
    assert (found.width, found.vocab, found.head_tied) == (64, 500, model_type == "gpt2")
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())

    def kept(sequences):
        ids = torch.zeros(sequences, 64, dtype=torch.int64)
        with profile(profile_memory=True, acc_events=True) as profiler, torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.base_model(input_ids=ids, use_cache=False)
        changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        del output
        return sum(changes)

    kept(1)
    assert found.activation_bytes == pytest.approx((kept(3) - kept(1)) / 128, rel=0.05)


def test_checkpointing_keeps_the_layers_inputs(folder):
    path = folder("llama", **LLAMA)
    whole = models.describe(path, "--student", sequence_length=64)
    least = models.describe(path, "--student", sequence_length=64, checkpointing=True)
    assert least.activation_bytes == 4 * 64 * 4
    assert least.activation_bytes < whole.activation_bytes / 5


def test_nothing_there(tmp_path):
    for name in (tmp_path, "nobody/has-this"):
        with pytest.raises(ValueError, match="--student-width"):
            models.describe(name, "--student")
