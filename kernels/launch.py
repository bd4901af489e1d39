"""The arguments of launchers, in two parts: the heads that produce logits, and the loss computed from these."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.kernels.block_sizes import TileConfig
from kdfast.kernels.divergences import Entry, entry_of, series

Matrix = namedtuple("Matrix", "pointer row column")  # a pointer and its strides
# factors of the logits: hidden (N, Hs), teacher_hidden (N, Hs) or (N, Ht), weight (V, Hs), teacher_weight (V, Ht), of
# which the teacher's may have no pointer; biases (V,) or None; mask (V,) of the ids that the KD term covers, or None
Operands = namedtuple("Operands", "hidden teacher_hidden weight teacher_weight bias teacher_bias mask")
Given = namedtuple("Given", "logits offsets")  # a `Logits` teacher's logits and their rows' offsets, or None
LossTensors = namedtuple("LossTensors", "labels targets active coefficients tau teacher_tau scale series")

PRECISION = {True: "tf32", False: "ieee"}  # Triton's names for the precision of fp32 products


class Gradients(NamedTuple):
    """Kernel argument: buffers for gradients of logits, (rows, columns) each; None = not needed."""

    student: Tensor | None
    teacher: Tensor | None  # the KD part, plus the anchor's if that has no plane of its own
    anchor: Tensor | None
    decorrelation: Tensor | None  # (rows,); if given, the teacher's gradient is made orthogonal to the student's
    stride: int  # between rows, the student's and the teacher's
    anchor_stride: int

    @classmethod
    def of(
        cls, student: Tensor | None, teacher: Tensor | None = None, anchor: Tensor | None = None,
        decorrelation: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        """Build the argument from tensors; the student's and the teacher's have the same stride."""
        planes = (teacher if student is None else student, anchor)
        strides = (0 if plane is None else plane.stride(0) for plane in planes)
        return cls(student, teacher, anchor, decorrelation, *strides)


@dataclass(frozen=True)
class HeadFlags:
    """Compile-time argument: properties of the heads."""

    softcap_s: bool = False
    softcap_t: bool = False
    truncated: bool = False  # the cross entropy covers ids that the KD term does not
    further: bool = False  # so do the teacher's terms at τ = 1
    given_stride: int = 0  # between entries of a `Logits` teacher
    given_even: bool = False  # its rows start at multiples of 8 entries
    even_s: bool = True  # Hs is a multiple of a tile's BLOCK_H
    even_t: bool = True
    precision: str = "ieee"
    scaled_s: bool = False  # there is a logit_scale
    scaled_t: bool = False


@dataclass(frozen=True)
class StatisticsFlags:
    """Compile-time argument: which statistics to compute."""

    teacher: bool  # there are two sides of logits
    ce: bool
    anchor: bool
    metrics: bool
    teacher_gradient: bool
    decorrelate: bool
    precise: bool  # gradients are stored in float32 or float64


@dataclass(frozen=True)
class GradientFlags:
    """Compile-time argument: which gradients to compute."""

    student: bool
    ce: bool
    teacher: bool
    anchor: bool
    decorrelate: bool
    precise: bool


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of student and teacher, whose logits are softcap·tanh(logit_scale·(h Wᵀ + b)/softcap)."""

    hidden: Tensor  # (N, Hs)
    weight: Tensor  # (V, Hs)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    teacher_hidden: Tensor | None  # (N, Hs) if it shares the student's head, (N, Ht), or None
    teacher_weight: Tensor | None  # (V, Ht), or None
    teacher_bias: Tensor | None  # (V,): the student's again if the head is shared
    teacher_logit_scale: float
    teacher_softcap: float | None
    teacher_logits: Tensor | None  # dense logits with any strides, one row per token at `offsets`, or None
    offsets: Tensor | None  # (N,) int64
    vocab: int  # entries of the vocabulary that count
    kd_vocab: int  # entries of both sides of the KD term; only the cross entropy covers the rest
    tf32: bool  # fp32 products may round their operands to TF32
    truncated: bool = False  # there is such a rest, in this or another process's slice
    mask: Tensor | None = None  # (V,) bool, False from kd_vocab on: the ids that the KD term covers

    @property
    def further(self) -> bool:
        """Return whether the teacher's terms at τ = 1 cover the rest too, which they do if it shares the head."""
        shared = self.teacher_hidden is not None and self.teacher_weight is None
        return shared and self.truncated and self.mask is not None

    @property
    def teacher(self) -> bool:
        """Return whether there are two sides of logits."""
        return self.teacher_hidden is not None or self.teacher_logits is not None

    def student_alone(self) -> Heads:
        """Return the heads without a teacher."""
        return replace(self, teacher_hidden=None, teacher_weight=None, teacher_bias=None, teacher_logits=None)

    @property
    def intricate(self) -> bool:
        """Return whether a logit takes more than a product and a sum, which needs the "full" block sizes."""
        extras = (self.softcap, self.teacher_softcap, self.bias, self.teacher_bias, self.mask)
        return any(extra is not None for extra in extras)

    def operands(self) -> Operands:
        hidden, teacher, weight, own = map(matrix, (self.hidden, self.teacher_hidden, self.weight, self.teacher_weight))
        return Operands(hidden, teacher, weight, own, self.bias, self.teacher_bias, self.mask)

    def given(self) -> Given:
        return Given(self.teacher_logits, self.offsets)

    def widths(self) -> tuple[int, int]:
        """Return Hs and Ht."""
        teacher = self.hidden if self.teacher_hidden is None or self.teacher_weight is None else self.teacher_hidden
        return self.hidden.shape[1], teacher.shape[1]

    def scalars(self) -> tuple[float, float, float, float]:
        return (self.logit_scale, self.softcap or 1.0, self.teacher_logit_scale, self.teacher_softcap or 1.0)

    def flags(self, config: TileConfig | None = None) -> HeadFlags:
        """Return the flags of a kernel that reads logits, or with `config` of one that multiplies in its tiles."""
        given_stride, given_even = 0, False
        if self.teacher_logits is not None:
            *strides, given_stride = self.teacher_logits.stride()
            given_even = given_stride == 1 and all(stride % 8 == 0 for stride in strides)
        flags = HeadFlags(
            self.softcap is not None, self.teacher_softcap is not None, self.truncated, self.further, given_stride,
            given_even,
            scaled_s=self.logit_scale != 1, scaled_t=self.teacher_logit_scale != 1,
        )  # fmt: skip
        if config is None:
            return flags
        even_s, even_t = (width % config.block_h == 0 for width in self.widths())
        return replace(flags, even_s=even_s, even_t=even_t, precision=PRECISION[self.tf32])


@dataclass(frozen=True, eq=False)
class Term:
    """The loss: a divergence, and what else to compute from the logits."""

    divergence: str  # "sparse": a teacher given by a few entries per row, which the kernels see only in part
    parameter: float  # the divergence's first number, or 0
    temperature: Tensor  # ()
    coefficients: Tensor  # (3, N): kd, ce, anchor
    scale: Tensor  # (): divides gradients
    active: Tensor  # (N,) bool
    labels: Tensor | None  # (N,) int64; if given, the cross entropy is computed
    targets: Tensor | None  # (N,) int64; if given, the anchor is computed
    ce_gradient: bool
    teacher_gradient: bool
    anchor_gradient: bool
    metrics: bool
    bits: Tensor | None = None  # (rows, words) int32: set bits take entries out of a sparse teacher's bucket
    teacher_temperature: Tensor | None = None  # (): the teacher's own in the KD term
    second: float = 0.0  # the divergence's second number, or 0
    precise: bool = True  # gradients are stored in float32 or float64

    @property
    def intricate(self) -> bool:
        return self.metrics or self.targets is not None or self.entry.base == "" or self.bits is not None

    @property
    def entry(self) -> Entry:
        return entry_of(self.divergence, self.active.device.type != "cpu" and torch.version.hip is None)

    def tensors(self) -> LossTensors:
        taus = (self.temperature, self.temperature if self.teacher_temperature is None else self.teacher_temperature)
        numbers = series(self.divergence, self.parameter)
        return LossTensors(self.labels, self.targets, self.active, self.coefficients, *taus, self.scale, numbers)

    def statistics_flags(self, teacher: bool, decorrelate: bool) -> StatisticsFlags:
        ce, anchor = self.labels is not None, self.targets is not None
        of_teacher = self.teacher_gradient or decorrelate
        return StatisticsFlags(teacher, ce, anchor, self.metrics, of_teacher, decorrelate, self.precise)

    def gradient_flags(self, student: bool, decorrelate: bool) -> GradientFlags:
        anchor, precise = self.anchor_gradient, self.precise
        return GradientFlags(student, self.ce_gradient, self.teacher_gradient, anchor, decorrelate, precise)


def matrix(operand: Tensor | None) -> Matrix:
    """Return a 2-D tensor, or None, as a kernel argument."""
    if operand is not None and operand.dtype == torch.bfloat16 and operand.device.type == "cpu":
        operand = operand.float()  # the interpreter has no bf16 product
    return Matrix(None, 0, 0) if operand is None else Matrix(operand, *operand.stride())
