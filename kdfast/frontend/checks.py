"""Checks of all arguments. Every error names the argument, what came, what was expected, and what to do.

Names, types, shapes, devices and dtypes are always checked. Tensor values are checked where reading them is free: on
the CPU, outside a compiled graph. On a GPU that would need a synchronization; KDFAST_CHECK=1 allows it.
"""

from __future__ import annotations

import math
import os
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast import engines
from kdfast.divergences import DIVERGENCES, Divergence
from kdfast.engines import unavailable
from kdfast.frontend.arguments import EMPTY_MASK, Arguments
from kdfast.inputs import (
    MOST_ENTRIES,
    Head,
    Logits,
    Options,
    Projected,
    SparseLogits,
    Teacher,
    is_asked,
    kind,
    same_vocabulary,
    short,
)
from kdfast.ops import autocast, sparse, transforms
from kdfast.ops.transforms import has_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_LOG_PROB = 0.01  # allows for rounding of a probability of one
IDS = "integer token ids. Convert with .long()"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # the loss computes in float32


def check(x: Arguments) -> None:
    """Raise ValueError or TypeError for the first argument that is wrong."""
    student, teacher, options = x.student, x.teacher, x.options
    _check_names(options)
    _check_number("temperature", options.temperature, " > 0")
    for name in ("kd_weight", "ce_weight", "anchor_weight"):
        _check_number(name, getattr(options, name))
    if options.num_items_in_batch is not None:
        _check_number("num_items_in_batch", options.num_items_in_batch)
    check_head("student", student, empty=x.vocabulary.group != "")
    _check_valid_vocab(options.valid_vocab, x.vocabulary.size)
    if isinstance(teacher, Projected):
        _check_projected(teacher, student)
    elif isinstance(teacher, Head):
        _check_own_head(teacher, x)
    elif isinstance(teacher, Logits):
        _check_logits(teacher, x)
    elif isinstance(teacher, SparseLogits):
        _check_sparse(teacher, x)
    _check_kd_vocab_mask(x)
    hidden = (source.hidden.dtype for source in (student, teacher) if isinstance(source, (Head, Projected)))
    obstacle = unavailable(options.engine, student.hidden.device, *hidden)
    if obstacle is not None:
        raise ValueError(f"engine={options.engine!r} {obstacle}")
    if options.engine.startswith("triton") and not has_kernels(options.divergence, teacher):
        raise ValueError(
            f"engine={options.engine!r} has no kernel for divergence={options.divergence!r}: there is no function "
            "in kernels/divergences.py (CONTRIBUTING.md says how to add one). Use engine='torch' or 'reference'"
        )
    _check_targets("labels", x.labels, x)
    _check_targets("anchor_targets", options.anchor_targets, x)
    _check_token_weights("token_weights", options.token_weights, student.hidden)
    _check_token_weights("kd_token_weights", options.kd_token_weights, student.hidden)
    _check_terms(teacher, x.labels, options)
    if isinstance(teacher, SparseLogits):
        _check_entries(teacher, x)


def has_kernels(divergence: Divergence, teacher: Teacher | None) -> bool:
    """Return whether Triton engines support the divergence. With a sparse teacher they do not compute it themselves."""
    return divergence.key in DIVERGENCES or not isinstance(teacher, (Projected, Head, Logits))


def check_kinds(student: Any, teacher: Any) -> None:
    """Raise TypeError for a student or teacher of an unknown kind."""
    if not isinstance(student, Head):
        raise TypeError(f"student is {kind(student)}; expected kdfast.Head(hidden, weight, bias)")
    if teacher is not None and not isinstance(teacher, (Projected, Head, Logits, SparseLogits)):
        raise TypeError(f"teacher is {kind(teacher)}; expected kdfast.Projected, Head, Logits, SparseLogits or None")


def check_transforms(student: Head, teacher: Teacher | None, labels: Any, options: Options) -> None:
    """Raise NotImplementedError for transforms of torch.func, forward mode and make_fx, which only engine="reference"
    supports."""
    if isinstance(options.engine, str) and options.engine == "reference":
        return
    tensors = {"labels": labels}
    for prefix, source in (("student: Head.", student), (f"teacher: {kind(teacher)}.", teacher), ("", options)):
        if source is not None:
            tensors |= {prefix + field.name: getattr(source, field.name) for field in fields(source)}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            transforms.refuse(name, value)
    if not torch.compiler.is_compiling() and transforms.traced():
        raise NotImplementedError(
            f"fused_kd_loss: make_fx is tracing, and engine={options.engine!r} is one operator whose arguments are "
            "checked by value. Use torch.compile or torch.export, or engine='reference'"
        )


def _check_names(options: Options) -> None:
    expected = {
        "teacher_grad": ("full", "projector", "none"),
        "reduction": ("mean", "sum", "none"),
        "vocab": ("error", "truncate"),
        "engine": engines.NAMES,
    }
    for name, allowed in expected.items():
        value = getattr(options, name)
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name}={short(value)} is unknown; expected one of {', '.join(map(repr, allowed))}")
    if not _is_int(options.ignore_index):
        raise TypeError(f"ignore_index is {kind(options.ignore_index)}; expected an int, such as -100")
    if not -(2**63) <= options.ignore_index < 2**63:
        raise ValueError("ignore_index is past what 64 bits hold; expected an int that a label can be, such as -100")
    scratch = options.scratch_bytes
    if scratch is not None and not (_is_int(scratch) and 0 < scratch < 2**63):
        raise ValueError(
            f"scratch_bytes={short(scratch)}; expected a positive int (bytes for one chunk's logits) or None"
        )
    _check_flag("temperature_squared", options.temperature_squared)
    if not (isinstance(options.return_metrics, str) and options.return_metrics == "terms"):
        _check_flag("return_metrics", options.return_metrics, "True, False or 'terms'")


def check_head(name: str, head: Head, *, empty: bool) -> None:
    """Raise if a head's tensors or numbers are wrong. empty: it may have no rows, as a slice of a vocabulary may."""
    _check_float_tensor(f"{name}: Head.hidden", head.hidden)
    _check_float_tensor(f"{name}: Head.weight", head.weight)
    if head.weight.dim() != 2 or (head.weight.shape[0] == 0 and not empty):
        raise ValueError(f"{name}: Head.weight has shape {tuple(head.weight.shape)}; expected (V, H)")
    _check_linear(f"{name}: Head", head.hidden, "(V, H)", weight=head.weight, bias=head.bias)
    numbers = {"logit_scale": (head.logit_scale, ""), "softcap": (head.softcap, " > 0")}
    for field, (value, bound) in numbers.items():
        if field == "softcap" and value is None:
            continue
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(
                f"{name}: Head.{field} is {kind(value)}; expected a number. A trained scale belongs on the hidden "
                "states: multiply them by it"
            )
        _check_range(f"{name}: Head.{field}", value, bound)


def _check_linear(name: str, hidden: Tensor, shape: str, **parts: Tensor | None) -> None:
    """Raise if widths, devices or dtypes of hidden (*, H), weight (V, H) and bias (V,) do not fit together.

    parts: weight and bias, with their field names as keys; shape: the weight's, in letters.
    """
    (w, weight), (b, bias) = parts.items()
    assert weight is not None
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or hidden.shape[-1] == 0:
        hint = ""
        if hidden.dim() and hidden.shape[-1] == weight.shape[0]:
            logits = hidden.shape[-1] > weight.shape[1]  # a vocabulary is larger than a width
            hint = " Are these logits? Pass what goes into the head" if logits else " Transpose the weight?"
        raise ValueError(
            f"{name}.hidden is {tuple(hidden.shape)} and {name}.{w} is {tuple(weight.shape)}; expected (*, H) and "
            f"{shape} with the same width.{hint}"
        )
    if bias is not None:
        _check_float_tensor(f"{name}.{b}", bias)
        if tuple(bias.shape) != (weight.shape[0],):
            rows = shape[1:].split(",")[0]
            raise ValueError(f"{name}.{b} is {tuple(bias.shape)}; expected ({rows},) = ({weight.shape[0]},)")
    for field, tensor in parts.items():
        if tensor is None:
            continue
        _check_same_device(f"{name}.{field}", tensor, hidden, f"{name}.hidden")
        double = torch.float64 in (tensor.dtype, hidden.dtype)  # autocast leaves float64 alone
        free = tensor is bias or autocast.dtype_of(hidden.device) is not None  # a bias is added to fp32 products
        if tensor.dtype != hidden.dtype and (double or not free):
            raise ValueError(
                f"{name}.{field} is {tensor.dtype} and {name}.hidden {hidden.dtype}; within one head dtypes must "
                "agree, but for a bias that is not float64: convert one, or run under torch.autocast"
            )


def _check_projected(teacher: Projected, student: Head) -> None:
    _check_float_tensor("teacher: Projected.hidden", teacher.hidden)
    _check_same_rows("teacher: Projected.hidden", teacher.hidden, student.hidden)
    if teacher.temperature is not None:
        _check_number("teacher: Projected.temperature", teacher.temperature, " > 0")
    Hs, Ht = student.hidden.shape[-1], teacher.hidden.shape[-1]
    weight, bias = teacher.projector_weight, teacher.projector_bias
    if weight is None:
        if bias is not None:
            raise ValueError(
                "teacher: Projected.projector_bias is given without projector_weight; give both, or neither and "
                "hidden states that already have the student's width"
            )
        if Ht != Hs:
            raise ValueError(
                f"teacher: Projected.hidden has width {Ht} and no projector_weight; without a projector it must have "
                f"the student's width {Hs}. Pass projector_weight of shape ({Hs}, {Ht})"
            )
        return
    _check_float_tensor("teacher: Projected.projector_weight", weight)
    if tuple(weight.shape) != (Hs, Ht):
        transposed = " Transpose it?" if tuple(weight.shape) == (Ht, Hs) else ""
        raise ValueError(
            f"teacher: Projected.projector_weight is {tuple(weight.shape)}; with student width Hs={Hs} and teacher "
            f"width Ht={Ht} it must be (Hs, Ht) = ({Hs}, {Ht}), as nn.Linear({Ht}, {Hs}).weight is.{transposed}"
        )
    _check_linear("teacher: Projected", teacher.hidden, "(Hs, Ht)", projector_weight=weight, projector_bias=bias)
    _refuse_grad("teacher: Projected.hidden", teacher.hidden, "a teacher under a projector gets no gradient")


def _check_own_head(teacher: Head, x: Arguments) -> None:
    check_head("teacher", teacher, empty=x.vocabulary.group != "")
    _check_same_rows("teacher: Head.hidden", teacher.hidden, x.student.hidden)
    _check_vocabularies("teacher: Head.weight", teacher.weight.shape[0], x)
    for field, tensor in (("hidden", teacher.hidden), ("weight", teacher.weight), ("bias", teacher.bias)):
        _refuse_grad(f"teacher: Head.{field}", tensor, "the teacher gets no gradient")


def _check_logits(teacher: Logits, x: Arguments) -> None:
    logits = teacher.logits
    _check_float_tensor("teacher: Logits.logits", logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and not x.vocabulary.group):
        raise ValueError(f"teacher: Logits.logits has shape {tuple(logits.shape)}; expected (*, V)")
    _check_same_rows("teacher: Logits.logits", logits, x.student.hidden)
    _check_vocabularies("teacher: Logits.logits", logits.shape[-1], x)
    _refuse_grad("teacher: Logits.logits", logits, "the teacher gets no gradient")


def _check_vocabularies(name: str, here: int, x: Arguments) -> None:
    """Raise if the teacher's vocabulary, of which this process has `here` entries, does not fit the student's."""
    theirs, ours = here if x.vocabulary.teacher is None else x.vocabulary.teacher, x.vocabulary.size
    if theirs == 0:
        raise ValueError(f"{name} has no entries on any process of process_group; expected (*, V)")
    if same_vocabulary(theirs, ours, x.options.valid_vocab, x.options.vocab):
        return
    raise ValueError(
        f"{name} has a vocabulary of {theirs} and the student's head {ours}. If the larger one only adds padding rows, "
        "pass valid_vocab=, the number of real tokens; if its first ids are the other's, pass vocab='truncate' to "
        "compare those alone"
    )


def _check_sparse(teacher: SparseLogits, x: Arguments) -> None:
    indices, log_probs, log_tail, tail = teacher.indices, teacher.log_probs, teacher.log_tail, teacher.tail
    if not isinstance(tail, str) or tail not in ("renormalize", "bucket", "none", "renormalize_both"):
        raise ValueError(
            f"teacher: SparseLogits.tail={short(tail)} is unknown; expected 'renormalize', 'bucket', 'none' or "
            "'renormalize_both'"
        )
    _check_flag("teacher: SparseLogits.tempered", teacher.tempered)
    _check_tensor("teacher: SparseLogits.indices", indices, INTEGERS, "an integer tensor (*, K)", IDS)
    _check_float_tensor("teacher: SparseLogits.log_probs", log_probs)
    if indices.shape != log_probs.shape or indices.dim() == 0 or not 1 <= indices.shape[-1] <= MOST_ENTRIES:
        raise ValueError(
            f"teacher: SparseLogits.indices is {tuple(indices.shape)} and .log_probs {tuple(log_probs.shape)}; "
            f"expected (*, K) both, with K from 1 to {MOST_ENTRIES}"
        )
    _check_same_rows("teacher: SparseLogits.indices", indices, x.student.hidden)
    _check_same_rows("teacher: SparseLogits.log_probs", log_probs, x.student.hidden)
    _refuse_grad("teacher: SparseLogits.log_probs", log_probs, "the teacher gets no gradient")
    if log_tail is not None:
        name = "teacher: SparseLogits.log_tail"
        if tail != "bucket":
            raise ValueError(f"{name} with tail={tail!r}, which has no use for it; pass tail='bucket', or leave it out")
        _check_float_tensor(name, log_tail)
        _check_one_per_row(name, log_tail, x.student.hidden)
        _refuse_grad(name, log_tail, "the teacher gets no gradient")
    if tail == "none" and not teacher.tempered:
        tau = x.options.temperature
        if isinstance(tau, Tensor):
            tau = tau.item() if can_read(tau) and tau.dim() == 0 else 1.0
        if isinstance(tau, Real) and tau != 1:
            raise ValueError(
                f"temperature={tau} with teacher: SparseLogits.tail='none'; weights taken as given say nothing about "
                "another temperature. Pass temperature=1.0, or tempered=True for weights that are of this one, or "
                "tail='renormalize' or 'bucket'"
            )
    divergence = x.options.divergence.name
    if tail in ("renormalize", "none") and divergence in ("reverse_kl", "symmetric_kl"):
        raise ValueError(
            f"divergence={divergence!r} with teacher: SparseLogits.tail={tail!r} is infinite: the student has "
            "probability where the teacher has none. Pass tail='bucket' or 'renormalize_both', or a divergence "
            "that is finite there: forward_kl, jsd, skew_kl, skew_reverse_kl, total_variation"
        )
    if tail in ("renormalize", "none") and has_values(indices):
        sparse.without_teacher(x.options.divergence)


def _check_entries(teacher: SparseLogits, x: Arguments) -> None:
    """Raise ValueError for impossible values of a sparse teacher in rows that count."""
    log_tail, tail, counts = teacher.log_tail, teacher.tail, _rows_that_count(x)
    if counts is None or not (can_read(teacher.indices) and can_read(teacher.log_probs)):
        return
    V = x.vocabulary.size
    indices = teacher.indices.long()  # a narrower type would compare modulo its range
    log_probs = teacher.log_probs.masked_fill(~counts[..., None], -math.inf)
    strange = ((indices < 0) | (indices >= V)) & (log_probs > -math.inf)
    if x.options.vocab != "truncate" and bool(strange.any()):
        raise ValueError(
            f"teacher: SparseLogits.indices contains {int(indices[strange].flatten()[0])}; expected ids from 0 to "
            f"{V - 1} (an entry of log-probability −inf may hold any id), or vocab='truncate' to drop the others"
        )
    if bool(log_probs.isnan().any()) or bool((log_probs == math.inf).any()):
        raise ValueError("teacher: SparseLogits.log_probs contains NaN or +inf; expected log-probabilities")
    if tail in ("bucket", "none") and bool((log_probs > LARGEST_LOG_PROB).any()):
        raise ValueError(
            f"teacher: SparseLogits.log_probs contains {float(log_probs.max())}, more than all of the probability; "
            f"tail={tail!r} takes log-probabilities, not logits: apply log_softmax over the whole vocabulary first"
        )
    if log_tail is not None and can_read(log_tail):
        total = (log_probs.float().exp().sum(-1) + log_tail.float().exp()).masked_fill(~counts, 0)
        if not bool((total <= 1.1).all()):
            raise ValueError(
                f"teacher: SparseLogits.log_tail and .log_probs hold a mass of {float(total.max())}; expected 1. "
                "Is log_tail the log of the mass of all other ids, at the temperature of log_probs?"
            )
    valid = x.valid_vocab
    mask = x.kd_vocab_mask
    empty = counts & sparse.without_entries(teacher, valid, mask)
    if bool(empty.any()):
        row = ", ".join(map(str, empty.nonzero()[0].tolist()))
        raise ValueError(
            f"teacher: SparseLogits has no entry in row {row}, which counts, and tail={tail!r} normalizes over a row's "
            f"entries: each of its log_probs is −inf or of an id that is not from 0 to {valid - 1}"
            f"{'' if mask is None else ', or is False in kd_vocab_mask'}. Leave the row out "
            "(label ignore_index, or weight 0), or pass tail='bucket', for mass that is elsewhere"
        )


def _rows_that_count(x: Arguments) -> Tensor | None:
    """Return a mask (*,), True for rows whose weight in the KD term is not 0; None if the weights cannot be read."""
    options = x.options
    given = [options.kd_token_weights]
    if options.kd_token_weights is None:
        given = [options.token_weights, None if x.labels is None else x.labels.long() != options.ignore_index]
    counts = torch.ones(x.student.hidden.shape[:-1], dtype=torch.bool, device=x.student.hidden.device)
    for weights in given:
        if weights is not None:
            if not can_read(weights):
                return None
            counts = counts & (weights != 0)
    return counts


def _check_same_rows(name: str, hidden: Tensor, student_hidden: Tensor) -> None:
    if hidden.dim() == 0 or hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"{name} is {tuple(hidden.shape)} and student: Head.hidden {tuple(student_hidden.shape)}; the leading "
            "shape must be the same, one row per token"
        )
    _check_same_device(name, hidden, student_hidden)


def _check_valid_vocab(valid: Any, V: int) -> None:
    if valid is not None and not _is_int(valid):
        raise TypeError(f"valid_vocab is {kind(valid)}; expected an int or None")
    if valid is not None and not 0 < valid <= V:
        raise ValueError(f"valid_vocab={short(valid)}; expected 1 to the head's {V} rows")


def check_mask(mask: Any, student: Head) -> None:
    """Raise if kd_vocab_mask is not a mask over this process's ids of the student."""
    if mask is None:
        return
    if type(mask).__name__ == "DTensor":
        raise TypeError("kd_vocab_mask is a DTensor; expected a plain tensor, or process_group=, the mesh it is cut on")
    _check_tensor("kd_vocab_mask", mask, (torch.bool,), "a bool tensor (V,), or None", "torch.bool, such as ids < 100")
    V = student.weight.shape[0]
    if tuple(mask.shape) != (V,):
        raise ValueError(f"kd_vocab_mask is {tuple(mask.shape)}; expected ({V},), one per row of student: Head.weight")
    _check_same_device("kd_vocab_mask", mask, student.hidden)


def _check_kd_vocab_mask(x: Arguments) -> None:
    mask, teacher = x.options.kd_vocab_mask, x.teacher
    check_mask(mask, x.student)
    if mask is None:
        return
    if isinstance(teacher, SparseLogits) and teacher.tail == "bucket" and teacher.log_tail is None:
        raise ValueError(
            "kd_vocab_mask with teacher: SparseLogits.tail='bucket' and no log_tail; what the entries leave of 1 is on "
            "False ids, too. Pass log_tail, the log of the mass of the True ids that are not given, or another tail"
        )
    if not x.vocabulary.group and can_read(mask) and not bool(mask[: x.kd_vocab].any()):
        raise ValueError(EMPTY_MASK)


def _check_targets(name: str, targets: Tensor | None, x: Arguments) -> None:
    if targets is None:
        return
    _check_tensor(name, targets, INTEGERS, "an integer tensor of token ids, or None", IDS)
    _check_one_per_row(name, targets, x.student.hidden)
    if not can_read(targets):
        return
    given = x.options.valid_vocab
    valid, why = (x.vocabulary.size, "") if given is None else (given, f" (valid_vocab={given})")
    targets = targets.long()  # a narrower type would compare modulo its range
    bad = ((targets < 0) | (targets >= valid)) & (targets != x.options.ignore_index)
    if bool(bad.any()):
        raise ValueError(
            f"{name} contains {int(targets[bad].flatten()[0])}; expected ids from 0 to {valid - 1}{why} or "
            f"ignore_index={x.options.ignore_index}. Is it another tokenizer's, or a different ignore_index?"
        )


def refuse_ids(role: str, rows: int, input_ids: Tensor, strange: Tensor, argument: str = "input_ids") -> None:
    """Raise ValueError if any of `input_ids` (B, T) is `strange` (B, T), True where the model has no embedding."""
    if not bool(strange.any()):
        return
    found = input_ids[strange]
    largest = int(found.max())
    resize = f", or give it rows for tokens that were added: {role}.resize_token_embeddings({largest + 1})"
    raise ValueError(
        f"{argument} contains {int(found[0])}, and the {role} has {rows} token embeddings, for ids from 0 to "
        f"{rows - 1} (any id will do at padding, where attention_mask is 0). Take text of the {role}'s own tokenizer"
        f"{resize if largest >= rows else ''}"
    )


def _check_token_weights(name: str, weights: Tensor | None, hidden: Tensor) -> None:
    if weights is None:
        return
    dtypes = (*DTYPES, *INTEGERS, torch.bool)
    _check_tensor(name, weights, dtypes, "a tensor with one weight per token, or None", "real weights, such as float32")
    _check_one_per_row(name, weights, hidden)
    _refuse_grad(name, weights, "weights get no gradient")
    _check_tangent(name, weights)
    if can_read(weights) and not bool(((weights >= 0) & (weights < math.inf)).all()):
        raise ValueError(f"{name} contains a negative, infinite or NaN weight; expected finite weights ≥ 0")


def _check_number(name: str, value: Any, bound: str = " ≥ 0") -> None:
    """Raise unless `value` is a finite number within `bound`, or a 0-d tensor that holds one."""
    if isinstance(value, Tensor):
        _check_dense(name, value)
        if value.dim() != 0 or value.dtype not in (*DTYPES, *INTEGERS) or value.device.type == "meta":
            raise ValueError(
                f"{name} is a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}; expected a finite "
                f"number{bound} or a 0-d tensor"
            )
        _refuse_grad(name, value, f"{name} gets no gradient")
        _check_tangent(name, value)
        if not can_read(value):
            return
        value = value.item()
    elif not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {kind(value)}; expected a finite number{bound} or a 0-d tensor")
    _check_range(name, value, bound)


def _check_range(name: str, given: Any, bound: str) -> None:
    """Raise for a number that is not finite in float32 or is outside `bound`, which is "", " ≥ 0" or " > 0". Uses only
    comparisons that a compiled graph can make with a number that changes."""
    # in float16 LARGEST would be infinite
    value = float(given) if isinstance(given, np.floating) else given
    inside = not bound or value >= SMALLEST or (bound == " ≥ 0" and value == 0)
    if not (inside and -LARGEST <= value <= LARGEST):
        finite = 0 < value < SMALLEST or LARGEST < abs(value) < math.inf
        why = " in float32, which the loss is made of" if finite else ""
        raise ValueError(f"{name}={short(given)}; expected a finite number{bound}{why}")


def _check_terms(teacher: Teacher | None, labels: Tensor | None, options: Options) -> None:
    """Raise if a requested term has nothing to be computed from."""
    if labels is None and is_asked(options.ce_weight):
        raise ValueError(f"ce_weight={options.ce_weight} without labels; pass labels, or ce_weight=0")
    if teacher is None and labels is None:
        raise ValueError("teacher=None and labels=None: nothing to compute; pass labels and ce_weight, or a teacher")
    if is_asked(options.anchor_weight):
        if not isinstance(teacher, Projected):
            raise ValueError(
                f"anchor_weight={options.anchor_weight} with teacher={kind(teacher)}; the anchor is the cross entropy "
                "of a Projected teacher. Pass one, or anchor_weight=0"
            )
        if labels is None and options.anchor_targets is None:
            raise ValueError(f"anchor_weight={options.anchor_weight} without anchor_targets or labels; pass one")


def _check_float_tensor(name: str, value: Any) -> None:
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor; expected a plain tensor. An FSDP-sharded head must be unsharded first "
            "(call the loss inside the module's forward, or use .full_tensor()); a vocabulary-parallel head needs "
            "process_group=, the mesh it is sharded on"
        )
    _check_tensor(name, value, DTYPES, "a tensor", "float32, bfloat16, float16 or float64")


def _check_tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], expected: str, of_dtype: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {kind(value)}; expected {expected}")
    _check_dense(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; expected {of_dtype}")


def _check_dense(name: str, value: Tensor) -> None:
    """Raise for kinds of tensors that many operators do not support."""
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        what = "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout)
        raise TypeError(
            f"{name} is a {what} tensor; expected a plain, dense one. Convert with .to_dense(), .dequantize() or "
            "torch.nested.to_padded_tensor"
        )


def _check_one_per_row(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} is {tuple(value.shape)}; expected {tuple(hidden.shape[:-1])}, the leading shape of student: "
            "Head.hidden"
        )
    _check_same_device(name, value, hidden)


def _check_same_device(name: str, value: Tensor, hidden: Tensor, other: str = "student: Head.hidden") -> None:
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device} and {other} on {hidden.device}; move them to one device")


def _refuse_grad(name: str, tensor: Tensor | None, why: str) -> None:
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        model = name.startswith("teacher") and tensor.dim() > 0  # a 0-d tensor is an option
        freeze = ", or freeze the model it is of (teacher.requires_grad_(False))" if model else ""
        raise ValueError(f"{name} requires grad, but {why}; pass it detached (.detach()){freeze}")


def _check_tangent(name: str, value: Tensor) -> None:
    if has_values(value) and transforms.has_tangent(value) and bool((value == 0).any()):
        raise ValueError(
            f"{name} is differentiated in forward mode and contains a 0, which leaves a term out of the loss; expected "
            "weights > 0"
        )


def can_read(tensor: Tensor) -> bool:
    """Return whether reading the tensor's values is free or was requested (KDFAST_CHECK=1)."""
    return has_values(tensor) and (tensor.device.type == "cpu" or os.environ.get("KDFAST_CHECK") == "1")


def _check_flag(name: str, value: Any, expected: str = "True or False") -> None:
    if not isinstance(value, (bool, np.bool_)):  # anything else would silently count as true or false
        raise TypeError(f"{name} is {kind(value)}; expected {expected}")


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_divisor(items: int | Tensor, weights: Tensor, factors: Tensor) -> None:
    """Raise ValueError if num_items_in_batch is 0 but rows count; if it cannot be read, their loss becomes NaN."""
    if not can_read(weights) or (isinstance(items, Tensor) and not can_read(items)) or items != 0:
        return
    rows = int((weights * factors[:, None] != 0).any(dim=0).sum())
    if rows:
        raise ValueError(
            f"num_items_in_batch=0 with {rows} rows that count; expected how many count in all calls that "
            "share the divisor, or None for the mean of this call's"
        )
