"""Actions that the processes of a launch take together; a single process takes them alone."""

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
    """Print from the first process, each text only once."""
    print_once(text)


def by_first(act: Callable[[], T]) -> T:
    """Call `act` in the first process; return its result, or raise its error, in all of them."""
    first: Any = by_all(lambda: act() if index() == 0 else None)[0]
    return first


def by_all(act: Callable[[], T]) -> list[T]:
    """Return the results of `act` in all processes. If it raises in one, raise in all."""
    if count() == 1:
        return [act()]
    outcome: tuple[Any, Exception | None]
    try:
        outcome = act(), None
    except Exception as error:
        outcome = None, error
    outcomes: list[Any] = [None] * count()
    distributed.all_gather_object(outcomes, outcome)
    raised = [error for _, error in (outcome, *outcomes) if error is not None]  # this process's own error first
    if raised:
        distributed.barrier()  # if one left before all have heard of the error, the others would fail
        raise raised[0]
    return [result for result, _ in outcomes]


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Copy the first process's values to all, through `device`, one tensor at a time."""
    for tensor in tensors:
        sent = tensor.detach().to(device).contiguous()
        distributed.broadcast(sent, src=0)
        tensor.copy_(sent)


def leave() -> None:
    """Disconnect all processes at once: if one left early, those that talk to it would fail."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
