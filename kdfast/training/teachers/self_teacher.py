"""A teacher that is an earlier state of the student: its weights at the start, or a moving average of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback


def copy_student(student: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the student that shares everything untrained, such as the base below an adapter."""
    frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
    return copy.deepcopy(student, frozen)


class Average:
    """A teacher kept at an exponential moving average of its student's trained weights.

    Args:
        student, teacher: the latter from `copy_student`.
        update_rate: the student's share in each update, in (0, 1].

    Raises ValueError for 16-bit weights, in which small steps are lost.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, update_rate: float) -> None:
        self.models, self.update_rate = (student, teacher), update_rate
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.names = tuple(trained)
        if not 0 < update_rate <= 1:
            raise ValueError(f"teacher_update_rate={update_rate}; expected a number in (0, 1], such as 0.05, TRL's")
        low = next((name for name, p in trained.items() if p.dtype.itemsize < 4), None)
        if low is not None and update_rate < 1:
            raise ValueError(
                f"teacher_update_rate={update_rate:g}, and the student's {low} is {trained[low].dtype}, in which an "
                "average would not move by small steps. Load the student in float32, over which bf16=True is mixed"
            )

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Load the teacher's weights from `state`. Raise ValueError if some are missing."""
        if lacking := sorted({*self.names} ^ state.keys()):
            raise ValueError(f"the checkpoint's teacher is of another student: they differ in {lacking[0]}")
        for name, value in state.items():
            self.models[1].get_parameter(name).copy_(value)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average one step toward the current student."""
        student, teacher = self.models
        for name in self.names:
            teacher.get_parameter(name).lerp_(student.get_parameter(name), self.update_rate)


class TeacherUpdate(TrainerCallback):
    """A callback that updates `average()`, if any, after every `sync_steps`-th step that was not left out."""

    def __init__(self, average: Callable[[], Average | None], sync_steps: int, left_out: Callable[[], bool]) -> None:
        self.average, self.sync_steps, self.left_out = average, sync_steps, left_out

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        average = self.average()
        if average is not None and state.global_step % self.sync_steps == 0 and not self.left_out():
            average.update()
