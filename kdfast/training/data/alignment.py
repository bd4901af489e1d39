"""Rows of the student's tokens as a teacher with another tokenizer reads them, aligned position by position.

The teacher reads the bytes that the student's ids stand for, tokenized its own way. Position t of the student's row is
aligned with position u of the teacher's if both have read exactly the same bytes; otherwise with none (−1). Starts and
ends of texts are matched by role. Bytes are compared token by token, so a normalizer's changes are noticed: from there
on, a row has no aligned positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdfast.training.data.rows import PACKED
from kdfast.training.data.shared_vocabulary import TokenTable, share_vocabulary
from kdfast.training.data.text import DataError, columns_of, map_rows
from kdfast.training.data.tokenizers import check_tokens, other_tokenizer
from kdfast.training.durable.processes import print_once

IGNORED = -100  # a label that counts for nothing
NOWHERE = -1  # in place of a position or an offset
CHANGED = "text that the teacher's tokenizer changes"
UNKNOWN = "tokens of the student's without bytes"
NO_MARK = "an end of text, which the teacher lacks"


class Aligned(NamedTuple):
    """One row as the teacher reads it."""

    ids: list[int]
    positions: list[int]  # for each of the student's positions, the teacher's that has read the same, or −1
    lost: str = ""  # why the rest of the row is not read


class Span(NamedTuple):
    """Text that two renderings of a chat share: `text`, and the offset of its first byte in each."""

    text: bytes
    student: int
    teacher: int


class _Part(NamedTuple):
    """A part of a teacher's row: fixed ids, or a text to tokenize."""

    start: int  # the offset of a text's first byte; for ids, the offset after all of them
    ids: list[int]
    text: str = ""
    opens: bool = False  # whether it starts a text, where a tokenizer may insert a blank


class OtherTokenizer:
    """The tokenizer of a teacher that differs from the text's, and what the two share.

    Example:
        other = OtherTokenizer(student_tokenizer, teacher_tokenizer)
        rows = other.align("train_dataset", rows)  # adds teacher_input_ids and teacher_positions
        model = DistillationModel(student, teacher, shared_vocabulary=other.vocabulary)

    Args:
        student, teacher: the two tokenizers.
        length: most ids in a teacher's row; None = no limit.

    Raises ValueError if a tokenizer's tokens have unknown bytes, or the two share no string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, length: int | None = None
    ) -> None:
        self.student = TokenTable("processing_class", tokenizer)
        self.teacher = TokenTable("teacher", teacher)
        self.vocabulary, self.length = share_vocabulary(self.student, self.teacher), length

    def aligner(self, documents: bool = False) -> Aligner:
        """Return an `Aligner` of rows; `documents` as there."""
        return Aligner(self.student, self.teacher, self.length, documents)

    def align(self, argument: str, rows: Any, *, documents: bool = False) -> Any:
        """Return rows of input_ids with teacher_input_ids and teacher_positions added; print the aligned share.

        documents: as in `Aligner`. Raises DataError, a ValueError, for packed rows, for data sets other than lists and
        those of `datasets`, and if nothing is aligned.
        """
        columns = [*rows[0]] if isinstance(rows, list) and rows else columns_of(rows) if hasattr(rows, "map") else []
        if PACKED in columns or not columns:
            what = "packed of several documents" if columns else f"in a {type(rows).__name__}"
            raise DataError(
                f"{argument}: its rows are {what}, and the teacher's tokenizer is another; expected a list or a "
                "datasets.Dataset of rows with one document each (packing=False; text in blocks), or with the columns "
                "teacher_input_ids and teacher_positions"
            )
        columned = _Columns(self.aligner(documents))
        if isinstance(rows, list):
            made = columned({name: [row[name] for row in rows] for name in COLUMNS if name in columns})
            notes = {name: made.pop(name) for name in NOTES}
            rows = [{**row, **{name: made[name][i] for name in made}} for i, row in enumerate(rows)]
        else:
            rows = map_rows(rows, columned, f"Aligning {argument}", batched=True)
            notes = {name: rows[name] for name in NOTES} if hasattr(rows, "__len__") else {}
            rows = rows.remove_columns([*NOTES])
        if notes:
            print_once(described(argument, **notes))
        return rows


def find_other_tokenizer(
    argument: str,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher: Any,
    given: str | None = None,
    valid_vocab: int | None = None,
    length: int | None = None,
) -> OtherTokenizer | None:
    """Return the teacher's tokenizer if it is known to differ from the text's, `tokenizer`; otherwise None.

    teacher, given: as in `other_tokenizer`. Raises ValueError, naming `argument`, if the bytes of one of the two
    tokenizers are unknown.
    """
    own = other_tokenizer(tokenizer, teacher, given, valid_vocab)
    if tokenizer is None or own is None:
        return None
    try:
        return OtherTokenizer(tokenizer, own, length)
    except ValueError:
        check_tokens(argument, tokenizer, own, valid_vocab)
        raise


COLUMNS = ("input_ids", "attention_mask", "labels")  # columns of a row that are read
NOTES = ("aligned", "counted", "lost")  # notes on a row, beside its columns


def described(argument: str, aligned: Iterable[int], counted: Iterable[int], lost: Iterable[str]) -> str:
    """Return the share of aligned positions in words. Raise DataError if there are none."""
    found, every, reasons = sum(aligned), sum(counted), Counter(filter(None, lost))
    text = (
        f"{argument}: aligned with the teacher's tokens at {found:,} of {every:,} targets ({found / (every or 1):.0%})"
    )
    text += "".join(f"; {number} rows not to their end: {reason}" for reason, number in sorted(reasons.items()))
    if not found:
        raise DataError(f"{text}. There is nothing to learn from this teacher: take another, or recipe='lm_only'")
    return text


class _Columns:
    """A function that adds the teacher's columns to a batch of rows; an object, so that `datasets` can cache by it."""

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = [np.asarray(one) for one in batch["input_ids"]]
        real = [np.asarray(one) != 0 for one in batch.get("attention_mask", [np.ones_like(one) for one in ids])]
        rows = self.aligner([one[mask].tolist() for one, mask in zip(ids, real, strict=True)])
        for i, mask in enumerate(real):  # padding is not read
            found = np.full(len(mask), NOWHERE)
            found[mask] = rows[i].positions
            rows[i] = rows[i]._replace(positions=found.tolist())
        labels = [np.asarray(one)[1:] != IGNORED for one in batch.get("labels", batch["input_ids"])]
        places = [np.asarray(row.positions)[: len(one)] != NOWHERE for row, one in zip(rows, labels, strict=True)]
        return {
            "teacher_input_ids": [row.ids for row in rows],
            "teacher_positions": [row.positions for row in rows],
            "aligned": [int((one & place).sum()) for one, place in zip(labels, places, strict=True)],
            "counted": [int(one.sum()) for one in labels],
            "lost": [row.lost for row in rows],
        }


class Aligner:
    """A function that aligns rows of the student's ids. Offsets count bytes, plus one per text for an inserted blank.

    Args:
        student, teacher: their token tables.
        length: most ids in a teacher's row; None = no limit.
        documents: whether rows begin at the start of a text; blocks begin anywhere, and a blank there is the text's.
    """

    def __init__(
        self, student: TokenTable, teacher: TokenTable, length: int | None = None, documents: bool = False
    ) -> None:
        self.student, self.teacher, self.length, self.documents = student, teacher, length, documents
        self._roles = {i: role for role, i in student.roles.items()}
        self._single = {one: i for one, i in teacher.by_bytes().items() if len(one) == 1}
        self._lead = "\n" * teacher.prefixed  # keeps a blank from being inserted inside a text; removed again

    def __call__(self, rows: Iterable[list[int]]) -> list[Aligned]:
        """Return the aligned rows, with one call of the teacher's tokenizer for all of them."""
        read = [(row, *self._read(row)) for row in rows]
        texts = [part for _, _, parts, _ in read for part in parts if part.text]
        encoded = iter(self.teacher.encode([part.text if part.opens else self._lead + part.text for part in texts]))
        return [self._align(*one, encoded) for one in read]

    def _read(self, row: list[int]) -> tuple[list[int], list[_Part], str]:
        """Return the offset after each readable id, the parts that the teacher reads, and why the rest is not read."""
        ends: list[int] = []
        at = 1  # the offset of the next text's first byte
        parts = [_Part(at, self._marks([], first=True, last=False) or [])]
        for marked, group in groupby(row, lambda i: i in self._roles):
            ids = list(group)
            n, first = len(ends) + len(ids), not ends
            pieces = self.student.pieces(row[n : n + 2] if marked else ids)
            text = b"".join(pieces)
            blank = (marked or not first or self.documents) and self.student.has_put(text)
            if marked:
                roles = [self._roles[i] for i in ids]
                marks = self._marks(roles[first and ids[0] == self.student.start :], first=first, last=n == len(row))
                if marks is None:  # the teacher cannot predict what the student's token before it predicts
                    return ends[:-1], parts, NO_MARK
                at += 0 if first else 2
                parts = ([] if first else parts) + [_Part(at, marks)]
                ends += [at - blank] * len(ids)  # several ids count as one
                continue
            ends += list(accumulate(map(len, pieces), initial=at - blank))[1:]
            parts += self._parts(text[blank:], at)
            at += len(text) - blank
            if len(pieces) < len(ids):
                return ends, parts, UNKNOWN
        return ends, parts, ""

    def _marks(self, roles: list[str], *, first: bool, last: bool) -> list[int] | None:
        """Return the teacher's ids for adjacent marks, before a text or last; None if it has none."""
        start = [] if self.teacher.start is None else [self.teacher.start]
        if "eos" not in roles:
            return start if start or first else None
        if "eos" not in self.teacher.roles:
            return None
        ends = [self.teacher.roles["eos"]] * roles.count("eos")
        return start * first + ends + ([] if last or start == ends[-1:] else start)

    def _parts(self, text: bytes, at: int) -> Iterator[_Part]:
        """Yield a text in parts: characters to tokenize, and stray bytes, whose tokens are known."""
        start = at
        while text:
            try:
                whole, bad = text, b""
                whole.decode()
            except UnicodeDecodeError as error:  # a block's edge inside a character
                whole, bad = text[: error.start], text[error.start : error.end]
            if whole:
                yield _Part(at, [], whole.decode(), at == start)
            at += len(whole)
            for byte in bad:
                at += 1
                yield _Part(at, [self._single.get(bytes([byte]), NOWHERE)])
            text = text[len(whole) + len(bad) :]

    def _align(
        self, row: list[int], ends: list[int], parts: list[_Part], lost: str, encoded: Iterator[list[int]]
    ) -> Aligned:
        ids: list[int] = []
        offsets: list[int] = []  # the offset after each
        given = [next(encoded) if part.text else part.ids for part in parts]
        for part, tokens in zip(parts, given, strict=True):
            if not part.text and NOWHERE not in tokens:
                ids, offsets = ids + tokens, offsets + [part.start] * len(tokens)
                continue
            lead = "" if part.opens else self._lead
            pieces = self.teacher.pieces(tokens)
            said, expected = b"".join(pieces), (lead + part.text).encode()
            if self.teacher.prefixed and leading(said, b" " + expected) > leading(said, expected):
                expected = b" " + expected
            end = part.start + len(part.text.encode())
            at = end - len(expected)
            if part.opens and at < part.start:  # earlier positions have not read the blank yet
                offsets = [at if offset == part.start else offset for offset in offsets]
            known = at + leading(said, expected)
            behind = list(accumulate(map(len, pieces), initial=at))[1:]
            if lead and part.start not in behind:
                lost = CHANGED
                break
            kept = [(i, offset) for i, offset in zip(tokens, behind, strict=False) if offset <= known]
            kept = [pair for pair in kept if not lead or pair[1] > part.start]
            ids, offsets = ids + [i for i, _ in kept], offsets + [offset for _, offset in kept]
            if known < end or not part.text:
                lost = CHANGED
                break
        return self._paired(row, ends, ids, offsets, lost)

    def _paired(self, row: list[int], ends: list[int], ids: list[int], offsets: list[int], lost: str = "") -> Aligned:
        """Return the teacher's ids up to the last aligned one; of several at one offset the last is aligned."""
        ids = ids[: self.length]
        places = {offset: u for u, offset in enumerate(offsets[: len(ids)]) if offset != NOWHERE}
        last = {end: t for t, end in enumerate(ends)}
        positions = [places.get(end, NOWHERE) if last[end] == t else NOWHERE for t, end in enumerate(ends)]
        positions += [NOWHERE] * (len(row) - len(ends))
        return Aligned(ids[: max(positions, default=NOWHERE) + 1] or [0], positions, lost)

    def chat(
        self, row: list[int], text: str, teacher_row: list[int], teacher_text: str, spans: Sequence[Span]
    ) -> Aligned:
        """Align the assistant's `spans`, which both chat templates write alike, within two renderings of a chat.

        The position at the end of a span is aligned if both continue with their end of text.
        """
        ends, theirs = self.student.offsets(row, text), self.teacher.offsets(teacher_row, teacher_text)
        eos = self.student.roles.get("eos"), self.teacher.roles.get("eos")
        pairs = [NOWHERE] * len(ends), [NOWHERE] * len(theirs)
        for number, span in enumerate(spans):
            for side, (offsets, ids, start) in enumerate(
                ((ends, row, span.student), (theirs, teacher_row, span.teacher))
            ):
                for t, offset in enumerate(offsets):
                    at_end = offset == start + len(span.text)
                    closes = t + 1 < len(ids) and ids[t + 1] == eos[side]
                    if start <= offset < start + len(span.text) or (at_end and closes):
                        pairs[side][t] = number << 40 | offset - start
        lost = "" if len(ends) == len(row) and len(theirs) == len(teacher_row) else CHANGED
        return self._paired(row, pairs[0], teacher_row, pairs[1], lost)


def leading(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of leading items that two sequences share."""
    if one[: len(other)] == other:
        return len(other)
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
