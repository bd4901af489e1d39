"""Reads a model's sizes from its configuration, by hub name or from a folder, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import expanduser

import torch

from kdfast.plan.price import Size, size_of


@dataclass(frozen=True)
class Model:
    width: int
    vocab: int  # rows of the head
    parameters: int = 0  # counts a tied embedding once
    head_tied: bool = True
    size: Size | None = None  # known for a model given by name


def describe(name: str, argument: str) -> Model:
    """Return the sizes of a causal language model, given its hub name or a folder with a config.json.

    Raises ValueError naming `argument`.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(expanduser(name), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings().weight
        tied, size = head is model.get_input_embeddings().weight, size_of(model)
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{argument} {name!r}: no causal language model can be read in such a folder, on the hub or in its cache "
            f"({reason}); expected a config.json there, and transformers (pip install 'kdfast[train]'); or give "
            "--student-width, --teacher-width and --vocab instead"
        ) from error
    return Model(head.shape[1], head.shape[0], model.num_parameters(), tied, size)
