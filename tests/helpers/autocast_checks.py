"""What must hold under autocast and a loss scaler, on a device: a head is computed as nn.Linear would be."""

from contextlib import ExitStack
from functools import partial

import torch
from cases import copy, make, relative, student
from teachers import leaves, sources

from kdfast import FusedKDLoss, Head, Projected, fused_kd_loss

FP16, FP32 = torch.float16, torch.float32


def to(case, device):
    for name, tensor in vars(case).items():
        setattr(case, name, tensor.detach().to(device).requires_grad_(tensor.requires_grad))
    return case


def results(case, kind, engine, given=None, autocast=()):
    """(loss, gradients by leaf) inside of the contexts in `autocast`, of sources made outside of them but "hidden"."""
    source, own = (None, {}) if kind == "hidden" else sources(case, kind, given)
    with ExitStack() as stack:
        for context in autocast:
            stack.enter_context(context)
        if kind == "hidden":  # by the user's own nn.Linear
            source = Projected(torch.nn.functional.linear(case.ht, case.P, case.p))
        loss = fused_kd_loss(student(case), source, case.labels, ce_weight=0.5, engine=engine, **own)
    loss.backward()
    return loss.detach(), {name: getattr(case, name).grad for name in leaves(kind)}


def check_autocast(device, engine, kind, dtype, **sizes):
    """The numbers of heads cast to `dtype`, gradients in the leaves' own; what the teacher gave stays as it is."""
    on = partial(torch.autocast, device, dtype=dtype)
    case = to(make(FP32, **sizes), device)
    loss, computed = results(copy(case, FP32), kind, engine, case, [on()])
    narrow = copy(case, dtype)
    expected, theirs = results(narrow, kind, engine, narrow if kind in ("head", "truncated", "masked") else case)
    assert loss.dtype == FP32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    _, exact = results(copy(case), kind, "reference", copy(case))
    for name, gradient in computed.items():
        assert gradient.dtype == FP32
        assert torch.equal(gradient, gradient.to(dtype).float())  # rounded where nn.Linear's is
        assert relative(gradient, theirs[name]) < 2 * torch.finfo(dtype).eps, name
        assert relative(gradient, exact[name]) < 8 * torch.finfo(dtype).eps, name
    off, plain = results(copy(case, FP32), kind, engine, case, [on(), on(enabled=False)]), copy(case, FP32)
    without = results(plain, kind, engine, case)
    assert torch.equal(off[0], without[0])
    assert all(torch.equal(off[1][name], without[1][name]) for name in computed)


def train(device, engine, kind, scale, *, steps=4, overflow=None):
    """A loop with a float16 autocast: [(loss, gradients, loss scale, whether the step was taken)]."""
    torch.manual_seed(0)
    case = to(make(FP32, n=9, v=61), device)
    body = torch.nn.Linear(case.hs.shape[1], case.hs.shape[1]).to(device)
    parameters = [body.weight, *(getattr(case, name) for name in leaves(kind) if name != "hs")]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    scaler = torch.amp.GradScaler(device, init_scale=scale, enabled=scale > 0)
    criterion, (source, own) = FusedKDLoss(engine=engine, ce_weight=0.5), sources(case, kind)
    history = []
    for step in range(steps):
        before = body.weight.detach().clone()
        with torch.autocast(device, dtype=FP16):
            loss = criterion(Head(body(case.hs.detach()), case.W, case.b), source, case.labels, **own)
        scaler.scale(loss * (overflow if step == 1 and overflow else 1)).backward()
        scaler.unscale_(optimizer)
        gradients = [parameter.grad.clone() for parameter in parameters]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        history.append((loss.detach(), gradients, scaler.get_scale(), not torch.equal(before, body.weight)))
    return history


def check_grad_scaler(device, engine, kind):
    """Scaled and unscaled again, gradients are those without a scaler, up to float16's rounding; a step whose gradients
    overflow is left out, at half the scale."""
    plain, scaled = train(device, engine, kind, 0), train(device, engine, kind, 2.0**12)
    assert scaled[-1][0] < scaled[0][0]
    for (loss, theirs, _, _), (same, ours, _, taken) in zip(plain, scaled, strict=True):
        assert taken
        assert relative(same, loss) < 1e-3
        assert all(relative(a, b) < 2e-3 for a, b in zip(ours, theirs, strict=True))
    history = train(device, engine, kind, 2.0**12, overflow=2.0**12)
    assert [taken for *_, taken in history] == [True, False, True, True]
    assert [scale for *_, scale, _ in history] == [2.0**12, 2.0**11, 2.0**11, 2.0**11]
    assert not all(gradient.isfinite().all() for gradient in history[1][1])
    assert all(loss.isfinite() for loss, *_ in history)
