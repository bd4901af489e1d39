"""Gradients of a block of logits, once the rows' constants are known: shared by the row kernel and the tiled kernels.

    ∂L/∂z_s = c_kd/τ·(a_q − q·Σa_q) + c_ce·(softmax(z_s) − onehot(label))
    ∂L/∂z_t = c_kd/τ·(a_p − p·Σa_p)  and  c_anchor·(softmax(z_t) − onehot(target))

each times the slope of its head's softcap and scale, so that it is a gradient towards h·Wᵀ + b.
"""

import triton
import triton.language as tl

from kdfast.kernels.divergences import terms
from kdfast.kernels.online_softmax import probabilities


@triton.jit
def load_coefficients(pointers, stride, mask, scale):
    """(kd, ce, anchor) of the rows at `pointers`, [R] each, over the gradients' scale."""
    return (
        tl.load(pointers, mask=mask, other=0) / scale,
        tl.load(pointers + stride, mask=mask, other=0) / scale,
        tl.load(pointers + 2 * stride, mask=mask, other=0) / scale,
    )


@triton.jit
def gradients(
    z_s, z_t, slope_s, slope_t, v, kd_V, rows, mix, coefficients, labels, targets, inv_tau, parameter,
    TEACHER: tl.constexpr, TRUNCATED: tl.constexpr, DIVERGENCE: tl.constexpr, CENTRED_P: tl.constexpr,
    CENTRED_Q: tl.constexpr, CE: tl.constexpr, STUDENT: tl.constexpr, TEACHER_GRADIENT: tl.constexpr,
    ANCHOR: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """(student's, teacher's KD part, teacher's anchor part), [R, BLOCK] each; an unwanted one is 0.

    z, slope [R, BLOCK]; v [1, BLOCK]; rows, mix, labels, targets [R]; coefficients (kd, ce, anchor), [R] each.
    With MIX the teacher's part has mix·(the student's) added. TRUNCATED: the KD term ends at kd_V. For a "sparse"
    teacher the student's part is what entries get that it does not have: A_p·exp(x − log S), with the constants in the
    teacher's place."""
    m_s, _, m_t, ls_t, _, A_p, A_q, n_s, n_t = rows
    c_kd, c_ce, c_anchor = coefficients
    grad_s = tl.zeros_like(z_s)
    grad_t = grad_s
    grad_a = grad_s
    if DIVERGENCE == "sparse":
        if STUDENT:
            outside = A_p[:, None]
            softmax = tl.exp((z_s - m_t[:, None]) * inv_tau - ls_t[:, None])
            grad_s = tl.where(outside == 0, 0, outside * softmax)
    elif TEACHER and (STUDENT or TEACHER_GRADIENT):
        k = (c_kd * inv_tau)[:, None]
        shared = z_s
        if TRUNCATED:
            shared = tl.where(v < kd_V, z_s, -float("inf"))
        p, q, g = probabilities(shared, z_t, rows, inv_tau)
        _, a_p, a_q = terms(DIVERGENCE, p, q, g, parameter)
        if STUDENT:
            if not CENTRED_Q:
                a_q -= q * A_q[:, None]
            grad_s = tl.where(k == 0, 0, k * a_q)  # a row the KD term does not count may diverge
        if TEACHER_GRADIENT:
            if not CENTRED_P:
                a_p -= p * A_p[:, None]
            grad_t = tl.where(k == 0, 0, k * a_p)
    if STUDENT and CE:
        grad_s += _cross_entropy(z_s, v, m_s, n_s, labels, c_ce)
    if ANCHOR:
        grad_a = _cross_entropy(z_t, v, m_t, n_t, targets, c_anchor) * slope_t
    grad_s *= slope_s
    grad_t *= slope_t
    if MIX:
        grad_t += mix[:, None] * grad_s
    return grad_s, grad_t, grad_a


@triton.jit
def _cross_entropy(z, v, m, n, targets, coefficient):
    softmax = tl.exp((z - m[:, None]) - n[:, None])
    return coefficient[:, None] * tl.where(v == targets[:, None], softmax - 1, softmax)


@triton.jit
def store_gradient(pointers, grad, counts, mask):
    """Write a block, rounded to the buffer's dtype; 0 where `counts` is false. float16 saturates, NaN stays NaN."""
    if pointers.dtype.element_ty == tl.float16:
        grad = tl.where(grad > 65504, 65504, tl.where(grad < -65504, -65504, grad))
    tl.store(pointers, tl.where(counts, grad, 0), mask=mask)
