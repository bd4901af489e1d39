"""Teachers given as whole logits, against the definition."""

import oracle
import pytest
import torch
from cases import N, V, copy, make, student
from definition import EVERY, SMALL, check, keep, mean
from oracle import value
from teachers import ENGINES

from kdfast import Logits, fused_kd_loss


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_dense_logits(divergence):
    case = make()
    z_t = oracle.logits(case.ht, case.Wt, case.bt).detach()

    def expected(c):
        z_s = oracle.logits(c.hs, c.W, c.b)
        kd = mean(value(divergence, (z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1)), keep(c))
        return 4 * kd + 0.5 * torch.nn.functional.cross_entropy(z_s, c.labels)

    check(expected, case, lambda c: Logits(z_t), divergence=divergence, ce_weight=0.5)


@pytest.mark.parametrize("engine", ENGINES)
def test_dense_logits_of_any_strides_are_read_in_place(engine):
    """A slice of a batch, (2, 7 of 8, V) with every other entry: flattening it would copy it."""
    case = make(n=14, leading=(2, 7))
    storage = torch.randn(2, 8, 2 * V, dtype=torch.float64)
    z_t = storage[:, :-1, ::2]
    with pytest.raises(RuntimeError, match="view"):
        z_t.view(-1, V)
    losses = []
    for logits in (z_t, z_t.contiguous()):
        c = copy(case)
        loss = fused_kd_loss(student(c), Logits(logits), c.labels, engine=engine, scratch_bytes=SMALL)
        loss.backward()
        losses.append((loss.detach(), c.W.grad, c.hs.grad))
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_logits_of_another_dtype(engine, dtype):
    case = make(torch.float32)
    z_t = torch.randn(N, V).to(dtype)
    losses = []
    for logits in (z_t, z_t.double()):
        c = copy(case, torch.float32)
        loss = fused_kd_loss(student(c), Logits(logits), engine=engine)
        loss.backward()
        assert loss.dtype == torch.float32
        losses.append((loss.detach(), c.W.grad))
    torch.testing.assert_close(*losses)
