"""Under autocast a head is computed as nn.Linear would be, on any device; and a loss scaler in a real loop of float16.

The checks take the device: tests/gpu/test_gpu.py calls them for a GPU.
"""

import pytest
import torch
from autocast_checks import check_autocast, check_grad_scaler
from cases import make
from teachers import ENGINES, SOME, loss_of

from kdfast import Head, fused_kd_loss
from kdfast.ops import matmul

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(("engine", "kind"), SOME)
def test_heads_are_computed_as_linear_does(engine, kind):
    check_autocast("cpu", engine, kind, BF16 if engine in ("reference", "torch") else FP16, n=9, v=61)


def test_float64_is_left_alone():
    case = make()
    with torch.autocast("cpu"):
        loss = loss_of(fused_kd_loss, case, "head")
        with pytest.raises(ValueError, match=r"Head.weight is torch.float32 and .* torch.float64"):
            fused_kd_loss(Head(case.hs, case.W.float()), None, case.labels, ce_weight=1.0)
    assert torch.equal(loss, loss_of(fused_kd_loss, case, "head"))


@pytest.mark.parametrize(("engine", "kind"), [("torch", "bucket"), *((engine, "projected") for engine in ENGINES)])
def test_grad_scaler(engine, kind):
    check_grad_scaler("cpu", engine, kind)


@pytest.mark.parametrize("engine", ["torch", "triton_chunked"])
def test_grad_scaler_with_sixteen_bit_gradients_of_logits(engine, monkeypatch):
    """As on a GPU: they saturate, but what becomes of them under too large a scale is still infinite."""
    monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
    check_grad_scaler("cpu", engine, "projected")
