"""What processes with a slice of the vocabulary each must agree on, told to each other around the checks.

`compare`: that their slices are the vocabulary without a gap or an overlap; and on the CPU (on a GPU with
KDFAST_CHECK=1) that they call alike: as many rows, the same labels, weights, sparse entries and options, hidden states
that agree in a few places. `together`: there, what one process refuses is an error on all.

On a GPU telling each other would wait for the device. So it is done once for each set of slices and kind of call, and
remembered with the group: what changes, changes on all processes, or a group of its own is made for it.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kdfast.frontend.checks import can_read
from kdfast.frontend.vocabulary import Vocabulary
from kdfast.inputs import Head, Options, Projected, SparseLogits, is_asked
from kdfast.ops import autocast, collectives

NO_ENTRIES = -1  # of the vocabulary, in a source without logits or a head of its own


class Slice(NamedTuple):
    """What a process has of the student's head, and of a teacher's own."""

    start: int = 0  # first id
    rows: int = 0
    claimed: int = 0  # by `vocab_start`; the same, or a DTensor's is another
    teacher_start: int = 0
    teacher: int = NO_ENTRIES


class Call(NamedTuple):
    """What a process calls with. Numbers, to be compared exactly, and probes, nearly."""

    rows: float = 0.0
    structure: float = 0.0  # checksums: of what decides which collectives there are
    labels: float = 0.0
    weights: float = 0.0
    entries: float = 0.0  # a sparse teacher's ids
    numbers: float = 0.0


DIFFER = {
    "rows": "the number of rows of student: Head.hidden",
    "structure": "the kind of call (options, the teacher's kind, dtypes, what requires grad, the scratch budget)",
    "labels": "labels or anchor_targets",
    "weights": "token_weights or kd_token_weights",
    "entries": "a SparseLogits' indices",
    "numbers": "a number among the options, a logit_scale or a softcap",
}
PROBES = 8  # hidden states that are compared, of each side
_known: WeakKeyDictionary[Any, dict[tuple[Any, ...], Vocabulary]] = WeakKeyDictionary()


def compare(
    group: Any, mine: Slice, student: Head, teacher: Any, labels: Any, options: Options, refused: Exception | None
) -> Vocabulary:
    """Raises ValueError on every process for what does not fit, `refused` where that is given."""
    hidden = student.hidden
    if not isinstance(hidden, Tensor) or not can_read(hidden):
        if refused is not None:
            raise refused
        device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
        return _remembered(group.group_name, tuple(mine), _structure(student, teacher, labels, options), device)
    call, probes = Call(), [0.0] * 2 * PROBES
    if refused is None:
        try:
            call, probes = _call(student, teacher, labels, options), _probes(hidden, teacher)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            refused = error
    tables = collectives.exchange([refused is not None, *mine, *call, *probes], group, hidden.device)
    _raise_together(refused, [table[0] for table in tables])
    slices = [Slice(*map(int, table[1 : 1 + len(mine)])) for table in tables]
    vocabulary = _vocabulary(group, mine, slices)
    _check_alike([table[1 + len(mine) :] for table in tables])
    return vocabulary


@contextmanager
def together(vocabulary: Vocabulary, hidden: Any) -> Iterator[None]:
    """Where looking is free, an error on one process is one on all."""
    if not vocabulary.group or not isinstance(hidden, Tensor) or not can_read(hidden):
        yield
        return
    refused: Exception | None = None
    try:
        yield
    except (TypeError, ValueError) as error:
        refused = error
    flags = collectives.exchange([refused is not None], vocabulary.group, hidden.device)
    _raise_together(refused, [flag for (flag,) in flags])


def _raise_together(refused: Exception | None, flags: list[float]) -> None:
    if refused is not None:
        raise refused
    if any(flags):
        raise ValueError(
            f"rank {flags.index(1.0)} of process_group refuses its arguments; its own error says what is wrong"
        )


def _remembered(name: str, mine: tuple[int, ...], structure: tuple[Any, ...], device: torch.device) -> Vocabulary:
    group = collectives.named(name)
    known = _known.setdefault(group, {})
    key = (mine, structure, os.environ.get("KDFAST_SCRATCH_BYTES"))
    if key not in known:
        tables = collectives.exchange([*mine, _checksum(key[1:])], group, device)
        _check_alike([[0.0, table[-1]] for table in tables])
        known[key] = _vocabulary(group, Slice(*mine), [Slice(*map(int, table[:-1])) for table in tables])
    return known[key]


# a collective on numbers a graph has as constants: taken while it is traced, on all processes alike
_remembered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _vocabulary(group: Any, mine: Slice, slices: list[Slice]) -> Vocabulary:
    for rank, each in enumerate(slices):
        if each.claimed != each.start:
            raise ValueError(
                f"vocab_start={each.claimed} on rank {rank} with student: Head.weight a DTensor whose slice starts at "
                f"{each.start}; leave vocab_start out"
            )
    heads = sorted((each.start, each.rows, rank) for rank, each in enumerate(slices))
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
    teacher, whole_teacher = _size_of("teacher", [(s, s.teacher_start, s.teacher) for s in slices], end)
    return Vocabulary(
        size=end,
        start=mine.start,
        rows=mine.rows,
        largest=max(each.rows for each in slices),
        group=group.group_name,
        teacher=teacher,
        whole_teacher=whole_teacher,
    )


def _size_of(name: str, parts: list[tuple[Slice, int, int]], size: int) -> tuple[int | None, bool]:
    """Of a source's vocabulary, next to the student's `size`, and whether it is whole on every process: else it is cut
    where the student's is, perhaps shorter at its end, or longer than the last slice. parts: the student's slice, and
    the source's first id and entries."""
    found = [entries for _, _, entries in parts]
    if NO_ENTRIES in found:
        return None, False
    alike = len(set(found)) == 1
    if alike and found[0] >= size:
        return found[0], True
    numbered = sorted((s.start, s.rows, entries, first, rank) for rank, (s, first, entries) in enumerate(parts))
    slices = [each for each in numbered if each[1] or each[2]]
    shorter = [i for i, (_, rows, entries, *_) in enumerate(slices) if entries < rows]
    after_its_end = slices[shorter[0] + 1 :] if shorter else []
    elsewhere = any(first != start for start, _, entries, first, _ in slices if entries)
    longer = any(entries > rows for _, rows, entries, *_ in slices[:-1])
    if elsewhere or longer or any(entries for _, _, entries, *_ in after_its_end):
        if alike and not elsewhere:
            return found[0], True
        listed = ", ".join(f"rank {r} {n} from {f}, of {rows} from {start}" for start, rows, n, f, r in slices)
        raise ValueError(
            f"{name}: its slices have other ids than the student's (entries of its, of the student's: {listed}); "
            "expected as many on both sides (fewer only where its vocabulary ends, more only on the last). Cut its "
            "head or its logits where the student's head is cut, or pass them whole"
        )
    return max((start + entries for start, _, entries, *_ in slices if entries), default=0), False


def _structure(student: Head, teacher: Any, labels: Any, options: Options) -> tuple[Any, ...]:
    """What decides which collectives there are, and of what size; nothing that changes from step to step."""
    grads = [student.hidden, student.weight, student.bias]
    if isinstance(teacher, Projected):
        grads += [teacher.hidden, teacher.projector_weight, teacher.projector_bias]
    tensors = [labels, options.token_weights, options.kd_token_weights, options.anchor_targets]
    return (
        *(bool(tensor.requires_grad) if isinstance(tensor, Tensor) else None for tensor in grads),
        *(type(value).__name__ if value is not None else None for value in (teacher, *tensors)),
        torch.is_grad_enabled(),
        str(student.hidden.dtype),
        str(student.weight.dtype),
        str(autocast.dtype_of(student.hidden.device)),
        getattr(teacher, "tail", None),
        getattr(teacher, "tempered", None),
        options.divergence.name,
        options.teacher_grad,
        options.reduction,
        options.valid_vocab,
        options.vocab,
        options.engine,
        options.scratch_bytes,
        options.return_metrics,
        is_asked(options.ce_weight),
        is_asked(options.anchor_weight),
    )


def _call(student: Head, teacher: Any, labels: Any, options: Options) -> Call:
    structure = (_structure(student, teacher, labels, options), os.environ.get("KDFAST_SCRATCH_BYTES"))
    numbers = [getattr(options, name) for name in ("temperature", "kd_weight", "ce_weight", "anchor_weight")]
    numbers += [options.num_items_in_batch, options.ignore_index, options.temperature_squared]
    numbers += [*options.divergence.parameters]
    for source in (student, teacher):
        numbers += [source.logit_scale, source.softcap] if isinstance(source, Head) else []
    ids = [teacher.indices] if isinstance(teacher, SparseLogits) else []
    return Call(
        rows=float(student.hidden.shape[:-1].numel()),
        structure=_checksum(structure),
        labels=_checksum(labels, options.anchor_targets),
        weights=_checksum(options.token_weights, options.kd_token_weights),
        entries=_checksum(*ids),
        numbers=_checksum([n.tolist() if isinstance(n, Tensor) else n for n in numbers]),
    )


def _checksum(*values: Any) -> float:
    """Return a checksum of tensors' values, and of the text of anything else."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            data = value.detach().cpu().double().numpy().tobytes()
        else:
            data = repr(value).encode()
        total = zlib.crc32(data, total)
    return float(total)


def _probes(hidden: Tensor, teacher: Any) -> list[float]:
    """A few hidden states of both sides, spread over the rows."""
    found: list[float] = []
    for tensor in (hidden, getattr(teacher, "hidden", None)):
        numbers: list[float] = []
        if isinstance(tensor, Tensor):
            values = tensor.detach().reshape(-1)
            numbers = values[:: max(1, values.numel() // PROBES)][:PROBES].tolist()
        found += [value if math.isfinite(value) else 0.0 for value in numbers] + [0.0] * (PROBES - len(numbers))
    return found


def _check_alike(tables: list[list[float]]) -> None:
    """Of every process the numbers of its Call, and perhaps its probes: each against the first's, alike on all."""
    for rank, table in enumerate(tables):
        for mine, theirs, name in zip(tables[0], table, Call._fields, strict=False):
            if mine != theirs:
                _refuse(DIFFER[name], rank)
        probes = [each[len(Call._fields) :] for each in (tables[0], table)]
        for first, name in ((0, "student: Head.hidden"), (PROBES, "the teacher's hidden states")):
            a, b = (each[first : first + PROBES] for each in probes)
            scale = max(map(abs, a + b), default=0.0)
            if any(abs(x - y) > 0.05 * scale for x, y in zip(a, b, strict=True)):
                _refuse(name, rank)


def _refuse(what: str, rank: int) -> None:
    raise ValueError(
        f"{what} is not the same on rank 0 and rank {rank} of process_group; every process of a vocabulary-parallel "
        "group makes the same call with the same rows (data parallelism is another group's)"
    )
