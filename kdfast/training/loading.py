"""Students and teachers from disk, from the hub, or fresh from a configuration.

Code that a model repository brings along is never run (`trust_remote_code` stays off), nor what a pickled weight file
would call (`weights_only`), and HF_HUB_OFFLINE is respected. Every failure is one ValueError that names the argument.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdfast.frontend.checks import short
from kdfast.training.durable.errors import first_line
from kdfast.training.durable.safe_load import explain

MOST_LAYERS = 10_000
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
OUTSIDE_TO_DICT = ("rope_theta", "rope_scaling", "attn_implementation")  # settings that to_dict() does not list


def load_student(
    model_name_or_path: str | Path | None = None,
    *,
    student_config: str | Path | dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> PreTrainedModel:
    """A causal language model to train.

    Args:
        model_name_or_path: a folder, or a name on the hub.
        student_config: instead, a fresh model, drawn from the global random state: a dict with "model_type" and that
            type's settings, a config.json, or a folder with one.
        tokenizer: its token ids must fit the model. A fresh model takes vocab_size and special ids from it, but
            where the dict sets them.
        dtype: of the weights. Keep fp32 and let `bf16=True` of the training arguments do the mixed precision.

    Raises ValueError naming the argument: none or both given, nothing found, unknown settings, ids that do not fit.
    """
    if (model_name_or_path is None) == (student_config is None):
        raise ValueError(
            f"model_name_or_path={model_name_or_path!r} and student_config={student_config!r}; expected one of the two"
        )
    if model_name_or_path is not None:
        model = _from_pretrained("model_name_or_path", model_name_or_path, dtype)
    else:
        assert student_config is not None
        wanted = _torch_dtype(dtype)
        model = _from_config(_config(student_config, tokenizer))
        model.to(wanted)  # type: ignore[arg-type]  # transformers' annotation of it is lost in a wrapper
    _check_tokenizer("model_name_or_path" if student_config is None else "student_config", model, tokenizer)
    return model


def load_teacher(
    model_name_or_path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """A teacher in eval mode, frozen.

    Args:
        model_name_or_path: a folder, or a name on the hub.
        tokenizer: its token ids must fit the model.
        dtype: of the weights; "auto" is the one they were saved in.

    Raises ValueError like `load_student`.
    """
    model = _from_pretrained("teacher_model_name_or_path", model_name_or_path, dtype)
    _check_tokenizer("teacher_model_name_or_path", model, tokenizer)
    return model.requires_grad_(False).eval()


def _from_pretrained(argument: str, name: str | Path, dtype: torch.dtype | str) -> PreTrainedModel:
    path = Path(name).expanduser()
    local = path.is_dir()
    if not local and (path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1):
        raise ValueError(f"{argument}={str(name)!r}: there is no such folder; expected one that save_pretrained wrote")
    try:
        return AutoModelForCausalLM.from_pretrained(
            path if local else str(name),
            dtype=dtype,
            trust_remote_code=False,
            weights_only=True,
            local_files_only=local,
        )
    except (SafetensorError, UnpicklingError) as error:
        raise ValueError(
            f"{argument}={str(name)!r}: its weights file {explain(error)}. Expected a whole model.safetensors, or a "
            "pytorch_model.bin of tensors alone; download or copy it again"
        ) from error
    except Exception as error:  # of many classes: what stands in a config.json is used unchecked
        where = "in that folder" if local else "as a folder, nor on the hub or in its cache"
        raise ValueError(
            f"{argument}={str(name)!r} could not be loaded {where}: {first_line(error)}. Expected a causal language "
            "model as save_pretrained writes it"
        ) from error


def _from_config(config: PreTrainedConfig) -> PreTrainedModel:
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:  # hours, and all of the memory, before it could fail
        raise ValueError(f"student_config: {short(layers)} layers; expected {MOST_LAYERS} at most")
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of many classes: sizes that do not go together, or do not fit into memory
        raise ValueError(
            f"student_config of model_type {config.model_type!r}: no model can be made of it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _config(source: str | Path | dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    given: dict[str, Any] = {}
    if isinstance(source, dict):
        given = dict(source)
        config = _config_from_dict(given)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise ValueError(
                f"student_config={str(source)!r}: there is no such file; expected a config.json or a folder"
            )
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # of many classes, as above
            raise ValueError(f"student_config={str(source)!r} could not be read: {first_line(error)}.") from error
    if tokenizer is not None:
        derived = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in SPECIAL_IDS}}
        for name, value in derived.items():
            if name not in given:
                setattr(config, name, value)
    return config


def _config_from_dict(settings: dict[str, Any]) -> PreTrainedConfig:
    """AutoConfig takes any key and keeps it without a word; a misspelt one would give another model."""
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
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"student_config: {key!r} is not a setting of model_type {model_type!r}{hint}")
    try:
        return AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # transformers' own checks of types and values, in several classes
        raise ValueError(f"student_config of model_type {model_type!r}: {first_line(error)}.") from error


def _check_tokenizer(argument: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is None:
        return
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=0)  # there may be more ids than tokens
    if len(tokenizer) > rows or largest >= rows:
        raise ValueError(
            f"{argument}: the model has {rows} token embeddings and the tokenizer {len(tokenizer)} tokens with ids up "
            f"to {largest}; they do not belong together. Give the model's own tokenizer, or resize its token embeddings"
        )


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={dtype!r}; expected a torch dtype such as 'float32' or 'bfloat16'")
    return found
