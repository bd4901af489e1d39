"""Checked arguments → one `Problem`: flat rows, the projector applied, every convention folded into coefficients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import operators
from kdfast.engines.choice import resolve
from kdfast.options import Options, is_asked
from kdfast.problem import Problem
from kdfast.row_weights import row_weights, scalar
from kdfast.sources import Head, Projected, Teacher


def assemble(student: Head, teacher: Teacher | None, labels: Tensor | None, options: Options) -> tuple[Problem, Tensor]:
    """Checked arguments → (Problem, weights (3, N) of the rows in KD, CE and anchor means)."""
    student = _autocast(student)
    hidden = student.hidden.reshape(-1, student.hidden.shape[-1])
    device, N = hidden.device, hidden.shape[0]
    valid_vocab = student.weight.shape[0] if options.valid_vocab is None else options.valid_vocab

    engine = resolve(
        options.engine,
        device,
        student.weight.dtype,
        tokens=N,
        vocab=valid_vocab,
        teacher=teacher is not None,
        scratch_bytes=options.scratch_bytes or 0,
    )
    own: Head | None = None
    teacher_hidden: Tensor | None = None
    if isinstance(teacher, Projected):
        teacher_hidden = teacher.hidden.reshape(-1, teacher.hidden.shape[-1])
        if teacher.projector_weight is not None:
            teacher_hidden = _project(teacher_hidden, teacher.projector_weight, teacher.projector_bias, engine)
        teacher_hidden = teacher_hidden.to(student.weight.dtype)
    elif isinstance(teacher, Head):
        own = _autocast(teacher)
        teacher_hidden = own.hidden.reshape(-1, own.hidden.shape[-1])

    double = torch.float64 in (hidden.dtype, None if teacher_hidden is None else teacher_hidden.dtype)
    dtype = torch.float64 if double else torch.float32
    temperature = scalar(options.temperature, device, dtype)
    rows = row_weights(
        labels,
        options,
        N,
        valid_vocab,
        temperature,
        has_kd=teacher is not None,
        has_anchor=isinstance(teacher, Projected),
        dtype=dtype,
        device=device,
    )

    grad = torch.is_grad_enabled()
    has_anchor = isinstance(teacher, Projected) and rows.anchor_targets is not None
    problem = Problem(
        hidden=hidden,
        weight=student.weight,
        bias=student.bias,
        logit_scale=float(student.logit_scale),
        softcap=_float(student.softcap),
        teacher_hidden=teacher_hidden,
        teacher_weight=None if own is None else own.weight,
        teacher_bias=None if own is None else own.bias,
        teacher_logit_scale=float(student.logit_scale if own is None else own.logit_scale),
        teacher_softcap=_float(student.softcap if own is None else own.softcap),
        labels=rows.labels,
        anchor_targets=rows.anchor_targets if has_anchor else None,
        temperature=temperature,
        coefficients=rows.coefficients,
        active=rows.active,
        divergence_name=options.divergence.name,
        divergence_parameters=options.divergence.parameters,
        teacher_grad=options.teacher_grad,
        valid_vocab=valid_vocab,
        ce_term=rows.labels is not None and is_asked(options.ce_weight),
        anchor_term=has_anchor and is_asked(options.anchor_weight),
        want_metrics=options.return_metrics,
        per_row=options.reduction == "none",
        need_hidden=grad and hidden.requires_grad,
        need_weight=grad and student.weight.requires_grad,
        need_bias=grad and student.bias is not None and student.bias.requires_grad,
        need_teacher_hidden=grad and own is None and teacher_hidden is not None and teacher_hidden.requires_grad,
        engine=engine,
        scratch_bytes=options.scratch_bytes or 0,
    )
    return problem, rows.weights


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, engine: str) -> Tensor:
    if engine != "triton_tiled":
        return F.linear(hidden, weight, bias)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    return operators.project(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _autocast(head: Head) -> Head:
    """Inside autocast a head is computed as nn.Linear would be: in the autocast dtype (float64 is left alone)."""
    device_type = head.hidden.device.type
    if not torch.is_autocast_enabled(device_type) or head.hidden.dtype == torch.float64:
        return head
    dtype = torch.get_autocast_dtype(device_type)
    return Head(
        head.hidden.to(dtype),
        head.weight.to(dtype),
        None if head.bias is None else head.bias.to(dtype),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    )


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
