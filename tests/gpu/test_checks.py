"""The checks that test_gpu.py makes on a GPU, on a CPU and at tiny sizes, where they must pass, and fail."""

import pytest
import teachers
import torch
from gpu_checks import FP32, TRITON, TWO, check_backwards, check_replay, check_slice, compare

from kdfast.ops import matmul

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py makes them there")


@pytest.mark.parametrize(("kind", "divergence"), TWO)
def test_the_comparison_itself(kind, divergence, monkeypatch):
    """On a CPU, tiny: the engines pass, and an engine whose dW is off by a thousandth doesn't."""
    arguments = ("cpu", "fp32", (7, 70, 16, 20), kind, divergence)
    compare(*arguments, TRITON, rows=3)
    weight_gradient = matmul.weight_gradient
    monkeypatch.setattr(matmul, "weight_gradient", lambda g, x, out, **how: weight_gradient(g * 1.001, x, out, **how))
    with pytest.raises(AssertionError, match=r"'triton_chunked', 'W'"):
        compare(*arguments, TRITON[:1], rows=3)


@pytest.mark.parametrize("kind", teachers.KINDS)
def test_the_checks_themselves(kind):
    for check in (check_replay, check_backwards, check_slice):
        check("cpu", FP32, (7, 70, 16, 20), "torch", kind)
