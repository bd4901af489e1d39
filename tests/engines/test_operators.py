"""The operators behind the fused engines: torch.library's own checks, and what they must not do.

They read no value on the host, need none to know a shape, and take no derivative they don't have.
"""

from contextlib import contextmanager
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from cases import LEAVES, copy, make, student
from operator_arguments import arguments, problem
from teachers import ENGINES, KINDS, SOME, leaves, loss_of, sources
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from kdfast import fused_kd_loss
from kdfast.engines import operators
from kdfast.ops.problem import Problem

# torch 2.15's opcheck looks at .grad of what is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
FUSED = ENGINES[1:]
SMALL = {"n": 3, "v": 9, "hs": 4, "ht": 5}
OPERANDS = [kind for kind in KINDS if kind != "hidden"]  # which an operator sees as "projected"


def detached(values, keep_grad=False):
    return tuple(
        value.detach().requires_grad_(keep_grad and value.requires_grad) if isinstance(value, torch.Tensor) else value
        for value in values
    )


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("engine", FUSED)
def test_opcheck(kind, reduction, engine):
    values = problem(make(**SMALL), kind, reduction=reduction, return_metrics=reduction == "mean", engine=engine)
    opcheck(operators.fused_kd, detached(values, keep_grad=True))


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("engine", FUSED)
def test_opcheck_of_the_gradients(kind, engine):
    values = detached(problem(make(**SMALL), kind, reduction="none", engine=engine))
    rows, upstream = operators.fused_kd(*values)[-1], torch.rand(SMALL["n"], dtype=torch.float64)
    opcheck(operators.fused_kd_gradients, (*values, rows, upstream))


@pytest.mark.parametrize("teacher_grad", ["full", "none"])
def test_opcheck_with_strides_of_all_kinds_and_gradients_that_are_zero(teacher_grad):
    """What an operator returns is laid out as its fake implementation says, whatever its inputs' layouts."""
    case = make(**SMALL)
    for name, leaf in vars(case).items():
        if leaf.dim() == 2:
            setattr(case, name, leaf.detach().t().contiguous().t().requires_grad_(name in LEAVES))
    wanted = {"need_hidden": False, "need_weight": False, "need_bias": False} if teacher_grad == "none" else {}
    values = Problem(*detached(problem(case, "projected", reduction="none", teacher_grad=teacher_grad)))
    values = [getattr(replace(values, **wanted), field.name) for field in fields(Problem)]
    opcheck(operators.fused_kd_gradients, (*values, torch.empty(0), torch.rand(3, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck_of_the_finishing(dtype):
    saved = torch.rand(4, 3, dtype=torch.promote_types(dtype, torch.float32))
    like = torch.rand(3, 4, dtype=dtype).t()
    opcheck(operators.finalize_gradient, (saved, saved.new_tensor(1.5), like))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("wanted", [("P", "p"), ("P",), ("p",), ()])
def test_opcheck_of_the_projector(dtype, wanted):
    case = copy(make(**SMALL), dtype)
    for name in ("P", "p"):
        getattr(case, name).requires_grad_(name in wanted)
    bias = case.p if wanted != ("P",) else None
    opcheck(operators.project, (case.ht, case.P, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_raise(kind, reduction):
    case = make(**SMALL)
    loss = loss_of(fused_kd_loss, case, kind, reduction=reduction).sum()
    for name in leaves(kind):
        (gradient,) = torch.autograd.grad(loss, getattr(case, name), create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match=r"second derivatives .* engine='reference'"):
            gradient.sum().backward(retain_graph=True)


# values are not there


def elsewhere(place, *trees):
    """The same sources and options with every tensor put through `place`."""

    def one(leaf):
        return place(leaf.detach()).requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(one, trees)


class NoCopies(TorchDispatchMode):
    """From the host to the device the host waits for, so it must not happen, but for numbers it does not wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and result.is_meta:
            assert all(arg.is_meta for arg in args) or (kwargs or {}).get("non_blocking"), function
        return result


@contextmanager
def shapes_alone():
    """The meta device in place of a GPU: what reads a value raises, and so does what makes a tensor of the host's
    numbers. There is nothing to launch a kernel on."""

    def host_data(*args, **options):
        raise AssertionError("a tensor made of numbers is copied to the device, and the host waits")

    with pytest.MonkeyPatch.context() as patch, NoCopies():
        for name in ("tensor", "as_tensor", "from_numpy"):
            patch.setattr(torch, name, host_data)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
        patch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *args, **options: None)
        yield


def on_meta(kind):
    case = make(torch.bfloat16, n=6)
    everything = (student(case, softcap=4.0), *sources(case, kind), case.labels, case.weights)
    return elsewhere(lambda tensor: tensor.to("meta"), *everything)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has tests/gpu/test_gpu.py")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("engine", FUSED)
def test_no_host_synchronisation(kind, reduction, engine):
    """In the assembly and in the operators' own code (not their fake implementations), in chunks, in slabs."""
    head, source, own, labels, weights = on_meta(kind)
    numbers = {"temperature": torch.ones(()), "kd_weight": 0.3, "num_items_in_batch": 7}
    with shapes_alone():
        values = arguments(
            head, source, labels, reduction=reduction, engine=engine, return_metrics=True, token_weights=weights,
            divergence="jsd", valid_vocab=99, scratch_bytes=7 * 101 * 6, **{"ce_weight": 0.5} | own | numbers,
        )  # fmt: skip
        result = operators.fused_kd._init_fn(*values)
        upstream = torch.empty(6, device="meta")
        hidden, *_ = operators.fused_kd_gradients._init_fn(*values, result[-1], upstream)
        assert hidden.shape == head.hidden.shape
        for reading in (lambda: bool(upstream[0] > 0), upstream.nonzero):  # the instrument works
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                reading().numel()
        for copying in (lambda: torch.tensor([1, 2], device="meta"), lambda: torch.zeros(2).to("meta")):
            with pytest.raises(AssertionError):
                copying()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_meta_tensors(kind, engine):
    """The whole function and its backward where there are shapes alone; so no host synchronisation here either."""
    head, source, own, labels, _ = on_meta(kind)
    with shapes_alone():
        loss, metrics = fused_kd_loss(head, source, labels, engine=engine, return_metrics=True, ce_weight=0.5, **own)
        loss.backward()
    assert loss.is_meta
    assert all(metric.is_meta for metric in metrics)
    assert (head.weight.grad.shape, head.weight.grad.dtype) == (head.weight.shape, torch.bfloat16)


@pytest.mark.parametrize(("engine", "kind"), SOME)
def test_fake_tensors(engine, kind):
    """As estimators of memory use: on a CPU, and yet there is no value to look at."""
    mode, case = FakeTensorMode(), make(n=6)
    everything = elsewhere(mode.from_tensor, student(case), *sources(case, kind), case.labels)
    with mode:
        for reduction in ("mean", "none"):
            head, source, own, labels = everything
            loss = fused_kd_loss(head, source, labels, engine=engine, reduction=reduction, ce_weight=0.5, **own)
            loss.sum().backward()
            assert loss.shape == ((6,) if reduction == "none" else ())
        assert head.hidden.grad.shape == head.hidden.shape


@pytest.mark.parametrize(("engine", "kind"), SOME)
def test_the_default_device_does_not_matter(engine, kind):
    """After torch.set_default_device("cuda") a tensor made without a device would be elsewhere."""
    case = make(n=6, v=41)
    expected = loss_of(fused_kd_loss, case, kind, engine=engine)
    source, own = sources(case, kind)
    with torch.device("meta"):
        loss = fused_kd_loss(student(case), source, case.labels, engine=engine, ce_weight=0.5, **own)
        loss.backward()
    torch.testing.assert_close(loss, expected)
