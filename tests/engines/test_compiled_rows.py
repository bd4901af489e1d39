"""Row work that inductor has compiled: as exact as plain torch, and plain torch where it cannot be had."""

import logging
import multiprocessing
import shutil

import pytest
import torch
from confident import check, draw, row_gradients
from near_convergence import near_convergence, solve

from kdfast import JSD, AlphaBeta, Head, Logits, Projected, SkewKL, SkewReverseKL, fused_kd_loss
from kdfast.engines import compiled_rows

COMPILER = shutil.which(torch._inductor.config.cpp.cxx[1] or "")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
V = 200


@pytest.fixture(autouse=True)
def _compiling(monkeypatch):
    monkeypatch.setenv("KDFAST_COMPILE", "1")
    monkeypatch.setattr(compiled_rows, "LEAST", 0)
    monkeypatch.setattr(compiled_rows, "BLOCK", 8 * V)
    monkeypatch.setattr(compiled_rows, "_off", [])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def problem(kind, dtype=torch.float32, *, tokens=23, shorter=0, mask=False, bias=True, seed=0, **options):
    """(loss, metrics or None, gradients by name) of the torch engine, in `dtype`, of the same float32 numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, b, ht, Wt, P = (
        normal(tokens, 16),
        normal(V, 16) / 2,
        normal(V),
        normal(tokens, 24),
        normal(V, 24) / 2,
        normal(16, 24) / 5,
    )
    if mask:
        b[::7] = -torch.inf
    labels = torch.randint(V, (tokens,), generator=generator)
    labels[::5] = 1
    leaves = (
        {"hidden": hidden, "weight": weight} | ({"bias": b} if bias else {}) | ({"P": P} if kind == "projected" else {})
    )
    leaves = {name: leaf.to(dtype, copy=True).requires_grad_() for name, leaf in leaves.items()}
    transform = {name: options.pop(name) for name in ("softcap", "logit_scale") if name in options}
    student = Head(leaves["hidden"], leaves["weight"], leaves.get("bias"), **transform)
    if "anchor_weight" in options:
        options["anchor_targets"] = labels.clamp_min(2)
    logits = ht @ Wt[: V - shorter].T + (b[: V - shorter] if mask else 0)
    teacher = {
        "head": lambda: Head(ht.to(dtype), Wt[: V - shorter].to(dtype), b[: V - shorter].to(dtype) if mask else None),
        "projected": lambda: Projected(ht.to(dtype), leaves["P"]),
        "logits": lambda: Logits(logits.to(dtype)),
        "none": lambda: None,
    }[kind]()
    wants_labels = kind == "none" or options.get("return_metrics") or options.get("ce_weight")
    found = fused_kd_loss(student, teacher, labels if wants_labels else None, ignore_index=1, **options)
    loss, metrics = found if options.get("return_metrics") else (found, None)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), metrics, dict(zip(leaves, gradients, strict=True))


def compared(kind, **options):
    """Hold what is compiled, and plain torch, against float64's reference."""
    before = len(compiled_rows._functions)
    loss, metrics, gradients = problem(kind, engine="torch", **options)
    assert len(compiled_rows._functions) == before + 1
    exact, exact_metrics, exact_gradients = problem(kind, torch.float64, engine="reference", **options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KDFAST_COMPILE", "0")
        plain, _, plain_gradients = problem(kind, engine="torch", **options)
    assert abs(loss - exact) <= abs(plain - exact) + 2e-6 * abs(exact) + 1e-7
    for name, truth in exact_gradients.items():
        error, allowed = (float((g[name].double() - truth).norm()) for g in (gradients, plain_gradients))
        assert error <= 2 * allowed + 2e-6 * float(truth.norm()), name
    for ours, theirs in zip(metrics or (), exact_metrics or (), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert compiled_rows._off == []


CASES = {  # one in every run: each compiles for ten seconds
    "everything": (
        "projected",
        {"ce_weight": 0.5, "return_metrics": True, "softcap": 8.0, "logit_scale": 0.7, "anchor_weight": 0.2},
    ),
}
MORE = {
    "jsd": ("head", {"divergence": JSD(0.3), "ce_weight": 0.5, "shorter": 13, "vocab": "truncate"}),
    "given": ("logits", {"divergence": SkewKL(0.2), "bias": False}),
    "cross entropy": ("none", {"ce_weight": 1.0}),
    "reverse": ("projected", {"divergence": "reverse_kl", "teacher_grad": "projector"}),
    "symmetric": ("head", {"divergence": "symmetric_kl"}),
    "skew reverse": ("head", {"divergence": SkewReverseKL(0.4)}),
    "total variation": ("projected", {"divergence": "total_variation"}),
    "alpha beta": ("head", {"divergence": AlphaBeta(0.3, -0.6)}),
    "some ids": (
        "projected",
        {"divergence": SkewKL(0.2), "kd_vocab_mask": torch.arange(V) % 3 > 0, "ce_weight": 0.5, "anchor_weight": 0.2},
    ),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_as_exact_as_plain_torch(case):
    kind, options = (CASES | MORE)[case]
    compared(kind, **options)


@pytest.mark.slow
def test_anything_infinite_or_not_a_number():
    """Masked ids on both sides, a row that is NaN and counts, one that is NaN and does not."""
    compared("head", mask=True, bias=False, seed=1)
    hidden, weight = torch.randn(20, 16), torch.randn(V, 16)
    given = torch.randn(20, V)
    hidden[3], given[4, 5] = torch.nan, -torch.inf
    leaf = hidden.requires_grad_()
    weights = torch.ones(20)
    weights[3] = 0
    options = {"token_weights": weights, "engine": "torch"}
    loss = fused_kd_loss(Head(leaf, weight), Logits(given), **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    given[4, 5] = torch.nan
    assert fused_kd_loss(Head(leaf, weight), Logits(given), **options).isnan()
    assert compiled_rows._off == []


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kl", JSD(0.5)], ids=str)
def test_confident_rows(divergence):
    for agreement, size in (("none", 2.0), ("none", 5.0), ("most", 10.0)):
        tensors = draw(agreement, size)
        found = row_gradients(tensors, "head", divergence, torch.float32, "torch", temperature=0.5)
        check(found, tensors, "head", divergence, temperature=0.5)
    assert compiled_rows._off == []
    assert compiled_rows._functions


def test_near_convergence():
    """exp(x) − 1 for expm1(x), which inductor takes, would leave a KL of 4e-4 a tenth off."""
    tensors = near_convergence(torch.bfloat16, 0.02)
    _, kl, exact = solve(tensors, "head", torch.float64, "reference")
    _, value, found = solve(tensors, "head", torch.bfloat16, "torch")
    assert abs(value - kl) < 4e-6 * kl
    for ours, truth in zip(found, exact, strict=True):
        assert (ours - truth).norm() < 0.003 * truth.norm()
    assert compiled_rows._off == []


def test_one_function_for_any_number_of_rows():
    from torch._dynamo.utils import counters

    problem("head", bias=False)
    graphs = counters["stats"]["unique_graphs"]
    for tokens in (7, 23, 64, 200):
        problem("head", bias=False, tokens=tokens)
    assert counters["stats"]["unique_graphs"] == graphs


def test_no_compiler(monkeypatch, caplog):
    expected = problem("head", bias=False, divergence=JSD(0.7), engine="reference")
    monkeypatch.setattr(compiled_rows, "_functions", {})

    def nothing(*_, **__):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", nothing)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = problem("head", bias=False, divergence=JSD(0.7), engine="torch")
    torch.testing.assert_close(found, expected)
    assert ["no working" in record.getMessage() for record in caplog.records] == [False, True]


def test_where_it_is_not_wanted(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(compiled_rows, "_functions", {})
    with monkeypatch.context() as patched:
        patched.setenv("KDFAST_COMPILE", "0")
        problem("head")
    with monkeypatch.context() as patched:
        patched.setattr(compiled_rows, "LEAST", 1 << 21)
        problem("head")
    with monkeypatch.context() as patched:
        patched.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
        problem("head")
    assert compiled_rows._off == []
