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

ATTENTION = "kdfast_plan"  # the name our stand-in for attention is registered under


@dataclass(frozen=True)
class Model:
    name: str
    width: int
    vocab: int  # rows of the head
    parameters: int  # a tied embedding once
    head_tied: bool
    activation_bytes: int = 0  # a token, kept for the backward
    autocast_bytes: int = 0  # bf16 copies of weights


def describe(name: str | Path, argument: str, *, sequence_length: int = 0, checkpointing: bool = False) -> Model:
    """A causal language model, by the hub's name or a folder with a config.json.

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
            parameters = sum(p.numel() for p in model.parameters())
            growing = constant = 0
            if sequence_length:
                one, two = (_saved_bytes(model, sequences, sequence_length) for sequences in (1, 2))
                growing, constant = (two - one) // sequence_length, max(0, 2 * one - two)
            if sequence_length and checkpointing:
                growing = (config.get_text_config().num_hidden_layers + 1) * width * 4
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{argument} {str(name)!r}: the model could not be built without its weights ({reason}); give "
            "--student-width, --teacher-width and --vocab instead"
        ) from error
    return Model(str(name), width, vocab, parameters, tied, growing, constant)


def _config(name: str | Path, argument: str) -> Any:
    from transformers import AutoConfig

    local = Path(name).expanduser()
    try:
        return AutoConfig.from_pretrained(
            local if local.is_dir() else str(name), trust_remote_code=False, local_files_only=local.is_dir()
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{argument} {str(name)!r}: no configuration found in such a folder, on the hub or in its cache ({reason}) "
            "Give a folder with a config.json, or --student-width, --teacher-width and --vocab instead"
        ) from error


def _build(config: Any) -> Any:
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).train()


def _saved_bytes(model: Any, sequences: int, length: int) -> int:
    """Bytes that autograd saves in the backbone's forward, parameters left out."""
    saved: dict[int, Tensor] = {}  # kept, so that no two storages have one identity
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    ids = torch.zeros(sequences, length, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        model.base_model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)


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


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: (B, heads, T, width) → (B, T, heads, width)."""
    return _Attention.apply(query, key, value).transpose(1, 2), None
