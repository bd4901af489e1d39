"""Counts of what happens to a data set's rows when they are tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from kdfast.training.durable.processes import print_once

NOTES = ("skipped", "truncated", "tokens", "targets", "teacher_tokens")  # notes on a row, beside its tokens


@dataclass
class Counts:
    """What happened to a data set's rows: `skipped` by reason; tokens and targets of those that were kept."""

    rows: int = 0
    tokens: int = 0
    targets: int = 0
    truncated: int = 0
    longest: int = 0  # the student's or the teacher's
    teacher_tokens: int = 0  # read with prompts of the teacher's own
    skipped: dict[str, int] = field(default_factory=dict)
    argument: str = ""

    def __str__(self) -> str:
        return self.text("; ")

    def text(self, between: str = "\n    ") -> str:
        """Return the counts in words, with what was skipped or cut after `between`."""
        notes = []
        if self.skipped:
            reasons = [f"{number} {reason}" for reason, number in sorted(self.skipped.items())]
            why = ", ".join(reasons if len(reasons) > 1 else self.skipped)
            notes.append(f"{sum(self.skipped.values())} skipped ({why})")
        if self.truncated:
            notes.append(f"{self.truncated} cut to max_length")
        counted = f"{self.argument}: {self.rows} rows; {self.tokens:,} tokens, {self.targets:,} of them targets"
        counted += f"; the teacher reads {self.teacher_tokens:,}, with its own prompts" if self.teacher_tokens else ""
        return between.join((counted, *([", ".join(notes)] if notes else [])))

    def keep(self, row: dict[str, Any]) -> bool:
        """Count a row of a stream; return whether to train on it. The first skipped row is reported."""
        reason = row["skipped"]
        if reason and reason not in self.skipped:
            print_once(f"{self.argument}: rows are skipped: {reason}")
        self.add(*([row[note]] for note in NOTES))
        return not reason

    def add(
        self,
        skipped: Iterable[str],
        truncated: Iterable[bool],
        tokens: Iterable[int],
        targets: Iterable[int],
        teacher_tokens: Iterable[int],
    ) -> None:
        """Count rows by `Encoder`'s notes, in the order of NOTES."""
        reasons = Counter(skipped)
        self.rows += reasons.total()
        for reason in filter(None, reasons):
            self.skipped[reason] = self.skipped.get(reason, 0) + reasons[reason]
        self.truncated += sum(truncated)
        tokens, teacher_tokens = list(tokens), list(teacher_tokens)
        self.tokens += sum(tokens)
        self.teacher_tokens += sum(teacher_tokens)
        self.longest = max([self.longest, *tokens, *teacher_tokens])
        self.targets += sum(targets)

    def of_blocks(self, blocks: Any, length: int) -> Counts:
        """Return the counts of blocks of one length, each a row; a stream's are unknown."""
        n = len(blocks) if hasattr(blocks, "__len__") else 0
        return replace(self, rows=n, tokens=n * length, targets=n * (length - 1), longest=length)
