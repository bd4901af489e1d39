"""What a CPU process holds beyond PyTorch's own allocations; measured with torch 2.13's CPU wheel.

Not predicted: freed blocks of under 32 MiB that glibc keeps in its heap, more or fewer from run to run. A method whose
logits are that small (eager at N=256, V=32000; torchtune's chunks) may hold up to twice its live bytes, a bf16 run of
the `torch` engine some tens of MiB more. MALLOC_MMAP_THRESHOLD_=1048576 in the environment gives them back.
"""

from __future__ import annotations

import torch

from kdfast.plan.peers import TRL_TOKENS, TRL_VOCAB
from kdfast.plan.shape import Shape

PRODUCT_BUFFERS = 6 << 20  # bytes a thread: operands of a product as MKL packs them


def beyond_allocations(method: str, x: Shape) -> int:
    """Bytes; 0 on a GPU."""
    if x.device != "cpu":
        return 0
    untouched = 0
    if method == "trl":  # two tiles of full width, of which a small vocabulary never touches the rest
        untouched = 2 * min(x.tokens, TRL_TOKENS) * max(0, TRL_VOCAB - x.vocab) * 4
    return PRODUCT_BUFFERS * torch.get_num_threads() - untouched
