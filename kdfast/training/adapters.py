"""Students with a PEFT adapter, such as LoRA, on a frozen base that may be quantized.

The student is the transformers model whose layers hold the adapter, whether it came inside a PeftModel, adapted in
place, or plain with a `peft_config`. Only the adapter is saved, as PEFT's own `save_pretrained` does:

    adapter_model.safetensors, adapter_config.json

`peft` is imported only where it is needed.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from kdfast.inputs import did_you_mean

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
NOTHING_TO_DO = (  # PEFT's warnings about its own question to transformers, and what is put right at once
    "`is_gradient_checkpointing` is deprecated", "fan_in_fan_out is set to False but the target module is `Conv1D`",
    "Input and output embeddings are no longer tied after merging",
)  # fmt: skip
PREFIX = "base_model.model."  # the path to the model inside a PeftModel, before every name in ADAPTER_WEIGHTS


def require_peft(what: str) -> Any:
    """Return the module peft. Raise ImportError, naming the extra to install, if it is missing."""
    if not is_peft_available():
        raise ImportError(f"{what} needs peft: pip install 'kdfast[lora]'")
    import peft

    return peft


def is_peft(module: object) -> bool:
    """Return whether the module's class or one of its bases is PEFT's, without importing PEFT."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def adapted_layer(model: nn.Module) -> str | None:
    """Return the name of the first PEFT module in `model`, or None."""
    return next((name for name, module in model.named_modules() if is_peft(module)), None)


def unwrap(model: Any, role: str) -> Any:
    """Return the model inside a PeftModel; anything else as it is. Raise TypeError for learned prompts."""
    if not (is_peft(model) and hasattr(model, "get_base_model")):
        return model
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise TypeError(
            f"{role} is {type(model).__name__} with {model.active_peft_config.peft_type.value}; prompt and prefix "
            "tuning are not supported, as their tokens are added outside the model. Expected LoRA or its kin"
        )
    return model.get_base_model()


def adapt(student: Any, peft_config: Any) -> PreTrainedModel:
    """Return the unwrapped student, with an adapter added if `peft_config` is given.

    Raises TypeError if that is not a PeftConfig, or one for prompts, and ValueError if the student has an adapter.
    """
    student = unwrap(student, "student")
    if peft_config is not None:
        peft = require_peft("peft_config")
        if not isinstance(peft_config, peft.PeftConfig):
            raise TypeError(f"peft_config is {type(peft_config).__name__}; expected one of PEFT's, such as LoraConfig")
        if peft_config.is_prompt_learning:
            raise TypeError(
                f"peft_config is {type(peft_config).__name__}; prompt and prefix tuning are not supported. Expected "
                "LoRA's or its kin's"
            )
        if (layer := adapted_layer(student)) is not None:
            raise ValueError(
                f"peft_config is given and the student has an adapter already (at {layer!r}); leave one out, or merge "
                "that adapter first: peft_model.merge_and_unload()"
            )
        with _without_warnings():
            student = peft.get_peft_model(student, copy.deepcopy(peft_config)).get_base_model()
    return student


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in NOTHING_TO_DO:
            warnings.filterwarnings("ignore", re.escape(message))
        yield


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in the first forward pass on some CPUs.

    Repacked weights give no gradient, less precise products, and another fingerprint of the teacher.
    """
    modules: Any = model.modules()
    for module in modules:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # undoes the packing of an earlier pass


def lora_config(fields: Mapping[str, Any]) -> Any:
    """Return PEFT's LoraConfig for a causal model. Raise ValueError, naming the key, for an unknown field.

    target_modules: a list; a single item may be a pattern, or PEFT's "all-linear".
    """
    peft = require_peft("use_peft: true")
    known = [field.name for field in dataclasses.fields(peft.LoraConfig) if field.init]
    for name in fields:
        if name not in known:
            raise ValueError(f"peft_config: {name!r} is no field of PEFT's LoraConfig{did_you_mean(name, known)}")
    modules: Any = fields.get("target_modules") or []
    if len(modules) == 1 and (modules[0] == "all-linear" or re.search(r"[^\w.]", modules[0])):
        fields = {**fields, "target_modules": modules[0]}
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", **fields})


def check_adapter(student: PreTrainedModel) -> None:
    """Raise ValueError if the student has PEFT layers that would not be trained and saved as expected."""
    layer = adapted_layer(student)
    if layer is None:
        return
    configs = getattr(student, "peft_config", None) or {}
    if len(configs) != 1:
        raise ValueError(
            f"the student has PEFT's layers (at {layer!r}) and {len(configs)} adapters ({', '.join(configs)}); "
            "expected one, which is trained and saved. Delete or merge the others, or load the model anew"
        )
    ((name, config),) = configs.items()
    peft = require_peft("a student with an adapter")
    kind, tuner = config.peft_type.value, peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    base = peft.tuners.tuners_utils.BaseTuner
    whole = issubclass(tuner, base) and tuner.forward is base.forward
    if not whole or getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"the student's adapter is {kind}, which PEFT runs by a forward of its own, or by more than the layers "
            "hold; expected LoRA (but not aLoRA) or another kind that is whole in the layers"
        )
    layers = {at: module for at, module in student.named_modules() if is_peft(module)}
    if merged := next((at for at, layer in layers.items() if getattr(layer, "merged", False)), None):
        raise ValueError(
            f"the student's adapter is merged into its base (at {merged!r}) and would not be trained; call "
            "unmerge_adapter() of its PeftModel"
        )
    with _unwrapped_layers(student):
        trained = [at for at, parameter in student.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"the student's adapter {name!r} is frozen, so nothing of it would be trained: load it with "
            "PeftModel.from_pretrained(base, folder, is_trainable=True), and make it without inference_mode=True"
        )
    state = student.state_dict()
    try:
        kept = {id(tensor) for tensor in adapter_state(student, state).values()}
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"the student's adapter is {kind}, whose weights PEFT does not find in the model alone ({error}), so it "
            "cannot be saved here"
        ) from error
    if lost := [at for at in trained if id(state[at]) not in kept]:
        raise ValueError(
            f"the student's {lost[0]} is trained and no part of the adapter {name!r}, so no checkpoint would have it "
            f"({len(lost)} such weights). Freeze it, or name its module in the adapter's modules_to_save"
        )


def adapter_state(student: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of the student's `state`, whole or sharded, that PEFT saves, under PEFT's names."""
    peft, (name,) = require_peft("saving an adapter"), student.peft_config
    with _unwrapped_layers(student):
        kept = peft.get_peft_model_state_dict(student, state_dict=state, adapter_name=name)
    return {PREFIX + key: tensor for key, tensor in kept.items()}


@contextmanager
def _unwrapped_layers(model: nn.Module) -> Iterator[None]:
    """Hide FSDP's activation checkpointing in module names, by which PEFT looks up entries of a state."""
    inner = "_checkpoint_wrapped_module"
    wrappers = [(parent, *item) for parent in model.modules() for item in parent.named_children()]
    wrappers = [(parent, name, child) for parent, name, child in wrappers if hasattr(child, inner)]
    for parent, name, child in wrappers:
        parent._modules[name] = getattr(child, inner)
    try:
        yield
    finally:
        for parent, name, child in wrappers:
            parent._modules[name] = child


def save_adapter(folder: Path, student: Any, state: dict[str, Tensor]) -> None:
    """Write `state`, from `adapter_state`, in the files that PeftModel.from_pretrained reads."""
    whole = {key: tensor.detach().contiguous().clone() for key, tensor in state.items()}  # untied: each is saved
    save_file(whole, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    (config,) = student.peft_config.values()
    config = copy.copy(config)
    config.inference_mode = True
    config.task_type = config.task_type or "CAUSAL_LM"
    config.base_model_name_or_path = config.base_model_name_or_path or student.name_or_path or None
    config.save_pretrained(str(folder))


def load_adapter(folder: Path, student: Any) -> None:
    """Load in place what `save_adapter` wrote. Raises ValueError if it belongs to another adapter."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no {path.name}; it was saved of a student without an adapter")
    peft, (name,) = require_peft("loading an adapter"), student.peft_config
    state = load_file(path)
    if other := adapter_state(student, student.state_dict()).keys() ^ state.keys():
        raise ValueError(f"{str(folder)!r} holds another adapter than the student's: they differ in {min(other)}")
    state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    with _unwrapped_layers(student):
        peft.set_peft_model_state_dict(student, state, adapter_name=name)


@torch.no_grad()
def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge the adapter in `folder` into `base` in place, in fp32, and return it.

    A tied head stays tied unless the adapter changed or trained it or the embedding.
    """
    peft = require_peft("merging an adapter")
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = nn.Parameter(head.weight.clone())
    with _without_warnings():
        merged: Any = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    if tied:
        same = torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = same
        merged.tie_weights()
    return merged
