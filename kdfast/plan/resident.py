"""What a CPU process holds beyond PyTorch's own allocations, term by term; measured with torch 2.13's CPU wheel, glibc.

Not predicted: tensors under 32 MiB that come and go. glibc takes them from its heap, which it gives back late or never,
and a method whose logits are that small (eager at N=256, V=32000; torchtune's chunks) holds up to twice its live bytes.
"""

from __future__ import annotations

import torch

from kdfast import gemm
from kdfast.plan.ours import chunk_of
from kdfast.plan.shape import Shape

PRODUCT_BUFFERS = 6 << 20  # bytes a thread: operands of a product as MKL packs them
HEAP = 32 << 20  # bytes of the largest block that glibc takes from its heap


def beyond_allocations(method: str, x: Shape) -> int:
    """Bytes; 0 on a GPU."""
    if x.device != "cpu":
        return 0
    extra = PRODUCT_BUFFERS * torch.get_num_threads()
    if method == "torch" and x.narrow:
        # blocks that are widened or rounded for a product, one at a time: the largest of them stays in the heap. Where
        # something small has come to lie between them more stays, and that changes from run to run (docs/planning.md)
        widths = [x.student_width] + [x.teacher_width] * (x.teacher == "head")
        blocks = [min(x.vocab, gemm.VOCAB_BLOCK) * width * x.wide for width in widths]
        if x.dtype == torch.bfloat16:
            blocks.append((2 if x.teacher == "projected" else 1) * chunk_of(x, "torch") * x.vocab * 2)
        extra += max((block for block in blocks if block < HEAP), default=0)
    return extra
