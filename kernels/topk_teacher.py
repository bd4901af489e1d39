"""A sparse teacher's entries on the device: their bit mask over the vocabulary, their logits, their gradients.

indices (N, K) int64 ascend in each row. Each kernel reads K numbers per token and nothing of size N × V, except for the
mask from `bits`, one bit per entry of the vocabulary: a thirty-second of the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_K, BLOCK_H, WARPS = 64, 64, 4


@triton.jit(do_not_specialize=["N"])
def bits_kernel(
    indices_ptr, stride_i, chosen_ptr, stride_c, bits_ptr, words, N, K, R: tl.constexpr, BLOCK: tl.constexpr
):
    n = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    for first in range(0, K, BLOCK):
        k = (first + tl.arange(0, BLOCK))[None, :]
        mask = (n < N) & (k < K)
        v = tl.load(indices_ptr + n * stride_i + k, mask=mask, other=0)
        chosen = tl.load(chosen_ptr + n * stride_c + k, mask=mask, other=0) != 0
        bit = tl.full([R, BLOCK], 1, tl.int32) << (v % 32).to(tl.int32)
        tl.atomic_or(bits_ptr + n * words + v // 32, bit, mask=chosen)


def bits(indices: Tensor, chosen: Tensor, vocab: int) -> Tensor:
    """Return a bit mask (N, words), int32, with the bits of the chosen (N, K) ids set, in any order of its atomics."""
    (N, K), words = indices.shape, triton.cdiv(vocab, 32)
    out = indices.new_zeros(N, words, dtype=torch.int32)
    if N:
        R, BLOCK = _shape(indices)
        bits_kernel[(triton.cdiv(N, R),)](
            indices, indices.stride(0), chosen, chosen.stride(0), out, words, N, K, R=R, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N"])
def support_logits_kernel(
    x_ptr, stride_xn, stride_xh,  # (N, H)
    w_ptr, stride_wv, stride_wh,  # (V, H)
    indices_ptr, stride_i,  # (N, K)
    out_ptr,  # (N, K)
    N, K, H,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    mask = (n < N) & (k < K)
    v = tl.load(indices_ptr + n * stride_i + k, mask=mask, other=0)
    total = tl.zeros([R, BLOCK_K], dtype)
    for first in range(0, H, BLOCK_H):
        h = (first + tl.arange(0, BLOCK_H).to(tl.int64))[None, None, :]
        x = tl.load(x_ptr + n[:, :, None] * stride_xn + h * stride_xh, mask=(n < N)[:, :, None] & (h < H), other=0)
        w = tl.load(w_ptr + v[:, :, None] * stride_wv + h * stride_wh, mask=mask[:, :, None] & (h < H), other=0)
        total += tl.sum(x.to(dtype) * w.to(dtype), axis=2)
    tl.store(out_ptr + n * K + k, total, mask=mask)


def support_logits(x: Tensor, weight: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    """Fill and return out (N, K) = x_n · weight[indices_nk], summed in fp32 (fp64).  x (N, H), weight (V, H).

    Reads K rows of weight per token: 2·K·H bytes in 16 bits, mostly from L2."""
    (N, K), H = indices.shape, x.shape[1]
    if N:
        R, _ = _shape(indices)
        support_logits_kernel[(triton.cdiv(N, R), triton.cdiv(K, BLOCK_K))](
            x, x.stride(0), x.stride(1), weight, weight.stride(0), weight.stride(1), indices, indices.stride(0), out,
            N, K, H, R=R, BLOCK_K=BLOCK_K, BLOCK_H=BLOCK_H, num_warps=WARPS,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["first", "width", "N"])
def write_kernel(
    plane_ptr, stride_p, indices_ptr, stride_i, values_ptr, stride_v, first, width, N, K,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    for start in range(0, K, BLOCK):
        k = (start + tl.arange(0, BLOCK))[None, :]
        mask = (n < N) & (k < K)
        column = tl.load(indices_ptr + n * stride_i + k, mask=mask, other=-1) - first
        value = tl.load(values_ptr + n * stride_v + k, mask=mask, other=0)
        # equal ids hold equal values, so the order of writes does not matter
        tl.store(plane_ptr + n * stride_p + column, value, mask=mask & (column >= 0) & (column < width))


def write(plane: Tensor, indices: Tensor, values: Tensor, first: int = 0) -> None:
    """Set plane[n, indices_nk − first] = values_nk if plane (N, width) has that column; values (N, K)."""
    N, K = indices.shape
    if N:
        R, BLOCK = _shape(indices)
        write_kernel[(triton.cdiv(N, R),)](
            plane, plane.stride(0), indices, indices.stride(0), values, values.stride(0), first, plane.shape[1], N, K,
            R=R, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def _shape(indices: Tensor) -> tuple[int, int]:
    """Return a program's number of rows (many for the interpreter, which pays per operation) and entries at a time."""
    return 16 if indices.device.type == "cpu" else 1, min(1024, triton.next_power_of_2(indices.shape[1]))
