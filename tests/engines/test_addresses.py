"""Addresses past 2³¹ elements: an index is 64 bits wide before a stride multiplies it, in every kernel.

Tensors lie in untouched pages, which take no memory. There is as much room before them as behind, so that an address
that has wrapped reads zeros and the test fails, and does not crash."""

import mmap
import sys

import pytest
import torch

from kdfast import Head, Logits, Projected, SparseLogits, fused_kd_loss
from kdfast.kernels.block_sizes import RowConfig, TileConfig
from kdfast.kernels.launch import Gradients, Heads, Term
from kdfast.kernels.row_kernel import Chunk, solve_rows
from kdfast.kernels.tiled_forward import statistics

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter"),
    pytest.mark.skipif(sys.platform != "linux", reason="pages that are not reserved are asked for as Linux has it"),
]
ROOM, FAR = 2**31, 2**28 + 16  # 8 × FAR passes 2³¹, and so does a step of 16 columns
SIZES = {
    "hidden": (18, 17), "weight": (20, 17), "teacher hidden": (18, 19), "teacher weight": (20, 19),
    "projected": (18, 17), "projector": (17, 19), "logits": (18, 20),
}  # fmt: skip


def far(values, *strides):
    """`values`, copied to where its elements lie so far apart."""
    span = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
    size, no_reserve = (ROOM + max(ROOM, span)) * values.dtype.itemsize, 0x4000
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except (OSError, ValueError, OverflowError) as error:
        pytest.skip(f"{size >> 30} GiB of addresses are not to be had: {error}")
    return torch.frombuffer(memory, dtype=values.dtype).as_strided(values.shape, strides, ROOM).copy_(values)


def solve(kind, engine, t):
    """Loss and gradients of float16 tensors by name, the student's hidden states and head among them."""
    student = Head(t["hidden"].requires_grad_(), t["weight"].requires_grad_())
    ids = torch.arange(3).repeat(18, 1) * 6 + torch.arange(18)[:, None] % 6
    teacher = {
        "head": lambda: Head(t["teacher hidden"], t["teacher weight"]),
        "projected": lambda: Projected(t["projected"]),
        "projector": lambda: Projected(t["teacher hidden"], t["projector"].requires_grad_()),
        "logits": lambda: Logits(t["logits"]),
        "sparse": lambda: SparseLogits(ids, torch.full((18, 3), -1.2), tail="bucket"),
    }[kind]()
    loss = fused_kd_loss(student, teacher, torch.arange(18), engine=engine, ce_weight=0.5)
    leaves = [t["hidden"], t["weight"], *([t["projector"]] if kind == "projector" else [])]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


KINDS = {
    "head": ["hidden", "weight", "teacher hidden", "teacher weight"], "projected": ["projected"],
    "projector": ["teacher hidden", "projector"], "logits": ["logits"], "sparse": ["hidden", "weight"],
}  # fmt: skip


@pytest.mark.parametrize("by", ["row", "column"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names])
@pytest.mark.parametrize("engine", ["triton_chunked", "triton_tiled"])
def test_of_an_input(engine, kind, name, by):
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(*size, generator=generator).half() for n, size in SIZES.items()}
    near = solve(kind, engine, {n: t.clone() for n, t in tensors.items()})
    tensors[name] = far(tensors[name], *((FAR, 1) if by == "row" else (1, FAR)))
    for found, expected in zip(solve(kind, engine, tensors), near, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)  # a product may be taken in another order
    assert near[1].any()


def test_of_statistics_and_coefficients():
    """Tensors that the library allocates itself: their strides are the number of tokens."""
    n, v = 6, 70
    z_s, z_t, grad_s, grad_t = (torch.randn(n, v) for _ in range(4))
    x, w = torch.randn(n, 20), torch.randn(v, 20)
    results = []
    for apart in (False, True):
        stats, coefficients = torch.zeros(6, n), torch.full((3, n), 0.5)
        if apart:
            stats, coefficients = far(stats, 2 * FAR, 1), far(coefficients, 4 * FAR, 1)
        one, ids, everything = torch.ones(()), torch.arange(n), (True,) * 4
        loss = Term("forward_kl", 0.0, one, coefficients, one, torch.ones(n, dtype=torch.bool), ids, ids, *everything)
        heads = Heads(x, w, None, 1.0, None, x, None, None, 1.0, None, None, None, v, v, False)
        chunk = Chunk(heads, loss, z_s, z_t, width=v, start=0)
        solve_rows(chunk, Gradients.of(grad_s, grad_t), stats=stats, config=RowConfig(2, 32, 4))
        of_rows, constants = stats.clone(), torch.zeros(12, n)
        config = TileConfig(16, 32, 16, 4, 1)
        statistics(heads, loss, stats=stats, constants=constants, decorrelate=True, config=config)
        results.append((of_rows, stats.clone(), constants, grad_s.clone(), grad_t.clone()))
    for near, there in zip(*results, strict=True):
        assert torch.equal(near, there)
    assert results[0][0].all(dim=1).any()


def test_rows_of_given_logits_are_aligned_where_every_stride_says_so():
    """Then they are read four at a time."""
    x, w = torch.randn(6, 8), torch.randn(72, 8)

    def even(logits):
        heads = Heads(x, w, None, 1.0, None, None, None, None, 1.0, None, logits, torch.arange(6) * 72, 72, 72, False)
        return heads.flags().given_even

    whole = torch.zeros(6, 72)
    assert even(whole)
    assert even(whole[:, :71])
    assert not even(torch.zeros(6, 71))
    assert not even(torch.zeros(72, 6).t())
    assert even(torch.zeros(2, 3, 72))
    assert not even(torch.zeros(2, 3 * 72 + 1)[:, 1:].unflatten(1, (3, 72)))
