"""Turns checked arguments into one `Problem`: flat rows, projector applied, conventions folded into coefficients."""

from __future__ import annotations

from dataclasses import fields, replace
from math import inf
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.engines import operators, resolve
from kdfast.frontend.arguments import Arguments
from kdfast.frontend.checks import has_kernels
from kdfast.frontend.row_weights import row_weights, scalar
from kdfast.inputs import Head, Logits, Projected, SparseLogits, Teacher, is_asked
from kdfast.ops import autocast, sparse
from kdfast.ops.problem import Problem
from kdfast.ops.transforms import ordinary


def build_problem(x: Arguments) -> tuple[Problem, Tensor]:
    """Return the problem for an engine, and each row's weight (3, N) in the means of the KD, CE and anchor metrics."""
    x = x._replace(student=_ordinary(x.student), teacher=_ordinary(x.teacher), options=_ordinary(x.options))
    options, vocabulary = x.options, x.vocabulary
    student = _autocast(x.student)
    hidden = _flat(student.hidden)
    N, device = hidden.shape[0], hidden.device
    valid_vocab = x.valid_vocab
    engine = resolve(
        options.engine,
        device,
        student.weight.dtype,
        tokens=N,
        vocab=min(valid_vocab, vocabulary.largest),
        teacher=isinstance(x.teacher, (Head, Projected)),
        scratch_bytes=options.scratch_bytes or 0,
        buffers=2 if vocabulary.group else 1,
        kernels=has_kernels(options.divergence, x.teacher),
    )
    teacher = _teacher(x.teacher, student, valid_vocab, engine, x.kd_vocab_mask)
    double = torch.float64 in (hidden.dtype, None if teacher.hidden is None else teacher.hidden.dtype)
    temperature = scalar(options.temperature, device, torch.float64 if double else torch.float32)
    if teacher.tail == "none" and not teacher.tempered:  # such weights are valid only at τ = 1
        temperature = torch.where(temperature == 1, temperature, float("nan"))
    its_own = x.teacher.temperature if isinstance(x.teacher, Projected) else None
    kd_vocab, kd_size = x.kd_vocab, valid_vocab
    if teacher.vocab is not None:
        kd_size = min(kd_size, teacher.vocab if vocabulary.teacher is None else vocabulary.teacher)
    kd_mask = None if x.teacher is None else options.kd_vocab_mask
    if kd_mask is not None:
        kd_mask = F.pad(kd_mask[:kd_vocab], (0, vocabulary.rows - kd_vocab)).contiguous()
    rows = row_weights(
        x.labels,
        options,
        N,
        valid_vocab,
        temperature,
        has_kd=x.teacher is not None,
        has_anchor=isinstance(x.teacher, Projected),
        bad_kd=_unreadable(x, valid_vocab, kd_mask),
    )

    ce_term = rows.labels is not None and is_asked(options.ce_weight)
    want_metrics = not isinstance(options.return_metrics, str) and bool(options.return_metrics)
    whole = ce_term or want_metrics  # only the cross entropy needs logits beyond the shared ids
    grad = torch.is_grad_enabled()
    projected = isinstance(x.teacher, Projected)
    problem = Problem(
        hidden=hidden,
        weight=student.weight,
        bias=student.bias,
        logit_scale=float(student.logit_scale),
        softcap=_float(student.softcap),
        teacher_hidden=teacher.hidden,
        teacher_weight=teacher.weight,
        teacher_bias=teacher.bias,
        teacher_logit_scale=teacher.logit_scale,
        teacher_softcap=teacher.softcap,
        teacher_logits=teacher.logits,
        teacher_rows=teacher.rows,
        teacher_indices=teacher.indices,
        teacher_log_probs=teacher.log_probs,
        teacher_log_tail=teacher.log_tail,
        teacher_tail=teacher.tail,
        teacher_tempered=teacher.tempered,
        labels=rows.labels,
        anchor_targets=rows.anchor_targets if projected else None,
        temperature=temperature,
        teacher_temperature=temperature if its_own is None else scalar(its_own, device, temperature.dtype),
        coefficients=rows.coefficients,
        active=rows.active,
        divergence_name=options.divergence.key,
        divergence_parameters=options.divergence.parameters,
        teacher_grad=options.teacher_grad,
        valid_vocab=vocabulary.within(valid_vocab) if whole else kd_vocab,
        kd_vocab=kd_vocab,
        kd_mask=kd_mask,
        vocab_size=valid_vocab if whole else kd_size,
        kd_size=kd_size,
        vocab_start=vocabulary.start,
        largest=vocabulary.largest,
        group=vocabulary.group,
        ce_term=ce_term,
        anchor_term=rows.has_anchor and is_asked(options.anchor_weight),
        want_metrics=want_metrics,
        per_row=options.reduction == "none",
        need_hidden=grad and hidden.requires_grad,
        need_weight=grad and student.weight.requires_grad,
        need_bias=grad and student.bias is not None and student.bias.requires_grad,
        need_teacher_hidden=grad and projected and teacher.hidden is not None and teacher.hidden.requires_grad,
        engine=engine,
        scratch_bytes=options.scratch_bytes or 0,
    )
    return problem, rows.weights


class _Teacher(NamedTuple):
    """The fields of `Problem` that begin with `teacher_`, as far as the kind of teacher has them."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    logits: Tensor | None = None
    rows: Tensor | None = None
    indices: Tensor | None = None
    log_probs: Tensor | None = None
    log_tail: Tensor | None = None
    tail: str = "renormalize"
    tempered: bool = False
    vocab: int | None = None  # entries on this process of the teacher's own vocabulary


def _teacher(
    teacher: Teacher | None, student: Head, valid_vocab: int, engine: str, mask: Tensor | None
) -> _Teacher:
    if isinstance(teacher, Projected):
        hidden = _flat(teacher.hidden)
        dtype = student.weight.dtype
        if engine == "torch" and hidden.device.type == "cpu":  # which multiplies fp32 operands
            dtype = torch.promote_types(dtype, torch.float32)
        if teacher.projector_weight is not None:
            hidden = _project(hidden, teacher.projector_weight, teacher.projector_bias, engine, dtype)
        scale, softcap = float(student.logit_scale), _float(student.softcap)
        return _Teacher(hidden.to(dtype), logit_scale=scale, softcap=softcap)
    if isinstance(teacher, Head):
        head = _autocast(teacher)
        scale, softcap, vocab = float(head.logit_scale), _float(head.softcap), head.weight.shape[0]
        return _Teacher(_flat(head.hidden), head.weight, head.bias, scale, softcap, vocab=vocab)
    if isinstance(teacher, Logits):
        rows = torch.arange(teacher.logits.shape[:-1].numel(), device=teacher.logits.device)
        return _Teacher(logits=teacher.logits, rows=rows, vocab=teacher.logits.shape[-1])
    if isinstance(teacher, SparseLogits):
        dtype = torch.promote_types(student.hidden.dtype, torch.float32)
        entries = sparse.prepare(_flat(teacher.indices), _flat(teacher.log_probs), valid_vocab, dtype, mask)
        return _Teacher(
            indices=entries[0],
            log_probs=entries[1],
            log_tail=sparse.log_tail(teacher, *entries, valid_vocab, mask),
            tail=teacher.tail,
            tempered=teacher.tempered,
        )
    return _Teacher()


def _unreadable(x: Arguments, valid_vocab: int, kd_mask: Tensor | None) -> Tensor | None:
    """Return a mask (N,), True for rows of a sparse teacher without entries or with mass on an id that the student
    lacks, and for all rows if the KD term covers no id."""
    nothing = None
    if kd_mask is not None and not x.vocabulary.group:
        nothing = ~kd_mask.any().expand(x.student.hidden.shape[:-1].numel())
    if not isinstance(x.teacher, SparseLogits):
        return nothing
    empty = sparse.without_entries(x.teacher, valid_vocab, x.kd_vocab_mask).reshape(-1)
    empty = empty if nothing is None else empty | nothing
    if x.options.vocab == "truncate":
        return empty
    indices = x.teacher.indices.long()  # a narrower type would compare modulo its range
    strange = (indices < 0) | (indices >= x.vocabulary.size)
    return empty | _flat(strange & (x.teacher.log_probs > -inf)).any(dim=-1)


def _ordinary(source: Any) -> Any:
    """Return a source or the options with tensors that autograd can save (`transforms.ordinary`)."""
    if source is None or torch.compiler.is_compiling():
        return source
    values = {field.name: getattr(source, field.name) for field in fields(source)}
    return replace(source, **{name: ordinary(value) for name, value in values.items() if isinstance(value, Tensor)})


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, engine: str, dtype: torch.dtype) -> Tensor:
    """Return hidden · weightᵀ + bias, computed in the projector's or autocast's dtype, or in `dtype` if wider."""
    narrow = autocast.dtype_of(hidden.device) or hidden.dtype
    if torch.promote_types(narrow, dtype) != narrow:
        head = _autocast(Head(hidden, weight, bias))
        with autocast.disabled(hidden.device):
            bias = None if head.bias is None else head.bias.to(dtype)
            return F.linear(head.hidden.to(dtype), head.weight.to(dtype), bias)
    if engine != "triton_tiled":
        if bias is None or bias.dtype == hidden.dtype or autocast.dtype_of(hidden.device) is not None:
            return F.linear(hidden, weight, bias)
        return F.linear(hidden, weight) + bias
    head = _autocast(Head(hidden, weight, bias))
    return operators.project(head.hidden, head.weight, head.bias)


def _autocast(head: Head) -> Head:
    """Return the head in the dtype that nn.Linear would use under autocast; float64 stays."""
    dtype = autocast.dtype_of(head.hidden.device)
    if dtype is None or head.hidden.dtype == torch.float64:
        return head
    bias = None if head.bias is None else head.bias.to(dtype)
    return replace(head, hidden=head.hidden.to(dtype), weight=head.weight.to(dtype), bias=bias)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
