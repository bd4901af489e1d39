"""Gradient kernel of the tiled engine: a slab of the vocabulary's logits recomputed, its gradients written.

grad_* (N, slab)  in the GEMM's dtype; the products dX += G·W and dW = Gᵀ·X of the slab are taken by the caller

Operations: as many as one pass of the statistics kernel, for the slab's share of V. Written: 2 or 4 bytes per logit.
"""

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.autotune import choose
from kdfast.kernels.block_sizes import TileConfig
from kdfast.kernels.launch import Heads, Term
from kdfast.kernels.logit_gradients import gradients, load_coefficients, store_gradient
from kdfast.kernels.online_softmax import ROWS, load_rows
from kdfast.kernels.tiles import given_logits, logits, parts, tile

GROUP = 8  # row blocks that walk a stretch of the vocabulary together, so that tiles of W are read from L2


@triton.jit(do_not_specialize=["stride_c", "N", "first", "width"])
def gradients_kernel(
    xs_ptr, stride_xsn, stride_xsh,  # (N, Hs)
    xt_ptr, stride_xtn, stride_xth,  # (N, Hs) or (N, Ht), or None
    w_ptr, stride_wv, stride_wh,  # (V, Hs)
    wt_ptr, stride_wtv, stride_wth,  # (V, Ht), or None
    bias_s_ptr, bias_t_ptr,  # (V,) or None
    given_ptr, offsets_ptr, STRIDE: tl.constexpr,  # dense teacher logits and their rows' offsets (N,), or None
    labels_ptr, targets_ptr,  # (N,) int64 or None
    active_ptr,  # (N,) bool
    coefficients_ptr, stride_c,  # (3, N)
    temperature_ptr, scale_ptr,  # ()
    rows_ptr,  # (10, N)
    grad_s_ptr, grad_t_ptr, grad_a_ptr, stride_g,  # (N, width) each, or None
    N, V, kd_V, Hs, Ht, first, width,
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64",
    SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, EVEN_S: tl.constexpr, EVEN_T: tl.constexpr,
    TRUNCATED: tl.constexpr,
    DIVERGENCE: tl.constexpr, BASE: tl.constexpr, CENTRED_P: tl.constexpr, CENTRED_Q: tl.constexpr,
    CE_GRADIENT: tl.constexpr, TEACHER_GRADIENT: tl.constexpr, ANCHOR_GRADIENT: tl.constexpr, MIX: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    TEACHER: tl.constexpr = (xt_ptr is not None) or (given_ptr is not None)
    row_blocks = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(width, BLOCK_V)
    group = tl.program_id(0) // (GROUP * tiles)
    rows_here = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles)
    n = (group * GROUP + within % rows_here) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = (within // rows_here) * BLOCK_V  # in the slab
    inside = n < N
    labels = tl.load(labels_ptr + n, mask=inside, other=0).to(tl.int32) if CE_GRADIENT else n
    targets = tl.load(targets_ptr + n, mask=inside, other=0).to(tl.int32) if ANCHOR_GRADIENT else n
    products_s, products_t = tile(
        xs_ptr, stride_xsn, stride_xsh, xt_ptr, stride_xtn, stride_xth,
        w_ptr, stride_wv, stride_wh, wt_ptr, stride_wtv, stride_wth,
        n, first + start + tl.arange(0, BLOCK_V), N, V, kd_V, Hs, Ht,
        dtype, EVEN_S, EVEN_T, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip

    inv_tau = 1 / tl.load(temperature_ptr)
    coefficients = load_coefficients(coefficients_ptr + n, stride_c, inside, tl.load(scale_ptr))
    rows = load_rows(rows_ptr + n, N, inside)
    mix = tl.load(rows_ptr + ROWS * N.to(tl.int64) + n, mask=inside, other=0)
    counts = (tl.load(active_ptr + n, mask=inside, other=0) != 0)[:, None]
    scale_s = tl.full([1, 1], scale_s, dtype)
    scale_t = tl.full([1, 1], scale_t, dtype)
    softcap_s = tl.full([1, 1], softcap_s, dtype)
    softcap_t = tl.full([1, 1], softcap_t, dtype)
    parameter = tl.full([1, 1], parameter, dtype)
    if given_ptr is not None:
        given_ptr += tl.load(offsets_ptr + n, mask=inside, other=0)[:, None]
    parts_s, parts_t = parts(products_s, PARTS), parts(products_t, PARTS)
    for i in tl.static_range(PARTS):
        column = start + i * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
        v = first + column
        z_s, slope_s = logits(parts_s[i], bias_s_ptr, v, V, scale_s, softcap_s, SOFTCAP_S)
        z_t, slope_t = z_s, slope_s
        if given_ptr is not None:
            z_t = given_logits(given_ptr, STRIDE, inside[:, None], v[None, :], kd_V, dtype)
        elif TEACHER:
            z_t, slope_t = logits(parts_t[i], bias_t_ptr, v, kd_V, scale_t, softcap_t, SOFTCAP_T)
        grad_s, grad_t, grad_a = gradients(
            z_s, z_t, slope_s, slope_t, v[None, :], kd_V, rows, mix, coefficients, labels, targets, inv_tau, parameter,
            TEACHER, TRUNCATED, DIVERGENCE, CENTRED_P, CENTRED_Q, CE_GRADIENT, grad_s_ptr is not None, TEACHER_GRADIENT,
            ANCHOR_GRADIENT, MIX,
        )  # fmt: skip
        # what lies between `width` and the end of its last tile is padding of the slab, and takes the store whole
        mask = inside[:, None] & (column < stride_g)[None, :]
        out = n.to(tl.int64)[:, None] * stride_g + column[None, :]
        if grad_a_ptr is not None:
            store_gradient(grad_a_ptr + out, grad_a, counts, mask)
        elif ANCHOR_GRADIENT:
            grad_t += grad_a
        if grad_s_ptr is not None:
            store_gradient(grad_s_ptr + out, grad_s, counts, mask)
        if grad_t_ptr is not None:
            store_gradient(grad_t_ptr + out, grad_t, counts, mask)


def slab_gradients(
    heads: Heads,
    term: Term,
    *,
    rows: Tensor,  # (10, N) from `statistics`
    first: int,  # the slab's first id
    grad_s: Tensor | None,  # (N, width), all of one stride; rows have room for whole tiles
    grad_t: Tensor | None,  # KD part, and the anchor's unless grad_a is given
    grad_a: Tensor | None,
    mix: bool,
    config: TileConfig | None = None,
) -> None:
    """Gradients towards h·Wᵀ + b of ids first … first + width, over `term.scale`."""
    some = grad_s if grad_s is not None else grad_t
    assert some is not None
    N, width = some.shape
    if N == 0:
        return
    if config is None:
        out = {"rows": rows, "first": first, "grad_s": grad_s, "grad_t": grad_t, "grad_a": grad_a, "mix": mix}
        config = choose(
            "gradients", heads.weight, N, lambda c: slab_gradients(heads, term, **out, config=c),
            widths=heads.widths(),
        )  # fmt: skip
    gradients_kernel[(triton.cdiv(N, config.block_n) * triton.cdiv(width, config.block_v),)](
        *heads.pointers(), *heads.given(),
        term.labels if term.ce_gradient else None, term.targets if term.anchor_gradient else None,
        term.active, term.coefficients, term.coefficients.stride(0), term.temperature, term.scale,
        rows, grad_s, grad_t, grad_a, some.stride(0),
        N, heads.vocab, heads.kd_vocab, *heads.widths(), first, width, *heads.scalars(), term.parameter,
        **heads.flags(config), TRUNCATED=heads.truncated, **term.divergence_flags(),
        CE_GRADIENT=term.ce_gradient, TEACHER_GRADIENT=term.teacher_gradient, ANCHOR_GRADIENT=term.anchor_gradient,
        MIX=mix, GROUP=GROUP, PARTS=config.parts, **config.blocks(), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
