"""Tiles of logits computed on the tensor cores and never stored: what both tiled kernels start with.

x_s (N, Hs), W (V, Hs)     student's hidden states and head
x_t (N, Hs) or (N, Ht)     projected hidden states, multiplied with the same tile of W; or the teacher's own, with Wt

Rows and columns past the end are read at the last valid address and masked by whoever uses them, so that only widths
that are no multiple of BLOCK_H cost a mask. Any strides; a unit stride is a compile-time constant.
"""

import triton
import triton.language as tl

from kdfast.kernels.online_softmax import transform


@triton.jit
def _operand(pointers, h, H, EVEN: tl.constexpr, dtype: tl.constexpr):
    """[.., BLOCK_H] or its transpose; h broadcasts against `pointers`. Products that are summed in float64 take no
    other operands, and those that are not none of float64."""
    x = tl.load(pointers) if EVEN else tl.load(pointers, mask=h < H, other=0)
    return x.to(dtype) if (x.dtype == tl.float64) != (dtype == tl.float64) else x


@triton.jit
def tile(
    xs_ptr, stride_xsn, stride_xsh,
    xt_ptr, stride_xtn, stride_xth,
    w_ptr, stride_wv, stride_wh,
    wt_ptr, stride_wtv, stride_wth,
    n, v, N, V, V_t, Hs, Ht,
    dtype: tl.constexpr, EVEN_S: tl.constexpr, EVEN_T: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The products h·Wᵀ of student and teacher, [BLOCK_N, BLOCK_V] each; the teacher's are 0 where there is none.

    n (BLOCK_N,), v (BLOCK_V,) int32; V, V_t entries that may be read of W and Wt; xt_ptr None without a teacher, wt_ptr
    None where it shares W."""
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
            b = _operand(w, h[:, None], left, EVEN_S, dtype)
            a = _operand(xs, h[None, :], left, EVEN_S, dtype)
            acc_s = tl.dot(a, b, acc_s, input_precision=PRECISION, out_dtype=dtype)
            a = _operand(xt, h[None, :], left, EVEN_S, dtype)
            acc_t = tl.dot(a, b, acc_t, input_precision=PRECISION, out_dtype=dtype)
            xs += BLOCK_H * stride_xsh
            xt += BLOCK_H * stride_xth
            w += BLOCK_H * stride_wh
    else:
        for start in range(0, Hs, BLOCK_H):
            left = Hs - start
            a = _operand(xs, h[None, :], left, EVEN_S, dtype)
            b = _operand(w, h[:, None], left, EVEN_S, dtype)
            acc_s = tl.dot(a, b, acc_s, input_precision=PRECISION, out_dtype=dtype)
            xs += BLOCK_H * stride_xsh
            w += BLOCK_H * stride_wh
    if wt_ptr is not None:
        wt = wt_ptr + tl.minimum(v, V_t - 1).to(tl.int64)[None, :] * stride_wtv + h[:, None] * stride_wth
        for start in range(0, Ht, BLOCK_H):
            left = Ht - start
            a = _operand(xt, h[None, :], left, EVEN_T, dtype)
            b = _operand(wt, h[:, None], left, EVEN_T, dtype)
            acc_t = tl.dot(a, b, acc_t, input_precision=PRECISION, out_dtype=dtype)
            xt += BLOCK_H * stride_xth
            wt += BLOCK_H * stride_wth
    return acc_s, acc_t


@triton.jit
def _halves(x):
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def parts(x, PARTS: tl.constexpr):
    """The columns of x in PARTS equal stretches, in order: what follows a product needs a dozen registers for every
    column it has in hand, and a whole tile's worth of them would spill. Takes no data from its thread."""
    if PARTS == 1:
        return (x,)
    elif PARTS == 2:
        return _halves(x)
    elif PARTS == 4:
        a, b = _halves(x)
        a0, a1 = _halves(a)
        b0, b1 = _halves(b)
        return (a0, a1, b0, b1)
    else:
        tl.static_assert(PARTS == 8)
        a, b = _halves(x)
        a0, a1, a2, a3 = parts(a, 4)
        b0, b1, b2, b3 = parts(b, 4)
        return (a0, a1, a2, a3, b0, b1, b2, b3)


@triton.jit
def logits(acc, bias_ptr, v, V, scale, softcap, SOFTCAP: tl.constexpr):
    """(logits, −inf from V on; their slope towards h·Wᵀ + b) of a block of products."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + tl.minimum(v, V - 1)).to(acc.dtype)[None, :]
    z, slope = transform(acc, scale, softcap, SOFTCAP)
    return tl.where((v < V)[None, :], z, -float("inf")), slope


@triton.jit
def given_logits(pointers, STRIDE: tl.constexpr, inside, v, V, dtype: tl.constexpr):
    """A block of logits the caller gave, −inf from V on; pointers, inside [R, 1], v [1, BLOCK]."""
    offsets = v if STRIDE == 1 else v.to(tl.int64) * STRIDE
    return tl.load(pointers + offsets, mask=inside & (v < V), other=-float("inf")).to(dtype)
