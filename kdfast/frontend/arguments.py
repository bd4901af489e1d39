"""The arguments of one call as this process has them: plain tensors, and where its vocabulary lies."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kdfast.inputs import Head, Logits, Options, Teacher

EMPTY_MASK = (
    "kd_vocab_mask is False at every id that both sides have; expected a True one, for the KD term to be over. Pass "
    "None for all ids, or teacher=None for the cross entropy alone"
)


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
    kd_vocab_mask: Tensor | None = None  # of the whole vocabulary, by which a sparse teacher's entries are dropped
    compare: bool = False  # this call with those of the group's other processes

    @property
    def valid_vocab(self) -> int:
        return self.vocabulary.size if self.options.valid_vocab is None else self.options.valid_vocab

    @property
    def kd_vocab(self) -> int:
        """How many of the entries here the KD term may be over: it ends where the smaller vocabulary does."""
        ids, teacher = self.vocabulary.within(self.valid_vocab), self.teacher
        if isinstance(teacher, Head):
            ids = min(ids, teacher.weight.shape[0])
        return min(ids, teacher.logits.shape[-1]) if isinstance(teacher, Logits) else ids
