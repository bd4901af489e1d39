"""What `engine="auto"` comes to."""

from unittest import mock

import pytest
import torch

from kdfast import engines
from kdfast.engines import choose
from kdfast.ops import planning
from kdfast.plan import Shape
from kdfast.plan.memory import portion

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MIB = 1 << 20


# a token's logits of two sides at V=50257, its rows padded to 50304: 0.38 MiB in fp32, 0.58 MiB with gradients in bf16
@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "teacher", "scratch", "engine", "chunk"),
    [
        ("cuda", torch.bfloat16, 8192, True, 0, "triton_chunked", 1376),
        ("cuda", torch.float32, 8192, True, 0, "triton_chunked", 1376),
        ("cuda", torch.float32, 8192, False, 0, "triton_chunked", 2048),
        ("cuda", torch.bfloat16, 300, True, 0, "triton_chunked", 300),
        ("cuda", torch.bfloat16, 8192, True, 100 * MIB, "triton_tiled", None),
        ("cuda", torch.bfloat16, 300, True, 100 * MIB, "triton_tiled", None),
        ("cuda", torch.bfloat16, 8, True, 100 * MIB, "triton_chunked", 8),
        ("cuda", torch.bfloat16, 8, True, 1 * MIB, "triton_tiled", None),
        ("cuda", torch.float64, 8192, True, 0, "torch", 1376),
        ("cuda", torch.float64, 8192, True, 1 * MIB, "torch", 1),
        ("cpu", torch.float32, 1024, True, 0, "torch", 256),
    ],
)
def test_auto(device, dtype, tokens, teacher, scratch, engine, chunk, monkeypatch):
    """The planner says so too."""
    monkeypatch.delenv("KDFAST_SCRATCH_BYTES", raising=False)
    sizes = {"tokens": tokens, "vocab": 50257, "teacher": teacher, "scratch_bytes": scratch}
    dx = planning.InputGradient(1 + teacher, 768, 132)
    found = choose(torch.device(device), dtype, **sizes, dx=dx, anywhere=True)
    assert (found.engine, found.tokens) == (engine, chunk)
    planned = portion(Shape(tokens, 50257, 768, 1024, dtype, device, "projected" if teacher else "none", scratch))
    assert planned.engine == engine
    if chunk is not None:
        assert planned.passes == -(-tokens // chunk)


@pytest.mark.parametrize(
    ("rows", "width", "processors", "tokens", "mib", "chunk", "waves"),
    [
        (2, 768, 132, 8192, 0, 1376, 6),  # 22 × 6 tiles are one wave of 132; 1024 tokens, 16 × 6, would be eight
        (2, 768, 108, 8192, 0, 1024, 8),  # an A100: 18 × 6 tiles, 1152 tokens, would be eight chunks too
        (2, 4096, 132, 8192, 0, 1024, 32),  # 16 × 32 of 4 × 132
        (2, 1536, 132, 8192, 0, 1376, 12),
        (2, 512, 132, 8192, 0, 1024, 8),  # a whole wave would take twice the memory
        (1, 768, 132, 8192, 0, 1024, 8),
        (2, 768, 132, 12288, 900, 1376, 9),  # holds 1563 tokens, of which eight chunks would take 16 waves
        (2, 768, 132, 12288, 800, 1376, 9),
        (2, 768, 132, 12288, 700, 1120, 11),  # 1215 tokens: every chunk is one wave
        (2, 4096, 132, 8192, 1600, 2736, 33),  # 2048 tokens would save a wave and cost a pass over dW
        (2, 768, 132, 1000, 0, 1000, 1),
        (2, 768, 132, 1409, 0, 720, 2),
        (2, 768, 132, 20, 6, 10, 2),  # 10 tokens are all it holds
        (2, 768, 132, 0, 0, 1, 0),
        (0, 768, 132, 8192, 0, 1024, 0),  # no gradients
    ],
)
def test_chunks_fill_whole_waves(rows, width, processors, tokens, mib, chunk, waves, monkeypatch):
    """Of tiles of dX, 128 × 128, on a GPU of so many multiprocessors."""
    monkeypatch.delenv("KDFAST_SCRATCH_BYTES", raising=False)
    dx = planning.InputGradient(rows, width, processors)
    assert planning.chunk_tokens(tokens, 50304 * 12, CUDA, mib * MIB, dx) == chunk
    full, rest = divmod(tokens, chunk)
    assert full * dx.waves(chunk) + dx.waves(rest) == waves


def test_chunks_stay_within_the_scratch_and_cost_no_more_than_equal_ones():
    dx = planning.InputGradient(2, 768, 132)
    for tokens in range(1, 9000, 97):
        for holds in (1, 15, 16, 100, 1000, 1407, 1500, 3000, 8999):
            chunk = planning.chunk_tokens(tokens, 1000, CUDA, 1000 * holds, dx)
            equal = planning.chunk_tokens(tokens, 1000, CUDA, 1000 * holds)
            assert 1 <= chunk <= min(tokens, holds)
            assert dx.cost(tokens, chunk) <= dx.cost(tokens, equal)
            assert chunk >= tokens or chunk % 16 == 0 or -(-chunk // 16) * 16 > holds


def test_where_triton_cannot_run_it_is_torch_and_says_why():
    sizes = {"tokens": 8192, "vocab": 50257}
    assert choose(CPU, torch.float32, **sizes) == choose(CPU, torch.float32, **sizes, anywhere=True)
    with mock.patch.object(engines, "unavailable", return_value=None):
        best = choose(CUDA, torch.bfloat16, **sizes)
    assert best.engine == "triton_chunked"
    with mock.patch.object(engines, "unavailable", return_value="has no block sizes for sm_50"):
        chosen = choose(CUDA, torch.bfloat16, **sizes)
    assert chosen == ("torch", best.tokens, "triton_chunked has no block sizes for sm_50")
