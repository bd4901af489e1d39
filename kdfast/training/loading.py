"""`load_student` and `load_teacher`: causal language models, from folders, the hub or a configuration.

Code in a model repository is not run unless `model_init_kwargs` has `trust_remote_code=True`; pickled weights are read
with `weights_only`, and HF_HUB_OFFLINE is respected. Every failure to load is one ValueError that names the argument.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from kdfast.inputs import did_you_mean, short
from kdfast.training.adapters import keep_unpacked, require_peft
from kdfast.training.data.tokenizers import check_tokens, count_ids, own_tokenizer
from kdfast.training.durable.errors import first_line
from kdfast.training.durable.safe_load import explain
from kdfast.training.hf import embedding_rows, is_dispatched

MOST_LAYERS = 10_000
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SOURCE = ("revision", "token", "cache_dir")  # init kwargs that also locate a model's other files
SPELLED = {  # older names of from_pretrained's arguments, or ones ignored beside dtype → current name
    "torch_dtype": "dtype",
    **{name: f"quantization_config={{'{name}': True}}" for name in ("load_in_4bit", "load_in_8bit")},
}
OUTSIDE_TO_DICT = ("rope_theta", "rope_scaling", "attn_implementation")  # settings that to_dict() leaves out


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
