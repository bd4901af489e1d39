"""The matrix products alone, which no fused loss can beat without skipping some.

Floor B: the very products of one run of our chunked engine (`torch` on a CPU, `triton_chunked` on a GPU), replayed on
buffers of the same shapes and strides. Floor A: the same operations unchunked, V padded to 128: logits with an fp32
result, gradients with operands of the head's dtype. A CPU has no bf16 product with an fp32 result, so there floor A in
bf16 is its logits in fp32 (weights widened beforehand) and both gradients in bf16.
"""

from __future__ import annotations

import recorder
import torch
from recorder import Product
from torch import Tensor
from workloads import Inputs

from kdfast.ops import matmul
from kdfast.ops.planning import ALIGNMENT, row_stride

from .method import Method, Run
from .ours import CHUNKED, loss


def recorded(inputs: Inputs) -> tuple[list[Product], list[Product]]:
    """The products of our chunked engine: (forward without gradients, step)."""
    engine = "torch" if inputs.device == "cpu" else "triton_chunked"
    with recorder.products() as forward, torch.no_grad():
        loss(inputs, engine)
    with recorder.products() as step:
        inputs.clear()
        loss(inputs, engine).backward()
    inputs.clear()
    return forward, step


def floor_b(inputs: Inputs) -> tuple[Run, Run]:
    forward, step = recorded(inputs)
    dtype, device = inputs.workload.dtype, torch.device(inputs.device)
    V, most = step[0].vocab, max(call.rows for call in forward + step)
    widths = {call.width for call in step}
    stride = row_stride(V, device, "torch" if device.type == "cpu" else "triton_chunked")
    narrow = matmul.gradient_dtype(dtype, device)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    z = normal(most, stride, dtype=torch.float32)[:, :V]
    g = z if narrow == z.dtype else normal(most, stride, dtype=narrow)[:, :V]
    x, heads = ({H: normal(n, H) for H in widths} for n in (most, V))
    d_weight = torch.empty(V, inputs.workload.student_width, device=device)

    def replay(calls: list[Product]) -> None:
        first = True
        for kind, rows, _, width in calls:
            if kind == "logits":
                matmul.logits(x[width][:rows], heads[width], z[:rows])
            elif kind == "input_gradient":
                matmul.input_gradient(g[:rows], heads[width], z.new_empty(rows, width))
            else:
                matmul.weight_gradient(g[:rows], x[width][:rows], d_weight, add=not first)
                first = False

    return lambda: replay(forward), lambda: replay(step)


def floor_a(inputs: Inputs) -> tuple[Run, Run]:
    workload, device = inputs.workload, inputs.device
    V = -(-workload.vocab // ALIGNMENT) * ALIGNMENT
    sides = [(workload.tokens * (1 + (workload.teacher == "projected")), workload.student_width)]
    if workload.teacher == "head":
        sides.append((workload.tokens, workload.teacher_width))
    # a product with an fp32 result: of the operands as they are on a GPU, of widened ones on a CPU
    wide = workload.dtype if device == "cuda" else torch.float32
    products = []
    for rows, width in sides:
        x, head = (torch.randn(n, width, device=device, dtype=wide) for n in (rows, V))
        products.append((x, head.t(), torch.empty(rows, V, device=device)))
    (rows, width), narrow = sides[0], workload.dtype
    g, W, x = (torch.randn(*shape, device=device, dtype=narrow) for shape in ((rows, V), (V, width), (rows, width)))

    def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if a.dtype == torch.float32 or device == "cpu":
            return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
        if out is None:
            return torch.ops.aten.mm.dtype(a, b, torch.float32)
        return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)

    def forward() -> None:
        for x, head, out in products:
            product(x, head, out)

    def step() -> None:
        forward()
        product(g, W)
        product(g.t(), x)

    return forward, step


METHODS = [
    Method("floor A (whole products)", floor_a, CHUNKED, is_floor=True),
    Method("floor B (our products)", floor_b, CHUNKED, is_floor=True),
]
