"""At home in PyTorch: opcheck, torch.compile without a graph break, autocast, checkpointing, second derivatives."""

import inspect
import shutil
from dataclasses import fields

import pytest
import torch
from cases import LEAVES, copy, gradients, make, relative, student, teacher
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from kdfast import FusedKDLoss, Head, Projected, fused_kd_loss, operators
from kdfast.assemble import assemble
from kdfast.divergences import get_divergence
from kdfast.options import Options
from kdfast.problem import Problem

compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
ENGINES = ["torch", "triton_chunked", "triton_tiled"]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=compiler)]


def problem(case, kind, **options):
    """The operators' arguments for a case."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(fused_kd_loss).parameters.items()
        if name in Options.names()
    }
    defaults |= options
    defaults["divergence"] = get_divergence(defaults["divergence"])
    x = assemble(student(case), teacher(case, kind), case.labels, Options(**defaults)).problem
    return [getattr(x, field.name) for field in fields(Problem)]


@pytest.mark.parametrize("kind", ["hidden", "head", "none"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("engine", ENGINES)
def test_opcheck(kind, reduction, engine):
    case = make(n=6)
    arguments = [
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
        for a in problem(case, kind, reduction=reduction, ce_weight=0.5, return_metrics=True, engine=engine)
    ]
    torch.library.opcheck(operators.fused_kd, tuple(arguments))


def test_opcheck_of_the_backward_operators():
    case = make(n=6)
    with torch.no_grad():
        arguments = problem(case, "hidden", reduction="none")
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    names = [field.name for field in fields(Problem)]
    for name in ("need_hidden", "need_weight", "need_bias", "need_teacher_hidden"):
        arguments[names.index(name)] = True
    rows, upstream = torch.empty(0, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    torch.library.opcheck(operators.fused_kd_gradients, (*arguments, rows, upstream))
    one = torch.ones((), dtype=torch.float64)
    torch.library.opcheck(operators.finish_gradient, (torch.rand(4, 3), one.float(), one.float(), torch.rand(4, 3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["projected", "head"])
@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_without_a_graph_break_gives_the_same_numbers(backend, kind, engine):
    case = make(torch.float32)

    def step(c, temperature, kd_weight, reduction):
        return fused_kd_loss(
            student(c, softcap=5.0), teacher(c, kind), c.labels, temperature=temperature, kd_weight=kd_weight,
            ce_weight=0.5, reduction=reduction, token_weights=c.weights, return_metrics=True, engine=engine,
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for reduction in ("mean", "none"):
        for temperature in (1.0, 3.0):
            a, b = copy(case, torch.float32), copy(case, torch.float32)
            scalars = (torch.tensor(temperature), torch.tensor(0.7))
            expected, expected_metrics = step(a, *scalars, reduction)
            loss, metrics = compiled(b, *scalars, reduction)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(metrics, expected_metrics, equal_nan=True)
            expected.sum().backward()
            loss.sum().backward()
            for name in LEAVES:
                torch.testing.assert_close(gradients(b)[name], gradients(a)[name])


def test_compiled_does_not_recompile_for_tensor_weights():
    case = make(torch.float32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    criterion = torch.compile(FusedKDLoss(ce_weight=0.5), fullgraph=True, backend=counter)
    for value in (0.1, 0.4, 0.7):
        criterion(
            student(case), teacher(case, "projected"), case.labels, kd_weight=torch.tensor(value),
            temperature=torch.tensor(1 + value),
        )  # fmt: skip
    assert counter.frame_count == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_raise(reduction):
    case = make(n=4)
    loss = fused_kd_loss(student(case), teacher(case, "projected"), reduction=reduction).sum()
    for leaf in (case.hs, case.P):
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match=r"second derivatives .* engine='reference'"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("kind", ["projected", "head"])
def test_autocast_computes_heads_as_linear_does(kind):
    """Inside autocast: the numbers of heads cast to bf16, gradients in the leaves' own dtype."""
    case = make(torch.float32)
    narrow = copy(case, torch.bfloat16)
    for engine in ("reference", *ENGINES):
        wide = copy(case, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = fused_kd_loss(student(wide), teacher(wide, kind), wide.labels, ce_weight=0.5, engine=engine)
        loss.backward()
        expected = fused_kd_loss(student(narrow), teacher(narrow, kind), narrow.labels, ce_weight=0.5, engine=engine)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert all(gradient.dtype == torch.float32 for gradient in gradients(wide).values())
        exact = copy(case)
        fused_kd_loss(student(exact), teacher(exact, kind), exact.labels, ce_weight=0.5).backward()
        # bf16 inputs: each rounded at 2⁻⁹
        assert relative(wide.hs.grad, exact.hs.grad) < 2e-2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    plain, checkpointed = make(), make()

    def loss(case):
        def compute(hs, W, P):
            return fused_kd_loss(Head(hs, W), Projected(case.ht, P), case.labels, ce_weight=0.5)

        return compute

    loss(plain)(plain.hs, plain.W, plain.P).backward()
    c = checkpointed
    checkpoint(loss(c), c.hs, c.W, c.P, use_reentrant=use_reentrant).backward()
    for name, gradient in gradients(c).items():
        torch.testing.assert_close(gradient, gradients(plain)[name])


def test_sources_are_pytrees():
    case = make()
    head = student(case, softcap=3.0, logit_scale=0.5)
    leaves, spec = pytree.tree_flatten(head)
    assert [id(leaf) for leaf in leaves] == [id(case.hs), id(case.W), id(case.b)]
    again = pytree.tree_unflatten([leaf.detach() for leaf in leaves], spec)
    assert isinstance(again, Head)
    assert (again.softcap, again.logit_scale) == (3.0, 0.5)
    assert len(pytree.tree_leaves(teacher(case, "projected"))) == 3


def test_data_parallel_divisor_sums_to_the_whole():
    """Two halves with num_items_in_batch of both: losses and gradients add up to the whole batch's."""
    whole, halves = make(), make()
    fused_kd_loss(student(whole), teacher(whole, "projected"), whole.labels, ce_weight=0.5).backward()
    items = (halves.labels != -100).sum()
    for part in (slice(0, 9), slice(9, None)):
        fused_kd_loss(
            Head(halves.hs[part], halves.W, halves.b), Projected(halves.ht[part], halves.P, halves.p),
            halves.labels[part], ce_weight=0.5, num_items_in_batch=items,
        ).backward()  # fmt: skip
    for name in LEAVES:
        torch.testing.assert_close(gradients(halves)[name], gradients(whole)[name])
