"""The formula of every contender, and what a process holds beyond PyTorch's allocations.

Not predicted: freed blocks of under 32 MiB that glibc keeps in its heap, more or fewer from run to run. A method whose
logits are that small (eager at N=256, V=32000; torchtune's chunks) may hold up to twice its live bytes, a bf16 run of
the `torch` engine some tens of MiB more. MALLOC_MMAP_THRESHOLD_=1048576 in the environment gives them back.
"""

from __future__ import annotations

import torch

from kdfast.plan import METHODS as OURS
from kdfast.plan import Shape
from kdfast.plan.memory import ROW, Formula, Phases, highest

from . import peers

PRODUCT_BUFFERS = 6 << 20  # bytes per thread: operands of a product as MKL packs them; measured with torch 2.13's wheel


def eager_compiled(x: Shape) -> Phases:
    """Estimate eager under torch.compile: logits and their gradients, everything between fused away.

    Fitted to a CPU's resident set. The compiler must keep logits of each side; its one backward kernel overwrites the
    student's with their gradient, but not those of a projected teacher's two sides.
    """
    L, W, A = x.logits, x.weight, x.hidden
    if x.teacher == "none":
        return {"logits": L, "products": L + W + A}
    if x.teacher == "head":
        return {"logits": 2 * L, "products": L + W + A}
    return {"logits": 4 * L + A, "products": L + 2 * W + 2 * A, "sum": 3 * W + 2 * A + x.projector}


def reference(x: Shape) -> Phases:
    """Count whole logits in fp32 (fp64)."""
    w, cast = x.wide, x.dtype.itemsize == 2
    L, A = x.tokens * x.vocab * w, x.tokens * x.student_width * w
    W = x.vocab * x.student_width * w  # in fp32: of W's gradient, and for 16-bit inputs of a copy that autograd keeps
    rows = ROW * x.tokens
    if x.teacher == "none":
        kept = A + cast * W + rows
        # logits, log_softmax, gradient; dW and its transpose
        return {"logits": 3 * L + kept, "products": L + W + A + kept, "transpose": 2 * W + A}
    teacher = x.tokens * x.teacher_width * x.dtype.itemsize
    mask = x.tokens * x.vocab  # of bytes, one for the divergence and one for each side that gets a gradient
    middle = 9 * L + 2 * mask + rows  # two sides' logits, scaled, log_softmax; p, masked
    if x.teacher == "head":
        kept = A + cast * W  # masked hidden states
        return {
            "teacher": 2 * L + kept + cast * x.vocab * x.teacher_width * w + teacher,
            "logits": middle + kept + teacher,
            "products": L + A + W + kept,
            "transpose": 2 * W + A,
        }
    kept = 2 * A + 2 * cast * W  # hidden states and projected ones; W widened for each of the two products
    return {
        "logits": middle + mask + kept + x.hidden * (1 + cast),
        "products": 2 * L + A + W + kept,
        "transpose": (2 + cast) * W + 2 * A + L,
        "sum": 3 * W + 2 * A,
    }


METHODS: dict[str, Formula] = {
    **OURS,
    "eager_compiled": eager_compiled,
    "reference": reference,
    "trl": peers.trl,
    "liger_chunked": peers.liger_chunked,  # not compiled
    "liger_triton_jsd": peers.liger_triton_jsd,
    "torchtune": peers.torchtune,
    "fla": peers.fla,
    "linear_cross_entropy": peers.linear_cross_entropy,
    "cce": peers.cce,  # from its source alone: not held against anything that ran
}


def live_bytes(method: str, shape: Shape) -> int | None:
    """Return the highest bytes of PyTorch's own allocations, above inputs and gradients; as kdfast.plan.peak_bytes."""
    return highest(METHODS[method], shape)


def peak_bytes(method: str, shape: Shape) -> int | None:
    """Return the same as a process has it: on a GPU the caching allocator's count, on a CPU the resident set."""
    live = live_bytes(method, shape)
    if live is None or shape.device != "cpu":
        return live
    untouched = 0
    if method == "trl":  # two tiles of full width, of which a small vocabulary never touches the rest
        untouched = 2 * min(shape.tokens, peers.TRL_TOKENS) * max(0, peers.TRL_VOCAB - shape.vocab) * 4
    return live + PRODUCT_BUFFERS * torch.get_num_threads() - untouched
