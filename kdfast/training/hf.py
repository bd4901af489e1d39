"""What the loss needs to know of a causal language model: its backbone, and how its head turns hidden states to logits.

    head(model, backbone(model)(input_ids).last_hidden_state)  →  Head, with model(input_ids).logits never made

Families scale and cap their logits in their own ways (`logit_scale`, `logits_scaling`, `final_logit_softcapping`, …).
A factor nobody knows of would silently train on wrong logits, so `check_model` compares head and model once, on a few
tokens and at a size of logits where a cap shows. That is the only place where logits are ever made: (1, 4, V).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.inputs import Head

CHECK_PEAK = 60.0  # largest logit in the check: twice the usual cap of 30, so a missed cap cannot hide
CHECK_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-2}  # of the largest logit; other dtypes 1e-4


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part that makes the last hidden states, final norm included."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def head(model: PreTrainedModel, hidden: Tensor) -> Head:
    """The model's own head over `hidden` (*, H)."""
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    return Head(hidden, linear.weight, linear.bias, logit_scale=_logit_scale(config), softcap=_softcap(config))


def head_shape(model: PreTrainedModel) -> tuple[int, int]:
    """(V, H)."""
    vocab, width = model.get_output_embeddings().weight.shape
    return vocab, width


def check_model(model: PreTrainedModel, role: str) -> None:
    """Raise if the loss could not be computed from this model's hidden states.

    Args:
        model: a causal language model.
        role: "student" or "teacher", for the message.

    Raises:
        TypeError: not a `PreTrainedModel` with a linear head.
        ValueError: an adapter sits on the head, the loss has a part outside the logits, or the head's logits are not
            those of the model. The message names the architecture.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{role} is {type(model).__name__}; expected a transformers PreTrainedModel with a language-model head, "
            "as AutoModelForCausalLM.from_pretrained gives"
        )
    name = f"{role} ({type(model).__name__})"
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; expected a causal (decoder-only) language model")
    linear = model.get_output_embeddings()
    if linear is not None and _is_adapter(linear):
        raise ValueError(
            f"{name} has an adapter on its head ({type(linear).__name__}); the loss takes one weight (V, H). Leave "
            "lm_head out of the adapter's target modules, or merge the adapter into it first"
        )
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise TypeError(
            f"{name} has {type(linear).__name__} as its head; expected a linear layer with a floating-point weight "
            "(V, H). A quantised head has to stay in floating point"
        )
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            f"{name} has output_router_logits=True: its loss has a load-balancing term, which is computed with the "
            "logits and would be left out here. Set config.output_router_logits=False"
        )
    if weight.device.type != "meta":
        _compare_logits(model, name)


@torch.no_grad()
def _compare_logits(model: PreTrainedModel, name: str) -> None:
    """model(ids).logits against ours, the backbone's last hidden states scaled to logits of size CHECK_PEAK."""
    seen: list[Tensor] = []

    def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
        linear, hidden = model.get_output_embeddings(), output.last_hidden_state
        scale = _logit_scale(model.config.get_text_config())
        peak = scale * F.linear(hidden, linear.weight, linear.bias).abs().amax().float()
        output.last_hidden_state = hidden * (CHECK_PEAK / peak.clamp_min(1e-6)).to(hidden.dtype)
        seen.append(output.last_hidden_state)
        return output

    vocab, _ = head_shape(model)
    ids = torch.arange(1, 5, device=model.get_output_embeddings().weight.device)[None] % vocab
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    hook = backbone(model).register_forward_hook(enlarge)
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training

    advice = (
        "Distil this architecture with your own code around kdfast.fused_kd_loss, which takes any "
        "Head(hidden, weight, bias, logit_scale=…, softcap=…)"
    )
    if not seen:
        raise ValueError(f"{name}: its forward does not call {type(backbone(model)).__name__}, its backbone. {advice}")
    known = head(model, seen[-1])
    ours = _logits(known)
    error = ((logits - ours).abs().amax() / ours.abs().amax()).item()
    if not error <= CHECK_TOLERANCE.get(known.hidden.dtype, 1e-4):
        raise ValueError(
            f"{name}: softcap·tanh(logit_scale·(h Wᵀ + b)/softcap) with logit_scale={known.logit_scale:g} and "
            f"softcap={known.softcap} does not give this model's logits (off by {error:.1%} of the largest one), so "
            f"its head does something that is not known here. {advice}"
        )


def _logits(head: Head) -> Tensor:
    logits = head.logit_scale * F.linear(head.hidden, head.weight, head.bias).float()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _logit_scale(config: Any) -> float:
    """The factor on the logits. Cohere, Falcon-H1 and others multiply, Granite divides."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return scale / scaling if "granite" in config.model_type else scale * scaling


def _softcap(config: Any) -> float | None:
    """The cap on the logits: Gemma's and NanoChat's, or RecurrentGemma's name for it."""
    return getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)


def _is_adapter(linear: nn.Module) -> bool:
    """PEFT's layers: LoRA and its kin wrap a base_layer, a copy trained whole sits in modules_to_save."""
    return hasattr(linear, "base_layer") or hasattr(linear, "modules_to_save")
