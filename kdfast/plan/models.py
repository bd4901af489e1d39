"""Models by name or folder: head, parameters, what a student's backbone keeps for its backward. No weights are read.

The model is built of fake tensors, which have shapes and no memory, and its forward is run on them inside bf16
autocast, as Hugging Face's Trainer does with bf16=True: parameters in fp32, products in bf16. What autograd saves is
counted, each storage once, for one sequence and for two: the difference is what grows with the tokens, the rest (bf16
copies of the weights, which autocast keeps) does not. Attention is counted as FlashAttention saves it, queries, keys,
values, output and log-sum-exps; PyTorch's plain attention would keep whole attention matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

ATTENTION = "kdfast_plan"  # the name that the attention below is registered under
BY_WIDTHS = "--student-width, --teacher-width and --vocab instead"


@dataclass(frozen=True)
class Model:
    width: int
    vocab: int  # rows of the head
    parameters: int = 0  # a tied embedding once
    head_tied: bool = True
    activation_bytes: int = 0  # per token, kept for the backward
    autocast_bytes: int = 0  # bf16 copies of weights


def describe(name: str | Path, argument: str, *, sequence_length: int = 0, checkpointing: bool = False) -> Model:
    """Return what is known of a causal language model, by the hub's name or a folder with a config.json.

    sequence_length: given, the backbone's activations are counted for sequences of so many tokens; with `checkpointing`
    the layers' inputs alone, of one layer after the other everything (not counted: one layer's is small).

    Raises ValueError naming `argument`.
    """
    config = _config(name, argument)
    try:
        with FakeTensorMode(), torch.device("cpu"):
            model = _build(config)
            head = model.get_output_embeddings()
            vocab, width = head.weight.shape
            tied = head.weight is model.get_input_embeddings().weight
            growing = constant = 0
            if sequence_length:
                one, two = (_saved_bytes(model, sequences, sequence_length) for sequences in (1, 2))
                growing, constant = (two - one) // sequence_length, max(0, 2 * one - two)
            if sequence_length and checkpointing:
                growing = (config.get_text_config().num_hidden_layers + 1) * width * 4
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{argument} {str(name)!r}: the model could not be built without its weights ({_first_line(error)}); give "
            f"{BY_WIDTHS}"
        ) from error
    return Model(width, vocab, sum(p.numel() for p in model.parameters()), tied, growing, constant)


def _config(name: str | Path, argument: str) -> Any:
    from transformers import AutoConfig

    local = Path(name).expanduser().is_dir()
    place = Path(name).expanduser() if local else name
    try:
        return AutoConfig.from_pretrained(str(place), trust_remote_code=False, local_files_only=local)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument} {str(name)!r}: no configuration found in such a folder, on the hub or in its cache "
            f"({_first_line(error)}) Give a folder with a config.json, or {BY_WIDTHS}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _build(config: Any) -> Any:
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).train()


def _saved_bytes(model: Any, sequences: int, length: int) -> int:
    """Return the bytes that autograd saves in the backbone's forward, parameters left out."""
    saved: dict[int, Tensor] = {}  # kept, so that no two storages have one identity

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    ids = torch.zeros(sequences, length, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        model.base_model(input_ids=ids, use_cache=False)
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise AssertionError("shapes alone have no gradients")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """Do as transformers calls it: (B, heads, T, width) → (B, T, heads, width) and no weights."""
    return _Attention.apply(query, key, value).transpose(1, 2), None
