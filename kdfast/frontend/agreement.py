"""Agreement between the processes that share a vocabulary.

The first call with a set of slices, and of each kind, is compared across processes: the slices must make up the
vocabulary without gaps or overlaps, and the calls must have the same number of rows, labels, weights, sparse entries
and options, and hidden states that agree in a few places. On the group's first call, an argument that one process
refuses is an error on all of them; on the first call of a later kind, this holds for what the checks refuse. The group
remembers the comparison, so later calls neither communicate nor wait. KDFAST_CHECK=1, set on every process, compares
every call. A compiled graph compares the slices and the kind of call while it is traced.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from operator import eq
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kdfast.divergences import Divergence
from kdfast.frontend.arguments import EMPTY_MASK, Arguments, Vocabulary
from kdfast.inputs import Head, Options, Projected, SparseLogits, is_asked
from kdfast.ops import autocast, collectives
from kdfast.ops.transforms import has_values, in_force

NO_ENTRIES = -1  # marks a teacher without logits or a head of its own
PROBES = 8  # hidden-state values that are compared, on each side
PROBED = ("student: Head.hidden", "the teacher's hidden states")
KIND_OF_CALL = "the kind of call (options, the teacher's kind, dtypes, what requires grad, the scratch budget)"
ROWS = ("labels", "anchor_targets", "token_weights", "kd_token_weights")  # their dtypes affect no collective
SCALES = ("logit_scale", "softcap")
VARYING = (  # options that may differ from step to step, or between processes
    "temperature", "kd_weight", "num_items_in_batch", "ignore_index", "temperature_squared", "process_group",
    "vocab_start",
)  # fmt: skip
_known: WeakKeyDictionary[Any, dict[tuple[str, str], Vocabulary]] = WeakKeyDictionary()


class Slice(NamedTuple):
    """A process's slice of the student's head, and of the teacher's own head or logits."""

    start: int = 0  # first id
    rows: int = 0
    claimed: int = 0  # start according to `vocab_start`, which may contradict a DTensor's
    teacher_start: int = 0
    teacher_rows: int = NO_ENTRIES


def agree_on_slices(
    group: Any, mine: Slice, kind_of_call: tuple[Any, ...], hidden: Any, refused: Exception | None
) -> tuple[Vocabulary, bool]:
    """Return the vocabulary that all slices make up, and whether the rest of this call is to be compared too.

    Raises ValueError on every process if the slices do not fit together, and `refused`, this process's own error, if
    there is one. Other processes learn of `refused` only with KDFAST_CHECK=1 or while the group knows no slices yet.
    """
    device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
    readable = isinstance(hidden, Tensor) and has_values(hidden) and not in_force()  # transforms' tensors have no bytes
    anew = readable and os.environ.get("KDFAST_CHECK") == "1"
    if refused is not None:
        if anew or (readable and not _known.get(group)):
            _exchange(refused, None, group, device)
        raise refused
    compare = anew or (readable and _key(tuple(mine), kind_of_call) not in _known.get(group, {}))
    return _vocabulary(group.group_name, tuple(mine), kind_of_call, device, anew), compare


@contextmanager
def raise_on_all_ranks(x: Arguments) -> Iterator[None]:
    """Raise an error from the checks inside on all processes, then compare their arguments; only if `x.compare`."""
    if not x.compare:
        yield
        return
    group, device = collectives.named(x.vocabulary.group), x.student.hidden.device
    values: dict[str, Any] = {}
    refused = None
    try:
        yield
        values = _values(x)
    except (TypeError, ValueError) as error:
        refused = error
    try:
        tables = _exchange(refused, values, group, device)
        compared = [table.pop(EMPTY_MASK) for table in tables]
        if not any(compared):
            raise ValueError(EMPTY_MASK)
        _check_alike(tables)
    except (TypeError, ValueError):
        _known.pop(group, None)  # on all processes, so that they compare the next call again
        raise


def kind_of_call(student: Head, teacher: Any, labels: Any, options: Options) -> tuple[Any, ...]:
    """Return everything that decides which collectives run and how large they are, and nothing that varies by step."""
    found = [torch.is_grad_enabled(), str(autocast.dtype_of(student.hidden.device)), type(teacher).__name__]
    found += [_kind("labels", labels), in_force()]
    for source in (student, teacher, options):
        if source is not None:
            names = [field.name for field in fields(source) if field.name not in VARYING]
            found += [_kind(name, getattr(source, name)) for name in names]
    trained = [student.hidden, student.weight, student.bias]
    if isinstance(teacher, Projected):
        trained += [teacher.hidden, teacher.projector_weight, teacher.projector_bias]
    found += [isinstance(tensor, Tensor) and bool(tensor.requires_grad) for tensor in trained]
    return tuple(found)


def _kind(name: str, value: Any) -> Any:
    if name in ("ce_weight", "anchor_weight"):
        return is_asked(value)
    if name in ROWS:
        return value is not None
    if isinstance(value, Tensor):
        return str(value.dtype)
    if isinstance(value, Divergence):
        return value.name
    # a scale or cap may be an int that changes, for which a graph has no constant
    return "number" if isinstance(value, float) or (name in SCALES and value is not None) else value


def _key(mine: tuple[int, ...], kind_of_call: tuple[Any, ...]) -> tuple[str, str]:
    return repr(mine), repr((kind_of_call, os.environ.get("KDFAST_SCRATCH_BYTES")))


def _vocabulary(
    name: str, mine: tuple[int, ...], kind_of_call: tuple[Any, ...], device: torch.device, anew: bool
) -> Vocabulary:
    """Return the vocabulary that the named group's slices make up; if `anew`, exchange it again."""
    group = collectives.named(name)
    known, key = _known.setdefault(group, {}), _key(mine, kind_of_call)
    if anew or key not in known:
        slices, kinds = zip(*_exchange(None, (Slice(*mine), {KIND_OF_CALL: key[1]}), group, device), strict=True)
        vocabulary = _of_slices(name, Slice(*mine), slices)
        _check_alike(kinds)
        known[key] = vocabulary
    return known[key]


# a collective on numbers that are constants in a graph: it runs during tracing, on all processes alike
_vocabulary._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _of_slices(name: str, mine: Slice, slices: Sequence[Slice]) -> Vocabulary:
    """Return the vocabulary that the ranks' slices make up. Raises ValueError if they overlap or leave a gap."""
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
    teacher, whole_teacher = _teacher_vocabulary(slices, end)
    largest = max(each.rows for each in slices)
    return Vocabulary(end, mine.start, mine.rows, largest, name, teacher, whole_teacher)


def _teacher_vocabulary(slices: Sequence[Slice], size: int) -> tuple[int | None, bool]:
    """Return the size of the teacher's own vocabulary (None if it has none), and whether every process has all of it.

    A teacher that is not whole must be cut at the same ids as the student's head, which has `size` rows. It may end
    earlier, or continue beyond it on the last process.
    """
    if any(each.teacher_rows == NO_ENTRIES for each in slices):
        return None, False
    ordered = sorted((each, rank) for rank, each in enumerate(slices) if each.rows or each.teacher_rows)
    same_ids = all(each.teacher_start == each.start for each in slices if each.teacher_rows)
    whole = same_ids and len({each.teacher_rows for each in slices}) == 1
    if whole and slices[0].teacher_rows >= size:
        return slices[0].teacher_rows, True
    end = max((each.start + each.teacher_rows for each in slices if each.teacher_rows), default=0)
    fitting = [min(max(end - each.start, 0), each.rows) for each, _ in ordered]
    fitting[-1] = max(end - ordered[-1][0].start, 0)
    if same_ids and [each.teacher_rows for each, _ in ordered] == fitting:
        return end, False
    if whole:
        return slices[0].teacher_rows, True
    listed = ", ".join(
        f"rank {rank} {each.teacher_rows} from {each.teacher_start}, of {each.rows} from {each.start}"
        for each, rank in ordered
    )
    raise ValueError(
        f"teacher: its slices have other ids than the student's (entries of its, of the student's: {listed}); "
        "expected as many on both sides (fewer only where its vocabulary ends, more only on the last). Cut its "
        "head or its logits where the student's head is cut, or pass them whole"
    )


def _values(x: Arguments) -> dict[str, Any]:
    """Return {name for errors: value that must be the same on all processes}: tensors as checksums, hidden states as a
    few of their values."""
    options = x.options
    numbers: list[Any] = [options.temperature, options.kd_weight, options.ce_weight, options.anchor_weight]
    numbers += [options.num_items_in_batch, options.ignore_index, options.temperature_squared]
    for source in (x.student, x.teacher):
        numbers += [source.logit_scale, source.softcap] if isinstance(source, Head) else []
    numbers += [*options.divergence.parameters, getattr(x.teacher, "temperature", None)]
    mask = options.kd_vocab_mask
    return {
        EMPTY_MASK: mask is None or bool(mask[: x.kd_vocab].any()),
        "the number of rows of student: Head.hidden": x.student.hidden.shape[:-1].numel(),
        "labels or anchor_targets": (_checksum(x.labels), _checksum(options.anchor_targets)),
        "token_weights or kd_token_weights": (
            _checksum(options.token_weights),
            _checksum(options.kd_token_weights),
        ),
        "a SparseLogits' indices": _checksum(x.teacher.indices if isinstance(x.teacher, SparseLogits) else None),
        "a number among the options, a logit_scale or a softcap": repr(
            [number.tolist() if isinstance(number, Tensor) else number for number in numbers]
        ),
        PROBED[0]: _probes(x.student.hidden),
        PROBED[1]: _probes(getattr(x.teacher, "hidden", None)),
    }


def _checksum(tensor: Tensor | None) -> int | None:
    return None if tensor is None else zlib.crc32(tensor.detach().cpu().double().numpy().tobytes())


def _probes(hidden: Tensor | None) -> list[float]:
    """Return a few values of the hidden states, spread over the rows, with 0 for those that are not finite."""
    if hidden is None:
        return []
    values = hidden.detach().reshape(-1)
    return values[:: max(1, values.numel() // PROBES)][:PROBES].double().nan_to_num(0.0, 0.0, 0.0).tolist()


def _check_alike(tables: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError if a process's values differ from the first's; hidden states may differ slightly."""
    for rank, table in enumerate(tables):
        for what, first in tables[0].items():
            if not (_near if what in PROBED else eq)(first, table[what]):
                raise ValueError(
                    f"{what} is not the same on rank 0 and rank {rank} of process_group; every process of a "
                    "vocabulary-parallel group makes the same call with the same rows (data parallelism is another "
                    "group's)"
                )


def _near(first: list[float], other: list[float]) -> bool:
    scale = max(map(abs, first + other), default=0.0)
    return all(abs(a - b) <= 0.05 * scale for a, b in zip(first, other, strict=False))


def _exchange(refused: Exception | None, values: Any, group: Any, device: torch.device) -> list[Any]:
    """Return every process's values. Raises `refused`, this process's own error; the others raise ValueError then."""
    answers = collectives.exchange((refused is not None, values), group, device)
    if refused is not None:
        raise refused
    for rank, (refuses, _) in enumerate(answers):
        if refuses:
            raise ValueError(f"rank {rank} of process_group refuses its arguments; its own error says what is wrong")
    return [values for _, values in answers]
