"""Tiny random models of several families, tiny data, and models that refuse to make logits."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

# family → (settings beside the sizes, logit scale, softcap): what the head of that family does, told independently
FAMILIES = {
    "gpt2": ({}, 1.0, None),  # tied
    "llama": ({"tie_word_embeddings": False}, 1.0, None),
    "qwen2": ({"tie_word_embeddings": True}, 1.0, None),
    "gemma2": ({"final_logit_softcapping": 3.0, "head_dim": 8}, 1.0, 3.0),
    "cohere": ({"logit_scale": 0.25}, 0.25, None),
    "granite": ({"logits_scaling": 4.0}, 0.25, None),  # divides
    "opt": ({"word_embed_proj_dim": None, "ffn_dim": 32, "do_layer_norm_before": True}, 1.0, None),
}


def tiny(family="llama", V=67, width=16, layers=1, seed=0, dropout=0.0, spread=0.3):
    """A random causal language model. `spread` makes its logits of order 1 or more, where a cap or a scale shows."""
    settings = dict(FAMILIES[family][0])
    if family == "gpt2":
        settings |= {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 64}
        settings |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    else:
        settings |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
        settings |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    if family == "opt":
        settings |= {"word_embed_proj_dim": width, "dropout": 0.0}
        del settings["num_key_value_heads"], settings["intermediate_size"]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=V, initializer_range=spread, **ids, **settings)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(name="tiny")
def _tiny():
    return tiny


@pytest.fixture
def batch():
    """3 rows of 9: one whole, one padded at the right, one at the left; −100 here and there."""
    input_ids = torch.randint(3, 67, (3, 9), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    attention_mask[2, :2] = 0
    labels = input_ids.clone()
    labels[0, :4] = -100
    labels[2, 5] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.fixture
def rows():
    """n rows of T ids as a data set, with labels that leave a different number of targets in every row."""

    def make(n, T=12, V=67, seed=5):
        generator = torch.Generator().manual_seed(seed)
        made = []
        for i in range(n):
            ids = torch.randint(3, V, (T,), generator=generator)
            labels = ids.clone()
            labels[: (3 * i) % T] = -100
            made.append({"input_ids": ids, "labels": labels})
        return made

    return make


@pytest.fixture
def no_logits():
    """Call it with models: from then on, whoever runs their head fails."""

    def forbid(*models):
        def fail(module, args):
            raise AssertionError("logits were made")

        for model in models:
            model.get_output_embeddings().register_forward_pre_hook(fail)

    return forbid


@pytest.fixture
def config(tmp_path):
    """KDConfig with what every test run wants."""
    from kdfast.training import KDConfig

    def make(**given):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "recipe": "run5",
            "use_cpu": True,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "save_strategy": "no",
            "logging_steps": 1,
        }
        return KDConfig(**{**defaults, **given})

    return make
