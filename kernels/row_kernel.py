"""Row kernels of the chunked engine: logits of one token chunk → statistics, losses and gradients of the logits.

z_s, z_t (m, V)  scratch in fp32 (fp64), rows of student and teacher: raw products h·Wᵀ, which are not modified
grad_* (m, V)    gradients in the GEMM's dtype; may share memory with the logits if the dtype is the same

A `Logits` teacher is read in place. One program handles one token (or `RowConfig.rows`), so programs share nothing. A
program walks its row pair up to three times, in `statistics_pass`, `terms_pass` and `gradients_pass`:

    row_kernel             one launch does it all
                               forward and reverse KL, or no teacher    statistics, gradients           2 reads, 1 write
                               every other divergence                   statistics, terms, gradients    3 reads, 1 write
                               without gradients                        one read fewer, and no write
                               ids that the KD term leaves out          the student's once more, for the cross entropy
    states_kernel          statistics, to be merged (`tiled_forward.combine`)
    terms_kernel           terms, to be merged
    row_gradients_kernel   gradients, from the rows' constants

The last three run if something comes between the passes: collectives, if each process has a slice of the vocabulary, or
arithmetic on entries (`kdfast.ops.sparse`), if the teacher is sparse.

Bytes per row pair: 8·V per read, the later ones from L2 as far as it holds the rows, and 4·V written in bf16.
"""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels import online_softmax as online
from kdfast.kernels.autotune import choose
from kdfast.kernels.block_sizes import RowConfig, row_of
from kdfast.kernels.launch import Gradients, Heads, Term, matrix
from kdfast.kernels.logit_gradients import gradients, load_coefficients, store_gradients
from kdfast.kernels.math import along, over_threads
from kdfast.kernels.tiles import given_logits

# Kernel argument: products and what turns them into logits. student (m, V); teacher (m, ≥ kd_V), or None if there are
# no products; given: `launch.Given`; biases (V,) or None; width ≥ V: elements of a row that may be read and written;
# mask (V,) bool or None: the ids that the KD term covers
Logits = namedtuple("Logits", "student teacher stride given bias_s bias_t V kd_V width mask")
# The rows of one program: r [R] in the chunk, n [R] among all tokens, past the end the last one; inside [R], active
# [R]; offset, given_offset [R] of the rows' first logits; zero [R], in the dtype of all computations
Rows = namedtuple("Rows", "r n inside active offset given_offset scales zero")
VEC: tl.constexpr = tl.constexpr(4)  # logits that a thread reads at a time


@triton.jit
def open_rows(
    logits, tensors, start, m, scale_s, softcap_s, scale_t, softcap_t, HEADS: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Return the program's `Rows`. (Triton 3.4 cannot return a tuple with None in it, so `Logits` stays separate.)"""
    dtype: tl.constexpr = logits.student.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = r < m
    r = tl.minimum(r, m - 1)
    n = start.to(tl.int64) + r
    offset = r * logits.stride
    given_offset = offset
    if logits.given.logits is not None:
        given_offset = tl.load(logits.given.offsets + n)
        if HEADS.given_even:
            given_offset = tl.multiple_of(given_offset, 8)
    scales = online.scales_of(scale_s, softcap_s, scale_t, softcap_t, dtype)
    active = tl.load(tensors.active + n) != 0
    return Rows(r, n, inside, active, offset, given_offset, scales, tl.zeros([R], dtype))


@triton.jit
def places(BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Return the positions of a block's logits [1, J, LANES, VEC], with a thread's in one lane."""
    j = tl.arange(0, BLOCK // (LANES * VEC))[None, :, None, None]
    return (j * LANES + tl.arange(0, LANES)[None, None, :, None]) * VEC + tl.arange(0, VEC)[None, None, None, :]


@triton.jit
def _logits(
    z_ptr, bias_ptr, rows, v, width, V, scale, softcap,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Return a block of rows' logits and their slope with respect to the raw products. MASKED: −inf from V on; KEEP:
    the eviction policy."""
    pointers = z_ptr + along(rows.offset, v) + v
    # a mask that ends at a multiple of 16 elements keeps the loads wide; elements between V and width are never used
    z = tl.load(pointers, mask=v < width if MASKED else None, other=0 if MASKED else None, eviction_policy=KEEP)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + v, mask=v < V if MASKED else None, other=0 if MASKED else None)
        z += bias.to(z.dtype)
    z, slope = online.transform(z, scale, softcap, SCALED, SOFTCAP)
    return tl.where(v < V, z, -float("inf")) if MASKED else z, slope


@triton.jit
def student_logits(logits, rows, v, V, HEADS: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """Return a block of the student's logits and their slope."""
    x = rows.scales
    return _logits(
        logits.student, logits.bias_s, rows, v, logits.width, V, x.scale_s, x.softcap_s,
        HEADS.scaled_s, HEADS.softcap_s, MASKED, KEEP,
    )  # fmt: skip


@triton.jit
def teacher_logits(logits, rows, v, HEADS: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """Return a block of the teacher's logits and their slope; a `Logits` teacher gets no gradient."""
    if logits.given.logits is not None:
        dtype: tl.constexpr = rows.zero.dtype
        given_ptr = logits.given.logits + along(rows.given_offset, v)
        z = given_logits(given_ptr, HEADS.given_stride, v, logits.kd_V, dtype, MASKED or HEADS.truncated)
        slope = tl.full([], 1.0, dtype)
    else:
        x = rows.scales
        z, slope = _logits(
            logits.teacher, logits.bias_t, rows, v, logits.width, logits.kd_V, x.scale_t, x.softcap_t,
            HEADS.scaled_t, HEADS.softcap_t, MASKED or HEADS.truncated, KEEP,
        )  # fmt: skip
    return z, slope


@triton.jit
def kd_tokens(logits, v, MASKED: tl.constexpr):
    """Return which ids v the KD term's mask keeps. MASKED: v may go past its end."""
    return tl.load(logits.mask + v, mask=v < logits.kd_V if MASKED else None, other=0 if MASKED else None) != 0


@triton.jit
def of_kd(z, logits, v, MASKED: tl.constexpr):
    """Return the logits z of ids v, with −inf at those that the mask takes out of the KD term."""
    if logits.mask is not None:
        z = tl.where(kd_tokens(logits, v, MASKED), z, -float("inf"))
    return z


@triton.jit
def _update(
    student, teacher, pair, logits, rows, loss, block, lane, bits_ptr,
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Return the states with a block added. An argmax is the first id of the block in which the maximum last rose."""
    v, m_s, m_t = block + lane, student.m, teacher.m
    z_s, _ = student_logits(logits, rows, v, logits.kd_V, HEADS, MASKED, KEEP)
    z_s = of_kd(z_s, logits, v, MASKED)
    if DIVERGENCE.name == "sparse":
        student, teacher = online.update_sparse(student, teacher, z_s, v, loss, bits_ptr, WANT)
    else:
        z_t = z_s
        if WANT.teacher:
            z_t, _ = teacher_logits(logits, rows, v, HEADS, MASKED, KEEP)
            z_t = of_kd(z_t, logits, v, MASKED)
        student, teacher, pair = online.update(student, teacher, pair, z_s, z_t, loss, DIVERGENCE, WANT)
    if WANT.metrics:
        student = online.with_argmax(student, tl.where(student.m > m_s, block, student.argmax))
        teacher = online.with_argmax(teacher, tl.where(teacher.m > m_t, block, teacher.argmax))
    return student, teacher, pair


@triton.jit
def statistics_pass(
    logits, rows, loss, bits_ptr,
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Return each thread's `Side` of student and teacher and their `Pair`, over the shared vocabulary.
    bits_ptr [R] or None: a sparse teacher's."""
    zero = tl.zeros([rows.zero.shape[0], LANES], rows.zero.dtype)
    student, teacher, pair = online.empty_state(zero, WANT.precise)
    full = logits.kd_V // BLOCK * BLOCK
    for block in range(0, full, BLOCK):
        student, teacher, pair = _update(
            student, teacher, pair, logits, rows, loss, block, places(BLOCK, LANES), bits_ptr,
            HEADS, DIVERGENCE, WANT, False, KEEP,
        )  # fmt: skip
    for block in range(full, logits.kd_V, LANES * VEC):
        student, teacher, pair = _update(
            student, teacher, pair, logits, rows, loss, block, places(LANES * VEC, LANES), bits_ptr,
            HEADS, DIVERGENCE, WANT, True, KEEP,
        )  # fmt: skip
    return student, teacher, pair


@triton.jit
def beyond_pass(
    student, teacher, logits, rows, loss,
    HEADS: tl.constexpr, WANT: tl.constexpr, LANES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Return the student's `Side`, merged, with the ids added that the KD term leaves out; and so the teacher's, if its
    terms at τ = 1 cover them."""
    STEP: tl.constexpr = LANES * VEC
    if logits.mask is None:
        first = logits.kd_V // STEP * STEP
    else:
        first = 0
    for block in range(first, logits.V, STEP):
        v = block + places(STEP, LANES)
        if logits.mask is None:
            kd = v < logits.kd_V
        else:
            kd = kd_tokens(logits, v, True)
        z_s, _ = student_logits(logits, rows, v, logits.V, HEADS, True, KEEP)
        z_s = tl.where(kd, -float("inf"), z_s)
        student, _ = online.update_side(student, z_s, loss.c_s, True, WANT.metrics, WANT.precise)
        if HEADS.further:
            z_t, _ = teacher_logits(logits, rows, v, HEADS, True, KEEP)
            z_t = tl.where(kd, -float("inf"), z_t)
            teacher, _ = online.update_side(teacher, z_t, loss.c_t, True, WANT.metrics, WANT.precise)
    student, _ = online.merge_side(student, loss.c_s, True, WANT.metrics, WANT.precise)
    if HEADS.further:
        teacher, _ = online.merge_side(teacher, loss.c_t, True, WANT.metrics, WANT.precise)
    return student, teacher


@triton.jit
def _first(z, v):
    """Return the id [R] of the first maximum; z, v [R, BLOCK]."""
    return tl.min(tl.where(z == tl.max(z, axis=1)[:, None], v, 2147483647), axis=1)


@triton.jit
def targets_and_argmaxes(
    student, teacher, logits, rows, loss, HEADS: tl.constexpr, WANT: tl.constexpr, BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Return both sides with their targets' logits, 0 for a target in another process's slice, and their argmaxes, if
    needed."""
    if WANT.ce:
        z, _ = student_logits(logits, rows, tl.maximum(loss.labels, 0)[:, None], logits.V, HEADS, False, KEEP)
        student = online.with_target(student, tl.where(loss.labels >= 0, tl.sum(z, axis=1), 0))
    if WANT.anchor:
        z, _ = teacher_logits(logits, rows, tl.maximum(loss.targets, 0)[:, None], HEADS, False, KEEP)
        teacher = online.with_target(teacher, tl.where(loss.targets >= 0, tl.sum(z, axis=1), 0))
    if WANT.metrics:
        v = student.argmax[:, None] + tl.arange(0, BLOCK)[None, :]
        z, _ = student_logits(logits, rows, v, logits.kd_V, HEADS, True, KEEP)
        student = online.with_argmax(student, _first(of_kd(z, logits, v, True), v))
        if (logits.teacher is not None) or (logits.given.logits is not None):
            v = teacher.argmax[:, None] + tl.arange(0, BLOCK)[None, :]
            z, _ = teacher_logits(logits, rows, v, HEADS, True, KEEP)
            teacher = online.with_argmax(teacher, _first(of_kd(z, logits, v, True), v))
    return student, teacher


@triton.jit
def _terms(
    total, logits, rows, loss, constants, v,
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    z_s, _ = student_logits(logits, rows, v, logits.kd_V, HEADS, MASKED, KEEP)
    z_t, _ = teacher_logits(logits, rows, v, HEADS, MASKED, KEEP)
    z_s, z_t = of_kd(z_s, logits, v, MASKED), of_kd(z_t, logits, v, MASKED)
    return online.update_terms(total, z_s, z_t, constants, loss, DIVERGENCE, WANT)


@triton.jit
def terms_pass(
    logits, rows, loss, constants,
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Return the `TermSums` over the shared vocabulary, read backwards, since L2 still holds what was read last."""
    total = online.empty_terms(tl.zeros([rows.zero.shape[0], LANES], rows.zero.dtype))
    full = logits.kd_V // BLOCK * BLOCK
    for block in range(full, logits.kd_V, LANES * VEC):
        v = block + places(LANES * VEC, LANES)
        total = _terms(total, logits, rows, loss, constants, v, HEADS, DIVERGENCE, WANT, True, KEEP)
    for back in range(BLOCK, full + BLOCK, BLOCK):
        v = full - back + places(BLOCK, LANES)
        total = _terms(total, logits, rows, loss, constants, v, HEADS, DIVERGENCE, WANT, False, KEEP)
    return online.TermSums(*over_threads(total))


@triton.jit
def _gradients(
    logits, rows, loss, constants, decorrelation, coefficients, grads, block,
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, GRAD: tl.constexpr, IN_PLACE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    TEACHER: tl.constexpr = (logits.teacher is not None) or (logits.given.logits is not None)
    ONE: tl.constexpr = rows.zero.shape[0] == 1
    v = block + tl.arange(0, BLOCK)[None, :]
    z_s, slope_s = student_logits(logits, rows, v, logits.V, HEADS, MASKED, "evict_first")
    z_t, slope_t = z_s, slope_s
    if TEACHER:
        z_t, slope_t = teacher_logits(logits, rows, v, HEADS, MASKED, "evict_first")
    if logits.mask is None:
        kd = v < logits.kd_V
    else:
        kd = kd_tokens(logits, v, MASKED)
    grad_s, grad_t, grad_a = gradients(
        z_s, z_t, slope_s, slope_t, v, block, kd, constants, decorrelation, coefficients, loss,
        TEACHER, logits.mask is not None, HEADS, DIVERGENCE, GRAD,
    )  # fmt: skip
    if IN_PLACE:
        tl.debug_barrier()  # every thread has read the block before any of it is overwritten
    if MASKED:
        mask = rows.inside[:, None] & (v < logits.width)
    else:
        mask = None if ONE else rows.inside[:, None] & (v >= 0)
    counts = None if ONE else rows.active[:, None]
    store_gradients(grads, rows.r[:, None], v, grad_s, grad_t, grad_a, counts, mask, GRAD)


@triton.jit
def gradients_pass(
    logits, rows, loss, constants, decorrelation, coefficients, grads,
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, GRAD: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the whole vocabulary's logits, backwards as `terms_pass`; TAIL: block size at the end."""
    full = logits.V // BLOCK * BLOCK
    for block in range(full, logits.V, TAIL):
        _gradients(
            logits, rows, loss, constants, decorrelation, coefficients, grads, block,
            HEADS, DIVERGENCE, GRAD, IN_PLACE, True, TAIL,
        )  # fmt: skip
    for back in range(BLOCK, full + BLOCK, BLOCK):
        _gradients(
            logits, rows, loss, constants, decorrelation, coefficients, grads, full - back,
            HEADS, DIVERGENCE, GRAD, IN_PLACE, False, BLOCK,
        )  # fmt: skip


@triton.jit
def zero_gradients(logits, rows, grads, R: tl.constexpr, BLOCK: tl.constexpr, GRAD: tl.constexpr):
    """Write the gradients of inactive rows, which are 0."""
    for block in range(0, logits.V, BLOCK):
        v = block + tl.arange(0, BLOCK)[None, :]
        mask = rows.inside[:, None] & (v < logits.width)
        zero = tl.zeros([R, BLOCK], tl.float32)
        store_gradients(grads, rows.r[:, None], v, zero, zero, zero, None, mask, GRAD)


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
    R: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute statistics, losses and gradients in one launch. logits: `Logits`; tensors: `launch.LossTensors`."""
    rows = open_rows(logits, tensors, start, m, scale_s, softcap_s, scale_t, softcap_t, HEADS, R)
    if tl.max(rows.active.to(tl.int32), axis=0) == 0:
        zero_gradients(logits, rows, grads, R, BLOCK, GRAD)
        if grads.decorrelation is not None:
            store_zeros(grads.decorrelation, m, rows, 1)
        return
    loss = online.load_loss(tensors, parameter, second, rows.n, rows.inside, rows.zero.dtype, WANT.precise)
    coefficients = load_coefficients(tensors.coefficients + rows.n, stride_c, rows.inside, tl.load(tensors.scale))
    SECOND: tl.constexpr = WANT.teacher and DIVERGENCE.base == ""
    WRITES: tl.constexpr = (grads.student is not None) or (grads.teacher is not None)
    AGAIN: tl.constexpr = "evict_last" if WRITES or SECOND else "evict_first"

    student, teacher, pair = statistics_pass(logits, rows, loss, None, HEADS, DIVERGENCE, WANT, BLOCK, LANES, AGAIN)
    beyond_s, beyond_t = student, teacher
    student, teacher, pair = online.merge_threads(student, teacher, pair, loss, DIVERGENCE, WANT)
    value, constants, dots = online.finalize(student, teacher, pair, loss, DIVERGENCE, WANT)
    if HEADS.truncated:
        beyond_s, beyond_t = beyond_pass(beyond_s, beyond_t, logits, rows, loss, HEADS, WANT, LANES, AGAIN)
        student, teacher, constants = online.whole_vocabulary(
            student, teacher, beyond_s, beyond_t, constants, HEADS.further, WANT.precise
        )
    student, teacher = targets_and_argmaxes(student, teacher, logits, rows, loss, HEADS, WANT, BLOCK, AGAIN)
    if SECOND:
        KEEP: tl.constexpr = "evict_last" if WRITES else "evict_first"
        total = terms_pass(logits, rows, loss, constants, HEADS, DIVERGENCE, WANT, BLOCK, LANES, KEEP)
        value, constants, dots = online.finalize_terms(total, constants, loss, DIVERGENCE, WANT)

    counts = rows.inside & rows.active  # an inactive row's statistics stay 0
    if WANT.teacher:
        tl.store(stats_ptr + rows.n, value, mask=counts)
    ce = online.store_statistics(stats_ptr + rows.n, stride_stats, counts, student, teacher, DIVERGENCE, WANT)

    if WRITES:
        decorrelation = rows.zero
        if GRAD.decorrelate:
            ce = ce if GRAD.ce else rows.zero
            kd, of_ce = coefficients.kd, coefficients.ce
            decorrelation = online.decorrelation_of(dots, ce, kd, of_ce, loss.inv_tau, loss.inv_tau_t)
            decorrelation = tl.where(rows.active, decorrelation, 0)
            tl.store(grads.decorrelation + rows.r, decorrelation, mask=rows.inside)
        gradients_pass(
            logits, rows, loss, constants, decorrelation, coefficients, grads,
            HEADS, DIVERGENCE, GRAD, IN_PLACE, BLOCK, LANES * VEC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stride_c", "start", "m"])
def states_kernel(
    logits, tensors, stride_c, start, m,
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64", second: "fp64",
    bits,  # (m, words) int32 or None
    states_ptr,  # (15, m): student, teacher, pair; if truncated (21, m), the student's beyond; or (27, m), both beyond
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of this process's vocabulary, to be merged with those of the rest."""
    rows = open_rows(logits, tensors, start, m, scale_s, softcap_s, scale_t, softcap_t, HEADS, R)
    if tl.max(rows.active.to(tl.int32), axis=0) == 0:
        store_zeros(states_ptr, m, rows, online.STATE + online.SIDE * (HEADS.truncated + HEADS.further))
        return
    loss = online.load_loss(tensors, parameter, second, rows.n, rows.inside, rows.zero.dtype, WANT.precise)
    bits_ptr = bits.pointer
    if bits_ptr is not None:
        bits_ptr += rows.r * bits.row
    student, teacher, pair = statistics_pass(
        logits, rows, loss, bits_ptr, HEADS, DIVERGENCE, WANT, BLOCK, LANES, "evict_last"
    )
    student, teacher, pair = online.merge_threads(student, teacher, pair, loss, DIVERGENCE, WANT)
    states_ptr += rows.r
    if HEADS.truncated:
        nothing = online.empty_side(tl.zeros([R, LANES], rows.zero.dtype), WANT.precise)
        beyond_s, beyond_t = beyond_pass(nothing, nothing, logits, rows, loss, HEADS, WANT, LANES, "evict_last")
        beyond_ptr = states_ptr + online.STATE * m.to(tl.int64)
        online.store_tensors(beyond_ptr, m, beyond_s, rows.inside)
        if HEADS.further:
            online.store_tensors(beyond_ptr + online.SIDE * m.to(tl.int64), m, beyond_t, rows.inside)
    student, teacher = targets_and_argmaxes(student, teacher, logits, rows, loss, HEADS, WANT, BLOCK, "evict_last")
    online.store_tensors(states_ptr, m, student + teacher + pair, rows.inside)


@triton.jit(do_not_specialize=["stride_c", "start", "m"])
def terms_kernel(
    logits, tensors, stride_c, start, m,
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64", second: "fp64",
    constants_ptr,  # (11, m)
    sums_ptr,  # (7, m)
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, WANT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Compute the sums of the second pass over this process's vocabulary."""
    rows = open_rows(logits, tensors, start, m, scale_s, softcap_s, scale_t, softcap_t, HEADS, R)
    if tl.max(rows.active.to(tl.int32), axis=0) == 0:
        store_zeros(sums_ptr, m, rows, online.TERMS)
        return
    loss = online.load_loss(tensors, parameter, second, rows.n, rows.inside, rows.zero.dtype, WANT.precise)
    constants = online.RowConstants(*online.load_tensors(constants_ptr + rows.r, m, rows.inside, online.CONSTANTS))
    total = terms_pass(logits, rows, loss, constants, HEADS, DIVERGENCE, WANT, BLOCK, LANES, "evict_last")
    online.store_tensors(sums_ptr + rows.r, m, total, rows.inside)


@triton.jit(do_not_specialize=["stride_c", "start", "m"])
def row_gradients_kernel(
    logits, tensors, stride_c, start, m,
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64", second: "fp64",
    constants_ptr,  # (11, m)
    grads,  # `launch.Gradients`
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, GRAD: tl.constexpr, IN_PLACE: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute gradients from the rows' constants."""
    rows = open_rows(logits, tensors, start, m, scale_s, softcap_s, scale_t, softcap_t, HEADS, R)
    if tl.max(rows.active.to(tl.int32), axis=0) == 0:
        zero_gradients(logits, rows, grads, R, BLOCK, GRAD)
        return
    loss = online.load_loss(tensors, parameter, second, rows.n, rows.inside, rows.zero.dtype, GRAD.precise)
    coefficients = load_coefficients(tensors.coefficients + rows.n, stride_c, rows.inside, tl.load(tensors.scale))
    constants = online.RowConstants(*online.load_tensors(constants_ptr + rows.r, m, rows.inside, online.CONSTANTS))
    decorrelation = rows.zero
    if GRAD.decorrelate:
        decorrelation = tl.load(grads.decorrelation + rows.r, mask=rows.inside, other=0)
    gradients_pass(
        logits, rows, loss, constants, decorrelation, coefficients, grads,
        HEADS, DIVERGENCE, GRAD, IN_PLACE, BLOCK, LANES * VEC,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Chunk:
    """Logits of consecutive tokens, and the loss computed from them."""

    heads: Heads  # read only for turning products into logits, and for a `Logits` teacher
    term: Term
    z_s: Tensor  # (m, V)
    z_t: Tensor | None  # (m, ≥ kd_vocab), strided as z_s
    width: int  # elements of a row of logits or gradients that may be read and written: V, or the padded stride
    start: int  # the first token

    @property
    def teacher(self) -> bool:
        """Return whether there are two sides of logits."""
        return self.z_t is not None or self.heads.teacher_logits is not None


def _launch(
    kernel: Any, chunk: Chunk, *arguments: Any, config: RowConfig | None = None, once: bool = False, **flags: Any
) -> None:
    """Launch a kernel over the chunk's rows. once: it must not be repeated, since it overwrites what it reads."""
    heads, term, z_s = chunk.heads, chunk.term, chunk.z_s
    m, V = z_s.shape
    if m == 0:
        return
    biases = (heads.bias, heads.teacher_bias)
    logits = Logits(z_s, chunk.z_t, z_s.stride(0), heads.given(), *biases, V, heads.kd_vocab, chunk.width, heads.mask)

    def launch(config: RowConfig) -> None:
        threads = config.warps * (64 if torch.version.hip else 32)
        lanes = max(1, min(threads, config.block // (2 * VEC.value)))
        kernel[(triton.cdiv(m, config.rows),)](
            logits, term.tensors(), term.coefficients.stride(0), chunk.start, m, *heads.scalars(),
            term.parameter, term.second, *arguments, HEADS=heads.flags(), DIVERGENCE=term.entry, **flags,
            R=config.rows, BLOCK=config.block, LANES=lanes, num_warps=config.warps,
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
    """Compute statistics, losses and gradients in one launch; stats (6, N) is written where computed."""
    heads, term, options = chunk.heads, chunk.term, _options(chunk, grads)
    want = term.statistics_flags(chunk.teacher, grads.decorrelation is not None)
    if want.decorrelate and want.ce and not (term.intricate or heads.intricate or torch.version.hip):
        options["maxnreg"] = 80  # three programs per multiprocessor: ptxas may miss that by a few, or spill for four
    _launch(row_kernel, chunk, stats, stats.stride(0), grads, WANT=want, **options, config=config)


def row_states(chunk: Chunk, states: Tensor, *, decorrelate: bool, config: RowConfig | None = None) -> None:
    """Fill states, (15, m) or by flags (21, m) or (27, m), with the statistics of this process's vocabulary."""
    want = chunk.term.statistics_flags(chunk.teacher, decorrelate)
    _launch(states_kernel, chunk, matrix(chunk.term.bits), states, WANT=want, config=config)


def row_terms(
    chunk: Chunk, sums: Tensor, *, constants: Tensor, decorrelate: bool, config: RowConfig | None = None
) -> None:
    """Fill sums (7, m) with the second pass over this process's vocabulary; constants (≥ 11, m)."""
    want = chunk.term.statistics_flags(chunk.teacher, decorrelate)
    _launch(terms_kernel, chunk, constants, sums, WANT=want, config=config)


def row_gradients(chunk: Chunk, grads: Gradients, *, constants: Tensor, config: RowConfig | None = None) -> None:
    """Compute gradients from the rows' constants (≥ 11, m)."""
    if grads.student is not None or grads.teacher is not None:
        _launch(row_gradients_kernel, chunk, constants, grads, **_options(chunk, grads), config=config)
