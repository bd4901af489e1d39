"""Column sums of the logits' gradients: the bias's gradient. out_V += Σ_m weight_m·g_mV, accumulated in fp32 (fp64).

One program a block of columns, rows in order: no atomics. Reads g once.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_V, WARPS = 32, 64, 4  # 16-bit rows of 128 bytes; V/64 programs fill any chip at V ≥ 32K


@triton.jit(do_not_specialize=["M"])
def column_sums_kernel(
    g_ptr, stride_g,  # (M, V)
    weights_ptr,  # (M,) or None: all 1
    out_ptr,  # (V,)
    M, V,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
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
    """out (V,) += Σ_m weights_m·g_mV.  g (M, V), weights (M,) or None for ones."""
    M, V = g.shape
    column_sums_kernel[(triton.cdiv(V, BLOCK_V),)](
        g, g.stride(0), weights, out, M, V, BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, num_warps=WARPS
    )
