"""What the processes of a launch do together; one alone does it all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


def index() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def say(text: str) -> None:
    """The first process prints it."""
    if index() == 0:
        print(text, flush=True)


def wait_for_all() -> None:
    if count() > 1:
        distributed.barrier()


def by_first(act: Callable[[], T]) -> T:
    """The first process acts; what it returns all return, and what it raises all raise: none is left waiting."""
    if count() == 1:
        return act()
    outcome: list[Any] = [None, None]  # what came of it, what it raised
    if index() == 0:
        try:
            outcome[0] = act()
        except Exception as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        wait_for_all()  # whoever leaves before all have heard of it takes the others down
        raise outcome[1]
    return outcome[0]


def by_all(act: Callable[[], T]) -> list[T]:
    """Every process acts, and waits for the others; what each returned. Where one raises, all raise."""
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
        wait_for_all()
        raise raised[0]
    return [result for result, _ in outcomes]


def leave() -> None:
    """All together: one that is still talked to would take the others down."""
    if distributed.is_initialized():
        wait_for_all()
        distributed.destroy_process_group()
