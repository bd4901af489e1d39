"""Row kernels of the chunked engine: logits of one token chunk → statistics, losses and gradients of the logits.

z_s, z_t (m, V)  scratch in fp32 (fp64), rows of student and teacher: raw products h·Wᵀ, read and left as they are
grad_* (m, V)    gradients in the GEMM's dtype; may be the logits' own memory where the dtype is the same

Teacher's logits that the caller gave are read where they lie. One program per token (`RowConfig.rows` of them), so that
nothing is shared between programs. A program walks its row pair up to three times, `statistics_pass`, `terms_pass` and
`gradients_pass`; what runs which:

    row_kernel             one launch does it all
                               forward and reverse KL, or no teacher    statistics, gradients           2 reads, 1 write
                               every other divergence                   statistics, terms, gradients    3 reads, 1 write
                               without gradients                        one fewer, and no write
    states_kernel          statistics, to be merged (`tiled_forward.combine`)
    terms_kernel           terms, to be merged
    row_gradients_kernel   gradients, from the rows' constants

The last three run where something lies between: collectives, where each process has a slice of the vocabulary, and
arithmetic on its entries (`kdfast.ops.sparse`), where the teacher is a few entries per row.

Bytes per row pair: 8·V per read, of which the later ones come from L2, 4·V written in bf16 (docs/performance.md).
"""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels import online_softmax as online
from kdfast.kernels.autotune import choose
from kdfast.kernels.block_sizes import RowConfig, row_of
from kdfast.kernels.launch import Gradients, Heads, Term, matrix
from kdfast.kernels.logit_gradients import gradients, load_coefficients, store_gradients
from kdfast.kernels.tiles import given_logits

# Kernel argument, the chunk's logits and what turns products into them: student (m, V); teacher (m, ≥ kd_V), or None
# where not computed; `launch.Given`; biases (V,) or None; width: what may be read and written of a row, ≥ V
Logits = namedtuple("Logits", "student teacher stride given bias_s bias_t V kd_V width")
# The rows of one program: r [R] of the chunk, n [R] of all tokens, inside [R], active [R]; offset, given_offset [R, 1]
# to the rows' first logits; zero [R], of the dtype in which everything is computed; lanes [1, BLOCK]
Rows = namedtuple("Rows", "r n inside active offset given_offset scales zero lanes")


@triton.jit
def open_rows(
    logits, tensors, start, m, scale_s, softcap_s, scale_t, softcap_t, R: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the program's `Rows`. (Triton 3.4 returns no tuple that has None in it, so `Logits` goes beside it.)"""
    dtype: tl.constexpr = logits.student.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    n = start.to(tl.int64) + r
    inside = r < m
    offset = r[:, None] * logits.stride
    given_offset = offset
    if logits.given.logits is not None:
        given_offset = tl.load(logits.given.offsets + n, mask=inside, other=0)[:, None]
    scales = online.scales_of(scale_s, softcap_s, scale_t, softcap_t, dtype)
    active = tl.load(tensors.active + n, mask=inside, other=0) != 0
    return Rows(r, n, inside, active, offset, given_offset, scales, tl.zeros([R], dtype), tl.arange(0, BLOCK)[None, :])


@triton.jit
def _logits(z_ptr, bias_ptr, rows, v, width, V, scale, softcap, SOFTCAP: tl.constexpr):
    """Return a block [R, BLOCK] of rows' logits, −inf from V on, and their slope towards the raw products."""
    # a mask that ends where 16 elements do keeps the loads wide; what lies between V and width is never used
    z = tl.load(z_ptr + rows.offset + v, mask=rows.inside[:, None] & (v < width), other=0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + v, mask=v < V, other=0).to(z.dtype)
    z, slope = online.transform(z, scale, softcap, SOFTCAP)
    return tl.where(v < V, z, -float("inf")), slope


@triton.jit
def student_logits(logits, rows, v, V, HEADS: tl.constexpr):
    """Return a block of the student's logits, −inf from V on, and their slope."""
    x = rows.scales
    return _logits(logits.student, logits.bias_s, rows, v, logits.width, V, x.scale_s, x.softcap_s, HEADS.softcap_s)


@triton.jit
def teacher_logits(logits, rows, v, HEADS: tl.constexpr):
    """Return the same of the teacher, computed or given; what is given gets no gradient."""
    if logits.given.logits is not None:
        dtype: tl.constexpr = rows.zero.dtype
        given_ptr = logits.given.logits + rows.given_offset
        z = given_logits(given_ptr, HEADS.given_stride, rows.inside[:, None], v, logits.kd_V, dtype)
        slope = tl.zeros_like(z)
    else:
        x, V = rows.scales, logits.kd_V
        z, slope = _logits(
            logits.teacher, logits.bias_t, rows, v, logits.width, V, x.scale_t, x.softcap_t, HEADS.softcap_t
        )
    return z, slope


@triton.jit
def _with_target(side, z_ptr, bias_ptr, rows, targets, scale, softcap, SOFTCAP: tl.constexpr):
    """Return the side's state with its target's logit; targets [R]."""
    one = targets[:, None]
    here = rows.inside[:, None] & (one >= 0)  # a target may be in another process's slice of the vocabulary
    z = tl.load(z_ptr + rows.offset + one, mask=here, other=0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + one, mask=here, other=0).to(z.dtype)
    z, _ = online.transform(z, scale, softcap, SOFTCAP)
    return online.Side(side.m, side.S, side.S1, side.E, side.argmax, tl.sum(tl.where(here, z, 0), axis=1))


@triton.jit
def statistics_pass(
    logits, rows, loss, bits_ptr, HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, BLOCK: tl.constexpr
):
    """Return student's and teacher's `Side` and their `Pair` over the shared vocabulary. bits_ptr [R, 1] or None: of a
    sparse teacher."""
    student, teacher, pair = online.empty_side(rows.zero), online.empty_side(rows.zero), online.empty_pair(rows.zero)
    for block in range(0, logits.kd_V, BLOCK):
        v = block + rows.lanes
        z_s, _ = student_logits(logits, rows, v, logits.kd_V, HEADS)
        if DIVERGENCE.name == "sparse":
            student, teacher = online.update_sparse(
                student, teacher, z_s, v, loss, bits_ptr, rows.inside[:, None], WANT, False
            )
        else:
            z_t = z_s
            if WANT.teacher:
                z_t, _ = teacher_logits(logits, rows, v, HEADS)
            student, teacher, pair = online.update(student, teacher, pair, z_s, z_t, v, loss, DIVERGENCE, WANT, False)
    return student, teacher, pair


@triton.jit
def beyond_pass(student, logits, rows, loss, HEADS: tl.constexpr, WANT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the student's `Side` with the tokens added that the teacher's vocabulary does not have."""
    for block in range(logits.kd_V // BLOCK * BLOCK, logits.V, BLOCK):
        v = block + rows.lanes
        z_s, _ = student_logits(logits, rows, v, logits.V, HEADS)
        z_s = tl.where(v >= logits.kd_V, z_s, -float("inf"))
        student, _ = online.update_side(student, z_s, v, loss.labels, loss.inv_tau, True, WANT.metrics, False)
    return student


@triton.jit
def with_targets(student, teacher, logits, rows, loss, HEADS: tl.constexpr, WANT: tl.constexpr):
    """Return both sides with their targets' logits, where these are wanted."""
    x = rows.scales
    if WANT.ce:
        z_ptr, bias_ptr = logits.student, logits.bias_s
        student = _with_target(student, z_ptr, bias_ptr, rows, loss.labels, x.scale_s, x.softcap_s, HEADS.softcap_s)
    if WANT.anchor:
        z_ptr, bias_ptr = logits.teacher, logits.bias_t
        teacher = _with_target(teacher, z_ptr, bias_ptr, rows, loss.targets, x.scale_t, x.softcap_t, HEADS.softcap_t)
    return student, teacher


@triton.jit
def terms_pass(
    logits, rows, loss, constants,
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the `TermSums` over the shared vocabulary."""
    total = online.empty_terms(rows.zero)
    for block in range(0, logits.kd_V, BLOCK):
        v = block + rows.lanes
        z_s, _ = student_logits(logits, rows, v, logits.kd_V, HEADS)
        z_t, _ = teacher_logits(logits, rows, v, HEADS)
        total = online.update_terms(total, z_s, z_t, constants, loss, DIVERGENCE, WANT)
    return total


@triton.jit
def gradients_pass(
    logits, rows, loss, constants, decorrelation, coefficients, grads,
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, GRAD: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the whole vocabulary's logits."""
    TEACHER: tl.constexpr = (logits.teacher is not None) or (logits.given.logits is not None)
    for block in range(0, logits.V, BLOCK):
        v = block + rows.lanes
        z_s, slope_s = student_logits(logits, rows, v, logits.V, HEADS)
        z_t, slope_t = z_s, slope_s
        if TEACHER:
            z_t, slope_t = teacher_logits(logits, rows, v, HEADS)
        grad_s, grad_t, grad_a = gradients(
            z_s, z_t, slope_s, slope_t, v, logits.kd_V, constants, decorrelation, coefficients, loss,
            TEACHER, HEADS.truncated, DIVERGENCE, GRAD,
        )  # fmt: skip
        if IN_PLACE:
            tl.debug_barrier()  # the block has been read by every thread before any of it is written
        mask = rows.inside[:, None] & (v < logits.width)
        store_gradients(grads, rows.r[:, None], v, grad_s, grad_t, grad_a, rows.active[:, None], mask, GRAD)


@triton.jit
def zero_gradients(logits, rows, grads, R: tl.constexpr, BLOCK: tl.constexpr, GRAD: tl.constexpr):
    """Write the gradients of rows that count for nothing."""
    for block in range(0, logits.V, BLOCK):
        v = block + rows.lanes
        mask = rows.inside[:, None] & (v < logits.width)
        zero = tl.zeros([R, BLOCK], tl.float32)
        store_gradients(grads, rows.r[:, None], v, zero, zero, zero, mask, mask, GRAD)


@triton.jit
def store_zeros(pointers, m, rows, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(pointers + i * m.to(tl.int64) + rows.r, tl.zeros(rows.r.shape, tl.float32), mask=rows.inside)


@triton.jit(do_not_specialize=["stride_c", "stride_stats", "start", "m"])
def row_kernel(
    logits, tensors, stride_c, start, m,
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64", second: "fp64",
    stats_ptr, stride_stats,  # (6, N): divergence, CE, anchor, student entropy, teacher entropy, agreement
    grads,  # `launch.Gradients`
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, GRAD: tl.constexpr, IN_PLACE: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics, losses and gradients in one launch. logits `Logits`; tensors `launch.LossTensors`."""
    rows = open_rows(logits, tensors, start, m, scale_s, softcap_s, scale_t, softcap_t, R, BLOCK)
    if tl.max(rows.active.to(tl.int32), axis=0) == 0:
        zero_gradients(logits, rows, grads, R, BLOCK, GRAD)
        if grads.decorrelation is not None:
            store_zeros(grads.decorrelation, m, rows, 1)
        return
    loss = online.load_loss(tensors, parameter, second, rows.n, rows.inside, rows.zero.dtype)
    coefficients = load_coefficients(tensors.coefficients + rows.n, stride_c, rows.inside, tl.load(tensors.scale))

    student, teacher, pair = statistics_pass(logits, rows, loss, None, HEADS, DIVERGENCE, WANT, BLOCK)
    value, constants, dots = online.finalize(student, teacher, pair, DIVERGENCE, WANT.teacher, WANT.decorrelate)
    if HEADS.truncated:
        beyond = beyond_pass(student, logits, rows, loss, HEADS, WANT, BLOCK)
        student, constants = online.whole_vocabulary(student, beyond, constants)
    student, teacher = with_targets(student, teacher, logits, rows, loss, HEADS, WANT)
    if WANT.teacher and DIVERGENCE.base == "":
        total = terms_pass(logits, rows, loss, constants, HEADS, DIVERGENCE, WANT, BLOCK)
        value, constants, dots = online.finalize_terms(total, constants, WANT.decorrelate)

    counts = rows.inside & rows.active  # an inactive row's statistics stay 0
    if WANT.teacher:
        tl.store(stats_ptr + rows.n, value, mask=counts)
    ce = online.store_statistics(stats_ptr + rows.n, stride_stats, counts, student, teacher, DIVERGENCE, WANT)

    if (grads.student is not None) or (grads.teacher is not None):
        decorrelation = rows.zero
        if GRAD.decorrelate:
            ce = ce if GRAD.ce else rows.zero
            kd, of_ce = coefficients.kd, coefficients.ce
            decorrelation = online.decorrelation_of(dots, ce, kd, of_ce, loss.inv_tau, loss.inv_tau_t)
            decorrelation = tl.where(rows.active, decorrelation, 0)
            tl.store(grads.decorrelation + rows.r, decorrelation, mask=rows.inside)
        gradients_pass(
            logits, rows, loss, constants, decorrelation, coefficients, grads, HEADS, DIVERGENCE, GRAD, IN_PLACE, BLOCK
        )


@triton.jit(do_not_specialize=["stride_c", "start", "m"])
def states_kernel(
    logits, tensors, stride_c, start, m,
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64", second: "fp64",
    bits,  # (m, words) int32 or None
    states_ptr,  # (19, m), or (25, m) where truncated: student, teacher, pair, the student's tokens beyond
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of the vocabulary that is here, before what is only known with the rest of it."""
    rows = open_rows(logits, tensors, start, m, scale_s, softcap_s, scale_t, softcap_t, R, BLOCK)
    if tl.max(rows.active.to(tl.int32), axis=0) == 0:
        store_zeros(states_ptr, m, rows, online.STATE + (online.SIDE if HEADS.truncated else 0))
        return
    loss = online.load_loss(tensors, parameter, second, rows.n, rows.inside, rows.zero.dtype)
    bits_ptr = bits.pointer
    if bits_ptr is not None:
        bits_ptr += rows.r[:, None] * bits.row
    student, teacher, pair = statistics_pass(logits, rows, loss, bits_ptr, HEADS, DIVERGENCE, WANT, BLOCK)
    states_ptr += rows.r
    if HEADS.truncated:
        beyond = beyond_pass(online.empty_side(rows.zero), logits, rows, loss, HEADS, WANT, BLOCK)
        online.store_tensors(states_ptr + online.STATE * m.to(tl.int64), m, beyond, rows.inside)
    student, teacher = with_targets(student, teacher, logits, rows, loss, HEADS, WANT)
    online.store_tensors(states_ptr, m, student + teacher + pair, rows.inside)


@triton.jit(do_not_specialize=["stride_c", "start", "m"])
def terms_kernel(
    logits, tensors, stride_c, start, m,
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64", second: "fp64",
    constants_ptr,  # (11, m)
    sums_ptr,  # (10, m)
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second pass over the vocabulary that is here."""
    rows = open_rows(logits, tensors, start, m, scale_s, softcap_s, scale_t, softcap_t, R, BLOCK)
    if tl.max(rows.active.to(tl.int32), axis=0) == 0:
        store_zeros(sums_ptr, m, rows, online.TERMS)
        return
    loss = online.load_loss(tensors, parameter, second, rows.n, rows.inside, rows.zero.dtype)
    constants = online.RowConstants(*online.load_tensors(constants_ptr + rows.r, m, rows.inside, online.CONSTANTS))
    total = terms_pass(logits, rows, loss, constants, HEADS, DIVERGENCE, WANT, BLOCK)
    online.store_tensors(sums_ptr + rows.r, m, total, rows.inside)


@triton.jit(do_not_specialize=["stride_c", "start", "m"])
def row_gradients_kernel(
    logits, tensors, stride_c, start, m,
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64", second: "fp64",
    constants_ptr,  # (11, m)
    grads,  # `launch.Gradients`
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, GRAD: tl.constexpr, IN_PLACE: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients from the rows' constants."""
    rows = open_rows(logits, tensors, start, m, scale_s, softcap_s, scale_t, softcap_t, R, BLOCK)
    if tl.max(rows.active.to(tl.int32), axis=0) == 0:
        zero_gradients(logits, rows, grads, R, BLOCK, GRAD)
        return
    loss = online.load_loss(tensors, parameter, second, rows.n, rows.inside, rows.zero.dtype)
    coefficients = load_coefficients(tensors.coefficients + rows.n, stride_c, rows.inside, tl.load(tensors.scale))
    constants = online.RowConstants(*online.load_tensors(constants_ptr + rows.r, m, rows.inside, online.CONSTANTS))
    decorrelation = rows.zero
    if GRAD.decorrelate:
        decorrelation = tl.load(grads.decorrelation + rows.r, mask=rows.inside, other=0)
    gradients_pass(
        logits, rows, loss, constants, decorrelation, coefficients, grads, HEADS, DIVERGENCE, GRAD, IN_PLACE, BLOCK
    )


@dataclass(frozen=True, eq=False)
class Chunk:
    """Logits of consecutive tokens, and the loss that is taken of them."""

    heads: Heads  # only what turns products into logits, and where given ones lie, is read
    term: Term
    z_s: Tensor  # (m, V)
    z_t: Tensor | None  # (m, ≥ kd_vocab), strided as z_s
    width: int  # elements of a row, of logits and of gradients, that may be read and written: V, or the padded stride
    start: int  # the first token

    @property
    def teacher(self) -> bool:
        """Whether there are two sides of logits."""
        return self.z_t is not None or self.heads.teacher_logits is not None


def _launch(
    kernel: Any, chunk: Chunk, *arguments: Any, config: RowConfig | None = None, once: bool = False, **flags: Any
) -> None:
    """Launch a kernel over the chunk's rows. once: doing it again would read what it has written."""
    heads, term, z_s = chunk.heads, chunk.term, chunk.z_s
    m, V = z_s.shape
    if m == 0:
        return
    biases = (heads.bias, heads.teacher_bias)
    logits = Logits(z_s, chunk.z_t, z_s.stride(0), heads.given(), *biases, V, heads.kd_vocab, chunk.width)

    def launch(config: RowConfig) -> None:
        kernel[(triton.cdiv(m, config.rows),)](
            logits, term.tensors(), term.coefficients.stride(0), chunk.start, m, *heads.scalars(),
            term.parameter, term.second, *arguments, HEADS=heads.flags(), DIVERGENCE=term.entry, **flags,
            R=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip

    if config is None and once:
        config = row_of(z_s.device, z_s.element_size(), m).rows
    launch(config or choose("rows", z_s, m, launch))


def _options(chunk: Chunk, grads: Gradients) -> dict[str, Any]:
    """Return the options of a launch that writes gradients."""
    in_place = any(grad is not None and grad.dtype == chunk.z_s.dtype for grad in (grads.student, grads.teacher))
    flags = chunk.term.gradient_flags(grads.student is not None, grads.decorrelation is not None)
    return {"GRAD": flags, "IN_PLACE": in_place, "once": in_place}


def solve_rows(chunk: Chunk, grads: Gradients, *, stats: Tensor, config: RowConfig | None = None) -> None:
    """Take statistics, losses and gradients in one launch; stats (6, N) is written where computed."""
    want = chunk.term.statistics_flags(chunk.teacher, grads.decorrelation is not None)
    _launch(row_kernel, chunk, stats, stats.stride(0), grads, WANT=want, **_options(chunk, grads), config=config)


def row_states(chunk: Chunk, states: Tensor, *, decorrelate: bool, config: RowConfig | None = None) -> None:
    """Fill states (19, m), or (25, m) where the vocabulary is truncated, with the statistics of what is here."""
    want = chunk.term.statistics_flags(chunk.teacher, decorrelate)
    _launch(states_kernel, chunk, matrix(chunk.term.bits), states, WANT=want, config=config)


def row_terms(
    chunk: Chunk, sums: Tensor, *, constants: Tensor, decorrelate: bool, config: RowConfig | None = None
) -> None:
    """Fill sums (10, m) with the second pass over what is here; constants (≥ 11, m)."""
    want = chunk.term.statistics_flags(chunk.teacher, decorrelate)
    _launch(terms_kernel, chunk, constants, sums, WANT=want, config=config)


def row_gradients(chunk: Chunk, grads: Gradients, *, constants: Tensor, config: RowConfig | None = None) -> None:
    """Take gradients from the rows' constants (≥ 11, m)."""
    if grads.student is not None or grads.teacher is not None:
        _launch(row_gradients_kernel, chunk, constants, grads, **_options(chunk, grads), config=config)
