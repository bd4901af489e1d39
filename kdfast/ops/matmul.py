"""Every matrix product with the vocabulary that an engine hands to the vendor: precision in one place.

    logits           Z (m, V)  = X (m, H) · Wᵀ        Z in fp32 (fp64), whatever X and W are
    input_gradient   dX (m, H) = G (m, V) · W         returned in fp32 (fp64)
    weight_gradient  dW (V, H) += Gᵀ · X              accumulated in fp32 (fp64)

Each is u = 2·m·V·H operations. 16-bit operands: on a GPU G has their dtype, and products accumulate and return fp32.
A CPU has no 16-bit product with an fp32 result. There G stays fp32; logits and dW are fp32 products, of operands
widened a vocabulary block at a time; dX is a bf16 product, rounded once. (A bf16 dW product is no faster than an
fp32 one on the CPUs tried, and would be rounded once more per chunk.) fp16, for which CPUs have no fast product, is
widened throughout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

VOCAB_BLOCK = 8192  # rows of W widened, or of dW added up, at a time: 8192·H·4 bytes of temporary


def tf32(device: torch.device) -> bool:
    """Return whether PyTorch is set to round fp32 operands of products on `device` to TF32; kernels follow it."""
    if device.type != "cuda":
        return False
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch ≥ 2.9
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if setting is None else setting == "tf32"


def gradient_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which the gradients of the logits are kept for the products, for heads of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32 if device.type == "cpu" else dtype


def logits(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write out = x · weightᵀ and return it.  x (m, H), weight (V, H) of one dtype; out (m, V) fp32 or fp64, whose rows
    may be strided."""
    if x.dtype == weight.dtype == out.dtype:
        return torch.mm(x, weight.t(), out=out)
    if x.is_cuda and out.dtype == torch.float32 and x.dtype == weight.dtype:
        return torch.ops.aten.mm.dtype_out(x, weight.t(), out.dtype, out=out)
    x = x.to(out.dtype)
    for block in blocks(weight.shape[0]):
        torch.mm(x, weight[block].to(out.dtype).t(), out=out[:, block])
    return out


def input_gradient(g: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return g · weight.  g (m, V), weight (V, H) → (m, H) in `dtype` (fp32 or fp64)."""
    if g.dtype == weight.dtype:
        return _product(g, weight, dtype)
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.mm(g.to(torch.bfloat16), weight).to(dtype)
    out = torch.zeros(g.shape[0], weight.shape[1], dtype=dtype, device=g.device)
    for block in blocks(weight.shape[0]):
        out.addmm_(g[:, block].to(dtype), weight[block].to(dtype))
    return out


def add_input_gradient(g: Tensor, weight: Tensor, accumulator: Tensor) -> None:
    """Add g · weight to `accumulator`.  g (m, V), weight (V, H), accumulator (m, H) fp32 or fp64."""
    if g.dtype == weight.dtype and _accumulates(g, accumulator):
        _accumulate(accumulator, g, weight)
    else:
        accumulator += input_gradient(g, weight, accumulator.dtype)


def weight_gradient(g: Tensor, x: Tensor, accumulator: Tensor) -> Tensor:
    """Add gᵀ · x to `accumulator` and return it.  g (m, V), x (m, H), accumulator (V, H) fp32 or fp64."""
    x = x.to(g.dtype)
    if _accumulates(g, accumulator):
        return _accumulate(accumulator, g.t(), x)
    for block in blocks(accumulator.shape[0]):
        accumulator[block] += _product(g[:, block].t(), x, accumulator.dtype)
    return accumulator


def whole_weight_gradient(g: Tensor, x: Tensor, out: Tensor) -> None:
    """Write out = gᵀ · x, summed in fp32 (fp64) and rounded once.  g (m, V), x (m, H), out (V, H) of any dtype."""
    wide = torch.promote_types(out.dtype, torch.float32)
    out.copy_(_product(g.t(), x.to(g.dtype), wide))


def _accumulates(operand: Tensor, accumulator: Tensor) -> bool:
    """Return whether a product of such operands can be added to `accumulator` in its own call, without a temporary.
    Before PyTorch 2.10 a 16-bit product would not be added to fp32."""
    narrow = operand.is_cuda and accumulator.dtype == torch.float32 and torch.__version__ >= "2.10"
    return operand.dtype == accumulator.dtype or narrow


def _accumulate(accumulator: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a · b to `accumulator`."""
    if a.dtype == accumulator.dtype:
        return accumulator.addmm_(a, b)
    return torch.ops.aten.addmm.dtype_out(accumulator, a, b, accumulator.dtype, out=accumulator)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a · b, of one dtype, in `dtype`."""
    if a.is_cuda and a.dtype != dtype == torch.float32:
        return torch.ops.aten.mm.dtype(a, b, dtype)
    return torch.mm(a, b).to(dtype)


def blocks(total: int, size: int = VOCAB_BLOCK) -> Iterator[slice]:
    """Yield slices of at most `size` that make up range(total), in order."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
