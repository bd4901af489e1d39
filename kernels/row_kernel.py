"""Row kernel of the chunked engine: logits of one token chunk → statistics, losses and gradients of the logits.

z_s, z_t (m, V)  scratch in fp32 (fp64), rows of student and teacher: raw products h·Wᵀ, read and left as they are
grad_* (m, V)    gradients in the GEMM's dtype; may be the logits' own memory where the dtype is the same

Teacher's logits that the caller gave are read where they lie. Of a teacher given by a few entries a row the kernel
knows next to nothing (`fold_sparse`): it is launched twice, for the statistics and for the gradients, with arithmetic
on those entries between (`kdfast.ops.sparse`).

One program a token (`RowConfig.rows` of them), so that nothing is shared between programs. Passes over its row pair:

    forward and reverse KL, or no teacher    statistics; gradients                     2 reads, 1 write
    every other divergence                   statistics; divergence; gradients         3 reads, 1 write
    a sparse teacher                         statistics; gradients                     2 reads, 1 write
    without gradients                        one fewer, and no write

The first read comes from memory. A row pair is 2·V·4 bytes (402 KB at V=50257); with one program on each of 132
multiprocessors 53 MB are alive and later reads come from a 60 MB L2, with two 106 MB, and some come from memory. Bytes,
a row pair: 8·V a read, 4·V written in bf16.
"""

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.autotune import choose
from kdfast.kernels.block_sizes import RowConfig, row_of
from kdfast.kernels.launch import Heads, Term
from kdfast.kernels.logit_gradients import gradients, load_coefficients, store_gradient
from kdfast.kernels.online_softmax import (
    PAIR,
    ROWS,
    SIDE,
    TERMS,
    empty_pair,
    empty_side,
    finish,
    finish_terms,
    fold,
    fold_side,
    fold_sparse,
    fold_terms,
    load_rows,
    mix_of,
    store_rows,
    store_statistics,
    transform,
    whole_vocabulary,
)
from kdfast.kernels.tiles import given_logits


@triton.jit
def _logits(z_ptr, bias_ptr, r_mask, v, width, V, scale, softcap, SOFTCAP: tl.constexpr):
    """A block [R, BLOCK] of rows' logits, −inf from V on, and their slope towards the raw products. z_ptr [R, 1]."""
    # a mask that ends where 16 elements do keeps the loads wide; what lies between V and width is never used
    z = tl.load(z_ptr + v, mask=r_mask & (v < width), other=0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + v, mask=v < V, other=0).to(z.dtype)
    z, slope = transform(z, scale, softcap, SOFTCAP)
    return tl.where(v < V, z, -float("inf")), slope


@triton.jit
def _teacher_logits(
    z_t_ptr, bias_t_ptr, given_ptr, r_mask, v, width, V, scale, softcap, dtype: tl.constexpr,
    STRIDE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The same of the teacher, computed (z_t_ptr) or given (given_ptr, [R, 1]); what is given gets no gradient."""
    if given_ptr is not None:
        z = given_logits(given_ptr, STRIDE, r_mask, v, V, dtype)
        slope = tl.zeros_like(z)
    else:
        z, slope = _logits(z_t_ptr, bias_t_ptr, r_mask, v, width, V, scale, softcap, SOFTCAP)
    return z, slope


@triton.jit
def _target(side, z_ptr, bias_ptr, inside_r, targets, scale, softcap, SOFTCAP: tl.constexpr):
    """The side's state with its target's logit; z_ptr [R, 1], targets [R]."""
    one = targets[:, None]
    here = inside_r[:, None] & (one >= 0)  # a target may be in another process's slice of the vocabulary
    z = tl.load(z_ptr + one, mask=here, other=0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + one, mask=here, other=0).to(z.dtype)
    z, _ = transform(z, scale, softcap, SOFTCAP)
    return (side[0], side[1], side[2], side[3], side[4], tl.sum(tl.where(here, z, 0), axis=1))


@triton.jit(do_not_specialize=["stride_c", "stride_stats", "start", "m"])
def row_kernel(
    z_s_ptr, z_t_ptr, stride_z,  # (m, V) each; z_t_ptr None where the teacher's logits are not computed
    given_ptr, offsets_ptr, STRIDE: tl.constexpr,  # dense teacher logits and their rows' offsets (N,), or None
    bits_ptr, stride_bits,  # (m, words) int32 or None: of a sparse teacher
    bias_s_ptr, bias_t_ptr,  # (V,) or None
    labels_ptr, targets_ptr,  # (N,) int64 or None: the cross entropy's and the anchor's
    active_ptr,  # (N,) bool
    coefficients_ptr, stride_c,  # (3, N): kd, ce, anchor
    temperature_ptr, scale_ptr,  # ()
    stats_ptr, stride_stats,  # (6, N): divergence, CE, anchor, student entropy, teacher entropy, agreement
    grad_s_ptr, grad_t_ptr, stride_g,  # (m, V) or None
    grad_a_ptr, stride_a,  # (m, V) or None: the anchor's part, where it is kept apart
    mix_ptr,  # (m,) or None
    rows_ptr,  # (9, m) or None: the rows' constants, between the phases
    states_ptr,  # (19, m), (25, m) where truncated, or (10, m), or None: what the phases "fold" and "terms" leave
    start, m, V, kd_V, width,  # width: elements of a row that may be read and written, ≥ V
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64",
    PHASE: tl.constexpr,
    SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, TRUNCATED: tl.constexpr,
    DIVERGENCE: tl.constexpr, BASE: tl.constexpr, CENTRED_P: tl.constexpr, CENTRED_Q: tl.constexpr,
    CE: tl.constexpr, CE_GRADIENT: tl.constexpr, ANCHOR: tl.constexpr, ANCHOR_GRADIENT: tl.constexpr,
    TEACHER_GRADIENT: tl.constexpr, METRICS: tl.constexpr, MIX: tl.constexpr, IN_PLACE: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PHASE: "" is all in one launch. "statistics" fills rows_ptr and "gradients" reads it, and mix_ptr. Where others
    have a say between them, "fold" leaves the states of `online_softmax.py` in place of statistics, and "terms"
    those of the second pass, reading rows_ptr."""
    TEACHER: tl.constexpr = (z_t_ptr is not None) or (given_ptr is not None)
    SPARSE: tl.constexpr = DIVERGENCE == "sparse"
    dtype: tl.constexpr = z_s_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    n = start.to(tl.int64) + r
    inside_r = r < m
    r_mask = inside_r[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    row_g = r[:, None] * stride_g
    row_a = r[:, None] * stride_a
    z_s_ptr += r[:, None] * stride_z
    if z_t_ptr is not None:
        z_t_ptr += r[:, None] * stride_z
    if given_ptr is not None:
        given_ptr += tl.load(offsets_ptr + n, mask=inside_r, other=0)[:, None]
    if bits_ptr is not None:
        bits_ptr += r[:, None] * stride_bits

    active = tl.load(active_ptr + n, mask=inside_r, other=0) != 0
    if tl.max(active.to(tl.int32), axis=0) == 0:
        for block in range(0, V, BLOCK):
            v = block + lanes
            mask = r_mask & (v < width)
            nothing = tl.zeros([R, BLOCK], tl.float32)
            if grad_s_ptr is not None:
                tl.store(grad_s_ptr + row_g + v, nothing, mask=mask)
            if grad_t_ptr is not None:
                tl.store(grad_t_ptr + row_g + v, nothing, mask=mask)
            if grad_a_ptr is not None:
                tl.store(grad_a_ptr + row_a + v, nothing, mask=mask)
        if mix_ptr is not None:
            tl.store(mix_ptr + r, tl.zeros([R], tl.float32), mask=inside_r)
        if PHASE == "statistics":
            for i in tl.static_range(ROWS):
                tl.store(rows_ptr + i * m + r, tl.zeros([R], tl.float32), mask=inside_r)
        if states_ptr is not None:
            for i in tl.static_range(TERMS if PHASE == "terms" else 2 * SIDE + PAIR + (SIDE if TRUNCATED else 0)):
                tl.store(states_ptr + i * m + r, tl.zeros([R], tl.float32), mask=inside_r)
        return

    zero = tl.zeros([R], dtype)
    inv_tau = 1 / tl.load(temperature_ptr)
    coefficients = load_coefficients(coefficients_ptr + n, stride_c, inside_r, tl.load(scale_ptr))
    labels = tl.load(labels_ptr + n, mask=inside_r, other=0).to(tl.int32) if CE else r
    targets = tl.load(targets_ptr + n, mask=inside_r, other=0).to(tl.int32) if ANCHOR else r
    scale_s = tl.full([1, 1], scale_s, dtype)
    scale_t = tl.full([1, 1], scale_t, dtype)
    softcap_s = tl.full([1, 1], softcap_s, dtype)
    softcap_t = tl.full([1, 1], softcap_t, dtype)
    parameter = tl.full([1, 1], parameter, dtype)
    ce = zero

    # statistics
    if PHASE == "gradients" or PHASE == "terms":
        rows = load_rows(rows_ptr + r, m, inside_r)
        products = (zero, zero)
    else:
        student, teacher, pair = empty_side(zero), empty_side(zero), empty_pair(zero)
        for block in range(0, kd_V, BLOCK):
            v = block + lanes
            z_s, _ = _logits(z_s_ptr, bias_s_ptr, r_mask, v, width, kd_V, scale_s, softcap_s, SOFTCAP_S)
            if SPARSE:
                student, teacher = fold_sparse(
                    student, teacher, z_s, v, labels, inv_tau, bits_ptr, r_mask, CE, METRICS, False
                )
            else:
                z_t = z_s
                if TEACHER:
                    z_t, _ = _teacher_logits(
                        z_t_ptr, bias_t_ptr, given_ptr, r_mask, v, width, kd_V, scale_t, softcap_t, dtype, STRIDE,
                        SOFTCAP_T,
                    )  # fmt: skip
                student, teacher, pair = fold(
                    student, teacher, pair, z_s, z_t, v, labels, targets, inv_tau, TEACHER, BASE, MIX, CE, ANCHOR,
                    METRICS, False,
                )  # fmt: skip
        if PHASE == "fold":
            beyond = empty_side(zero)
        else:
            value, rows, products = finish(student, teacher, pair, BASE, MIX, TEACHER or bits_ptr is not None)
            beyond = student
        if TRUNCATED:
            for block in range(kd_V // BLOCK * BLOCK, V, BLOCK):
                v = block + lanes
                z_s, _ = _logits(z_s_ptr, bias_s_ptr, r_mask, v, width, V, scale_s, softcap_s, SOFTCAP_S)
                z_s = tl.where(v >= kd_V, z_s, -float("inf"))
                beyond, _, _, _, _ = fold_side(beyond, z_s, v, labels, inv_tau, True, METRICS, False)
            if PHASE != "fold":
                student, rows = whole_vocabulary(student, beyond, rows)
        if CE:
            student = _target(student, z_s_ptr, bias_s_ptr, inside_r, labels, scale_s, softcap_s, SOFTCAP_S)
        if ANCHOR:
            teacher = _target(teacher, z_t_ptr, bias_t_ptr, inside_r, targets, scale_t, softcap_t, SOFTCAP_T)
        if PHASE == "fold":
            store_rows(states_ptr + r, m, student, inside_r)
            store_rows(states_ptr + SIDE * m + r, m, teacher, inside_r)
            store_rows(states_ptr + 2 * SIDE * m + r, m, pair, inside_r)
            if TRUNCATED:
                store_rows(states_ptr + (2 * SIDE + PAIR) * m + r, m, beyond, inside_r)

    # divergence
    if PHASE != "gradients" and PHASE != "fold" and TEACHER and BASE == "":
        sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
        for block in range(0, kd_V, BLOCK):
            v = block + lanes
            z_s, _ = _logits(z_s_ptr, bias_s_ptr, r_mask, v, width, kd_V, scale_s, softcap_s, SOFTCAP_S)
            z_t, _ = _teacher_logits(
                z_t_ptr, bias_t_ptr, given_ptr, r_mask, v, width, kd_V, scale_t, softcap_t, dtype, STRIDE,
                SOFTCAP_T,
            )  # fmt: skip
            sums = fold_terms(
                sums, z_s, z_t, rows, inv_tau, parameter, DIVERGENCE, CENTRED_P, CENTRED_Q, MIX
            )
        if PHASE == "terms":
            store_rows(states_ptr + r, m, sums, inside_r)
        else:
            value, rows, products = finish_terms(sums, rows)

    if PHASE == "" or PHASE == "statistics":
        counts = inside_r & active  # an inactive row's statistics stay 0
        if TEACHER:
            tl.store(stats_ptr + n, value, mask=counts)
        ce = store_statistics(
            stats_ptr + n, stride_stats, counts, student, teacher, TEACHER, SPARSE, CE, ANCHOR, METRICS
        )
        if PHASE == "statistics":
            store_rows(rows_ptr + r, m, rows, inside_r)

    # gradients
    if (PHASE == "" or PHASE == "gradients") and (grad_s_ptr is not None or grad_t_ptr is not None):
        mix = zero
        if MIX and PHASE == "gradients":
            mix = tl.load(mix_ptr + r, mask=inside_r, other=0)
        elif MIX:
            mix = mix_of(products, ce if CE_GRADIENT else zero, coefficients, inv_tau)
            mix = tl.where(active, mix, 0)
            tl.store(mix_ptr + r, mix, mask=inside_r)
        for block in range(0, V, BLOCK):
            v = block + lanes
            mask = r_mask & (v < width)
            z_s, slope_s = _logits(z_s_ptr, bias_s_ptr, r_mask, v, width, V, scale_s, softcap_s, SOFTCAP_S)
            z_t, slope_t = z_s, slope_s
            if TEACHER:
                z_t, slope_t = _teacher_logits(
                    z_t_ptr, bias_t_ptr, given_ptr, r_mask, v, width, kd_V, scale_t, softcap_t, dtype, STRIDE,
                    SOFTCAP_T,
                )  # fmt: skip
            grad_s, grad_t, grad_a = gradients(
                z_s, z_t, slope_s, slope_t, v, kd_V, rows, mix, coefficients, labels, targets, inv_tau, parameter,
                TEACHER, TRUNCATED, DIVERGENCE, CENTRED_P, CENTRED_Q, CE_GRADIENT, grad_s_ptr is not None,
                TEACHER_GRADIENT, ANCHOR_GRADIENT, MIX,
            )  # fmt: skip
            if IN_PLACE:
                tl.debug_barrier()  # the block has been read by every thread before any of it is written
            if grad_a_ptr is not None:
                store_gradient(grad_a_ptr + row_a + v, grad_a, active[:, None], mask)
            elif ANCHOR_GRADIENT:
                grad_t += grad_a
            if grad_s_ptr is not None:
                store_gradient(grad_s_ptr + row_g + v, grad_s, active[:, None], mask)
            if grad_t_ptr is not None:
                store_gradient(grad_t_ptr + row_g + v, grad_t, active[:, None], mask)


def solve_rows(
    heads: Heads,  # the logits are at hand: only what turns products into logits, and where given ones lie, is read
    term: Term,
    z_s: Tensor,  # (m, V)
    z_t: Tensor | None,  # (m, ≥ kd_vocab), strided as z_s
    *,
    width: int,  # elements of a row, of logits and of gradients, that may be read and written: V, or the padded stride
    start: int,  # the chunk's first token
    stats: Tensor,  # (6, N), written where computed
    grad_s: Tensor | None,  # (m, V)
    grad_t: Tensor | None = None,  # (m, V): KD part, and the anchor's unless grad_a is given
    grad_a: Tensor | None = None,  # (m, V)
    mix: Tensor | None = None,  # (m,); given = grad_t is made orthogonal to grad_s
    phase: str = "",  # of `row_kernel`
    rows: Tensor | None = None,  # (≥ 9, m): the rows' constants, which "statistics" leaves and others read
    states: Tensor | None = None,  # (19, m), (25, m) where the vocabulary is truncated, or (10, m): "fold"'s, "terms"'
    mixes: bool = False,  # what `mix` needs is to be known later
    config: RowConfig | None = None,
) -> None:
    """One launch."""
    arguments = locals()
    m, V = z_s.shape
    if m == 0:
        return
    gradient = grad_s if grad_s is not None else grad_t
    in_place = gradient is not None and gradient.dtype == z_s.dtype
    if config is None and in_place:  # launching twice would read what the first launch wrote
        config = row_of(z_s.device, z_s.element_size(), m).rows
    elif config is None:
        config = choose("rows", z_s, m, lambda c: solve_rows(**{**arguments, "config": c}))
    row_kernel[(triton.cdiv(m, config.rows),)](
        z_s, z_t, z_s.stride(0),
        *heads.given(),
        *term.excluded(),
        heads.bias, heads.teacher_bias,
        term.labels, term.targets,
        term.active,
        term.coefficients, term.coefficients.stride(0),
        term.temperature, term.scale,
        stats, stats.stride(0),
        grad_s, grad_t, 0 if gradient is None else gradient.stride(0),
        grad_a, 0 if grad_a is None else grad_a.stride(0),
        mix, rows, states,
        start, m, V, heads.kd_vocab, width, *heads.scalars(), term.parameter,
        PHASE=phase,
        SOFTCAP_S=heads.softcap is not None, SOFTCAP_T=heads.teacher_softcap is not None, TRUNCATED=heads.truncated,
        **term.divergence_flags(),
        CE=term.labels is not None, CE_GRADIENT=term.ce_gradient, ANCHOR=term.targets is not None,
        ANCHOR_GRADIENT=term.anchor_gradient, TEACHER_GRADIENT=term.teacher_gradient, METRICS=term.metrics,
        MIX=mixes or mix is not None, IN_PLACE=in_place,
        R=config.rows, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip
