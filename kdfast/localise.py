"""What a caller passes → plain tensors of this process's slice of the vocabulary, and where that lies.

Heads may be plain slices with `vocab_start`, or DTensors; a teacher's own head or logits are cut at the same ids, or
whole on every process. Without a `process_group` everything is as it was.
"""

from __future__ import annotations

from dataclasses import fields, replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kdfast.agreement import NO_ENTRIES, compare
from kdfast.options import Options
from kdfast.sources import Head, Logits, Projected, Teacher
from kdfast.validation import kind
from kdfast.vocabulary import Vocabulary


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
    if not isinstance(start, Integral) or isinstance(start, bool) or start < 0:
        raise ValueError(f"vocab_start={start!r}; expected an int ≥ 0, the id of the slice's first row")
    student = _local_head("student", student, group, mesh)
    rows = student.weight.shape[0] if _is_matrix(student.weight) else 0
    teacher, of_teacher = _local_source("teacher", teacher, start, group, mesh)
    anchor, of_anchor = _local_source("anchor_targets", options.anchor_targets, start, group, mesh)
    options = replace(options, anchor_targets=anchor)
    slices = (int(start), rows, of_teacher, of_anchor)
    vocabulary = compare(group, slices, student, teacher, labels, options)
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
