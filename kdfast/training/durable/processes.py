"""What the processes of a launch do together; a single process does it all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def index() -> int:
    """Return this process's rank."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def print_once(text: str) -> None:
    """Print from the first process."""
    if index() == 0:
        print(text, flush=True)


@cache
def say_once(text: str) -> None:
    """Print from the first process, and the same text only once."""
    print_once(text)


def by_first(act: Callable[[], T]) -> T:
    """Return in all processes what `act` returns in the first; raise in all what it raises, so that none waits."""
    first: Any = by_all(lambda: act() if index() == 0 else None)[0]
    return first


def by_all(act: Callable[[], T]) -> list[T]:
    """Return what `act` returns in every process. Where it raises in one, all raise."""
    if count() == 1:
        return [act()]
    outcome: tuple[Any, Exception | None]
    try:
        outcome = act(), None
    except Exception as error:
        outcome = None, error
    outcomes: list[Any] = [None] * count()
    distributed.all_gather_object(outcomes, outcome)
    raised = [error for _, error in (outcome, *outcomes) if error is not None]  # its own before the others'
    if raised:
        distributed.barrier()  # a process that left before all have heard of it would take the others down
        raise raised[0]
    return [result for result, _ in outcomes]


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Copy the first process's values into all, through `device`, one tensor at a time."""
    for tensor in tensors:
        sent = tensor.detach().to(device).contiguous()
        distributed.broadcast(sent, src=0)
        tensor.copy_(sent)


def leave() -> None:
    """Disconnect the processes, all together: one that is still talked to would take the others down."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
