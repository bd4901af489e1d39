"""The projector: out (N, Hs) = x (N, Ht) · Pᵀ + p, accumulated in fp32 (fp64), rounded once to the inputs' dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.autotune import choose
from kdfast.kernels.block_sizes import TileConfig
from kdfast.kernels.launch import PRECISION, HeadFlags, Matrix, Operands, matrix
from kdfast.kernels.tiles import tile


@triton.jit(do_not_specialize=["N"])
def projection_kernel(
    x,  # Matrix (N, Ht)
    weight,  # Matrix (Hs, Ht)
    bias_ptr,  # (Hs,) or None
    out_ptr, stride_on,  # (N, Hs)
    N, Hs, Ht,
    HEADS: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    nothing = Matrix(None, 0, 0)
    operands = Operands(x, nothing, weight, nothing, None, None, None)
    acc, _ = tile(operands, n, o, N, Hs, Hs, Ht, Ht, HEADS, dtype, BLOCK_N, BLOCK_V, BLOCK_H)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + tl.minimum(o, Hs - 1)).to(dtype)[None, :]
    mask = (n < N)[:, None] & (o < Hs)[None, :]
    tl.store(out_ptr + n.to(tl.int64)[:, None] * stride_on + o[None, :], acc, mask=mask)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, *, tf32: bool, config: TileConfig | None = None) -> Tensor:
    """Return x (N, Ht) · weight (Hs, Ht)ᵀ + bias (Hs,), (N, Hs) in x's dtype."""
    (N, Ht), Hs = x.shape, weight.shape[0]
    out = torch.empty(N, Hs, device=x.device, dtype=x.dtype)
    if N == 0:
        return out
    if config is None:
        config = choose("projection", weight, N, lambda c: project(x, weight, bias, tf32=tf32, config=c), [Ht])
    projection_kernel[(triton.cdiv(N, config.block_n), triton.cdiv(Hs, config.block_v))](
        matrix(x), matrix(weight), bias, out, out.stride(0), N, Hs, Ht,
        HEADS=HeadFlags(even_s=Ht % config.block_h == 0, precision=PRECISION[tf32]), DOUBLE=x.dtype == torch.float64,
        **config.blocks(), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
