"""The chunked engine: precision where it is hardest, the products it makes, and what it must not touch."""

import os
from types import SimpleNamespace

import pytest
import torch
from cases import LEAVES, V, copy, gradients, make, relative, student, teacher
from torch.nn.functional import linear

from kdfast import JSD, Head, Projected, fused_kd_loss, gemm
from kdfast.engines import chunked
from kdfast.engines.planning import gradient_scale
from kdfast.problem import Problem


def eager(case, kind, dtype, *, temperature, ce_weight, **head):
    """What a user would write: everything in `dtype`, logits included; loss and gradients."""
    import oracle

    c = copy(case, dtype)
    sources = {"P": c.P, "p": c.p} if kind == "projected" else {"Wt": c.Wt, "bt": c.bt}
    loss = oracle.loss(
        c.hs, c.W, c.b, ht=c.ht, **sources, labels=c.labels, temperature=temperature, ce_weight=ce_weight, **head
    )
    loss.backward()
    return loss, gradients(c)


# V: just below, at, above a multiple of 16, prime and odd. std 8 gives logits of ±100 at width 12, 800 ±1e4.
@pytest.mark.parametrize("v", [95, 96, 97, 101])
@pytest.mark.parametrize("kind", ["projected", "head"])
@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("weight_std", [0.3, 8.0, 800.0])
def test_float32_is_no_worse_than_eager(v, kind, temperature, weight_std):
    """|ours − truth| ≤ |eager in float32 − truth| + tolerance. The tolerance, relative to the truth's norm, is 2e-5:
    a few hundred roundings of 6e-8; at logits of 1e4 their own rounding (1e-3) is what eager's error is made of."""
    case = make(torch.float32, v=v, weight_std=weight_std)
    options = {"temperature": temperature, "ce_weight": 0.5}
    truth, truth_gradients = eager(case, kind, torch.float64, **options)
    theirs, their_gradients = eager(case, kind, torch.float32, **options)
    ours = copy(case, torch.float32)
    loss = fused_kd_loss(student(ours), teacher(ours, kind), ours.labels, scratch_bytes=5 * 2 * v * 4, **options)
    loss.backward()
    assert loss.dtype == torch.float32
    assert relative(loss, truth) <= relative(theirs, truth) + 2e-5
    for name, gradient in gradients(ours).items():
        allowed = relative(their_gradients[name], truth_gradients[name]) + 2e-5
        if weight_std == 800.0:  # a softmax of logits rounded at 1e-3 is a matter of luck row by row
            allowed = max(2 * allowed, 1e-3)
        assert relative(gradient, truth_gradients[name]) <= allowed, name


def near_convergence(dtype, noise, *, width=256, vocab=16384, rows=256):
    """A teacher that is the student plus `noise`: (hs, W, ht, Wt, P) in `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hs, W = normal(rows, width), normal(vocab, width) / 8
    ht, Wt = hs + noise * normal(rows, width), W + noise * normal(vocab, width) / 8
    P = torch.eye(width) + noise * normal(width, width) / width**0.5
    return [t.to(dtype) for t in (hs, W, ht, Wt, P)]


def solve(tensors, kind, dtype, engine, *, rounded=False, upstream=1.0, labels=None, **options):
    """(loss, KL, gradients) with the numbers of `tensors` in `dtype`; `rounded`: projected hidden states too."""
    hs, W, ht, Wt, P = (t.to(dtype, copy=True) for t in tensors)
    leaves = [t.requires_grad_() for t in ([hs, W, P] if kind == "projected" else [hs, W])]
    if kind == "head":
        source = Head(ht, Wt)
    elif rounded:
        projected = linear(ht, P)
        source = Projected(projected + (projected.to(tensors[0].dtype).to(dtype) - projected).detach())
    else:
        source = Projected(ht, P)
    loss, metrics = fused_kd_loss(Head(hs, W), source, labels, engine=engine, return_metrics=True, **options)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    return loss, metrics.kd, [leaf.grad for leaf in leaves]


# noise 0.02 is KL 4e-4, the figure the numerical policy is stated at
@pytest.mark.parametrize("noise", [0.2, 0.02, 0.005])
def test_bfloat16_near_convergence_own_head(noise):
    """Gradients within 0.3% of float64's on the same bf16 inputs, the value within 1e-4."""
    tensors = near_convergence(torch.bfloat16, noise)
    truth, kl, exact = solve(tensors, "head", torch.float64, "reference")
    if noise == 0.02:
        assert 2e-4 < kl < 8e-4
    loss, _, ours = solve(tensors, "head", torch.bfloat16, "torch")
    assert relative(loss, truth) < 1e-4
    for gradient, expected in zip(ours, exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative(gradient, expected) < 3e-3


@pytest.mark.parametrize("products", ["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("noise", [0.2, 0.02])
def test_bfloat16_near_convergence_projected(noise, products, capsys, monkeypatch):
    """The same where the truth also rounds the projected hidden states. What that rounding itself costs is printed:
    it is the price of projected hidden states in bf16, and no engine behind them can win it back."""
    if products == "as on a GPU":  # gradients of the logits rounded to bf16 before every product
        monkeypatch.setattr(gemm, "gradient_dtype", lambda dtype, device: dtype)
    tensors = near_convergence(torch.bfloat16, noise)
    truth, kl, exact = solve(tensors, "projected", torch.float64, "reference", rounded=True)
    loss, _, ours = solve(tensors, "projected", torch.bfloat16, "torch")
    assert relative(loss, truth) < 1e-4
    for name, gradient, expected in zip(("hidden", "weight", "projector"), ours, exact, strict=True):
        assert relative(gradient, expected) < 3e-3, name
    unrounded = solve(tensors, "projected", torch.float64, "reference")
    errors = [relative(gradient, expected) for gradient, expected in zip(ours, unrounded[2], strict=True)]
    with capsys.disabled():
        print(f"\n  bf16 projected, KL {float(kl):.1e}: against unrounded projected hidden states, loss "
              f"{relative(loss, unrounded[0]):.1e}, hidden/weight/projector gradient "
              f"{' / '.join(f'{100 * e:.2f}%' for e in errors)}")  # fmt: skip


def test_float16_gradients_survive_a_loss_scaler():
    """The saved gradients carry no 1/N: with a scaler's upstream factor nothing has underflowed before it acts."""
    tensors = near_convergence(torch.float16, 0.02)
    for kind in ("head", "projected"):
        _, _, exact = solve(tensors, kind, torch.float64, "reference", rounded=True, upstream=2.0**16)
        _, _, ours = solve(tensors, kind, torch.float16, "torch", upstream=2.0**16)
        for gradient, expected in zip(ours, exact, strict=True):
            assert relative(gradient, expected) < 3e-3


KEY = {"logits": "z", "input_gradient": "x", "weight_gradient": "w"}


def units(calls, rows, width):
    """Operations by kind in units of one pass, u = 2·N·V·width."""
    total = dict.fromkeys(KEY.values(), 0.0)
    for call in calls:
        total[KEY[call.kind]] += call.operations / (2 * rows * V * width)
    return total


TABLE = [
    # teacher_grad, anchor → logits, input gradients, weight gradients, in u(Hs)
    ("full", 0.0, {"z": 2, "x": 2, "w": 2}),
    ("full", 0.3, {"z": 2, "x": 2, "w": 2}),
    ("projector", 0.0, {"z": 2, "x": 2, "w": 1}),
    ("none", 0.0, {"z": 2, "x": 1, "w": 1}),
    ("none", 0.3, {"z": 2, "x": 2, "w": 1}),
]


@pytest.mark.parametrize(("teacher_grad", "anchor", "expected"), TABLE)
def test_products_of_a_projected_teacher(teacher_grad, anchor, expected):
    case = make(n=20)
    case.labels.clamp_(min=0)
    with gemm.record() as calls:
        loss = fused_kd_loss(
            student(case), teacher(case, "projected"), case.labels, teacher_grad=teacher_grad, anchor_weight=anchor
        )
        loss.backward()
    assert units(calls, 20, case.hs.shape[1]) == expected
    if teacher_grad == "full":  # student and projected rows are one product
        assert len(calls) == 3


def test_products_nobody_wants_are_not_made():
    case = make(n=20)
    case.labels.clamp_(min=0)

    def count(source, **leaves):
        for name in LEAVES:
            getattr(case, name).requires_grad_(leaves.get(name, True))
        with gemm.record() as calls:
            loss = fused_kd_loss(student(case), teacher(case, source), case.labels)
            if loss.requires_grad:
                loss.backward()
        return units([call for call in calls if call.width == 12], 20, 12)

    frozen = dict.fromkeys(LEAVES, False)
    assert count("head") == {"z": 1, "x": 1, "w": 1}
    assert count("head", W=False, b=False) == {"z": 1, "x": 1, "w": 0}
    assert count("head", hs=False) == {"z": 1, "x": 0, "w": 1}
    assert count("projected", P=False, p=False) == {"z": 2, "x": 1, "w": 2}
    assert count("projected", W=False, b=False) == {"z": 2, "x": 2, "w": 0}
    assert count("projected", hs=False, W=False, b=False) == {"z": 2, "x": 1, "w": 0}
    assert count("projected", **frozen) == {"z": 2, "x": 0, "w": 0}
    with torch.no_grad():
        assert count("projected") == {"z": 2, "x": 0, "w": 0}


def test_products_of_per_row_losses():
    """reduction="none": the logits alone in the forward, everything again in the backward: 8u."""
    case = make(n=20)
    case.labels.clamp_(min=0)
    with gemm.record() as calls:
        loss = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, reduction="none")
        assert units(calls, 20, 12) == {"z": 2, "x": 0, "w": 0}
        loss.sum().backward()
    assert units(calls, 20, 12) == {"z": 4, "x": 2, "w": 2}


def test_ignored_rows_cost_no_products_on_a_cpu():
    case = make(n=20)
    case.labels[5:] = -100
    case.labels[:5] = 3
    with gemm.record() as calls:
        fused_kd_loss(student(case), teacher(case, "projected"), case.labels)
    assert {call.rows for call in calls} == {10}


def test_scratch_bounds_the_chunk(monkeypatch):
    case = make(n=20)
    case.labels.clamp_(min=0)

    def rows(**options):
        with gemm.record() as calls:
            fused_kd_loss(student(case), teacher(case, "projected"), case.labels, **options)
        return [call.rows // 2 for call in calls if call.kind == "logits"]

    pair = 2 * V * 8
    assert rows() == [20]
    assert rows(scratch_bytes=6 * pair) == [5, 5, 5, 5]  # equal chunks rather than 6, 6, 6, 2
    assert rows(scratch_bytes=1) == [1] * 20
    monkeypatch.setenv("KDFAST_SCRATCH_BYTES", str(10 * pair))
    assert rows() == [10, 10]
    assert rows(scratch_bytes=20 * pair) == [20]
    monkeypatch.setenv("KDFAST_SCRATCH_BYTES", "lots")
    with pytest.raises(ValueError, match="KDFAST_SCRATCH_BYTES"):
        rows()


def test_inputs_are_not_written_to_and_a_second_backward_is_right():
    for reduction in ("mean", "none"):
        case = make()
        before = copy(case)
        loss = fused_kd_loss(
            student(case), teacher(case, "projected"), case.labels, ce_weight=0.5, reduction=reduction
        ).sum()
        loss.backward(retain_graph=True)
        first = {name: gradient.clone() for name, gradient in gradients(case).items()}
        loss.backward(torch.tensor(2.0, dtype=torch.float64))
        for name, gradient in gradients(case).items():
            torch.testing.assert_close(gradient, 3 * first[name])
            assert torch.equal(getattr(case, name), getattr(before, name))


def test_a_gradient_handed_out_is_not_the_one_kept_for_another_backward():
    case = make()
    loss = fused_kd_loss(student(case), teacher(case, "projected"), case.labels)
    loss.backward(retain_graph=True)
    first = case.W.grad.clone()
    case.W.grad.mul_(7)  # an optimizer or gradient clipping writes here
    case.W.grad = None
    loss.backward()
    assert torch.equal(case.W.grad, first)


def test_chunking_does_not_change_the_numbers_in_bfloat16():
    """dW accumulates in fp32 over chunks: 32 chunks are no worse than one."""
    tensors = near_convergence(torch.bfloat16, 0.02, vocab=2048)
    _, _, exact = solve(tensors, "head", torch.float64, "reference")
    errors = []
    for scratch in (1 << 30, 2 * 2048 * 6 * 8):
        os.environ["KDFAST_SCRATCH_BYTES"] = str(scratch)
        try:
            errors.append(relative(solve(tensors, "head", torch.bfloat16, "torch")[2][1], exact[1]))
        finally:
            del os.environ["KDFAST_SCRATCH_BYTES"]
    assert errors[1] < 1.5 * errors[0]


def test_scale_is_a_power_of_two_and_survives_nan():
    def scale(coefficients, dtype=torch.bfloat16):
        x = SimpleNamespace(coefficients=coefficients, weight=torch.empty(0, dtype=dtype), dtype=torch.float32)
        return gradient_scale(x).item()

    assert scale(torch.tensor([[0.3, -0.7], [0.0, 0.0]])) == 0.5
    assert scale(torch.tensor([[0.3, -0.7], [0.0, 0.0]]), torch.float32) == 1
    assert scale(torch.tensor([[0.3, -0.7], [0.0, 0.0]]), torch.float16) == 0.5 / 1024
    assert scale(torch.zeros(3, 4)) == 1
    assert scale(torch.tensor([torch.nan, 1.0])) == 1
    assert scale(torch.zeros(3, 0)) == 1


def test_jsd_takes_its_second_pass_in_chunks():
    case = make()
    whole = fused_kd_loss(student(case), teacher(case, "head"), divergence=JSD(0.5))
    parts = fused_kd_loss(student(case), teacher(case, "head"), divergence=JSD(0.5), scratch_bytes=1)
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("kind", ["hidden", "head", "logits", "sparse", "none"])
def test_no_host_synchronisation_off_the_cpu(kind):
    """On the meta device, which takes the path of a GPU, whatever reads a value on the host raises."""
    N, width = 20, 12

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x = Problem(
        hidden=empty(N, width), weight=empty(V, width), bias=empty(V), logit_scale=0.5, softcap=30.0,
        teacher_hidden=empty(N, width) if kind in ("hidden", "head") else None,
        teacher_weight=empty(V, width) if kind == "head" else None,
        teacher_bias=None, teacher_logit_scale=1.0, teacher_softcap=None,
        teacher_logits=empty(N, V) if kind == "logits" else None,
        teacher_rows=empty(N, dtype=torch.long) if kind == "logits" else None,
        teacher_indices=empty(N, 5, dtype=torch.long) if kind == "sparse" else None,
        teacher_log_probs=empty(N, 5, dtype=torch.float32) if kind == "sparse" else None, teacher_tail="bucket",
        labels=empty(N, dtype=torch.long),
        anchor_targets=empty(N, dtype=torch.long) if kind == "hidden" else None, temperature=empty(dtype=torch.float32),
        coefficients=empty(3, N, dtype=torch.float32), active=empty(N, dtype=torch.bool), divergence_name="jsd",
        divergence_parameters=[0.5], teacher_grad="full", valid_vocab=V - 3, kd_vocab=V - 3, ce_term=True,
        anchor_term=kind == "hidden",
        want_metrics=True, per_row=False, need_hidden=True, need_weight=True, need_bias=True,
        need_teacher_hidden=kind == "hidden", engine="torch", scratch_bytes=7 * V * 6,
    )  # fmt: skip
    with gemm.record() as calls:
        result = chunked.run(x)
    assert result.weight.shape == (V, width)
    assert len(calls) > 3
    with pytest.raises(RuntimeError, match="meta"):  # the instrument works
        x.active.nonzero().numel()
