"""Operations and bytes of every method, and the seconds they take on a known GPU: predictions, not measurements.

    seconds = 16-bit operations / products + fp32 operations / fp32 products + results + row work
    results = EXPOSED · bytes that the vendor's products write (and add to) / copies
    row work = max(bytes / copies, instructions / lanes)

Products and row work are added, and nothing else overlaps; launch gaps are left out, so a small N takes longer than
this says. u(H) = 2·N·V·H is one product with the vocabulary. Bytes are those of logits, their gradients and dW, each
counted every time a pass reads or writes it; operands that a product reads are not. Of triton_chunked and TRL the
products' results are known apart; everybody else's bytes are all row work.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdfast.plan import Shape
from kdfast.plan.memory import chunk_of, slab_width

from .gpus import Gpu, get_gpu
from .memory import live_bytes

TRITON_PRODUCTS = 0.6  # a Triton product's share of the vendor's rate: a guess, as in bench/gpu.py
EXPOSED = 0.5  # share of the time to write products that their operations don't hide: a guess
READS = 5 / 3  # of a logit by the row kernel, from memory: a third of the second one comes from L2
# executed per pair of logits on sm_90 (bench/results/gpu-predicted.md): with a cross entropy and decorrelation
ROW_INSTRUCTIONS, STATISTICS_INSTRUCTIONS, GRADIENT_INSTRUCTIONS = 56, 39, 31


@dataclass(frozen=True)
class Operations:
    """In units of u, by the head they go through."""

    student: int
    teacher: int = 0
    fp32: int = 0  # of the student's, products of fp32 operands whatever the inputs are
    triton: int = 0  # of all, products that a Triton kernel makes

    def __str__(self) -> str:
        parts = [(self.student, "Hs"), (self.teacher, "Ht")]
        return " + ".join(f"{n if n > 1 else ''}u({width})" for n, width in parts if n)


PLAIN = {"projected": Operations(6), "head": Operations(3, 1), "none": Operations(3)}  # nothing computed twice
TILED = {"projected": Operations(8, triton=4), "head": Operations(4, 2, triton=4), "none": Operations(4, triton=2)}
FP32 = {"projected": Operations(6, fp32=6), "head": Operations(3, 1, fp32=4), "none": Operations(3, fp32=3)}
SPECIAL = {
    "reference": FP32,
    "triton_tiled": TILED,
    "trl": {"head": Operations(4, 2)},
    "fla": {"head": Operations(3, 1, fp32=1)},  # dW of widened gradients
    "cce": {"none": Operations(4, triton=4)},  # gradients that it filters out are counted
}

# passes over one side's logits in plain torch: operators' reads and writes, forward and backward, and what products
# write and read. (passes a side with gradients, passes a side without, bytes of an entry, None = the inputs')
PASSES: dict[str, tuple[int, int, int | None]] = {
    "eager": (24, 12, 4),
    "eager_compiled": (6, 3, None),
    "reference": (30, 16, 4),
    "torch": (22, 12, 4),
    "liger_chunked": (24, 12, None),
    "torchtune": (16, 6, 4),
    "liger_triton_jsd": (14, 8, 4),
    "fla": (10, 3, None),
    "linear_cross_entropy": (9, 0, 4),
}


def operations(method: str, shape: Shape) -> Operations | None:
    """Return the matrix products of `method` for `shape`, forward and backward. None: the method is not for this."""
    return None if live_bytes(method, shape) is None else SPECIAL.get(method, PLAIN)[shape.teacher]


def predicted_seconds(method: str, shape: Shape, gpu: str | Gpu) -> float | None:
    """Predict the seconds of a forward and backward on `gpu`, a name of `GPUS` or a `Gpu`.

    None: the method is not for this shape, or not for a GPU.

    Raises ValueError: an unknown method or GPU.
    """
    device = get_gpu(gpu)
    made = operations(method, shape)
    if made is None or shape.device == "cpu" or shape.dtype.itemsize == 8:
        return None
    unit = 2 * shape.tokens * shape.vocab
    every = unit * (made.student * shape.student_width + made.teacher * shape.teacher_width)
    mean = every / (made.student + made.teacher)
    if shape.teacher == "projected":
        every += 4 * shape.tokens * shape.student_width * shape.teacher_width  # the projector and its gradient
    fp32, triton = made.fp32 * mean, made.triton * mean
    rate = device.products if shape.dtype.itemsize == 2 else device.fp32_products
    seconds = (every - fp32 - triton) / rate + fp32 / device.fp32_products + triton / (TRITON_PRODUCTS * rate)
    results, moved, instructions = traffic(method, shape)
    return seconds + EXPOSED * results / device.copies + max(moved / device.copies, instructions / device.lanes)


def traffic(method: str, shape: Shape) -> tuple[float, float, float]:
    """Return (bytes of the products' results, bytes of everything else, lane instructions of everything else)."""
    entries = shape.tokens * shape.vocab
    sides = 1 if shape.teacher == "none" else 2
    trained = 2 if shape.teacher == "projected" else 1  # sides that have gradients
    s, dW = shape.dtype.itemsize, shape.vocab * shape.student_width
    if method == "triton_chunked":
        chunks = -(-shape.tokens // chunk_of(shape, method))
        # fp32 logits; dW in fp32, which every chunk reads and writes, and its rounding
        results = entries * 4 * sides + dW * (8 * chunks + s)
        return results, entries * (4 * READS * sides + s * trained), entries * ROW_INSTRUCTIONS * sides / 2
    if method == "triton_tiled":
        slabs = -(-shape.vocab // slab_width(shape))
        # gradients written and read twice; dX in fp32 read and written a slab; dW through fp32 once
        moved = entries * 3 * s * trained + 8 * slabs * trained * shape.tokens * shape.student_width + dW * (8 + 3 * s)
        return 0.0, moved, entries * (STATISTICS_INSTRUCTIONS + GRADIENT_INSTRUCTIONS) * sides / 2
    if method == "trl":
        # fp32 tiles, in the forward and again in the backward; their reads, and the gradient, rounded
        chunks = -(-shape.tokens // 4096)
        return entries * (8 + 8) + 8 * chunks * dW, entries * (8 + 4 + 2 * s), 0.0
    if method == "cce":
        return 0.0, dW * 3 * s, entries * (STATISTICS_INSTRUCTIONS + GRADIENT_INSTRUCTIONS) / 2
    with_gradient, without, itemsize = PASSES[method]
    passes = with_gradient * trained + without * (sides - trained)
    if shape.teacher == "none":
        passes = min(passes, 10)  # a cross entropy: log_softmax, its gradient, three products
    return 0.0, entries * passes * (itemsize or s) + dW * 3 * s, 0.0
