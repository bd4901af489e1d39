"""Which part of the vocabulary this process has: the whole, or under vocabulary parallelism a contiguous slice.

`localise` turns what the caller passes into plain tensors of this process's slice, and compares the processes: that
their slices are the vocabulary without a gap or an overlap, and on the CPU (on a GPU with KDFAST_CHECK=1) that they
call with the same rows, labels and options. What it finds is an error on every process, not a wrong number or a hang.
On a GPU the comparison of slices waits for the device, once for each set of slices; then it is remembered.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import fields, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kdfast import collectives
from kdfast.options import Options
from kdfast.sources import Head, Logits, Projected, SparseLogits, Teacher
from kdfast.validation import can_read, kind


class Vocabulary(NamedTuple):
    """The student's, and what of it is here. Sizes count rows of the heads, padding included."""

    size: int
    start: int = 0
    rows: int = 0  # here: ids start … start + rows
    largest: int = 0  # most rows any process has
    group: str = ""  # of processes; "" = the vocabulary is whole
    teacher: int | None = None  # size of the teacher's own vocabulary
    anchor: int | None = None  # and of the anchor's
    whole: tuple[bool, bool] = (False, False)  # the teacher's, and the anchor's, are whole on every process

    def within(self, ids: int) -> int:
        """How many of the first `ids` ids are here."""
        return min(max(ids - self.start, 0), self.rows)


class Localised(NamedTuple):
    student: Head
    teacher: Teacher | None
    options: Options
    vocabulary: Vocabulary


def localise(student: Head, teacher: Teacher | None, labels: Any, options: Options) -> Localised:
    """Raises ValueError, TypeError for a group, a slice or processes that do not fit."""
    group, mesh = options.process_group, None
    if group is None:
        if options.vocab_start is not None:
            raise ValueError(
                f"vocab_start={options.vocab_start!r} without process_group; pass the group whose processes have the "
                "other slices of the head, or leave vocab_start out"
            )
        rows = student.weight.shape[0] if _is_matrix(student.weight) else 0
        return Localised(student, teacher, options, Vocabulary(rows, rows=rows, largest=rows))
    if isinstance(group, DeviceMesh):
        mesh = group
        if mesh.ndim != 1:
            raise ValueError(
                f"process_group is a DeviceMesh of {mesh.ndim} dimensions {mesh.mesh_dim_names}; expected the one the "
                "vocabulary is sharded on: mesh['vocab']"
            )
        group = mesh.get_group()
    elif not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"process_group is {kind(group)}; expected a torch.distributed.ProcessGroup or a DeviceMesh")

    start = options.vocab_start
    if _is_dtensor(student.weight):
        first = _offset("student: Head.weight", student.weight, 0, group, mesh)
        if start is not None and start != first:
            raise ValueError(
                f"vocab_start={start} with student: Head.weight a DTensor whose slice starts at {first}; leave it out"
            )
        start = first
    if start is None:
        raise ValueError(
            "vocab_start is None with a plain student: Head.weight; expected the id of the slice's first row, or a "
            "DTensor weight sharded on dim 0 of the mesh passed as process_group"
        )
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise ValueError(f"vocab_start={start!r}; expected an int ≥ 0, the id of the slice's first row")
    student = _local_head("student", student, group, mesh)
    rows = student.weight.shape[0] if _is_matrix(student.weight) else 0
    teacher, of_teacher = _local_source("teacher", teacher, start, group, mesh)
    anchor, of_anchor = _local_source("anchor_targets", options.anchor_targets, start, group, mesh)
    options = replace(options, anchor_targets=anchor)
    slices = (start, rows, of_teacher, of_anchor)
    vocabulary = _compare(group, slices, student, teacher, labels, options)
    teacher = _cut(teacher, start) if vocabulary.whole[0] else teacher
    anchor = _cut(anchor, start) if vocabulary.whole[1] else anchor
    return Localised(student, teacher, replace(options, anchor_targets=anchor), vocabulary)


def _is_dtensor(value: Any) -> bool:
    return type(value).__name__ == "DTensor"


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _local_head(name: str, head: Head, group: Any, mesh: DeviceMesh | None) -> Head:
    return replace(
        head,
        hidden=_replicated(f"{name}: Head.hidden", head.hidden, group, mesh),
        weight=_sharded(f"{name}: Head.weight", head.weight, 0, group, mesh),
        bias=_sharded(f"{name}: Head.bias", head.bias, 0, group, mesh),
    )


NO_ENTRIES = -1  # of the vocabulary, in a source without logits or a head of its own


def _local_source(name: str, source: Any, start: int, group: Any, mesh: DeviceMesh | None) -> tuple[Any, int]:
    """A teacher, or an anchor, with what it has here of a vocabulary of its own, and how many entries that is."""
    if isinstance(source, Projected):
        tensors = {field.name: getattr(source, field.name) for field in fields(source)}
        tensors = {key: _replicated(f"{name}: Projected.{key}", t, group, mesh) for key, t in tensors.items()}
        return Projected(**tensors), NO_ENTRIES
    if isinstance(source, Head):
        if _is_dtensor(source.weight):
            _same_boundaries(f"{name}: Head.weight", source.weight, 0, start, group, mesh)
        source = _local_head(name, source, group, mesh)
        return source, source.weight.shape[0] if _is_matrix(source.weight) else NO_ENTRIES
    if not isinstance(source, Logits) or not isinstance(source.logits, Tensor) or source.logits.dim() == 0:
        return source, NO_ENTRIES
    logits, last = source.logits, source.logits.dim() - 1
    if _is_dtensor(logits):
        _same_boundaries(f"{name}: Logits.logits", logits, last, start, group, mesh)
        source = Logits(_sharded(f"{name}: Logits.logits", logits, last, group, mesh))
        return source, source.logits.shape[-1]
    return source, logits.shape[-1]


def _cut(source: Any, start: int) -> Any:
    """What is whole on every process, from this slice's first id on."""
    if isinstance(source, Logits):
        return Logits(source.logits[..., start:])
    return replace(source, weight=source.weight[start:], bias=None if source.bias is None else source.bias[start:])


def _same_boundaries(name: str, tensor: Any, dim: int, start: int, group: Any, mesh: DeviceMesh | None) -> None:
    first = _offset(name, tensor, dim, group, mesh)
    if first != start and tensor.to_local().shape[dim]:
        raise ValueError(
            f"{name} is a DTensor whose slice starts at id {first}, and the student's starts at {start}; both sides of "
            "a slice must hold the same ids. Pass plain slices cut where the student's are"
        )


def _offset(name: str, tensor: Any, dim: int, group: Any, mesh: DeviceMesh | None) -> int:
    """The id at which this process's shard starts."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _check_mesh(name, tensor, group, mesh)
    placement = tensor.placements[0]
    if not (placement.is_shard() and placement.dim in (dim, dim - tensor.dim())):
        raise ValueError(
            f"{name} is a DTensor placed {placement}; expected Shard({dim}), the vocabulary's dimension, on the mesh "
            "passed as process_group"
        )
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[dim])


def _check_mesh(name: str, tensor: Any, group: Any, mesh: DeviceMesh | None) -> None:
    theirs = tensor.device_mesh
    if theirs.ndim == 1 and (theirs == mesh or theirs.get_group() is group):
        return
    raise ValueError(
        f"{name} is a DTensor on {theirs}, not on the group passed as process_group. An FSDP-sharded head is "
        "sharded over the data, not the vocabulary: unshard it (call the loss inside the module's forward, or use "
        ".full_tensor()); for a vocabulary-parallel head pass the 1-D mesh it is sharded on"
    )


def _sharded(name: str, tensor: Any, dim: int, group: Any, mesh: DeviceMesh | None) -> Any:
    if not _is_dtensor(tensor):
        return tensor
    _offset(name, tensor, dim, group, mesh)
    return tensor.to_local()


def _replicated(name: str, tensor: Any, group: Any, mesh: DeviceMesh | None) -> Any:
    if not _is_dtensor(tensor):
        return tensor
    _check_mesh(name, tensor, group, mesh)
    if not tensor.placements[0].is_replicate():
        raise ValueError(
            f"{name} is a DTensor placed {tensor.placements[0]}; expected Replicate(): every process of the group "
            "takes the same rows. Redistribute it (sequence-sharded hidden states: gather them first)"
        )
    return tensor.to_local(grad_placements=tensor.placements)


# Agreement between the processes

PROBES = 8  # hidden states and labels that are compared
_known: WeakKeyDictionary[Any, dict[tuple[int, ...], Vocabulary]] = WeakKeyDictionary()


def _compare(
    group: Any, slices: tuple[int, ...], student: Head, teacher: Any, labels: Any, options: Options
) -> Vocabulary:
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
