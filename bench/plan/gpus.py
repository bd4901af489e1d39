"""Known GPUs: the vendors' data sheets, and what share of them programs get.

A data sheet's peak is not reached. On an H200 one 16-bit product ran at 790 of 989 TFLOP/s, a copy at 4.3 of 4.8 TB/s;
the same two shares are assumed for every other GPU, which nobody here has measured.
"""

from __future__ import annotations

from dataclasses import dataclass

PRODUCTS = 790 / 989  # of the tensor peak
COPIES = 4.3 / 4.8  # of the bandwidth
CLOCK = 1.755 / 1.98  # of the clock that the fp32 peak is quoted at


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it; `source` says where each figure is from."""

    name: str
    memory_gib: float  # that a process can allocate, about: capacity less the driver's (and ECC's) part
    tensor_tflops: float  # bf16 and fp16, fp32 sums, dense
    fp32_tflops: float  # outside the tensor cores
    bandwidth_tb: float  # TB/s
    source: str

    @property
    def products(self) -> float:
        """Operations a second of a 16-bit product."""
        return self.tensor_tflops * 1e12 * PRODUCTS

    @property
    def fp32_products(self) -> float:
        """Operations a second of an fp32 product (no TF32)."""
        return self.fp32_tflops * 1e12 * CLOCK

    @property
    def copies(self) -> float:
        """Bytes a second, read and written."""
        return self.bandwidth_tb * 1e12 * COPIES

    @property
    def lanes(self) -> float:
        """Lane instructions a second: an fp32 peak counts two operations for each."""
        return self.fp32_tflops * 1e12 / 2 * CLOCK


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("B200", 178, 2250, 75, 7.7, "NVIDIA HGX B200 data sheet; dense is half of what it quotes"),
        Gpu("H200", 139, 989, 67, 4.8, "NVIDIA H200 SXM data sheet; 790 TFLOP/s and 4.3 TB/s measured"),
        Gpu("H100", 79, 989, 67, 3.35, "NVIDIA H100 SXM data sheet"),
        Gpu("A100-80GB", 79, 312, 19.5, 2.039, "NVIDIA A100 80GB SXM data sheet"),
        Gpu("A100-40GB", 39, 312, 19.5, 1.555, "NVIDIA A100 40GB SXM data sheet"),
        Gpu("L40S", 44, 362, 91.6, 0.864, "NVIDIA L40S data sheet"),
        Gpu("L4", 22, 121, 30.3, 0.3, "NVIDIA L4 data sheet"),
        Gpu("RTX-4090", 23.5, 165, 82.6, 1.008, "NVIDIA Ada GPU architecture white paper"),
        Gpu("RTX-3090", 23.5, 71, 35.6, 0.936, "NVIDIA Ampere GA102 white paper"),
        Gpu("MI300X", 191, 1307, 163.4, 5.3, "AMD Instinct MI300X data sheet"),
    )
}


def get_gpu(name: str | Gpu) -> Gpu:
    """Return a GPU by name, in any case. Raises ValueError that lists what is known."""
    if isinstance(name, Gpu):
        return name
    if name.lower() not in GPUS:
        raise ValueError(f"gpu={name!r}; expected one of {', '.join(gpu.name for gpu in GPUS.values())}")
    return GPUS[name.lower()]
