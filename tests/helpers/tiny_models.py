"""Tiny random causal language models of several families."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

# what TrainingArguments calls it; the other is its older name
RECOMPUTE = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
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
