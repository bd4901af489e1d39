"""What `engine="auto"` comes to."""

from unittest import mock

import pytest
import torch

from kdfast import engines
from kdfast.engines import choose
from kdfast.plan import Shape
from kdfast.plan.memory import portion

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MIB = 1 << 20


# a token's logits of two sides at V=50257, its rows padded to 50304: 0.38 MiB in fp32, 0.58 MiB with gradients in bf16
@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "teacher", "scratch", "engine", "chunk"),
    [
        ("cuda", torch.bfloat16, 8192, True, 0, "triton_chunked", 1024),
        ("cuda", torch.float32, 8192, True, 0, "triton_chunked", 1171),
        ("cuda", torch.float32, 8192, False, 0, "triton_chunked", 2048),
        ("cuda", torch.bfloat16, 300, True, 0, "triton_chunked", 300),
        ("cuda", torch.bfloat16, 8192, True, 100 * MIB, "triton_tiled", None),
        ("cuda", torch.bfloat16, 300, True, 100 * MIB, "triton_tiled", None),
        ("cuda", torch.bfloat16, 8, True, 100 * MIB, "triton_chunked", 8),
        ("cuda", torch.bfloat16, 8, True, 1 * MIB, "triton_tiled", None),
        ("cuda", torch.float64, 8192, True, 0, "torch", 1024),
        ("cuda", torch.float64, 8192, True, 1 * MIB, "torch", 1),
        ("cpu", torch.float32, 1024, True, 0, "torch", 256),
    ],
)
def test_auto(device, dtype, tokens, teacher, scratch, engine, chunk, monkeypatch):
    """The planner says so too."""
    monkeypatch.delenv("KDFAST_SCRATCH_BYTES", raising=False)
    sizes = {"tokens": tokens, "vocab": 50257, "teacher": teacher, "scratch_bytes": scratch}
    found = choose(torch.device(device), dtype, **sizes, anywhere=True)
    assert (found.engine, found.tokens) == (engine, chunk)
    planned = portion(Shape(tokens, 50257, 768, 1024, dtype, device, "projected" if teacher else "none", scratch))
    assert planned.engine == engine
    if chunk is not None:
        assert planned.passes == -(-tokens // chunk)


def test_where_triton_cannot_run_it_is_torch_and_says_why():
    sizes = {"tokens": 8192, "vocab": 50257}
    assert choose(CPU, torch.float32, **sizes) == choose(CPU, torch.float32, **sizes, anywhere=True)
    with mock.patch.object(engines, "unavailable", return_value=None):
        best = choose(CUDA, torch.bfloat16, **sizes)
    assert best.engine == "triton_chunked"
    with mock.patch.object(engines, "unavailable", return_value="has no block sizes for sm_50"):
        chosen = choose(CUDA, torch.bfloat16, **sizes)
    assert chosen == ("torch", best.tokens, "triton_chunked has no block sizes for sm_50")
