"""Turns DTensors and slices of a vocabulary into this process's plain tensors, and finds where its slice lies.

Heads may be plain slices with `vocab_start`, or DTensors. A teacher's own head or logits are cut at the same ids, or
whole on every process. Without a `process_group` the arguments stay as they are.
"""

from __future__ import annotations

from dataclasses import fields, replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kdfast.frontend.agreement import NO_ENTRIES, Slice, agree_on_slices, kind_of_call
from kdfast.frontend.arguments import Arguments, Vocabulary
from kdfast.frontend.checks import check_head, check_mask
from kdfast.inputs import Head, Logits, Options, Projected, SparseLogits, Teacher, kind
from kdfast.ops import collectives


def localize(student: Head, teacher: Teacher | None, labels: Any, options: Options) -> Arguments:
    """Return the arguments as plain tensors of this process.

    Raises TypeError or ValueError for an invalid process_group, and for slices that do not fit together.
    """
    if options.process_group is None:
        if options.vocab_start is not None:
            raise ValueError(
                f"vocab_start={options.vocab_start!r} without process_group; pass the group whose processes have the "
                "other slices of the head, or leave vocab_start out"
            )
        rows = student.weight.shape[0] if _is_matrix(student.weight) else 0
        vocabulary = Vocabulary(rows, rows=rows, largest=rows)
        return Arguments(student, teacher, labels, options, vocabulary, options.kd_vocab_mask)
    sharding = _sharding(options.process_group)
    mine, kind_here, refused = Slice(), (), None
    try:
        student, teacher, labels, options, mine = _local(student, teacher, labels, options, sharding)
        kind_here = kind_of_call(student, teacher, labels, options)
    except (TypeError, ValueError) as error:
        refused = error
    vocabulary, compare = agree_on_slices(sharding.group, mine, kind_here, student.hidden, refused)
    if vocabulary.whole_teacher:
        teacher = _cut(teacher, mine.start)
    mask = options.kd_vocab_mask if isinstance(teacher, SparseLogits) else None
    if mask is not None:  # a sparse teacher's entries may be in any slice
        mask = F.pad(mask.to(torch.uint8), (mine.start, vocabulary.size - mine.start - mine.rows))
        mask = collectives.sum_traced(mask, sharding.group) != 0
    return Arguments(student, teacher, labels, options, vocabulary, mask, compare)


def _local(
    student: Head, teacher: Any, labels: Any, options: Options, sharding: _Sharding
) -> tuple[Head, Any, Any, Options, Slice]:
    """Return the local arguments, and which slice of the vocabulary they are."""
    claimed = options.vocab_start
    if claimed is not None and (not isinstance(claimed, Integral) or isinstance(claimed, bool) or claimed < 0):
        raise ValueError(f"vocab_start={claimed!r}; expected an int ≥ 0, the id of the slice's first row")
    student, start = sharding.local_head("student", student, claimed)
    if start is None:
        raise ValueError(
            "vocab_start is None with a plain student: Head.weight; expected the id of the slice's first row, or a "
            "DTensor weight sharded on dim 0 of the mesh passed as process_group"
        )
    start = int(start)
    check_head("student", student, empty=True)
    teacher, *teacher_slice = _local_teacher(teacher, start, sharding)
    per_token = ("anchor_targets", "token_weights", "kd_token_weights")
    options = replace(options, **{name: sharding.replicated(name, getattr(options, name)) for name in per_token})
    given: Any = options.kd_vocab_mask
    mask, first = sharding.sharded("kd_vocab_mask", given, 0, start)
    if _is_dtensor(given) and given.placements[0].is_replicate():
        mask = mask[start : start + student.weight.shape[0]]
    check_mask(mask, student)
    if first != start:
        raise ValueError(
            f"kd_vocab_mask is a DTensor whose slice starts at {first}, and student: Head.weight's starts at {start}; "
            "expected it cut where the weight is"
        )
    options = replace(options, kd_vocab_mask=mask)
    mine = Slice(start, student.weight.shape[0], start if claimed is None else int(claimed), *teacher_slice)
    return student, teacher, sharding.replicated("labels", labels), options, mine


def _local_teacher(teacher: Any, start: int, sharding: _Sharding) -> tuple[Any, int, int]:
    """Return the local teacher, and the first id and number of entries of its own vocabulary's part."""
    if isinstance(teacher, (Projected, SparseLogits)):
        tensors = {field.name: getattr(teacher, field.name) for field in fields(teacher)}
        local = {name: sharding.replicated(f"teacher: {kind(teacher)}.{name}", t) for name, t in tensors.items()}
        return type(teacher)(**local), start, NO_ENTRIES
    if isinstance(teacher, Head):
        teacher, first = sharding.local_head("teacher", teacher, start)
        return teacher, first, teacher.weight.shape[0] if _is_matrix(teacher.weight) else NO_ENTRIES
    if isinstance(teacher, Logits) and isinstance(teacher.logits, Tensor) and teacher.logits.dim():
        last = teacher.logits.dim() - 1
        logits, first = sharding.sharded("teacher: Logits.logits", teacher.logits, last, start)
        return Logits(logits), first, logits.shape[-1]
    return sharding.replicated("teacher", teacher), start, NO_ENTRIES


def _cut(teacher: Any, start: int) -> Any:
    """Return a teacher that is whole on every process, cut to start at id `start`."""
    if isinstance(teacher, Logits):
        return Logits(teacher.logits[..., start:])
    bias = None if teacher.bias is None else teacher.bias[start:]
    return replace(teacher, weight=teacher.weight[start:], bias=bias)


def _sharding(given: Any) -> _Sharding:
    """Return the sharding that `process_group=` stands for."""
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            raise ValueError(
                f"process_group is a DeviceMesh of {given.ndim} dimensions {given.mesh_dim_names}; expected the one "
                "the vocabulary is sharded on: mesh['vocab']"
            )
        return _Sharding(given.get_group(), given)
    if not isinstance(given, torch.distributed.ProcessGroup):
        none = torch.distributed.GroupMember.NON_GROUP_MEMBER
        why = "this process is not in it" if type(given) is type(none) and given == none else kind(given)
        raise TypeError(f"process_group is {why}; expected a torch.distributed.ProcessGroup or a DeviceMesh")
    return _Sharding(given, None)


class _Sharding(NamedTuple):
    """The processes that have one slice of the vocabulary each. Turns DTensors on them into local tensors."""

    group: Any
    mesh: DeviceMesh | None

    def local_head(self, name: str, head: Head, start: Any) -> tuple[Head, Any]:
        """Return the local head and the id it starts at, as `sharded` does."""
        weight, first = self.sharded(f"{name}: Head.weight", head.weight, 0, start)
        bias, _ = self.sharded(f"{name}: Head.bias", head.bias, 0, start)
        hidden = self.replicated(f"{name}: Head.hidden", head.hidden)
        return replace(head, hidden=hidden, weight=weight, bias=bias), first

    def sharded(self, name: str, tensor: Any, dim: int, start: Any) -> tuple[Any, Any]:
        """Return the local part of a tensor that is cut along `dim`, and the id it starts at: `start`, unless a DTensor
        is cut elsewhere. A teacher's may be whole."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if not _is_dtensor(tensor):
            return tensor, start
        placement = tensor.placements[0]
        if placement.is_replicate() and not name.startswith("student"):
            return self.replicated(name, tensor), start
        self._check_mesh(name, tensor)
        if not (placement.is_shard() and placement.dim in (dim, dim - tensor.dim())):
            raise ValueError(
                f"{name} is a DTensor placed {placement}; expected Shard({dim}), the vocabulary's dimension, on the "
                "mesh passed as process_group"
            )
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return tensor.to_local(), int(offset[dim])

    def replicated(self, name: str, tensor: Any) -> Any:
        """Return the local copy of a tensor that is whole on every process."""
        if not _is_dtensor(tensor):
            return tensor
        self._check_mesh(name, tensor)
        if not tensor.placements[0].is_replicate():
            raise ValueError(
                f"{name} is a DTensor placed {tensor.placements[0]}; expected Replicate(): every process of the group "
                "takes the same rows. Redistribute it (sequence-sharded hidden states: gather them first)"
            )
        return tensor.to_local(grad_placements=tensor.placements)

    def _check_mesh(self, name: str, tensor: Any) -> None:
        theirs = tensor.device_mesh
        if theirs.ndim == 1 and (theirs == self.mesh or theirs.get_group() is self.group):
            return
        raise ValueError(
            f"{name} is a DTensor on {theirs}, not on the group passed as process_group. An FSDP-sharded head is "
            "sharded over the data, not the vocabulary: unshard it (call the loss inside the module's forward, or use "
            ".full_tensor()); for a vocabulary-parallel head pass the 1-D mesh it is sharded on"
        )


def _is_dtensor(value: Any) -> bool:
    return type(value).__name__ == "DTensor"


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_nested  # a nested tensor has no shape
