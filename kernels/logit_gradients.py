"""Gradients of a block of logits, once the rows' constants are known: shared by the row kernel and the tiled kernels.

    ∂L/∂z_s = c_kd/τ·(a_q − q·Σa_q) + c_ce·(softmax(z_s) − onehot(label))
    ∂L/∂z_t = c_kd/τ_t·(a_p − p·Σa_p)  and  c_anchor·(softmax(z_t) − onehot(target))

each times the slope of its head's softcap and scale, so that it is a gradient towards h·Wᵀ + b. The bias's gradient is
their sum over the rows.
"""

from collections import namedtuple

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.divergences import terms
from kdfast.kernels.online_softmax import load_tensors, probabilities

Coefficients = namedtuple("Coefficients", "kd ce anchor")  # of a program's rows, [R] each, over the gradients' scale


@triton.jit
def load_coefficients(pointers, stride, mask, scale):
    """Return the `Coefficients` of the rows at `pointers` [R]."""
    kd, ce, anchor = load_tensors(pointers, stride, mask, 3)
    return Coefficients(kd / scale, ce / scale, anchor / scale)


@triton.jit
def gradients(
    z_s, z_t, slope_s, slope_t, v, kd_V, constants, decorrelation, coefficients, loss,
    TEACHER: tl.constexpr, TRUNCATED: tl.constexpr, DIVERGENCE: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Return (student's, teacher's KD part, teacher's anchor part), [R, BLOCK] each; an unwanted one is 0.

    z, slope [R, BLOCK]; v [1, BLOCK]; decorrelation [R]: the teacher's part has that much of the student's added.
    TRUNCATED: the KD term ends at kd_V. For a "sparse" teacher the student's part is what tokens get that it does not
    have: A_p·exp(x − log S), with the constants in the teacher's place."""
    NAME: tl.constexpr = DIVERGENCE.name
    grad_s = tl.zeros_like(z_s)
    grad_t, grad_a = grad_s, grad_s
    if DIVERGENCE.name == "sparse":
        if GRAD.student:
            outside = constants.A_p[:, None]
            softmax = tl.exp((z_s - constants.m_t[:, None]) * loss.inv_tau - constants.log_S_t[:, None])
            grad_s = tl.where(outside == 0, 0, outside * softmax)
    elif TEACHER and (GRAD.student or GRAD.teacher):
        k = (coefficients.kd * loss.inv_tau)[:, None]
        shared = tl.where(v < kd_V, z_s, -float("inf")) if TRUNCATED else z_s
        size = tl.abs(constants.m_s) * loss.inv_tau + tl.abs(constants.m_t) * loss.inv_tau_t
        p, q, g, log_p, log_q = probabilities(shared, z_t, constants, loss)
        _, a_p, a_q = terms(NAME, p, q, g, log_p, log_q, loss.parameter, loss.second)
        if GRAD.student:
            if not DIVERGENCE.centred_q:
                a_q = _centered(a_q, q, constants.A_q, constants.D_q, constants.log_S_s, size, DIVERGENCE, GRAD)
            grad_s = tl.where(k == 0, 0, k * a_q)  # a row the KD term does not count may diverge
        if GRAD.teacher:
            if not DIVERGENCE.centred_p:
                a_p = _centered(a_p, p, constants.A_p, constants.D_p, constants.log_S_t, size, DIVERGENCE, GRAD)
            k = (coefficients.kd * loss.inv_tau_t)[:, None]
            grad_t = tl.where(k == 0, 0, k * a_p)
    if GRAD.student and GRAD.ce:
        grad_s += _cross_entropy(z_s, v, constants.m_s, constants.log_S1_s, loss.labels, coefficients.ce)
    if GRAD.anchor:
        grad_a = _cross_entropy(z_t, v, constants.m_t, constants.log_S1_t, loss.targets, coefficients.anchor) * slope_t
    grad_s *= slope_s
    grad_t *= slope_t
    if GRAD.decorrelate:
        grad_t += decorrelation[:, None] * grad_s
    return grad_s, grad_t, grad_a


@triton.jit
def _centered(a, softmax, A, D, log_S, size, DIVERGENCE: tl.constexpr, GRAD: tl.constexpr):
    """Return a − softmax·A, and D where that cancels: at an entry with most of the mass, more than in the second pass,
    as z may be computed anew. A KL's one pass does not know D: 0 at an entry that has all of it, to rounding, where
    A and the logits over τ are so large that a − softmax·A is their rounding."""
    centered = a - softmax * A[:, None]
    if DIVERGENCE.base != "":
        NONE: tl.constexpr = 2**-53 if a.dtype == tl.float64 else 2**-24
        sure = (log_S < NONE) & (size + tl.abs(A) > 256)
        return tl.where((softmax > 0.6) & sure[:, None], 0, centered)
    elif GRAD.decorrelate:
        return centered
    else:
        return tl.where((softmax > 0.6) & (D == D)[:, None], D[:, None], centered)


@triton.jit
def _cross_entropy(z, v, m, log_S1, targets, coefficient):
    softmax = tl.exp((z - m[:, None]) - log_S1[:, None])
    return coefficient[:, None] * tl.where(v == targets[:, None], softmax - 1, softmax)


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
    """Write a block, rounded to the buffer's dtype; 0 where `counts` is false. float16 saturates, NaN stays NaN."""
    if pointers.dtype.element_ty == tl.float16:
        grad = tl.where(grad > 65504, 65504, tl.where(grad < -65504, -65504, grad))
    tl.store(pointers, tl.where(counts, grad, 0), mask=mask)


BLOCK_M, BLOCK_V, WARPS = 32, 64, 4  # 16-bit rows of 128 bytes; V/64 programs fill any chip at V ≥ 32K


@triton.jit(do_not_specialize=["M"])
def column_sums_kernel(
    g_ptr, stride_g,  # (M, V)
    weights_ptr,  # (M,) or None: all 1
    out_ptr,  # (V,)
    M, V,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per block of columns, rows in order: no atomics. Reads g once, sums in fp32 (fp64)."""
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
