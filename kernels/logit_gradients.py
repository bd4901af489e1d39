"""Gradients of a block of logits, once the rows' constants are known: shared by the row kernel and the tiled kernels.

    ∂L/∂z_s = c_kd/τ·(a_q − q·Σa_q) + c_ce·(softmax(z_s) − onehot(label))
    ∂L/∂z_t = c_kd/τ_t·(a_p − p·Σa_p)  and  c_anchor·(softmax(z_t) − onehot(target))

each times the slope of its head's softcap and scale, which makes it a gradient with respect to h·Wᵀ + b. The bias's
gradient is their sum over the rows.
"""

from collections import namedtuple

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.divergences import factors, in_log2, terms
from kdfast.kernels.math import LN2, LOG2E, difference
from kdfast.kernels.online_softmax import exponent, load_tensors, log2_probabilities, power, probabilities, shift

Coefficients = namedtuple("Coefficients", "kd ce anchor")  # of a program's rows, [R] each, divided by the scale


@triton.jit
def load_coefficients(pointers, stride, mask, scale):
    """Return the `Coefficients` of the rows at `pointers` [R]."""
    kd, ce, anchor = load_tensors(pointers, stride, mask, 3)
    return Coefficients(kd / scale, ce / scale, anchor / scale)


@triton.jit
def gradients(
    z_s, z_t, slope_s, slope_t, v, begin, kd, constants, decorrelation, coefficients, loss,
    TEACHER: tl.constexpr, MASKED: tl.constexpr, HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Return the student's gradient, the teacher's KD part and its anchor part, [R, BLOCK] each; 0 if not needed.

    z [R, BLOCK]; v [1, BLOCK], from `begin` on; decorrelation [R]: this multiple of the student's part is added to the
    teacher's; kd [1, BLOCK]: the ids that the KD term covers, used if not all. For a "sparse" teacher the student's
    part is that of ids outside the support, A_p·exp(x − log S), with the constants in the teacher's place."""
    NAME: tl.constexpr = DIVERGENCE.name
    grad_s = tl.zeros_like(z_s)
    grad_t, grad_a = grad_s, grad_s
    shared, theirs = z_s, z_t
    if MASKED or HEADS.truncated:
        shared = tl.where(kd, z_s, -float("inf"))
    if MASKED:
        theirs = tl.where(kd, z_t, -float("inf"))
    if DIVERGENCE.name == "sparse":
        if GRAD.student:
            factor = constants.A_p * _over_sum(constants.log_S_t, constants.m_t, loss.c_s, GRAD)
            e = power(exponent(shared, constants.m_t, loss.c_s, GRAD.precise), GRAD.precise)
            grad_s = tl.where((constants.A_p == 0)[:, None], 0, factor[:, None] * e)
    elif TEACHER and (GRAD.student or GRAD.teacher):
        if DIVERGENCE.base != "":
            grad_s, grad_t = _kl_gradients(shared, theirs, constants, coefficients.kd, loss, DIVERGENCE, GRAD)
        elif DIVERGENCE.in_log2 and not GRAD.precise:
            x_p, x_q = log2_probabilities(shared, theirs, constants, loss)
            p, q, _, a_p, a_q = in_log2(DIVERGENCE, x_p, x_q, loss.series, loss.parameter)
            _, of_p, of_q = factors(NAME, loss.parameter)
            grad_s = _less_mean(a_q, q, of_q, constants.A_q, coefficients.kd * loss.inv_tau, NAME)
            grad_t = _less_mean(a_p, p, of_p, constants.A_p, coefficients.kd * loss.inv_tau_t, NAME)
        else:
            p, q, g, log_p, log_q = probabilities(shared, theirs, constants, loss, GRAD.precise)
            _, a_p, a_q = terms(NAME, p, q, g, log_p, log_q, loss.parameter, loss.second)
            if GRAD.student:
                k = (coefficients.kd * loss.inv_tau)[:, None]
                grad_s = tl.where(k == 0, 0, k * _centered(a_q, q, constants.A_q, constants.D_q, GRAD))
            if GRAD.teacher:
                k = (coefficients.kd * loss.inv_tau_t)[:, None]
                grad_t = tl.where(k == 0, 0, k * _centered(a_p, p, constants.A_p, constants.D_p, GRAD))
        if not GRAD.teacher:  # the buffer may be for the anchor's alone
            grad_t = grad_a
    if GRAD.student and GRAD.ce:
        grad_s = _add_cross_entropy(
            grad_s, z_s, v, begin, constants.m_s, constants.log_S1_s, loss.labels, coefficients.ce, HEADS.truncated,
            GRAD,
        )
    if GRAD.anchor:
        grad_a = slope_t * _add_cross_entropy(
            grad_a, z_t, v, begin, constants.m_t, constants.log_S1_t, loss.targets, coefficients.anchor,
            HEADS.further, GRAD,
        )
    grad_s *= slope_s
    grad_t *= slope_t
    if GRAD.decorrelate:
        grad_t += decorrelation[:, None] * grad_s
    return grad_s, grad_t, grad_a


@triton.jit
def _over_sum(log_S, m, c, GRAD: tl.constexpr):
    """Return the factor [R] that turns powers of `exponent` into probabilities."""
    return tl.exp2(-log_S * LOG2E - shift(m, c, GRAD.precise))


@triton.jit
def _kl_gradients(z_s, z_t, constants, kd, loss, DIVERGENCE: tl.constexpr, GRAD: tl.constexpr):
    """Return the gradients kd/τ·(∂/∂z_s, ∂/∂z_t) of a KL. With b the side of the expectation, u = x_b − x_o and
    u − mean = g − KL, they are p_o − p_b and p_b·(u − mean)."""
    m_s, log_S_s, m_t, log_S_t, gap, A_p, A_q, _, _, _, _ = constants
    x_s, x_t = exponent(z_s, m_s, loss.c_s, GRAD.precise), exponent(z_t, m_t, loss.c_t, GRAD.precise)
    over_s, over_t = _over_sum(log_S_s, m_s, loss.c_s, GRAD), _over_sum(log_S_t, m_t, loss.c_t, GRAD)
    size = tl.abs(m_s) * loss.inv_tau + tl.abs(m_t) * loss.inv_tau_t
    if DIVERGENCE.base == "t":
        x_b, x_o, over_b, over_o, log_S_b, log_S_o, mean = x_t, x_s, over_t, over_s, log_S_t, log_S_s, A_p
        inv_tau_b, inv_tau_o = loss.inv_tau_t, loss.inv_tau
    else:
        x_b, x_o, over_b, over_o, log_S_b, log_S_o, mean = x_s, x_t, over_s, over_t, log_S_s, log_S_t, A_q
        gap, inv_tau_b, inv_tau_o = -gap, loss.inv_tau, loss.inv_tau_t
    size += tl.abs(mean)
    if GRAD.precise:
        # if one token has all the mass up to rounding, u − mean is the rounding of large numbers
        sure = (log_S_b < (2**-53 if z_s.dtype == tl.float64 else 2**-24)) & (size > 256)
        u, k_b, k_o = x_b - x_o, (kd * inv_tau_b)[:, None], (kd * inv_tau_o)[:, None]
        p_b, p_o = tl.exp(x_b - log_S_b[:, None]), tl.exp(x_o - log_S_o[:, None])
        of_o = tl.where(k_o == 0, 0, k_o * difference(p_b, p_o, u - gap[:, None]))
        of_b = tl.where(((p_b > 0.6) & sure[:, None]) | (p_b == 0), 0, p_b * (u - mean[:, None]))
        of_b = tl.where(k_b == 0, 0, k_b * of_b)  # in a row with weight 0 the KD term may diverge or be NaN
    else:
        # as above; the rest of the mass is less than that rounding then, and if both sides have the same token,
        # p_o − p_b is only rounding
        sure = (log_S_b < 2**-22) & (size > 256) & (size < float("inf"))
        same = (tl.maximum(log_S_b, log_S_o) < 2**-21) & (mean - gap < 2**-20)
        off = (kd == 0) | same
        ratio, k = tl.where(sure | off, 0, inv_tau_b / inv_tau_o), kd * inv_tau_o
        over_b, over_o = tl.where(off, 0, k * over_b), tl.where(off, 0, k * over_o)
        BOTH: tl.constexpr = GRAD.teacher or DIVERGENCE.base == "s"
        if BOTH:  # masked logits and NaN become finite, without mass; if a NaN counts, `over` is NaN
            x_b, x_o = tl.maximum(x_b, -1e30), tl.maximum(x_o, -1e30)
        p = tl.exp2(x_b) * over_b[:, None]
        of_o = tl.exp2(x_o) * over_o[:, None] - p
        if not BOTH:
            of_o = tl.where(off[:, None], 0, of_o)
        of_b = p * ((x_b - x_o) * (ratio * LN2)[:, None] - tl.where(off, 0, ratio * mean)[:, None])
    return (of_o, of_b) if DIVERGENCE.base == "t" else (of_b, of_o)


@triton.jit
def _less_mean(a, softmax, factor, A, k, NAME: tl.constexpr):
    """Return k·(factor·a − softmax·A), or 0 if k is 0: in such a row the KD term may diverge or be NaN."""
    A = tl.where(k == 0, 0, k * A)[:, None]
    if NAME == "symmetric_kl":
        return tl.where((k == 0)[:, None], 0, (k * factor)[:, None] * a - A * softmax)
    else:
        return softmax * ((k * factor)[:, None] * a - A)


@triton.jit
def _centered(a, softmax, A, D, GRAD: tl.constexpr):
    """Return a − softmax·A, or D where that cancels: at an entry with most of the mass (with a larger share than in the
    second pass, since z may have been computed again)."""
    centered = a - softmax * A[:, None]
    if not GRAD.precise:
        return centered
    else:
        return tl.where((softmax > 0.6) & (D == D)[:, None], D[:, None], centered)


@triton.jit
def _add_cross_entropy(grad, z, v, begin, m, log_S1, targets, coefficient, TRUNCATED: tl.constexpr, GRAD: tl.constexpr):
    """Return grad + coefficient·(softmax(z) − onehot(targets)). TRUNCATED: logits beyond may be larger than m."""
    ONE: tl.constexpr = 1.0 if GRAD.precise else LOG2E
    x = exponent(z, m, ONE, GRAD.precise)
    if TRUNCATED:
        x -= (log_S1 * ONE + shift(m, ONE, GRAD.precise))[:, None]
        grad += coefficient[:, None] * power(x, GRAD.precise)
    else:
        grad += (coefficient * _over_sum(log_S1, m, ONE, GRAD))[:, None] * power(x, GRAD.precise)
    if z.shape[0] == 1:  # a single row has its target in one block
        target = tl.max(targets, axis=0)
        if (target >= begin) & (target < begin + z.shape[1]):
            grad = tl.where(v == target, grad - coefficient[:, None], grad)
    else:
        grad = tl.where(v == targets[:, None], grad - coefficient[:, None], grad)
    return grad


@triton.jit
def store_gradients(grads, r, column, grad_s, grad_t, grad_a, counts, mask, GRAD: tl.constexpr):
    """Write a block's gradients into `launch.Gradients`; r [R, 1] int64 rows, column [1, BLOCK]."""
    row = r * grads.stride
    if grads.anchor is not None:
        _store(grads.anchor + r * grads.anchor_stride + column, grad_a, counts, mask)
    elif GRAD.anchor:
        grad_t += grad_a
    if grads.student is not None:
        _store(grads.student + row + column, grad_s, counts, mask)
    if grads.teacher is not None:
        _store(grads.teacher + row + column, grad_t, counts, mask)


@triton.jit
def _store(pointers, grad, counts, mask):
    """Write a block, rounded to the buffer's dtype; 0 where `counts` is False. float16 saturates, NaN stays NaN."""
    if pointers.dtype.element_ty == tl.float16:
        grad = tl.where(grad > 65504, 65504, tl.where(grad < -65504, -65504, grad))
    if counts is None:
        tl.store(pointers, grad, mask=mask)
    else:  # a wide store of zeros costs less than selecting every number
        tl.store(pointers, grad, mask=mask & counts)
        tl.store(pointers, tl.zeros_like(grad), mask=mask & (counts == 0))


BLOCK_M, BLOCK_V, WARPS = 32, 64, 4  # 16-bit rows of 128 bytes; V/64 programs fill any chip at V ≥ 32K


@triton.jit(do_not_specialize=["M"])
def column_sums_kernel(
    g_ptr, stride_g,  # (M, V)
    weights_ptr,  # (M,) or None: all 1
    out_ptr,  # (V,)
    M, V,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Add weighted column sums to out, in fp32 (fp64): one program per block of columns, rows in order, no atomics."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_V], dtype)
    for block in range(0, M, BLOCK_M):
        m = block + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None] & (v < V)[None, :]
        g = tl.load(g_ptr + m.to(tl.int64)[:, None] * stride_g + v[None, :], mask=inside, other=0).to(dtype)
        if weights_ptr is not None:
            g *= tl.load(weights_ptr + m, mask=m < M, other=0)[:, None]
        total += tl.sum(g, axis=0)
    tl.store(out_ptr + v, tl.load(out_ptr + v, mask=v < V, other=0) + total, mask=v < V)


def add_column_sums(g: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """Add Σ_m weights_m·g_mV to out (V,).  g (M, V), weights (M,) or None for ones."""
    M, V = g.shape
    column_sums_kernel[(triton.cdiv(V, BLOCK_V),)](
        g, g.stride(0), weights, out, M, V, BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, num_warps=WARPS
    )
