"""The arguments of one call as this process has them: plain tensors, and where its vocabulary lies."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kdfast.inputs import Head, Options, Teacher


class Vocabulary(NamedTuple):
    """The student's vocabulary and the contiguous part of it here. Sizes count a head's rows, padding included."""

    size: int
    start: int = 0
    rows: int = 0  # here: ids start … start + rows
    largest: int = 0  # most rows any process has
    group: str = ""  # of processes; "" = the vocabulary is whole
    teacher: int | None = None  # size of the teacher's own vocabulary, where it is sliced or whole on each of them
    whole_teacher: bool = False  # each process has all of that

    def within(self, ids: int) -> int:
        """Return how many of the first `ids` ids are here."""
        return min(max(ids - self.start, 0), self.rows)


class Arguments(NamedTuple):
    """What `fused_kd_loss` was called with, on this process."""

    student: Head
    teacher: Teacher | None
    labels: Tensor | None
    options: Options
    vocabulary: Vocabulary
    compare: bool = False  # this call with those of the group's other processes
