"""Checked arguments → one `Problem`: flat rows, the projector applied, every convention folded into coefficients."""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.engines import operators, resolve
from kdfast.frontend.row_weights import row_weights, scalar
from kdfast.frontend.vocabulary import Vocabulary
from kdfast.inputs import Head, Logits, Options, Projected, SparseLogits, Teacher, is_asked
from kdfast.ops import autocast, sparse
from kdfast.ops.problem import Problem


class Assembled(NamedTuple):
    problem: Problem
    weights: Tensor  # (3, N): of the rows in KD, CE and anchor means


def assemble(
    student: Head, teacher: Teacher | None, labels: Tensor | None, options: Options, vocabulary: Vocabulary
) -> Assembled:
    """Checked arguments → what an engine solves."""
    student = _autocast(student)
    hidden = _flat(student.hidden)
    device, N = hidden.device, hidden.shape[0]
    valid_vocab = vocabulary.size if options.valid_vocab is None else options.valid_vocab

    engine = resolve(
        options.engine,
        device,
        student.weight.dtype,
        tokens=N,
        vocab=min(valid_vocab, vocabulary.largest),
        teacher=isinstance(teacher, (Head, Projected)),
        scratch_bytes=options.scratch_bytes or 0,
        buffers=2 if vocabulary.group else 1,
    )
    projected: Tensor | None = None
    if isinstance(teacher, Projected):
        projected = _flat(teacher.hidden)
        if teacher.projector_weight is not None:
            projected = _project(projected, teacher.projector_weight, teacher.projector_bias, engine)
        projected = projected.to(student.weight.dtype)
    elif isinstance(teacher, Head):
        teacher = _autocast(teacher)

    others = (projected, teacher.hidden if isinstance(teacher, Head) else None)
    double = any(t is not None and t.dtype == torch.float64 for t in (hidden, *others))
    dtype = torch.float64 if double else torch.float32
    temperature = scalar(options.temperature, device, dtype)
    sides = _sides(teacher, student, projected, valid_vocab, temperature, dtype, vocabulary, vocabulary.teacher)
    rows = row_weights(
        labels,
        options,
        N,
        valid_vocab,
        sides["temperature"],
        has_kd=teacher is not None,
        has_anchor=isinstance(teacher, Projected),
        bad_kd=_out_of_vocabulary(teacher, vocabulary.size, options),
        dtype=dtype,
        device=device,
    )

    ce_term = rows.labels is not None and is_asked(options.ce_weight)
    anchor_term = projected is not None and rows.has_anchor and is_asked(options.anchor_weight)
    grad = torch.is_grad_enabled()
    whole = ce_term or options.return_metrics  # past the shared ids there is the cross entropy alone
    problem = Problem(
        hidden=hidden,
        weight=student.weight,
        bias=student.bias,
        logit_scale=float(student.logit_scale),
        softcap=_float(student.softcap),
        **sides,
        labels=rows.labels,
        anchor_targets=rows.anchor_targets if projected is not None else None,
        coefficients=rows.coefficients,
        active=rows.active,
        divergence_name=options.divergence.name,
        divergence_parameters=options.divergence.parameters,
        teacher_grad=options.teacher_grad,
        valid_vocab=vocabulary.within(valid_vocab) if whole else sides["kd_vocab"],
        vocab_size=valid_vocab if whole else sides["kd_size"],
        vocab_start=vocabulary.start,
        largest=vocabulary.largest,
        group=vocabulary.group,
        ce_term=ce_term,
        anchor_term=anchor_term,
        want_metrics=options.return_metrics,
        per_row=options.reduction == "none",
        need_hidden=grad and hidden.requires_grad,
        need_weight=grad and student.weight.requires_grad,
        need_bias=grad and student.bias is not None and student.bias.requires_grad,
        need_teacher_hidden=grad and projected is not None and projected.requires_grad,
        engine=engine,
        scratch_bytes=options.scratch_bytes or 0,
    )
    return Assembled(problem, rows.weights)


def _sides(
    teacher: Teacher | None,
    student: Head,
    projected: Tensor | None,
    valid_vocab: int,
    temperature: Tensor,
    dtype: torch.dtype,
    vocabulary: Vocabulary,
    own: int | None,
) -> dict[str, Any]:
    """The fields of Problem that say what the student is compared with, and at which temperature. own: size of the
    teacher's vocabulary where only a slice of that is here."""
    here = vocabulary.within(valid_vocab)
    side: dict[str, Any] = dict.fromkeys(
        ("teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logits", "teacher_rows", "teacher_indices")
    )
    side |= {
        "teacher_hidden": projected,
        "teacher_logit_scale": float(student.logit_scale),
        "teacher_softcap": _float(student.softcap),
        "teacher_log_probs": None,
        "teacher_tail": "renormalize",
        "teacher_tempered": False,
        "kd_vocab": here,
        "kd_size": valid_vocab,
        "temperature": temperature,
    }
    if isinstance(teacher, Head):
        side |= {
            "teacher_hidden": _flat(teacher.hidden),
            "teacher_weight": teacher.weight,
            "teacher_bias": teacher.bias,
            "teacher_logit_scale": float(teacher.logit_scale),
            "teacher_softcap": _float(teacher.softcap),
            "kd_vocab": min(here, teacher.weight.shape[0]),
            "kd_size": min(valid_vocab, teacher.weight.shape[0] if own is None else own),
        }
    elif isinstance(teacher, Logits):
        rows = teacher.logits.shape[:-1].numel()
        side |= {
            "teacher_logits": teacher.logits,
            "teacher_rows": torch.arange(rows, device=teacher.logits.device),
            "kd_vocab": min(here, teacher.logits.shape[-1]),
            "kd_size": min(valid_vocab, teacher.logits.shape[-1] if own is None else own),
        }
    elif isinstance(teacher, SparseLogits):
        indices, log_probs = sparse.prepare(_flat(teacher.indices), _flat(teacher.log_probs), valid_vocab, dtype)
        side |= {"teacher_indices": indices, "teacher_log_probs": log_probs}
        side |= {"teacher_tail": teacher.tail, "teacher_tempered": teacher.tempered}
        if teacher.tail == "none" and not teacher.tempered:  # weights as given mean what they say at τ = 1 only
            side["temperature"] = torch.where(temperature == 1, temperature, float("nan"))
    return side


def _out_of_vocabulary(source: Any, vocab: int, options: Options) -> Tensor | None:
    """(N,) bool: rows of a sparse source with mass on an id the student does not have."""
    if not isinstance(source, SparseLogits) or options.vocab == "truncate":
        return None
    indices = source.indices.long()  # as in validation
    strange = (indices < 0) | (indices >= vocab)
    return _flat(strange & (source.log_probs > -inf)).any(dim=-1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, engine: str) -> Tensor:
    if engine != "triton_tiled":
        return F.linear(hidden, weight, bias)
    dtype = autocast.dtype_of(hidden.device)
    if dtype is None or hidden.dtype == torch.float64:
        dtype = hidden.dtype
    return operators.project(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _autocast(head: Head) -> Head:
    """Inside autocast a head is computed as nn.Linear would be: in the autocast dtype (float64 is left alone)."""
    dtype = autocast.dtype_of(head.hidden.device)
    if dtype is None or head.hidden.dtype == torch.float64:
        return head
    return Head(
        head.hidden.to(dtype),
        head.weight.to(dtype),
        None if head.bias is None else head.bias.to(dtype),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    )


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
