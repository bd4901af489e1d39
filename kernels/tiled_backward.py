"""Gradient kernel of the tiled engine: recomputes the logits of a slab of the vocabulary and writes their gradients.

grad_* (N, slab)  in the GEMM's dtype; the caller computes the slab's products dX += G·W and dW = Gᵀ·X

Operations: as many as one pass of the statistics kernel, for the slab's share of V. Written: 2 or 4 bytes per logit.
"""

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.autotune import choose
from kdfast.kernels.block_sizes import TileConfig
from kdfast.kernels.launch import Gradients, Heads, Term
from kdfast.kernels.logit_gradients import gradients, load_coefficients, store_gradients
from kdfast.kernels.online_softmax import CONSTANTS, Loss, RowConstants, load_loss, load_tensors, scales_of
from kdfast.kernels.tiles import both_logits, parts, tile

GROUP = 8  # row blocks that walk the vocabulary together, so that tiles of W are read from L2


@triton.jit(do_not_specialize=["stride_c", "N", "first", "width"])
def gradients_kernel(
    operands, given, tensors, stride_c,  # `launch.Operands`, `Given`, `LossTensors`
    constants_ptr,  # (12, N)
    grads,  # `launch.Gradients`, all of one stride
    N, V, kd_V, Hs, Ht, first, width,
    scale_s: "fp64", softcap_s: "fp64", scale_t: "fp64", softcap_t: "fp64", parameter: "fp64", second: "fp64",
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
    start = (within // rows_here) * BLOCK_V  # of the tile, in the slab
    inside = n < N
    loss = load_loss(tensors, parameter, second, n, inside, dtype, GRAD.precise)
    begin = first + start  # of the tile, in the vocabulary; ids are counted from here, to compare with constants
    loss = Loss(loss.labels - begin, loss.targets - begin, *loss[2:])
    products_s, products_t = tile(
        operands, n, begin + tl.arange(0, BLOCK_V), N, V, kd_V, Hs, Ht, HEADS, dtype, BLOCK_N, BLOCK_V, BLOCK_H
    )

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
        v = i * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
        z_s, slope_s, z_t, slope_t = both_logits(
            parts_s[i], parts_t[i], operands, given_ptr, begin + v, V, kd_V, scales, HEADS, dtype
        )
        kd = (v < kd_V - begin)[None, :]
        if operands.mask is not None:
            kd = (tl.load(operands.mask + tl.minimum(begin + v, V - 1)) != 0)[None, :]
        elif HEADS.truncated:
            z_t = tl.where(kd, z_t, -float("inf"))
        grad_s, grad_t, grad_a = gradients(
            z_s, z_t, slope_s, slope_t, v[None, :], 0, kd, constants, decorrelation, coefficients, loss,
            TEACHER, operands.mask is not None, HEADS, DIVERGENCE, GRAD,
        )  # fmt: skip
        # between `width` and the end of the last tile is padding of the slab, so that stores need no narrower mask
        mask = inside[:, None] & (start + v < grads.stride)[None, :]
        store_gradients(grads, r, (start + v)[None, :], grad_s, grad_t, grad_a, counts, mask, GRAD)


def slab_gradients(
    heads: Heads, term: Term, grads: Gradients, *, constants: Tensor, first: int, decorrelate: bool,
    config: TileConfig | None = None,
) -> None:  # fmt: skip
    """Write the gradients with respect to h·Wᵀ + b of ids first … first + width, divided by `term.scale`.

    grads (N, width), all with the same stride and room for whole tiles; constants (12, N) from `statistics`."""
    some = grads.teacher if grads.student is None else grads.student
    assert some is not None
    N, width = some.shape
    if N == 0:
        return
    labels, targets = term.labels if term.ce_gradient else None, term.targets if term.anchor_gradient else None
    tensors = term.tensors()._replace(labels=labels, targets=targets)
    flags = term.gradient_flags(grads.student is not None, decorrelate)

    def launch(config: TileConfig) -> None:
        gradients_kernel[(triton.cdiv(N, config.block_n) * triton.cdiv(width, config.block_v),)](
            heads.operands(), heads.given(), tensors, term.coefficients.stride(0), constants, grads, N,
            heads.vocab, heads.kd_vocab, *heads.widths(), first, width, *heads.scalars(), term.parameter, term.second,
            HEADS=heads.flags(config), DIVERGENCE=term.entry, GRAD=flags,
            GROUP=GROUP, PARTS=config.parts, **config.blocks(), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    kernel = "gradients_full" if heads.intricate or term.intricate else "gradients"
    launch(config or choose(kernel, heads.weight, N, launch, widths=heads.widths()))
