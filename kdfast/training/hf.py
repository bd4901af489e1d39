"""What the loss needs to know about causal language models of transformers.

    head(model, backbone(model)(input_ids).last_hidden_state)  →  Head; model(input_ids).logits is never made

Model families scale and cap their logits in different ways (`logit_scale`, `final_logit_softcapping`, …). An unknown
factor would silently train on wrong logits, so `check_model` compares head and model once, on four tokens whose logits
are large enough for a cap to show. Logits, (1, 4, V), are made only there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from kdfast.frontend.checks import refuse_ids
from kdfast.inputs import Head
from kdfast.param_groups import router_parameters
from kdfast.training.adapters import adapted_layer, is_peft, keep_unpacked, unwrap

IGNORE_INDEX = -100  # a target with this value is ignored
CHECK_PEAK = 60.0  # the largest logit in the check: twice the usual cap of 30, so a missed cap shows
CHECK_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-2}  # as a share of the largest logit; 1e-4 for other dtypes

# parameters of a backbone's forward that are not data, or that only the model's own loss uses
NO_INPUTS = {"self", "labels", "logits_to_keep", "num_items_in_batch", "past_key_values", "return_dict", "use_cache"}
NO_INPUTS |= {"output_attentions", "output_router_logits"}
PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}  # position_ids say the same
ALWAYS = {"input_ids", "attention_mask"}  # a model that reads left to right works without the mask

# configuration settings: image_token_id (formerly image_token_index), vision_start_token_id, boi_token_index
PLACEHOLDER = re.compile(r"((?:image|video|audio|vision|bo[iva]|eo[iva])(?:_\w+)?)_token_(?:id|index)")


def backbone(model: PreTrainedModel) -> Any:
    """Return the module whose output goes into the head, with the final norm and any vision tower.

    Example:
        hidden = backbone(model)(**inputs, use_cache=False).last_hidden_state
        loss = fused_kd_loss(head(model, hidden), teacher_head, labels)

    Raises TypeError for a PeftModel with learned prompts, which are added outside the backbone.
    """
    model = unwrap(model, "model")
    inner: Any = model.base_model
    if inner is model:  # Llama-4's and Mllama's prefix names no attribute of theirs
        inner = getattr(model, "model", None) or model.get_decoder()
    if inner is not model and inner.get_output_embeddings() is not None:
        return backbone(inner)
    decoder = inner.get_decoder()
    parts = [part for part in inner.children() if not isinstance(part, nn.Embedding)]
    return decoder if parts == [decoder] else inner  # OPT's head and ProphetNet's call the decoder inside the wrapper


def inputs_of(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the inputs that the backbone reads. (Its `**kwargs` would swallow any other.)"""
    names: set[str] = set()
    outer = backbone(model)
    for module in (outer, outer.get_decoder()):  # the outer one passes unnamed inputs on
        for name, parameter in inspect.signature(type(module).forward).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:  # its position_ids are not read by all
                for typed in get_args(parameter.annotation):
                    names |= typed.__annotations__.keys() - {"position_ids"}
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                names.add(name)
    return frozenset(names - NO_INPUTS)


def check_inputs(model: PreTrainedModel, role: str, given: Iterable[str], known: frozenset[str] | None = None) -> None:
    """Raise ValueError for an input that the backbone does not read. `known`: the result of `inputs_of(model)`."""
    given = list(given)
    fine = ALWAYS | PACKING if "position_ids" in given else ALWAYS
    for name in given:
        if name not in fine and name not in (known or inputs_of(model)):
            raise ValueError(
                f"the {role} does not read {name}: its backbone, {type(backbone(model)).__name__} of "
                f"{type(model).__name__}, has no such input and would ignore it. Leave {name} out of the data, or take "
                f"a {role} that reads it"
            )


def may_skip_parameters(model: PreTrainedModel) -> bool:
    """Return whether plain text leaves trained parameters without a gradient, such as a vision tower's."""
    text = {id(p) for part in (backbone(model).get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return any(id(p) not in text or re.search("cross_?att|encoder_att", name) for name, p in trained)


def placeholders(model: PreTrainedModel) -> dict[str, int]:
    """Return the ids that mark an image, video or sound, or its ends, by their names in the configuration."""
    named = {**vars(model.config.get_text_config()), **vars(model.config)}
    found = {name: PLACEHOLDER.fullmatch(name) for name in named}
    return {match[1]: named[name] for name, match in found.items() if match and isinstance(named[name], int)}


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of the model's embedding."""
    embedding: Any = model.get_input_embeddings()
    return getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]


def known_ids(
    model: PreTrainedModel,
    role: str,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    look: bool = True,
    argument: str = "input_ids",
) -> tuple[Tensor, Tensor]:
    """Return ids (B, T) with 0 in place of unknown ones, and whether any of those was not padding, ().

    look: raise ValueError for unknown ids, naming `argument`. This waits for the device.
    """
    rows = embedding_rows(model)
    strange = (input_ids < 0) | (input_ids >= rows)
    for place in placeholders(model).values():
        if place >= rows:
            strange &= input_ids != place  # the model fills these in
    ids = input_ids.masked_fill(strange, 0)
    if attention_mask is not None and attention_mask.dim() == 2:
        strange = strange & (attention_mask != 0)
    if look:
        refuse_ids(role, rows, input_ids, strange, argument)
    return ids, strange.any()


def run_backbone(model: PreTrainedModel, **inputs: Any) -> Any:
    """Return the backbone's output for tensors on any device, moving them to the device of its embedding."""
    device = input_device(model)
    return backbone(model)(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})


def head(model: PreTrainedModel, hidden: Tensor) -> Head:
    """Return the model's own head, with its scale and cap, over `hidden` (*, H), its last hidden states.

    The weights come to the device of `hidden`, also if they were offloaded. Raises ValueError if an adapter is on the
    head.
    """
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    _check_adapter(linear, type(model).__name__)
    if getattr(linear.weight, "is_meta", False) and linear.weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{type(model).__name__}: its head's weight is offloaded, or on no device, and would get no gradient. Load "
            "a student whole; freeze a teacher (teacher.requires_grad_(False))"
        )
    weight, bias = fetch(linear, "weight", "bias")
    bias = None if bias is None else bias.to(hidden.device)
    return Head(hidden, weight.to(hidden.device), bias, logit_scale=_logit_scale(config), softcap=_softcap(config))


def is_dispatched(model: nn.Module) -> bool:
    """Return whether accelerate or a device_map has placed the model, which must then stay where it is."""
    return hasattr(model, "hf_device_map") or any(hasattr(module, "_hf_hook") for module in model.modules())


def fetch(module: nn.Module, *names: str) -> list[Any]:
    """Return the module's tensors by name, fetched if accelerate has offloaded them; None for missing ones."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    tensors = [getattr(module, name, None) for name in names]
    if hook is not None:
        hook.post_forward(module, None)  # releases them from the module
    return tensors


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that computes the model's embedding, wherever its weight is kept."""
    embedding: Any = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    devices = (getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,)))
    given = next((device for device in devices if device is not None), None)
    return torch.device(given) if embedding.weight.is_meta and given is not None else embedding.weight.device


def head_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Return the shape of the head's weight, (V, H)."""
    vocab, width = model.get_output_embeddings().weight.shape
    return vocab, width


class RouterLoss(NamedTuple):
    """The load-balancing loss of a mixture of experts: the model's own function with its own settings."""

    coef: float  # multiplies it in the training loss
    function: Callable[..., Tensor]
    experts: int
    top_k: int

    def __call__(self, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
        """Return the loss, (), of router logits without padding: top_k if all experts get equally many tokens."""
        mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        return self.function(router_logits, self.experts, self.top_k, mask)


def router_loss(model: PreTrainedModel, coef: float | None = None) -> RouterLoss | None:
    """Return the load-balancing loss that the model's own forward adds under output_router_logits=True.

    None if the model has none, or `coef` is 0. coef replaces the configuration's router_aux_loss_coef. Raises
    ValueError if coef is given and the model has no such loss, or one that is not understood.
    """
    config, function = model.config.get_text_config(), None
    for cls in type(model).__mro__:
        forward: Any = inspect.unwrap(cls.__dict__.get("forward", lambda: None))
        if "load_balancing_loss_func" in forward.__code__.co_names:
            function = forward.__globals__["load_balancing_loss_func"]
            break
    if function is None or not router_parameters(model):  # all layers of this mixture are dense
        asked = [f"router_aux_loss_coef={coef:g}"] if coef else []
        asked += ["output_router_logits=True" for c in (model.config, config) if getattr(c, "output_router_logits", 0)]
        if asked and coef != 0:
            raise ValueError(
                f"{asked[0]}: {type(model).__name__} has no load-balancing loss in transformers. Leave that out of the "
                "arguments and of its configuration, or pass router_aux_loss_coef=0"
            )
        return None

    def setting(*names: str) -> Any:  # the model's attributes first, since Dbrx's configuration keeps them elsewhere
        values = (getattr(one, name, None) for name in names for one in (model, config))
        return next((value for value in values if value is not None), None)

    coef = setting("router_aux_loss_coef", "aux_loss_coef") if coef is None else coef
    if coef == 0:
        return None
    experts, top_k = setting("num_experts"), setting("num_experts_per_tok")
    if None in (coef, experts, top_k) or "num_keys" in inspect.signature(function).parameters:
        raise ValueError(
            f"{type(model).__name__}: how it computes its load-balancing loss is not known here. "
            "router_aux_loss_coef=0 trains without it"
        )
    return RouterLoss(coef, function, experts, top_k)


def recomputes_reentrantly(model: nn.Module) -> bool:
    """Return whether layers are recomputed with use_reentrant=True, which loses all but their first output."""
    functions = (
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    )
    return any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)


def check_model(
    model: PreTrainedModel, role: str, *, compare: bool = True, router_aux_loss_coef: float | None = None
) -> None:
    """Raise if the loss cannot be computed from this model's hidden states.

    Args:
        model: a causal language model.
        role: "student" or "teacher", for the message. Adapters in the layers are fine, and so are quantized layers of
            a teacher or below a student's adapter.
        compare: also compare the head's logits, and a student's load-balancing loss, with the model's on four tokens.
        router_aux_loss_coef: as in `router_loss`.

    Raises:
        TypeError: it is not a `PreTrainedModel` with a linear head.
        ValueError: an adapter is on the head, a quantized student has no adapter, or the logits or the load-balancing
            loss differ from the model's. The message names the architecture.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{role} is {type(model).__name__}; expected a transformers PreTrainedModel with a language-model head, "
            "as AutoModelForCausalLM.from_pretrained gives, or one in a PeftModel"
        )
    name = f"{role} ({type(model).__name__})"
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; expected a causal (decoder-only) language model")
    linear = model.get_output_embeddings()
    _check_adapter(linear, name)
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or is_quantized(weight):
        raise TypeError(
            f"{name} has {type(linear).__name__} as its head; expected a linear layer with a floating-point weight "
            "(V, H). A quantized model's head has to stay in floating point (bitsandbytes' llm_int8_skip_modules)"
        )
    if role == "student":
        _check_student(model, name)
    keep_unpacked(model)
    if compare and (weight.device.type != "meta" or is_dispatched(model)):
        _compare_logits(model, name, router_loss(model, router_aux_loss_coef) if role == "student" else None)


def _check_student(model: PreTrainedModel, name: str) -> None:
    """Raise ValueError for properties that are fine in a teacher but not in a model that is trained."""
    quantized = (parameter for parameter, weight in model.named_parameters() if is_quantized(weight))
    first = next(quantized, None) or (getattr(model, "is_quantized", False) and "as its hf_quantizer has it")
    trainable = getattr(getattr(model, "hf_quantizer", None), "is_qat_trainable", False)
    if first and not trainable and adapted_layer(model) is None:  # transformers.Trainer decides likewise
        raise ValueError(
            f"{name} is quantized ({first}), and such weights are not trained: only the others would be. Load it "
            "without a quantization_config, or train an adapter on it: peft_config=LoraConfig(…), use_peft: true"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if is_dispatched(model) and (len(devices) > 1 or "meta" in devices):
        raise ValueError(
            f"{name} has been spread over devices or offloaded by accelerate (its weights are on "
            f"{', '.join(sorted(devices))}); a student that is trained stays on one: load it without device_map and "
            "cpu_offload. A teacher may be offloaded; FSDP2 shards a student that is too large"
        )


def is_quantized(weight: Tensor) -> bool:
    """Return whether a weight is packed into integers, has 8 bits, or is another library's tensor class (torchao's)."""
    wrapped = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    return wrapped or not weight.is_floating_point() or weight.element_size() == 1


def _check_adapter(linear: nn.Module, name: str) -> None:
    """Raise ValueError if the layer is PEFT's, unless it is a copy trained whole."""
    if hasattr(linear, "base_layer") or (is_peft(linear) and not hasattr(linear, "modules_to_save")):
        raise ValueError(
            f"{name} has an adapter on its head ({type(linear).__name__}); the loss takes one weight (V, H). Leave "
            "lm_head out of the adapter's target modules (modules_to_save trains it whole), or merge the adapter first"
        )


@torch.no_grad()
def _compare_logits(model: PreTrainedModel, name: str, balance: RouterLoss | None) -> None:
    """Compare model(ids).logits with ours, with hidden states scaled so that logits reach CHECK_PEAK."""
    seen: list[Any] = []
    advice = (
        "Distill this architecture with your own code around kdfast.fused_kd_loss, which takes any "
        "Head(hidden, weight, bias, logit_scale=…, softcap=…)"
    )

    def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        if hidden.shape[-1] != head_shape(model)[1]:
            raise ValueError(
                f"{name}: its head does not take the {hidden.shape[-1]} hidden states as they are. {advice}"
            )
        peak = _logits(replace(head(model, hidden), softcap=None)).abs().amax()
        output.last_hidden_state = hidden * (CHECK_PEAK / peak.clamp_min(1e-6)).to(hidden.dtype)
        seen.append(output)
        return output

    vocab, _ = head_shape(model)
    ids = torch.arange(1, 5, device=input_device(model))[None] % vocab
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    hook = backbone(model).register_forward_hook(enlarge)
    try:
        wanted = {} if balance is None else {"labels": ids, "output_router_logits": True}
        whole = model(input_ids=ids, use_cache=False, **wanted)
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training

    if not seen:
        raise ValueError(f"{name}: its forward does not call {type(backbone(model)).__name__}, its backbone. {advice}")
    logits, known = whole.logits.float(), head(model, seen[-1].last_hidden_state)
    ours = _logits(known).to(logits.device)
    error = ((logits - ours).abs().amax() / ours.abs().amax()).item()
    if not error <= CHECK_TOLERANCE.get(known.hidden.dtype, 1e-4):
        raise ValueError(
            f"{name}: softcap·tanh(logit_scale·(h Wᵀ + b)/softcap) with logit_scale={known.logit_scale:g} and "
            f"softcap={known.softcap} does not give this model's logits (off by {error:.1%} of the largest one), so "
            f"its head does something that is not known here. {advice}"
        )
    if balance is not None:
        found = balance(seen[-1].router_logits, None)
        added = whole.loss - F.cross_entropy(logits[0, :-1], ids[0, 1:].to(logits.device))
        own = router_loss(model)
        expected = found * (0.0 if own is None else own.coef)
        if not torch.allclose(found, whole.aux_loss) or not torch.allclose(added, expected, rtol=0.01, atol=1e-5):
            raise ValueError(
                f"{name}: its own loss on four tokens has {added.item():g} more than the cross entropy, where its "
                f"load-balancing loss, taken for {found.item():g}, would give {expected.item():g}. "
                "router_aux_loss_coef=0 trains without it"
            )


def _logits(head: Head) -> Tensor:
    logits = head.logit_scale * F.linear(head.hidden, head.weight, head.bias).float()  # as under autocast
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _logit_scale(config: Any) -> float:
    """Return the factor on the logits. Cohere, Falcon-H1 and others multiply by it; Granite divides."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return scale / scaling if "granite" in config.model_type else scale * scaling


def _softcap(config: Any) -> float | None:
    """Return the cap on the logits, under Gemma's and NanoChat's name or RecurrentGemma's."""
    return getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)


def shift_labels(labels: Tensor, attention_mask: Tensor | None = None, ignored: Iterable[int] = ()) -> Tensor:
    """Return the targets that the hidden states predict: targets[:, t] = labels[:, t + 1].

    Labels are shifted only here. A target is −100 (ignored) at the last position, if its label is −100 or in
    `ignored`, and if either the position or the one it predicts is padding.

    Args:
        labels: (B, T) int64, not shifted.
        attention_mask: (B, T), 0 at padding. A mask of another rank is ignored.
        ignored: ids that are not text, such as the place of an image.

    Returns: (B, T) int64. Raises ValueError for labels of another rank, such as classes.
    """
    if labels.dim() != 2:
        raise ValueError(f"labels is {tuple(labels.shape)}; expected (B, T), a token id or -100 for each of input_ids")
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    for token in ignored:
        targets = targets.masked_fill(targets == token, IGNORE_INDEX)
    if attention_mask is None or attention_mask.dim() != 2:
        return targets
    real = attention_mask != 0
    return targets.masked_fill(~(real & F.pad(real[:, 1:], (0, 1), value=False)), IGNORE_INDEX)


def real_tokens(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Return the mask (B, T) of tokens that are not padding; packed rows mark padding by position 0 instead."""
    if attention_mask is not None or position_ids is None or position_ids.dim() != 2:
        return attention_mask
    continued = F.pad(position_ids[:, 1:] == 1, (0, 1), value=False)
    return ((position_ids > 0) | continued).long()
