"""What docs/conventions.md says and leaves to a test: figures, and checks that are too long for the page."""

import json

import documents
import pytest
import torch
from cases import relative
from near_convergence import near_convergence, solve

from kdfast import ForwardKL, Head, Logits, Projected, fused_kd_loss

PAGE = documents.source("docs/conventions.md")


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_errors_near_convergence():
    """The table holds the worst gradients of bench/results/accuracy-cpu.json."""
    entries = json.loads((documents.ROOT / "bench/results/accuracy-cpu.json").read_text())["entries"]
    for kind, method, label in (
        ("head", "kdfast torch", "kdfast, teacher's own head"),
        ("projected", "kdfast torch", "kdfast, through a projector"),
        ("head", "eager", "eager, bf16 logits"),
    ):
        rows = entries[f"accuracy-{kind}-bf16"]["rows"][method]
        worst = [max(rows[leaf][i] for leaf in rows if leaf != "value") for i in range(5)]
        cells = " | ".join(f"{x:.0%}" if x >= 0.1 else f"{x:.1%}" for x in worst)
        assert f"| {label} | {cells} |" in PAGE, label


def test_a_projected_teacher_is_rounded_to_the_students_dtype():
    """5% off at a KL of 4e-4, but for the CPU's `torch` engine or a student in fp32."""
    assert "5% off at a KL of 4e-4" in PAGE
    tensors = near_convergence(torch.bfloat16, 0.03, width=128, vocab=4096, rows=64)
    _, kl, exact = solve(tensors, "projected", torch.float64, "reference")
    _, _, rounded = solve(tensors, "projected", torch.float64, "reference", rounded=True)
    assert 4e-4 < kl < 5e-4
    assert 0.045 < max(relative(a, b) for a, b in zip(rounded, exact, strict=True)) < 0.055

    def off(dtype, engine):
        hs, W, ht, _, P = tensors
        hs, W = hs.to(dtype).detach().requires_grad_(), W.to(dtype).detach().requires_grad_()
        loss = fused_kd_loss(Head(hs, W), Projected(ht, P), engine=engine)
        found = torch.autograd.grad(loss, [hs, W])
        return max(relative(a, b) for a, b in zip(found, exact, strict=False))

    assert off(torch.bfloat16, "reference") > 0.045
    assert off(torch.bfloat16, "torch") < 0.005
    assert off(torch.float32, "reference") < 0.001


def test_the_value_of_a_kl():
    h, W = torch.randn(32, 64), torch.randn(4096, 64) * 0.25
    z_t, z_s = (h + 0.005 * torch.randn(32, 64)) @ W.T, h @ W.T
    log_p, log_q = z_t.log_softmax(-1), z_s.log_softmax(-1)
    p, q, g = log_p.exp(), log_q.exp(), log_p - log_q
    exact = ForwardKL().pointwise(z_t.double().log_softmax(-1), z_s.double().log_softmax(-1)).sum(-1)
    assert exact.mean() < 1e-4

    def error(terms):
        return relative(terms.sum(-1), exact)

    assert error(p * g) > 1e-3
    assert error(p * (g + torch.expm1(-g))) < 1e-5
    assert error(ForwardKL().terms(p, q, g).f) < 1e-5  # what the engines sum


def test_gradients_shrink_with_the_square_of_the_temperature():
    h_s, W, teacher = double(6, 8).requires_grad_(), double(40, 8), Head(double(6, 12), double(40, 12))

    def size(tau, squared):
        loss = fused_kd_loss(Head(h_s, W), teacher, temperature=tau, temperature_squared=squared)
        return torch.autograd.grad(loss, h_s)[0].norm()

    assert 3.9 < size(400.0, False) / size(800.0, False) < 4.1
    assert 0.9 < size(400.0, True) / size(800.0, True) < 1.1


def test_no_gradient_to_a_projector_is_zero_and_no_error():
    P = double(8, 12).requires_grad_()
    student = Head(double(6, 8).requires_grad_(), double(40, 8))
    loss = fused_kd_loss(student, Projected(double(6, 12), P), teacher_grad="none")
    assert torch.autograd.grad(loss, P)[0].abs().sum() == 0


def test_infinities():
    z = torch.randn(4, 100)
    masked = torch.zeros(100)
    masked[90:] = -torch.inf
    student = Head(torch.randn(4, 8, requires_grad=True), torch.randn(100, 8), masked)
    assert fused_kd_loss(student, Logits(z + masked)).isfinite()  # masked on both sides
    assert fused_kd_loss(student, Logits(z)) == torch.inf  # on the student's alone
    assert fused_kd_loss(student, Logits(z), divergence="jsd").isfinite()
    large = Head(student.hidden * 1e3, student.weight)
    assert fused_kd_loss(large, Logits(1e4 * z), temperature=0.1).isfinite()


def test_the_same_call_has_the_same_bits():
    h, W = torch.randn(32, 64), torch.randn(4096, 64, requires_grad=True)
    loss = fused_kd_loss(Head(h, W), Head(h + 0.1, W.detach()))
    first, second = (torch.autograd.grad(loss, W, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(loss, fused_kd_loss(Head(h, W), Head(h + 0.1, W.detach())))


def test_second_derivatives_are_refused():
    h, W = torch.randn(4, 8), torch.randn(40, 8, requires_grad=True)
    (dW,) = torch.autograd.grad(fused_kd_loss(Head(h, W), Head(h + 0.1, W.detach())), W, create_graph=True)
    message = r"second derivatives are not available on a fused engine, whose .* Use engine='reference' \(or dr"
    with pytest.raises(RuntimeError, match=message):
        dW.sum().backward()


def test_a_label_past_the_padding_is_refused():
    labels = torch.tensor([3, 7, -100, 0, 39, 5])
    message = r"labels contains 39; expected ids from 0 to 29 \(valid_vocab=30\) or ignore_index=-100. Is it an"
    with pytest.raises(ValueError, match=message):
        fused_kd_loss(Head(double(6, 8), double(40, 8)), Logits(double(6, 40)), labels, valid_vocab=30)
