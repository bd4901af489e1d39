"""What the approximate functions of a GPU leave of a kernel's accuracy, in the interpreter. A GPU has test_gpu.py."""

import device_functions
import numpy as np
import pytest
import torch
from cases import relative
from near_convergence import errors_of_rows, near_convergence, solve

from kdfast import JSD, SkewKL, SymmetricKL
from kdfast.kernels import block_sizes
from kdfast.kernels.block_sizes import Row, RowConfig, TileConfig
from kdfast.ops import matmul

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has test_gpu.py"),
]
DIVERGENCES = ["forward_kl", "reverse_kl", JSD(0.5), SkewKL(0.1), SymmetricKL(0.5)]
OVER = [(divergence, "all ids") for divergence in DIVERGENCES] + [("forward_kl", "some"), (JSD(0.5), "some")]


@pytest.fixture(autouse=True)
def device_like(monkeypatch):
    device_functions.install(monkeypatch)
    tile = TileConfig(64, 2048, 512, 4, 1)
    monkeypatch.setattr(block_sizes, "INTERPRETER", Row(RowConfig(64, 4096, 4), *[tile] * 5, why="large problems"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("engine", ["triton_chunked", "triton_tiled"])
@pytest.mark.parametrize(("divergence", "over"), OVER, ids=str)
def test_values_of_rows_near_convergence(divergence, over, engine, dtype, monkeypatch):
    monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
    mask = torch.arange(3001) % 5 > 1 if over == "some" else None
    assert errors_of_rows(divergence, engine, dtype, mask=mask).max() <= 4e-6


@pytest.mark.parametrize("engine", ["triton_chunked", "triton_tiled"])
@pytest.mark.parametrize(("divergence", "over"), OVER, ids=str)
def test_sixteen_bit_gradients_near_convergence(divergence, over, engine, monkeypatch):
    """At a KL of 4e-4: within 0.3% of float64's, as with exact functions."""
    monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
    tensors = near_convergence(torch.float16, 0.02, width=128, vocab=4096, rows=64)
    options = {"divergence": divergence, "upstream": 2.0**14}  # as a loss scaler: fp16 gradients would underflow
    if over == "some":
        options["kd_vocab_mask"] = torch.arange(4096) % 5 > 1
    _, kl, exact = solve(tensors, "projected", torch.float64, "reference", rounded=True, **options)
    _, _, ours = solve(tensors, "projected", torch.float16, engine, **options)
    assert kl < 8e-4
    errors = [relative(gradient, expected) for gradient, expected in zip(ours, exact, strict=True)]
    assert max(errors) < 3e-3


def test_the_functions_are_as_far_off_as_a_devices():
    x = np.linspace(-100, 100, 100000, dtype=np.float32)
    y = np.float32(3) + np.abs(x[::-1])
    z = np.float32(0.6) + y / 128
    errors = (
        device_functions.exp2(x) / np.exp2(x.astype(np.float64)) - 1,
        device_functions.log2(z) - np.log2(z.astype(np.float64)),
        device_functions.divide(x, y) / (x.astype(np.float64) / y) - 1,
    )
    for error in errors:
        assert 2**-23 < np.abs(error).max() < 1.3 * 2**-22
    special = np.float32([-np.inf, -140, 0, np.inf, np.nan])
    np.testing.assert_array_equal(device_functions.exp2(special), np.float32([0, 0, 1, np.inf, np.nan]))
    np.testing.assert_array_equal(device_functions.divide(special, np.float32(4)), special / 4)
