"""Which products with the vocabulary are made: those of the design's table, and none whose result nobody wants.

Counted in units u(H) = 2·N·V·H, the vendor's products by bench/recorder.py, a kernel's by what its launcher is given.
The kernels' numbers are tested elsewhere; here none is launched.
"""

from contextlib import contextmanager
from itertools import product

import pytest
import recorder
import torch
from cases import HS, HT, LEAVES, V, make
from teachers import ENGINES, leaves, loss_of
from triton.runtime.interpreter import InterpretedFunction

from kdfast import fused_kd_loss
from kdfast.engines import triton_tiled

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's kernels can be left out")
FUSED = ENGINES[1:]
N = 5
TABLE = [
    # teacher, options → logits in u(Hs) and in u(Ht); gradients of student rows, of teacher rows, of W, in u(Hs)
    ("projected", {"teacher_grad": "full"}, 2, 0, 1, 1, 2),
    ("projected", {"teacher_grad": "projector"}, 2, 0, 1, 1, 1),
    ("projected", {"teacher_grad": "none"}, 2, 0, 1, 0, 1),
    ("projected", {"teacher_grad": "full", "anchor_weight": 0.3}, 2, 0, 1, 1, 2),
    ("projected", {"teacher_grad": "projector", "anchor_weight": 0.3}, 2, 0, 1, 1, 1),
    ("projected", {"teacher_grad": "none", "anchor_weight": 0.3}, 2, 0, 1, 1, 1),
    ("hidden", {"teacher_grad": "full"}, 2, 0, 1, 1, 2),
    ("hidden", {"teacher_grad": "none"}, 2, 0, 1, 0, 1),
    ("head", {}, 1, 1, 1, 0, 1),
    ("logits", {}, 1, 0, 1, 0, 1),
    ("renormalize", {}, 1, 0, 1, 0, 1),
    ("bucket", {}, 1, 0, 1, 0, 1),
    ("renormalize_both", {}, 1, 0, 1, 0, 1),
    ("weights", {}, 1, 0, 1, 0, 1),
    ("nothing", {}, 1, 0, 1, 0, 1),
]


@pytest.fixture(autouse=True)
def _no_launches(monkeypatch):
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *args, **options: None)


@contextmanager
def recorded():
    """All products made inside: the vendor's, and those of the tiled engine's kernels."""
    statistics, slab_gradients = triton_tiled.statistics, triton_tiled.slab_gradients

    def note(heads, first, last):
        sides = 2 if heads.teacher_hidden is not None and heads.teacher_weight is None else 1
        calls.append(recorder.Product("logits", sides * N, last - first, HS))
        if heads.teacher_weight is not None:
            shared = max(0, min(last, heads.kd_vocab) - first)
            calls.append(recorder.Product("logits", N, shared, heads.teacher_weight.shape[1]))

    def counted_statistics(heads, term, **how):
        for _ in range(2 if heads.teacher and term.entry.base == "" else 1):
            note(heads, 0, heads.vocab)
        return statistics(heads, term, **how)

    def counted_gradients(heads, term, grads, *, first, **how):
        note(heads, first, first + next(plane.shape[1] for plane in grads if plane is not None))
        return slab_gradients(heads, term, grads, first=first, **how)

    with pytest.MonkeyPatch.context() as patch, recorder.products() as calls:
        patch.setattr(triton_tiled, "statistics", counted_statistics)
        patch.setattr(triton_tiled, "slab_gradients", counted_gradients)
        yield calls


def problem(*wanted):
    case = make(n=N)
    case.labels.clamp_(min=0)  # a CPU would leave ignored rows out
    for name, want in zip(LEAVES, wanted or (True,) * 5, strict=True):
        getattr(case, name).requires_grad_(want)
    return case


def units(calls):
    """(logits in u(Hs), in u(Ht), input gradients, weight gradients)."""
    total = dict.fromkeys([("logits", HS), ("logits", HT), ("input_gradient", HS), ("weight_gradient", HS)], 0.0)
    for call in calls:
        total[call.kind, call.width] += call.operations / (2 * N * V * call.width)
    return tuple(total.values())


def combinations(kind):
    """Every choice of the gradients that are wanted, by leaf; the projector's weight and bias go together."""
    for hs, W, b, P in product((True, False), repeat=4):
        if kind in ("projected", "hidden") or not P:
            yield hs, W, b, P, P


@pytest.mark.parametrize("engine", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("kind", "options", "z_s", "z_t", "x_s", "x_t", "w"), TABLE)
def test_products_by_teacher_and_gradients_wanted(engine, reduction, kind, options, z_s, z_t, x_s, x_t, w):
    """A product is made for the gradient it ends in and for no other. Logits are computed once more where a gradient is
    taken of them later: in slabs, or in the backward of per-row losses."""
    for hs, W, b, *P in combinations(kind):
        case = problem(hs, W, b, *P)
        with recorded() as calls:
            loss = loss_of(fused_kd_loss, case, kind, engine=engine, reduction=reduction, **options)
            forward = units(calls)
            assert loss.requires_grad == any((hs, W, b, *P))
            if loss.requires_grad:
                loss.sum().backward()
        gradients = (hs * x_s + P[0] * x_t, W * w)
        twice = 1 + any((hs, W, b, P[0] * x_t))
        if reduction == "none":
            assert forward == (z_s, z_t, 0, 0)
        elif engine != "triton_tiled":
            assert forward == (z_s, z_t, *gradients)
            twice = 1
        assert units(calls) == (twice * z_s, twice * z_t, *gradients), (hs, W, b, P)
        for name, want in zip(LEAVES, (hs, W, b, *P), strict=True):
            assert (getattr(case, name).grad is not None) == (want and name in leaves(kind)), name


@pytest.mark.parametrize("engine", FUSED)
@pytest.mark.parametrize("kind", [row[0] for row in TABLE if row[1].get("teacher_grad", "full") == "full"])
def test_products_without_gradients(engine, kind):
    """The logits alone. A divergence that is no KL has to know both log-sum-exps first: the tiled engine computes its
    logits once more."""
    z_s, z_t = next(row[2:4] for row in TABLE if row[0] == kind)
    for divergence in ("forward_kl", "jsd"):
        with recorded() as calls, torch.no_grad():
            loss_of(fused_kd_loss, problem(), kind, engine=engine, divergence=divergence)
        dense = kind in ("projected", "hidden", "head", "logits")
        passes = 2 if engine == "triton_tiled" and divergence == "jsd" and dense else 1
        assert units(calls) == (passes * z_s, passes * z_t, 0, 0)


def test_products_of_per_row_losses_of_no_kl():
    """The tiled engine's second pass is not repeated in the backward."""
    with recorded() as calls:
        loss = loss_of(fused_kd_loss, problem(), "projected", engine="triton_tiled", reduction="none", divergence="jsd")
        assert units(calls) == (4, 0, 0, 0)
        loss.sum().backward()
    assert units(calls) == (6, 0, 2, 2)


def test_student_and_projected_rows_are_one_product():
    with recorded() as calls:
        loss_of(fused_kd_loss, problem(), "projected", engine="torch")
    assert [(call.kind, call.rows) for call in calls] == [
        ("logits", 2 * N), ("weight_gradient", 2 * N), ("input_gradient", 2 * N)
    ]  # fmt: skip
