"""Tiles of logits, computed on the tensor cores and never stored; both tiled kernels start with them.

x_s (N, Hs), W (V, Hs)     student's hidden states and head
x_t (N, Hs) or (N, Ht)     projected hidden states, multiplied with the same tile of W; or the teacher's own, with Wt

Rows and columns past the end are read at the last valid address and masked where they are used, so only widths that
are not a multiple of BLOCK_H need a mask. Strides may be anything; a unit stride is a compile-time constant.
"""

import triton
import triton.language as tl

from kdfast.kernels.online_softmax import transform


@triton.jit
def _operand(pointers, h, H, EVEN: tl.constexpr, dtype: tl.constexpr):
    """Return an operand [.., BLOCK_H] or its transpose; h broadcasts against `pointers`. Products summed in float64
    need float64 operands, and other products must have none."""
    x = tl.load(pointers) if EVEN else tl.load(pointers, mask=h < H, other=0)
    return x.to(dtype) if (x.dtype == tl.float64) != (dtype == tl.float64) else x


@triton.jit
def tile(
    operands, n, v, N, V, V_t, Hs, Ht, HEADS: tl.constexpr, dtype: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return the products h·Wᵀ of student and teacher, [BLOCK_N, BLOCK_V] each; 0 without a teacher.

    operands: `launch.Operands`; n (BLOCK_N,), v (BLOCK_V,): int32; V, V_t: rows that may be read of W and Wt."""
    PRECISION: tl.constexpr = HEADS.precision
    hidden, weight = operands.hidden, operands.weight
    teacher_hidden, teacher_weight = operands.teacher_hidden, operands.teacher_weight
    h = tl.arange(0, BLOCK_H)
    far, step = h.to(tl.int64), tl.full([], BLOCK_H, tl.int64)  # the stride of columns may be large
    n_safe = tl.minimum(n, N - 1).to(tl.int64)
    v_safe = tl.minimum(v, V - 1).to(tl.int64)
    xs = hidden.pointer + n_safe[:, None] * hidden.row + far[None, :] * hidden.column  # [BLOCK_N, BLOCK_H]
    w = weight.pointer + v_safe[None, :] * weight.row + far[:, None] * weight.column  # [BLOCK_H, BLOCK_V]
    acc_s = tl.zeros([BLOCK_N, BLOCK_V], dtype)
    acc_t = tl.zeros([BLOCK_N, BLOCK_V], dtype)
    if teacher_hidden.pointer is not None:
        xt = teacher_hidden.pointer + n_safe[:, None] * teacher_hidden.row + far[None, :] * teacher_hidden.column
    for start in range(0, Hs, BLOCK_H):
        left = Hs - start
        b = _operand(w, h[:, None], left, HEADS.even_s, dtype)
        a = _operand(xs, h[None, :], left, HEADS.even_s, dtype)
        acc_s = tl.dot(a, b, acc_s, input_precision=PRECISION, out_dtype=dtype)
        xs += step * hidden.column
        w += step * weight.column
        if teacher_hidden.pointer is not None and teacher_weight.pointer is None:
            a = _operand(xt, h[None, :], left, HEADS.even_s, dtype)
            acc_t = tl.dot(a, b, acc_t, input_precision=PRECISION, out_dtype=dtype)
            xt += step * teacher_hidden.column
    if teacher_weight.pointer is not None:
        wt_safe = tl.minimum(v, V_t - 1).to(tl.int64)
        wt = teacher_weight.pointer + wt_safe[None, :] * teacher_weight.row + far[:, None] * teacher_weight.column
        for start in range(0, Ht, BLOCK_H):
            left = Ht - start
            a = _operand(xt, h[None, :], left, HEADS.even_t, dtype)
            b = _operand(wt, h[:, None], left, HEADS.even_t, dtype)
            acc_t = tl.dot(a, b, acc_t, input_precision=PRECISION, out_dtype=dtype)
            xt += step * teacher_hidden.column
            wt += step * teacher_weight.column
    return acc_s, acc_t


@triton.jit
def _halves(x):
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _quarters(x):
    a, b = _halves(x)
    return _halves(a) + _halves(b)


@triton.jit
def parts(x, PARTS: tl.constexpr):
    """Return the columns of x in PARTS equal stretches, in order. The work after a product needs a dozen registers per
    column, and for a whole tile they would spill. No data moves between threads."""
    if PARTS == 1:
        return (x,)
    elif PARTS == 2:
        return _halves(x)
    elif PARTS == 4:
        return _quarters(x)
    else:
        a, b = _halves(x)
        return _quarters(a) + _quarters(b)


@triton.jit
def lanes(x, LANES: tl.constexpr, VEC: tl.constexpr):
    """Return a block [N, BLOCK] of a product's columns as [N, J, LANES, VEC], with each thread's own in one lane."""
    return x.reshape(x.shape[0], x.shape[1] // (VEC * LANES), LANES, VEC)


@triton.jit
def logits(acc, bias_ptr, v, V, scale, softcap, SCALED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the logits of a block of products, arbitrary from V on, and their slope with respect to h·Wᵀ + b."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + tl.minimum(v, V - 1)).to(acc.dtype)[None, :]
    return transform(acc, scale, softcap, SCALED, SOFTCAP)


@triton.jit
def both_logits(acc_s, acc_t, operands, given_ptr, v, V, kd_V, x, HEADS: tl.constexpr, dtype: tl.constexpr):
    """Return the student's logits and slope, and the teacher's, or the student's again without a teacher.

    acc [BLOCK_N, BLOCK]: products; given_ptr [BLOCK_N, 1] or None; v [BLOCK]; kd_V: the teacher's V; x: `Scales`."""
    z_s, slope_s = logits(acc_s, operands.bias, v, V, x.scale_s, x.softcap_s, HEADS.scaled_s, HEADS.softcap_s)
    z_t, slope_t = z_s, slope_s
    if given_ptr is not None:
        z_t = given_logits(given_ptr, HEADS.given_stride, v[None, :], kd_V, dtype, True)
    elif operands.teacher_hidden.pointer is not None:
        bias = operands.teacher_bias
        z_t, slope_t = logits(acc_t, bias, v, kd_V, x.scale_t, x.softcap_t, HEADS.scaled_t, HEADS.softcap_t)
    return z_s, slope_s, z_t, slope_t


@triton.jit
def masked(z_s, z_t, v, V):
    """Return both sides' logits, with −inf from V on."""
    within = (v < V)[None, :]
    return tl.where(within, z_s, -float("inf")), tl.where(within, z_t, -float("inf"))


@triton.jit
def of_mask(z_s, z_t, mask_ptr, v, V, OUTSIDE: tl.constexpr):
    """Return both sides' logits, with −inf at ids that the mask takes out of the KD term; if OUTSIDE, at the others."""
    kd = (tl.load(mask_ptr + tl.minimum(v, V - 1)) != OUTSIDE)[None, :]
    return tl.where(kd, z_s, -float("inf")), tl.where(kd, z_t, -float("inf"))


@triton.jit
def given_logits(pointers, STRIDE: tl.constexpr, v, V, dtype: tl.constexpr, MASKED: tl.constexpr):
    """Return a block of a `Logits` teacher; pointers [R, 1], v [1, BLOCK], or with more dimensions. MASKED: −inf from V
    on."""
    offsets = v if STRIDE == 1 else v.to(tl.int64) * STRIDE
    if MASKED:
        return tl.load(pointers + offsets, mask=v < V, other=-float("inf")).to(dtype)
    else:
        return tl.load(pointers + offsets).to(dtype)
