"""What processes with a slice of the vocabulary each must agree on, told to each other before the loss is taken.

That their slices are the vocabulary without a gap or an overlap; and on the CPU (on a GPU with KDFAST_CHECK=1) that
they call with the same rows, labels and options. What does not fit is an error on every process, not a wrong number
or a hang. On a GPU the slices are compared once, which waits for the device, and remembered.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kdfast import collectives
from kdfast.options import Options
from kdfast.sources import Head, Logits, Projected, SparseLogits
from kdfast.validation import can_read
from kdfast.vocabulary import Vocabulary

NO_ENTRIES = -1  # of the vocabulary, in a source without logits or a head of its own
PROBES = 8  # hidden states and labels that are compared
_known: WeakKeyDictionary[Any, dict[tuple[int, ...], Vocabulary]] = WeakKeyDictionary()


def compare(
    group: Any, slices: tuple[int, ...], student: Head, teacher: Any, labels: Any, options: Options
) -> Vocabulary:
    """slices: first id here, rows of the student's slice, entries of the teacher's and of the anchor's own."""
    hidden = student.hidden
    if not isinstance(hidden, Tensor) or not can_read(hidden):
        device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
        return _remembered(group.group_name, slices, device)
    call = [*_signature(student, teacher, labels, options), *_probes(hidden, labels)]
    tables = collectives.exchange([*slices, *call], group, hidden.device)
    vocabulary = _vocabulary(group, slices, tables)
    for rank, table in enumerate(tables):
        _check_same_call(call, table[len(slices) :], rank)
    return vocabulary


def _remembered(name: str, slices: tuple[int, ...], device: torch.device) -> Vocabulary:
    group = collectives.named(name)
    known = _known.setdefault(group, {})
    if slices not in known:
        known[slices] = _vocabulary(group, slices, collectives.exchange(slices, group, device))
    return known[slices]


# a collective on numbers a graph has as constants: taken while it is traced, on all processes alike
_remembered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _vocabulary(group: Any, slices: tuple[int, ...], tables: list[list[float]]) -> Vocabulary:
    start, rows, *_ = slices
    heads = sorted((int(table[0]), int(table[1]), rank) for rank, table in enumerate(tables))
    end = 0
    for first, count, rank in heads:
        if first != end and count:
            wrong = "overlap" if first < end else "leave a gap"
            listed = ", ".join(f"rank {r}: {f} to {f + c - 1}" if c else f"rank {r}: none" for f, c, r in heads)
            raise ValueError(
                f"vocab_start: the slices {wrong} at id {min(first, end)} ({listed}); expected every id exactly once, "
                f"from 0 on. Rank {rank}'s vocab_start should be {end}"
            )
        end += count
    if end == 0:
        raise ValueError("student: Head.weight has no rows on any process of process_group")
    teacher, whole_teacher = _size_of("teacher", tables, 2, end)
    anchor, whole_anchor = _size_of("anchor_targets", tables, 3, end)
    return Vocabulary(
        size=end,
        start=start,
        rows=rows,
        largest=max(count for _, count, _ in heads),
        group=group.group_name,
        teacher=teacher,
        anchor=anchor,
        whole=(whole_teacher, whole_anchor),
    )


def _size_of(name: str, tables: list[list[float]], column: int, size: int) -> tuple[int | None, bool]:
    """Of a source's vocabulary, next to the student's `size`, and whether it is whole on every process: else it is cut
    where the student's is, perhaps shorter at its end, or longer than the last slice."""
    found = [int(table[column]) for table in tables]
    if NO_ENTRIES in found:
        return None, False
    alike = len(set(found)) == 1
    if alike and found[0] >= size:
        return found[0], True
    numbered = enumerate(zip(tables, found, strict=True))
    slices = sorted((int(table[0]), int(table[1]), entries, rank) for rank, (table, entries) in numbered)
    slices = [each for each in slices if each[1] or each[2]]
    shorter = [i for i, (_, rows, entries, _) in enumerate(slices) if entries < rows]
    after_its_end = slices[shorter[0] + 1 :] if shorter else []
    if any(entries > rows for _, rows, entries, _ in slices[:-1]) or any(entries for _, _, entries, _ in after_its_end):
        if alike:
            return found[0], True
        listed = ", ".join(f"rank {rank} {entries} of {rows}" for _, rows, entries, rank in slices)
        raise ValueError(
            f"{name}: its slices have other ids than the student's (entries of its, of the student's: {listed}); "
            "expected as many on both sides (fewer only where its vocabulary ends, more only on the last). Cut its "
            "head or its logits where the student's head is cut"
        )
    return max((start + entries for start, _, entries, _ in slices if entries), default=0), False


def _signature(student: Head, teacher: Any, labels: Any, options: Options) -> list[float]:
    """What all processes must call with alike: how many rows, and a checksum of everything else but the tensors."""
    trained = [student.hidden, *(getattr(teacher, field.name) for field in _fields_of(teacher))]
    told: list[Any] = [type(teacher).__name__, getattr(teacher, "tail", None), labels is not None]
    told += [student.hidden.dtype, student.logit_scale, student.softcap, torch.is_grad_enabled()]
    told += [isinstance(tensor, Tensor) and tensor.requires_grad for tensor in trained]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in ("process_group", "vocab_start"):
            told.append(type(value).__name__ if isinstance(value, Tensor | Head | Logits | SparseLogits) else value)
    return [float(student.hidden.shape[:-1].numel()), float(zlib.crc32(repr(told).encode()))]


def _fields_of(source: Any) -> tuple[Any, ...]:
    return fields(source) if isinstance(source, Projected) else ()


def _probes(hidden: Tensor, labels: Any) -> list[float]:
    """A few hidden states and labels, spread over the rows."""
    found: list[float] = []
    for tensor in (hidden.detach(), labels):
        numbers: list[float] = []
        if isinstance(tensor, Tensor):
            numbers = tensor.reshape(-1)[:: max(1, tensor.numel() // PROBES)][:PROBES].tolist()
        found += [value if math.isfinite(value) else 0.0 for value in numbers] + [0.0] * (PROBES - len(numbers))
    return found


def _check_same_call(mine: list[float], theirs: list[float], rank: int) -> None:
    if mine[0] != theirs[0]:
        raise ValueError(
            f"student: Head.hidden has {int(mine[0])} rows here and {int(theirs[0])} on rank {rank} of process_group; "
            "every process of a vocabulary-parallel group takes the same rows (data parallelism is another group's)"
        )
    if mine[1] != theirs[1]:
        raise ValueError(
            f"rank {rank} of process_group calls with other options, another kind of teacher, or other tensors that "
            "require grad; expected the same call on every process"
        )
    hidden, labels = slice(2, 2 + PROBES), slice(2 + PROBES, None)
    scale = max(map(abs, mine[hidden]), default=0.0)
    apart = max(abs(a - b) for a, b in zip(mine[hidden], theirs[hidden], strict=True))
    if apart > 0.05 * scale or mine[labels] != theirs[labels]:
        what = "labels" if mine[labels] != theirs[labels] else "student: Head.hidden"
        raise ValueError(
            f"{what} is not the same on rank {rank} of process_group; every process of a vocabulary-parallel group "
            "takes the same rows (data parallelism is another group's)"
        )
