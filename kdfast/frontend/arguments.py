"""The arguments of one call on this process: plain tensors, and which part of the vocabulary they hold."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kdfast.inputs import Head, Logits, Options, Teacher

EMPTY_MASK = (
    "kd_vocab_mask is False at every id that both sides have; expected a True one, for the KD term to be over. Pass "
    "None for all ids, or teacher=None for the cross entropy alone"
)


class Vocabulary(NamedTuple):
    """The student's vocabulary and this process's contiguous slice. Sizes count a head's rows, padding included."""

    size: int
    start: int = 0
    rows: int = 0  # this process has ids start … start + rows
    largest: int = 0  # the most rows any process has
    group: str = ""  # the process group's name; "" = the vocabulary is not split
    teacher: int | None = None  # size of the teacher's own vocabulary, with a group
    whole_teacher: bool = False  # every process has the teacher's whole head or logits

    def within(self, ids: int) -> int:
        """Return how many of the first `ids` ids this process has."""
        return min(max(ids - self.start, 0), self.rows)


class Arguments(NamedTuple):
    """The arguments of `fused_kd_loss` on this process."""

    student: Head
    teacher: Teacher | None
    labels: Tensor | None
    options: Options
    vocabulary: Vocabulary
    kd_vocab_mask: Tensor | None = None  # over the whole vocabulary: drops a sparse teacher's entries
    compare: bool = False  # compare this call with those of the group's other processes

    @property
    def valid_vocab(self) -> int:
        return self.vocabulary.size if self.options.valid_vocab is None else self.options.valid_vocab

    @property
    def kd_vocab(self) -> int:
        """Return how many of this process's entries the KD term covers: up to the end of the smaller vocabulary."""
        ids, teacher = self.vocabulary.within(self.valid_vocab), self.teacher
        if isinstance(teacher, Head):
            ids = min(ids, teacher.weight.shape[0])
        return min(ids, teacher.logits.shape[-1]) if isinstance(teacher, Logits) else ids
