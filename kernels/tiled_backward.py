"""Gradient kernel of the tiled engine: a slab of the vocabulary's logits recomputed, its gradients written.

grad_* (N, slab)  in the GEMM's dtype; the products dX += G·W and dW = Gᵀ·X of the slab are taken by the caller

Operations: as many as one pass of the statistics kernel, for the slab's share of V. Written: 2 or 4 bytes per logit.
"""

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.autotune import choose
from kdfast.kernels.block_sizes import TileConfig
from kdfast.kernels.launch import Gradients, Heads, Term
from kdfast.kernels.logit_gradients import gradients, load_coefficients, store_gradients
from kdfast.kernels.online_softmax import CONSTANTS, Loss, RowConstants, load_tensors, scales_of
from kdfast.kernels.tiles import both_logits, parts, tile

GROUP = 8  # row blocks that walk a stretch of the vocabulary together, so that tiles of W are read from L2


@triton.jit(do_not_specialize=["stride_c", "N", "first", "width"])
def gradients_kernel(
    operands, given, tensors, stride_c,  # `launch.Operands`, `Given`, `LossTensors`
    constants_ptr,  # (10, N)
    grads,  # `launch.Gradients`, all of one stride
    N, V, kd_V, Hs, Ht, first, width,
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64",
    HEADS: tl.constexpr, DIVERGENCE: tl.constexpr, GRAD: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = constants_ptr.dtype.element_ty
    TEACHER: tl.constexpr = (operands.teacher_hidden.pointer is not None) or (given.logits is not None)
    row_blocks = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(width, BLOCK_V)
    group = tl.program_id(0) // (GROUP * tiles)
    rows_here = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles)
    n = (group * GROUP + within % rows_here) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = (within // rows_here) * BLOCK_V  # in the slab
    inside = n < N
    labels, targets = n, n
    if tensors.labels is not None:
        labels = tl.load(tensors.labels + n, mask=inside, other=0).to(tl.int32)
    if tensors.targets is not None:
        targets = tl.load(tensors.targets + n, mask=inside, other=0).to(tl.int32)
    products_s, products_t = tile(
        operands, n, first + start + tl.arange(0, BLOCK_V), N, V, kd_V, Hs, Ht, HEADS, dtype, BLOCK_N, BLOCK_V, BLOCK_H
    )

    loss = Loss(labels, targets, 1 / tl.load(tensors.temperature), tl.full([1, 1], parameter, dtype))
    coefficients = load_coefficients(tensors.coefficients + n, stride_c, inside, tl.load(tensors.scale))
    constants = RowConstants(*load_tensors(constants_ptr + n, N, inside, CONSTANTS))
    decorrelation = tl.load(constants_ptr + CONSTANTS * N.to(tl.int64) + n, mask=inside, other=0)
    counts = (tl.load(tensors.active + n, mask=inside, other=0) != 0)[:, None]
    scales = scales_of(scale_s, softcap_s, scale_t, softcap_t, dtype)
    given_ptr = given.logits
    if given_ptr is not None:
        given_ptr += tl.load(given.offsets + n, mask=inside, other=0)[:, None]
    r = n.to(tl.int64)[:, None]
    parts_s, parts_t = parts(products_s, PARTS), parts(products_t, PARTS)
    for i in tl.static_range(PARTS):
        column = start + i * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
        v = first + column
        z_s, slope_s, z_t, slope_t = both_logits(
            parts_s[i], parts_t[i], operands, given_ptr, inside, v, V, kd_V, scales, HEADS, dtype
        )
        grad_s, grad_t, grad_a = gradients(
            z_s, z_t, slope_s, slope_t, v[None, :], kd_V, constants, decorrelation, coefficients, loss,
            TEACHER, HEADS.truncated, DIVERGENCE, GRAD,
        )  # fmt: skip
        # what lies between `width` and the end of its last tile is padding of the slab, and takes the store whole
        mask = inside[:, None] & (column < grads.stride)[None, :]
        store_gradients(grads, r, column[None, :], grad_s, grad_t, grad_a, counts, mask, GRAD)


def slab_gradients(
    heads: Heads,
    term: Term,
    *,
    constants: Tensor,  # (10, N) from `statistics`
    first: int,  # the slab's first id
    grad_s: Tensor | None,  # (N, width), all of one stride; rows have room for whole tiles
    grad_t: Tensor | None,  # KD part, and the anchor's unless grad_a is given
    grad_a: Tensor | None,
    decorrelate: bool,
    config: TileConfig | None = None,
) -> None:
    """Write the gradients towards h·Wᵀ + b of ids first … first + width, over `term.scale`."""
    some = grad_s if grad_s is not None else grad_t
    assert some is not None
    N, width = some.shape
    if N == 0:
        return
    tensors = term.tensors()
    if not term.ce_gradient:
        tensors = tensors._replace(labels=None)
    if not term.anchor_gradient:
        tensors = tensors._replace(targets=None)

    def launch(config: TileConfig) -> None:
        gradients_kernel[(triton.cdiv(N, config.block_n) * triton.cdiv(width, config.block_v),)](
            heads.operands(), heads.given(), tensors, term.coefficients.stride(0), constants,
            Gradients.of(grad_s, grad_t, grad_a),
            N, heads.vocab, heads.kd_vocab, *heads.widths(), first, width, *heads.scalars(), term.parameter,
            HEADS=heads.flags(config), DIVERGENCE=term.entry, GRAD=term.gradient_flags(grad_s is not None, decorrelate),
            GROUP=GROUP, PARTS=config.parts, **config.blocks(), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    launch(config or choose("gradients", heads.weight, N, launch, widths=heads.widths()))
