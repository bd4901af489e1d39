"""Every process starts from what the first one has: a fresh student's weights, and what was solved for it.

Solving is done by all, so that none waits. The same text gives the same numbers up to the last bits, which other
devices or thread counts round differently, and by which a rank that a threshold finds may jump.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed

from kdfast.training.initialization import Start
from kdfast.training.model import DistillationModel


@torch.no_grad()
def share_starts(model: DistillationModel, starts: list[Start], device: torch.device) -> list[Start]:
    """The first process's trained weights, vocabulary weights and compressed head into all; its `starts` returned.

    Called by all, before anything is wrapped or sharded. The teacher is taken to be the same everywhere.
    """
    told: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        told = [starts, None if model.compressed_head is None else copy.deepcopy(model.compressed_head).cpu()]
    distributed.broadcast_object_list(told, src=0, device=device)
    starts, compressed = told
    if distributed.get_rank() != 0:
        model.compressed_head = None if compressed is None else compressed.to(device)
    parts = (model.student, model.logit_projector, model.hidden_loss)
    share((p for part in parts if part is not None for p in part.parameters()), device)
    if model.vocab_weights is not None:
        share([model.vocab_weights], device)
    return starts


@torch.no_grad()
def share(tensors: Iterable[Tensor], device: torch.device) -> None:
    """The first process's values into all, through `device`, one tensor at a time."""
    for tensor in tensors:
        sent = tensor.detach().to(device).contiguous()
        distributed.broadcast(sent, src=0)
        tensor.copy_(sent)
