"""What autograd expects of an operation: inputs left alone, backwards as long as the graph is kept, checkpointing."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from backwards import check_backwards, untracked
from cases import LEAVES, copy, gradients, make, student, teacher
from teachers import ENGINES, KINDS, PROJECTED, SOME, leaves, loss_of, sources
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kdfast import Head, Projected, fused_kd_loss

SMALL = {"n": 4, "v": 41}
CHUNKS = 2 * 2 * 41 * 8  # bytes: two tokens


@pytest.mark.parametrize(("engine", "kind"), SOME)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_three_backwards_and_inputs_as_they_were(engine, reduction, kind):
    case = make(**SMALL)
    source, own = sources(case, kind)
    inputs = [case.labels, case.weights, *pytree.tree_leaves((student(case), source, own))]
    before = [(x, x._version, x.detach().clone()) for x in inputs if isinstance(x, torch.Tensor)]
    options = {"ce_weight": 0.5, "token_weights": case.weights, "kd_token_weights": case.weights.flip(0)}
    loss = fused_kd_loss(
        student(case), source, case.labels, engine=engine, reduction=reduction, scratch_bytes=CHUNKS, **options | own
    )
    once = torch.autograd.grad(loss, [getattr(case, name) for name in leaves(kind)], torch.ones_like(loss), True)
    upstream = torch.rand_like(loss)
    loss.backward(upstream, retain_graph=True)
    first = {name: gradient.clone() for name, gradient in gradients(case).items()}
    loss.backward(2 * upstream, retain_graph=True)
    loss.backward(torch.ones_like(loss))
    for name, gradient in zip(leaves(kind), once, strict=True):
        torch.testing.assert_close(gradients(case)[name], 3 * first[name] + gradient)
    for x, version, value in before:
        assert x._version == version
        assert torch.equal(x.detach(), value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_handed_out_is_not_the_one_kept_for_another_backward(engine):
    case = make(**SMALL)
    loss = loss_of(fused_kd_loss, case, "projected", engine=engine)
    loss.backward(retain_graph=True)
    first = case.W.grad.clone()
    case.W.grad.mul_(7)  # an optimizer or gradient clipping writes here
    case.W.grad = None
    loss.backward()
    assert torch.equal(case.W.grad, first)


# 16-bit gradients in the interpreter, whose bf16 products are wrong, are those of triton_chunked alone
HANDED_OUT = [(*case, torch.float32) for case in SOME]
HANDED_OUT += [("torch", kind, torch.bfloat16) for kind in KINDS] + [("triton_chunked", "projected", torch.bfloat16)]
HANDED_OUT += [("torch", "projected", torch.float64), ("triton_tiled", "projected", torch.float16)]


@pytest.mark.parametrize(("engine", "kind", "dtype"), HANDED_OUT)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_the_callers_own(engine, kind, dtype, reduction):
    case = make(dtype, **SMALL)
    hidden = torch.nn.functional.linear(case.ht, case.P, case.p).detach().requires_grad_()
    trained = {name: getattr(case, name) for name in leaves(kind)}
    if kind == "hidden":
        trained = {name: trained[name] for name in LEAVES[:3]} | {"h_p": hidden}

    def of(tensors):
        own = SimpleNamespace(**vars(case) | tensors)
        source, options = (Projected(own.h_p), {}) if kind == "hidden" else sources(own, kind)
        options = {"ce_weight": 0.5, "reduction": reduction, "engine": engine, "scratch_bytes": CHUNKS} | options
        return fused_kd_loss(student(own), source, case.labels, **options)

    check_backwards(of, trained)


@pytest.mark.parametrize(
    ("engine", "dtype"), [*((engine, torch.float32) for engine in ENGINES[1:]), ("torch", torch.bfloat16)]
)
def test_one_backward_makes_no_second_gradient_of_the_head(engine, dtype):
    """Where the saved one is the answer: no operator of `loss.backward()` returns anything of W's size."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function != torch.ops.aten.detach.default:  # which accumulates by taking over
                tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
                made.extend(tensor.nbytes for tensor in tensors)
            return result

    case, made = make(dtype, **SMALL | {"v": 409}), []
    for keep, copies in ((True, 1), (False, 0 if dtype == torch.float32 else 1)):
        loss = loss_of(fused_kd_loss, case, "projected", engine=engine)
        case.W.grad = None
        made.clear()
        with Sizes():
            loss.backward(retain_graph=keep)
        assert sum(size >= case.W.nbytes for size in made) == copies, keep


# tensors made in torch.inference_mode()


FROZEN = [(), ("W", "b"), ("hs",), ("P", "p"), ("hs", "W", "b")]
INFERENCE = [(engine, kind, ()) for engine, kind in SOME]
INFERENCE += [(engine, kind, frozen) for engine in ENGINES for kind in PROJECTED for frozen in FROZEN[1:]]
INFERENCE += [(engine, "head", frozen) for engine in ENGINES for frozen in FROZEN[1:3]]


@pytest.mark.parametrize(("engine", "kind", "frozen"), INFERENCE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tensors_of_inference_mode(engine, kind, frozen, reduction):
    """A teacher's, and whatever else is no leaf: the same gradients as of ordinary tensors."""
    results = []
    for place in (lambda tree: tree, untracked):
        case = copy(make(**SMALL))
        for name in frozen:
            getattr(case, name).requires_grad_(False)
        source, own = sources(case, kind)
        head, labels, weights, own = place((student(case), case.labels, case.weights, own))
        numbers = place({"temperature": torch.tensor(2.0).double(), "ce_weight": torch.tensor(0.5).double()}) | own
        loss = fused_kd_loss(
            head, place(source), labels, engine=engine, reduction=reduction, token_weights=weights, **numbers
        )
        loss.sum().backward()
        results.append((loss.detach(), gradients(case)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_teacher_logits_of_inference_mode_are_kept_where_they_lie(engine):
    case, kept = make(**SMALL), []
    source, _ = sources(case, "logits")
    source = untracked(source)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.data_ptr()), x)[1], lambda x: x):
        loss = fused_kd_loss(student(case), source, case.labels, reduction="none", engine=engine)
    assert source.logits.data_ptr() in kept
    assert loss.sum().isfinite()


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_changed_before_the_backward_are_noticed(engine):
    case = make(**SMALL)
    loss = loss_of(fused_kd_loss, case, "projected", engine=engine)
    with torch.no_grad():
        case.W.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# activation checkpointing

CHECKPOINTED = [("torch", kind) for kind in KINDS]
CHECKPOINTED += [(engine, "projected") for engine in ("reference", "triton_chunked", "triton_tiled")]


def checked(engine, kind, run):
    """`run(loss, student, teacher, labels)`, which calls `loss` in a checkpoint, against the loss itself."""
    results = []
    for call in (lambda loss, *arguments: loss(*arguments), run):
        case = make(**SMALL)
        source, own = sources(case, kind)
        loss = partial(fused_kd_loss, **{"ce_weight": 0.5, "engine": engine} | own)
        value = call(loss, student(case), source, case.labels)
        value.backward()
        results.append((value.detach(), gradients(case)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("engine", "kind"), CHECKPOINTED)
def test_checkpointed(engine, kind):
    checked(engine, kind, partial(checkpoint, use_reentrant=False))


@pytest.mark.parametrize(("engine", "kind"), CHECKPOINTED)
def test_checkpointed_reentrant_with_the_tensors_as_arguments(engine, kind):
    """The reentrant variant detaches and watches its own arguments alone: tensors it sees, sources it does not."""

    def run(loss, *arguments):
        tensors, spec = pytree.tree_flatten(arguments)
        return checkpoint(lambda *again: loss(*pytree.tree_unflatten(again, spec)), *tensors, use_reentrant=True)

    checked(engine, kind, run)


def test_checkpointed_reentrant_says_that_it_sees_no_tensors_in_sources():
    case = make(**SMALL)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        loss = checkpoint(fused_kd_loss, student(case), teacher(case, "projected"), case.labels, use_reentrant=True)
    assert not loss.requires_grad


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
