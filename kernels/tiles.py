"""Tiles of logits computed on the tensor cores and never stored: what both tiled kernels start with.

x_s (N, Hs), W (V, Hs)     student's hidden states and head
x_t (N, Hs) or (N, Ht)     projected hidden states, multiplied with the same tile of W; or the teacher's own, with Wt

Rows and columns past the end are read at the last valid address and masked by whoever uses them, so that only widths
that are no multiple of BLOCK_H cost a mask. Any strides; a unit stride is a compile-time constant.
"""

import triton
import triton.language as tl

from kdfast.kernels.statistics import transform


@triton.jit
def _operand(pointers, h, H, EVEN: tl.constexpr):
    """[.., BLOCK_H] or its transpose; h broadcasts against `pointers`."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=h < H, other=0)


@triton.jit
def tile(
    xs_ptr, stride_xsn, stride_xsh,
    xt_ptr, stride_xtn, stride_xth,
    w_ptr, stride_wv, stride_wh,
    wt_ptr, stride_wtv, stride_wth,
    bias_s_ptr, bias_t_ptr,
    n, v, N, V, Hs, Ht, scale_s, softcap_s, scale_t, softcap_t,
    dtype: tl.constexpr, SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, EVEN_S: tl.constexpr, EVEN_T: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """(z_s, slope_s, z_t, slope_t) [BLOCK_N, BLOCK_V]: logits, −inf from V on, and their slopes towards h·Wᵀ + b.

    n (BLOCK_N,), v (BLOCK_V,) int32; xt_ptr None without a teacher, wt_ptr None where it shares W."""
    h = tl.arange(0, BLOCK_H)
    n_safe = tl.minimum(n, N - 1).to(tl.int64)
    v_safe = tl.minimum(v, V - 1).to(tl.int64)
    xs = xs_ptr + n_safe[:, None] * stride_xsn + h[None, :] * stride_xsh  # [BLOCK_N, BLOCK_H]
    w = w_ptr + v_safe[None, :] * stride_wv + h[:, None] * stride_wh  # [BLOCK_H, BLOCK_V]
    acc_s = tl.zeros([BLOCK_N, BLOCK_V], dtype)
    acc_t = tl.zeros([BLOCK_N, BLOCK_V], dtype)
    if xt_ptr is not None:
        xt = xt_ptr + n_safe[:, None] * stride_xtn + h[None, :] * stride_xth
    if xt_ptr is not None and wt_ptr is None:
        for start in range(0, Hs, BLOCK_H):
            left = Hs - start
            b = _operand(w, h[:, None], left, EVEN_S)
            acc_s = tl.dot(_operand(xs, h[None, :], left, EVEN_S), b, acc_s, input_precision=PRECISION, out_dtype=dtype)
            acc_t = tl.dot(_operand(xt, h[None, :], left, EVEN_S), b, acc_t, input_precision=PRECISION, out_dtype=dtype)
            xs += BLOCK_H * stride_xsh
            xt += BLOCK_H * stride_xth
            w += BLOCK_H * stride_wh
    else:
        for start in range(0, Hs, BLOCK_H):
            left = Hs - start
            a = _operand(xs, h[None, :], left, EVEN_S)
            acc_s = tl.dot(a, _operand(w, h[:, None], left, EVEN_S), acc_s, input_precision=PRECISION, out_dtype=dtype)
            xs += BLOCK_H * stride_xsh
            w += BLOCK_H * stride_wh
    if wt_ptr is not None:
        wt = wt_ptr + v_safe[None, :] * stride_wtv + h[:, None] * stride_wth
        for start in range(0, Ht, BLOCK_H):
            left = Ht - start
            a = _operand(xt, h[None, :], left, EVEN_T)
            acc_t = tl.dot(a, _operand(wt, h[:, None], left, EVEN_T), acc_t, input_precision=PRECISION, out_dtype=dtype)
            xt += BLOCK_H * stride_xth
            wt += BLOCK_H * stride_wth
    z_s, slope_s = _finish(acc_s, bias_s_ptr, v_safe, v < V, scale_s, softcap_s, SOFTCAP_S)
    z_t, slope_t = z_s, slope_s
    if xt_ptr is not None:
        z_t, slope_t = _finish(acc_t, bias_t_ptr, v_safe, v < V, scale_t, softcap_t, SOFTCAP_T)
    return z_s, slope_s, z_t, slope_t


@triton.jit
def _finish(acc, bias_ptr, v_safe, inside, scale, softcap, SOFTCAP: tl.constexpr):
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + v_safe).to(acc.dtype)[None, :]
    z, slope = transform(acc, scale, softcap, SOFTCAP)
    return tl.where(inside[None, :], z, -float("inf")), slope
