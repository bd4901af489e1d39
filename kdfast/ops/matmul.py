"""The matrix products with the vocabulary that use the vendor's library: precision and extents in one place.

    logits           Z (m, V)  = X (m, H) · Wᵀ        Z in fp32 (fp64), whatever the dtype of X and W
    input_gradient   dX (m, H) = G (m, V) · W         in fp32 (fp64)
    weight_gradient  dW (V, H) = Gᵀ · X               summed in fp32 (fp64)

The last two can add to their output. Each takes u = 2·m·V·H operations. With 16-bit operands on a GPU, G has their
dtype, and products accumulate and return fp32. CPUs have no 16-bit product with an fp32 result, nor has ROCm before
PyTorch 2.10. There G stays fp32, and products are fp32 products of operands widened one vocabulary block at a time,
except that dX on CPUs that multiply bf16 is a bf16 product, rounded once. (A bf16 dW product was no faster than an fp32
one on the CPUs we tried, and would round once more per chunk.)

Vendors' GPU kernels may be several times slower for a contiguous extent that is not a multiple of 8, whatever the row
stride (NVIDIA's "align1"). So on a GPU a vocabulary of 50257 is multiplied as 50256 entries, then one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

VOCAB_BLOCK = 8192  # rows of W widened, or of dW added, at a time: temporaries of 8192·H·4 bytes
SINCE_2_10 = torch.__version__ >= "2.10"


def tf32(device: torch.device) -> bool:
    """Return whether PyTorch is set to round fp32 operands of products on `device` to TF32. Kernels follow that setting
    where Triton can; of AMD's chips only gfx942 has it."""
    if device.type != "cuda":
        return False
    if torch.version.hip is not None and "gfx942" not in torch.cuda.get_device_properties(device).gcnArchName:
        return False
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch ≥ 2.9
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if setting is None else setting == "tf32"


def widens(device: torch.device) -> bool:
    """Return whether 16-bit operands must be widened because `device` has no product of them with an fp32 result."""
    return device.type == "cpu" or (torch.version.hip is not None and not SINCE_2_10)


def gradient_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which gradients of logits are stored for the products, for heads of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32 if widens(device) else dtype


def extent(device: torch.device) -> int:
    """Return the number that the vocabulary's extent in a product must be a multiple of, or less than."""
    return 1 if device.type == "cpu" else 8


def stretches(total: int, device: torch.device, size: int | None = None) -> Iterator[slice]:
    """Yield the slices of range(total) for products, in order, each at most `size` long if that is given."""
    even = total - total % extent(device)
    yield from blocks(even, size or max(1, even))
    if even < total:
        yield slice(even, total)


def logits(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write out = x · weightᵀ and return it.  x (m, H), weight (V, H) of one dtype; out (m, V) fp32 or fp64, possibly
    with strided rows."""
    widened = x.dtype != weight.dtype or not _multiplies(x, out.dtype)
    x = x.to(out.dtype) if widened else x
    for ids in stretches(weight.shape[0], x.device, VOCAB_BLOCK if widened else None):
        _multiply(x, weight[ids].to(x.dtype).t(), out[:, ids])
    return out


def input_gradient(g: Tensor, weight: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Write out = g · weight, or add to `out`, and return it.  g (m, V), weight (V, H), V > 0; out (m, H) fp32 or fp64.
    """
    widened = g.dtype != weight.dtype
    if widened and weight.dtype == torch.bfloat16 and not g.is_cuda and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        product = torch.mm(g.to(torch.bfloat16), weight)
        return out.add_(product) if add else out.copy_(product)
    for ids in stretches(weight.shape[0], g.device, VOCAB_BLOCK if widened else None):
        _multiply(g[:, ids], weight[ids].to(g.dtype), out, add=add or ids.start > 0)
    return out


def weight_gradient(g: Tensor, x: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Write out = gᵀ · x, or add to `out`, and return it.  g (m, V), x (m, H); out (V, H) fp32 or fp64, or without
    `add` any dtype, to which the sums are rounded once."""
    x = x.to(g.dtype)
    for ids in stretches(out.shape[0], g.device):
        _multiply(g[:, ids].t(), x, out[ids], add=add)
    return out


def _multiplies(operand: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the device can multiply operands like this one into `dtype`."""
    return operand.dtype == dtype or (dtype == torch.float32 and operand.is_cuda and not widens(operand.device))


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write out = a · b, or add to `out`, summed in fp32 (fp64).  a, b of one dtype."""
    wide = torch.promote_types(out.dtype, torch.float32)
    if a.dtype == out.dtype == wide:
        out.addmm_(a, b, beta=int(add))  # beta=0 does not read out
    elif out.dtype == wide and _multiplies(a, wide) and not add:
        torch.ops.aten.mm.dtype_out(a, b, wide, out=out)
    elif out.dtype == wide and _multiplies(a, wide) and SINCE_2_10:  # added to fp32 without a temporary
        torch.ops.aten.addmm.dtype_out(out, a, b, wide, out=out)
    else:
        for rows in blocks(out.shape[0], VOCAB_BLOCK if add else len(out)):
            mixed = a.dtype != wide and _multiplies(a, wide)
            product = torch.ops.aten.mm.dtype(a[rows], b, wide) if mixed else torch.mm(a[rows], b)
            _ = out[rows].add_(product) if add else out[rows].copy_(product)


def blocks(total: int, size: int = VOCAB_BLOCK) -> Iterator[slice]:
    """Yield slices of at most `size` that make up range(total), in order."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
