"""The student's vocabulary, and which part of it this process has: the whole, or a contiguous slice."""

from __future__ import annotations

from typing import NamedTuple


class Vocabulary(NamedTuple):
    """The student's, and what of it is here. Sizes count rows of the heads, padding included."""

    size: int
    start: int = 0
    rows: int = 0  # here: ids start … start + rows
    largest: int = 0  # most rows any process has
    group: str = ""  # of processes; "" = the vocabulary is whole
    teacher: int | None = None  # size of the teacher's own vocabulary
    whole_teacher: bool = False  # that is whole on every process

    def within(self, ids: int) -> int:
        """How many of the first `ids` ids are here."""
        return min(max(ids - self.start, 0), self.rows)
