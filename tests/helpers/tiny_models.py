"""Tiny random causal language models of several families, with and without a vision tower."""

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, TrainingArguments

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


IMAGE = 66  # the id that stands for a patch of an image
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP |= {"image_size": 8, "patch_size": 4, "initializer_range": 0.3}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# family → (the text model's settings beside the sizes, the vision tower's, the rest)
VISION = {
    "llava": (
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", "projection_dim": 16, **CLIP},
        {"image_token_id": IMAGE, "vision_feature_layer": -1},
    ),
    "gemma3": (
        {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8},
        {"model_type": "siglip_vision_model", **CLIP},
        {"image_token_id": IMAGE, "mm_tokens_per_image": 4, "boi_token_index": 64, "eoi_token_index": 65},
    ),
    "qwen2_5_vl": (
        {"model_type": "qwen2_5_vl_text", "rope_parameters": {"mrope_section": [1, 1, 2], **ROPE}},
        {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "window_size": 8,
         "temporal_patch_size": 2, "out_hidden_size": 16, "fullatt_block_indexes": [1]},
        {"image_token_id": IMAGE, "video_token_id": 65, "vision_start_token_id": 64, "vision_end_token_id": 63},
    ),
    "mllama": (
        {"model_type": "mllama_text_model", "cross_attention_layers": [1], "dropout": 0.0, "rope_parameters": ROPE},
        {"hidden_size": 16, "attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 1, "patch_size": 4,
         "intermediate_size": 16, "vision_output_dim": 32, "image_size": 8, "max_num_tiles": 1,
         "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]]},
        {"image_token_index": IMAGE},
    ),
    "llama4": (
        {"model_type": "llama4_text", "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32,
         "attention_chunk_size": 16},
        {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64, "patch_size": 4,
         "vision_output_dim": 16, "image_size": 8, "projector_input_dim": 16, "projector_output_dim": 16},
        {"image_token_index": IMAGE},
    ),
}  # fmt: skip


def tiny_vision(family="llava", seed=0, V=67, **given):
    """A random vision-language model; `given` is of its configuration, beside its parts'."""
    text, vision, rest = VISION[family]
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, text_config={**sizes, **text}, vision_config=vision, **{**rest, **given})
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():  # Mllama's gates, Gemma's projector: nothing would come of an image
                p.normal_(std=0.3)
    return model


def image_batch(family="llava", rows=2, seed=3):
    """Rows of 12 ids, four of which stand for an image each, as that family's processor makes them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 62, (rows, 12), generator=generator)
    ids[:, 2:6] = IMAGE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == IMAGE, -100)}
    images = torch.randn(rows, 3, 8, 8, generator=generator)
    if family == "qwen2_5_vl":
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
        images = torch.randn(rows * 16, 3 * 2 * 16, generator=generator)
    elif family == "mllama":
        images = images[:, None, None]
        one = torch.ones(rows, 1, dtype=torch.long)
        batch |= {"aspect_ratio_ids": one, "aspect_ratio_mask": one[..., None]}
        batch["cross_attention_mask"] = torch.ones(rows, 12, 1, 1, dtype=torch.long)
    elif family == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    return batch | {"pixel_values": images}


def loss_by_hand(student, teacher, input_ids, labels, tau=2.0, kd_weight=0.7):
    """The loss of recipe "teacher_head" from both models' whole logits."""
    with torch.no_grad():
        p = (teacher(input_ids).logits[:, :-1] / tau).log_softmax(-1)
    z = student(input_ids).logits[:, :-1]
    kd = F.kl_div((z / tau).log_softmax(-1), p, log_target=True, reduction="none").sum(-1).mean()
    return F.cross_entropy(z.flatten(0, 1), labels[:, 1:].flatten()) + kd_weight * tau**2 * kd


# family → settings beside the sizes
SPARSE = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.25}
TINY_MOE = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4, "logits_scaling": 4.0},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "jamba": {"num_experts": 4, "expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "use_mamba_kernels": False},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 1, "aux_loss_coef": 0.25},
}


def tiny_moe(family="mixtral", seed=0, V=67, **given):
    """A random mixture of experts of two layers; every one's aux_loss has the coefficient 0.25."""
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    torch.manual_seed(seed)
    settings = {**sizes, **SPARSE, **TINY_MOE[family], **given}
    if family == "jetmoe":
        del settings["router_aux_loss_coef"]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
