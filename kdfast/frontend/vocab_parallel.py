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

from kdfast.frontend.agreement import NO_ENTRIES, Slice, compare
from kdfast.frontend.checks import check_head, kind
from kdfast.frontend.vocabulary import Vocabulary
from kdfast.inputs import Head, Logits, Options, Projected, SparseLogits, Teacher


class Localised(NamedTuple):
    student: Head
    teacher: Teacher | None
    labels: Tensor | None
    options: Options
    vocabulary: Vocabulary


def localise(student: Head, teacher: Teacher | None, labels: Any, options: Options) -> Localised:
    """Raises ValueError, TypeError for a group, a slice or processes that do not fit."""
    if options.process_group is None:
        if options.vocab_start is not None:
            raise ValueError(
                f"vocab_start={options.vocab_start!r} without process_group; pass the group whose processes have the "
                "other slices of the head, or leave vocab_start out"
            )
        rows = student.weight.shape[0] if _is_matrix(student.weight) else 0
        return Localised(student, teacher, labels, options, Vocabulary(rows, rows=rows, largest=rows))
    group, mesh = _group(options.process_group)
    mine, refused = Slice(), None
    try:
        student, teacher, labels, options, mine = _local(student, teacher, labels, options, group, mesh)
    except (TypeError, ValueError) as error:
        refused = error
    vocabulary = compare(group, mine, student, teacher, labels, options, refused)
    if vocabulary.whole_teacher:
        teacher = _cut(teacher, mine.start)
    return Localised(student, teacher, labels, options, vocabulary)


def _group(given: Any) -> tuple[Any, DeviceMesh | None]:
    """(the group, its mesh where that was given)."""
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            raise ValueError(
                f"process_group is a DeviceMesh of {given.ndim} dimensions {given.mesh_dim_names}; expected the one "
                "the vocabulary is sharded on: mesh['vocab']"
            )
        return given.get_group(), given
    if not isinstance(given, torch.distributed.ProcessGroup):
        none = torch.distributed.GroupMember.NON_GROUP_MEMBER
        why = "this process is not in it" if type(given) is type(none) and given == none else kind(given)
        raise TypeError(f"process_group is {why}; expected a torch.distributed.ProcessGroup or a DeviceMesh")
    return given, None


def _local(
    student: Head, teacher: Any, labels: Any, options: Options, group: Any, mesh: DeviceMesh | None
) -> tuple[Head, Any, Any, Options, Slice]:
    claimed = options.vocab_start
    if claimed is not None and (not isinstance(claimed, Integral) or isinstance(claimed, bool) or claimed < 0):
        raise ValueError(f"vocab_start={claimed!r}; expected an int ≥ 0, the id of the slice's first row")
    if _is_dtensor(student.weight):
        start = _offset("student: Head.weight", student.weight, 0, group, mesh)
        claimed = start if claimed is None else claimed
    elif claimed is None:
        raise ValueError(
            "vocab_start is None with a plain student: Head.weight; expected the id of the slice's first row, or a "
            "DTensor weight sharded on dim 0 of the mesh passed as process_group"
        )
    else:
        start = int(claimed)
    student = _local_head("student", student, group, mesh)
    check_head("student", student, empty=True)
    teacher, *of_teacher = _local_source("teacher", teacher, start, group, mesh)
    labels = _replicated("labels", labels, group, mesh)
    per_token = ("anchor_targets", "token_weights", "kd_token_weights")
    plain = {name: _replicated(name, getattr(options, name), group, mesh) for name in per_token}
    options = replace(options, **plain)
    mine = Slice(start, student.weight.shape[0], int(claimed), *of_teacher)
    return student, teacher, labels, options, mine


def _is_dtensor(value: Any) -> bool:
    return type(value).__name__ == "DTensor"


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_nested  # which has no shape


def _local_head(name: str, head: Head, group: Any, mesh: DeviceMesh | None) -> Head:
    return replace(
        head,
        hidden=_replicated(f"{name}: Head.hidden", head.hidden, group, mesh),
        weight=_sharded(f"{name}: Head.weight", head.weight, 0, group, mesh),
        bias=_sharded(f"{name}: Head.bias", head.bias, 0, group, mesh),
    )


def _local_source(name: str, source: Any, start: int, group: Any, mesh: DeviceMesh | None) -> tuple[Any, int, int]:
    """A teacher with what it has here of a vocabulary of its own: from which id on, how many entries."""
    if isinstance(source, (Projected, SparseLogits)):
        tensors = {field.name: getattr(source, field.name) for field in fields(source)}
        tensors = {key: _replicated(f"{name}: {kind(source)}.{key}", t, group, mesh) for key, t in tensors.items()}
        return type(source)(**tensors), start, NO_ENTRIES
    if isinstance(source, Head):
        first = _first("Head.weight", name, source.weight, 0, start, group, mesh)
        source = _local_head(name, source, group, mesh)
        return source, first, source.weight.shape[0] if _is_matrix(source.weight) else NO_ENTRIES
    if isinstance(source, Logits) and isinstance(source.logits, Tensor) and source.logits.dim():
        last = source.logits.dim() - 1
        first = _first("Logits.logits", name, source.logits, last, start, group, mesh)
        source = Logits(_sharded(f"{name}: Logits.logits", source.logits, last, group, mesh))
        return source, first, source.logits.shape[-1]
    return _replicated(name, source, group, mesh), start, NO_ENTRIES


def _first(field: str, name: str, tensor: Any, dim: int, start: int, group: Any, mesh: DeviceMesh | None) -> int:
    """The id a source starts with: the slice's, but for a DTensor that is cut elsewhere."""
    if not _is_dtensor(tensor) or tensor.placements[0].is_replicate():
        return start
    return _offset(f"{name}: {field}", tensor, dim, group, mesh)


def _cut(source: Any, start: int) -> Any:
    """What is whole on every process, from this slice's first id on."""
    if isinstance(source, Logits):
        return Logits(source.logits[..., start:])
    return replace(source, weight=source.weight[start:], bias=None if source.bias is None else source.bias[start:])


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
    if tensor.placements[0].is_replicate() and not name.startswith("student"):
        return _replicated(name, tensor, group, mesh)
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
