"""Causal language models of transformers: loading them, and what the loss needs to know about them.

    head(model, backbone(model)(input_ids).last_hidden_state)  →  Head; model(input_ids).logits is never made

Model families scale and cap their logits in different ways (`logit_scale`, `final_logit_softcapping`, …). An unknown
factor would silently train on wrong logits, so `check_model` compares head and model once, on four tokens whose logits
are large enough for a cap to show. Logits, (1, 4, V), are made only there.

Code in a model repository is not run unless `model_init_kwargs` has `trust_remote_code=True`; pickled weights are read
with `weights_only`, and HF_HUB_OFFLINE is respected. Every failure to load is one ValueError that names the argument.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from kdfast.frontend.checks import refuse_ids
from kdfast.inputs import Head, did_you_mean, short
from kdfast.param_groups import router_parameters
from kdfast.training.adapters import adapted_layer, is_peft, keep_unpacked, require_peft, unwrap
from kdfast.training.data.tokenizers import check_tokens, count_ids, own_tokenizer
from kdfast.training.durable.errors import first_line
from kdfast.training.durable.safe_load import explain

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
MOST_LAYERS = 10_000
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SOURCE = ("revision", "token", "cache_dir")  # init kwargs that also locate a model's other files
SPELLED = {  # older names of from_pretrained's arguments, or ones ignored beside dtype → current name
    "torch_dtype": "dtype",
    **{name: f"quantization_config={{'{name}': True}}" for name in ("load_in_4bit", "load_in_8bit")},
}
OUTSIDE_TO_DICT = ("rope_theta", "rope_scaling", "attn_implementation")  # settings that to_dict() leaves out


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
        """Return the loss, (), of router logits from output_router_logits=True, without padding.

        It is 1 if all experts get equally many tokens, times top_k.
        """
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


def load_student(
    model_name_or_path: str | Path | None = None,
    *,
    student_config: str | Path | dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    valid_vocab: int | None = None,
    dtype: torch.dtype | str | None = None,
    model_init_kwargs: Mapping[str, Any] | str | None = None,
) -> PreTrainedModel:
    """Load a causal language model to train, or build one with fresh weights.

    Example:
        student = load_student("gpt2", tokenizer=tokenizer)
        small = load_student(student_config={"model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4})

    Args:
        model_name_or_path: a folder, or a name on the hub.
        student_config: instead, the configuration of a fresh model, whose weights are drawn from the global random
            state: a dict with "model_type" and settings of that type, the same as JSON, a config.json, or its folder.
        tokenizer: its ids must fit the model, and be the same tokens as in a tokenizer saved with the weights. A fresh
            model takes vocab_size and special ids from it, unless the dict sets them.
        valid_vocab: tokens with ids from here on may differ.
        dtype: dtype of the weights, fp32 by default. Keep that, and use `bf16=True` in the training arguments for
            mixed precision.
        model_init_kwargs: further arguments of `from_pretrained`, as a mapping or JSON: attn_implementation, revision,
            quantization_config, …, and dtype unless it is given separately.

    Raises ValueError naming the argument: none or both are given, nothing is found, settings are unknown, or ids do
    not fit or are other tokens.
    """
    if (model_name_or_path is None) == (student_config is None):
        raise ValueError(
            f"model_name_or_path={model_name_or_path!r} and student_config={student_config!r}; expected one of the two"
        )
    kwargs = read_init_kwargs("model_init_kwargs", model_init_kwargs, dtype)
    if model_name_or_path is not None:
        model = _from_pretrained("model_name_or_path", model_name_or_path, {"dtype": torch.float32, **kwargs})
    else:
        assert student_config is not None
        if model_init_kwargs:
            raise ValueError(
                f"model_init_kwargs={model_init_kwargs!r} with student_config, a fresh model; its settings are part of "
                "student_config, and dtype an argument"
            )
        if isinstance(student_config, str) and student_config.lstrip().startswith("{"):
            student_config = read_mapping("student_config", student_config)
        dtype = torch.float32 if dtype is None else dtype
        wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
        if not isinstance(wanted, torch.dtype):
            raise ValueError(f"dtype={dtype!r}; expected a torch dtype such as 'float32' or 'bfloat16'")
        model = _fresh(student_config, tokenizer)
        model.to(wanted)  # type: ignore[arg-type]  # a wrapper hides transformers' annotation
    _check_tokenizer(
        "model_name_or_path" if student_config is None else "student_config", model, tokenizer, valid_vocab
    )
    return model


def load_teacher(
    model_name_or_path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    valid_vocab: int | None = None,
    dtype: torch.dtype | str | None = None,
    model_init_kwargs: Mapping[str, Any] | str | None = None,
) -> PreTrainedModel:
    """Load a teacher, frozen and in eval mode.

    Example:
        teacher = load_teacher("gpt2-medium", dtype="bfloat16", model_init_kwargs={"device_map": "auto"})

    Args:
        model_name_or_path: a folder, or a name on the hub.
        tokenizer, valid_vocab: the text's, as in `load_student`.
        dtype: dtype of the weights; by default "auto", the one they were saved in.
        model_init_kwargs: as in `load_student`. With a device_map the teacher stays where that puts it.

    Raises ValueError as `load_student` does.
    """
    kwargs = read_init_kwargs("teacher_model_init_kwargs", model_init_kwargs, dtype)
    model = _from_pretrained("teacher_model_name_or_path", model_name_or_path, {"dtype": "auto", **kwargs})
    if kwargs.get("device_map") is not None and not is_dispatched(model):  # training may be on another device
        model.hf_device_map = {"": str(model.device)}  # type: ignore[assignment]
    _check_tokenizer("teacher_model_name_or_path", model, tokenizer, valid_vocab)
    return model.requires_grad_(False).eval()


def read_init_kwargs(
    argument: str, given: Mapping[str, Any] | str | None, dtype: torch.dtype | str | None = None
) -> dict[str, Any]:
    """Return `given`, a mapping or JSON of arguments for `from_pretrained`, as a dict, with `dtype` if it is given.

    Raises ValueError naming `argument`: not a mapping, dtype given twice, or an older name of a key.
    """
    kwargs = read_mapping(argument, given or {})
    if (key := next((key for key in SPELLED if key in kwargs), None)) is not None:
        raise ValueError(f"{argument} has {key}; expected {SPELLED[key]} in its place")
    if dtype is None:
        return kwargs
    if "dtype" in kwargs:
        key = argument.replace("model_init_kwargs", "dtype")
        raise ValueError(f"{key}={dtype!r}, and {argument} has dtype={kwargs['dtype']!r}; expected one of them")
    return {**kwargs, "dtype": dtype}


def read_mapping(argument: str, given: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return a copy of a mapping, or parse it from JSON."""
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"{argument}: {given!r} is not valid JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"{argument}={given!r}; expected a mapping of names to values, or one as JSON")
    return dict(value)


def _from_pretrained(argument: str, name: str | Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    path, subject = Path(name).expanduser(), f"{argument}={str(name)!r}"
    local = path.is_dir()
    if not local and (path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1):
        raise ValueError(f"{subject}: there is no such folder; expected one that save_pretrained wrote")
    where = "in that folder" if local else "as a folder, nor on the hub or in its cache"
    expected = "Expected a causal language model as save_pretrained writes it"
    source, teacher = str(path if local else name), argument.startswith("teacher")
    with _explained(f"{subject} could not be loaded {where}", expected):
        place = {key: value for key, value in kwargs.items() if key in SOURCE}
        adapter = find_adapter_config_file(source, local_files_only=local, **place)
    if adapter is not None:
        require_peft(f"{subject} holds a PEFT adapter, which")
    asked = f" with {short(kwargs)}" if kwargs.keys() - {"dtype"} else ""
    with _explained(f"{subject} could not be loaded {where}{asked}", expected):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            weights_only=True,
            output_loading_info=True,
            **{"local_files_only": local, "trust_remote_code": False, **kwargs},
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{subject} lacks {len(missing)} of the model's weights, first {missing[0]}, which would be drawn at "
            f"random. {expected}; layers that hold an adapter are to be merged first: merge_and_unload()"
        )
    if adapter is not None and not teacher:
        model.set_adapter(model.active_adapters())  # transformers leaves a loaded adapter frozen
    keep_unpacked(model)
    return model


@contextmanager
def _explained(failure: str, expected: str) -> Iterator[None]:
    """Turn any exception of transformers, which uses a config.json unchecked, into a ValueError."""
    try:
        yield
    except (SafetensorError, UnpicklingError) as error:
        raise ValueError(
            f"{failure}: its weights file {explain(error)}. Expected a whole model.safetensors, or a "
            "pytorch_model.bin of tensors alone; download or copy it again"
        ) from error
    except Exception as error:  # of many classes
        raise ValueError(f"{failure}: {type(error).__name__}: {first_line(error)}. {expected}") from error


def _fresh(source: str | Path | dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """Return a model with the given configuration and freshly drawn weights."""
    given: dict[str, Any] = source if isinstance(source, dict) else {}
    config = _config_from_dict(given) if isinstance(source, dict) else _config_from_file(source)
    if tokenizer is not None:
        derived = {"vocab_size": count_ids(tokenizer), **{name: getattr(tokenizer, name) for name in SPECIAL_IDS}}
        for name in derived.keys() - given.keys():
            setattr(config, name, derived[name])
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:  # it would take hours and all memory before it failed
        raise ValueError(f"student_config: {short(layers)} layers; expected {MOST_LAYERS} at most")
    failure = f"student_config of model_type {config.model_type!r}: no model can be made of it"
    with _explained(failure, "Expected sizes that go together, and fit into memory"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _config_from_file(source: str | Path) -> PreTrainedConfig:
    path, subject = Path(source).expanduser(), f"student_config={str(source)!r}"
    if not path.exists():
        raise ValueError(f"{subject}: there is no such file; expected a config.json or a folder")
    with _explained(f"{subject} could not be read", "Expected a config.json as save_pretrained writes it"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def _config_from_dict(settings: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of checked settings. (AutoConfig would accept a misspelled key and ignore it.)"""
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ValueError(f"student_config={settings!r} has no model_type; expected one, such as 'gpt2' or 'llama'")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(f"student_config: model_type={model_type!r} is unknown to transformers") from error
    known = {*default.to_dict(), *default.attribute_map, *SPECIAL_IDS, *OUTSIDE_TO_DICT}
    for key in settings:
        if key not in known:
            raise ValueError(
                f"student_config: {key!r} is not a setting of model_type {model_type!r}{did_you_mean(key, known)}"
            )
    with _explained(f"student_config of model_type {model_type!r}", "Expected settings as that type takes them"):
        return AutoConfig.for_model(model_type, **settings)


def _check_tokenizer(
    argument: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, valid_vocab: int | None
) -> None:
    """Raise if the ids of `tokenizer` do not fit the model, or are other tokens in the model's own tokenizer."""
    if tokenizer is None:
        return
    rows, largest = embedding_rows(model), count_ids(tokenizer) - 1  # ids may have gaps
    if len(tokenizer) > rows or largest >= rows:
        raise ValueError(
            f"{argument}: the model has {rows} token embeddings and the tokenizer {len(tokenizer)} tokens with ids up "
            f"to {largest}; they do not belong together. Give the model's own tokenizer, or save the model with rows "
            f"for tokens that were added: model.resize_token_embeddings({max(len(tokenizer), largest + 1)})"
        )
    if argument != "student_config":
        check_tokens(argument, tokenizer, own_tokenizer(model, local=False), valid_vocab)
