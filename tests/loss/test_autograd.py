"""What autograd expects of an operation: inputs left alone, backwards as long as the graph is kept, checkpointing."""

from functools import partial

import pytest
import torch
from cases import LEAVES, gradients, make, student, teacher
from teachers import ENGINES, KINDS, SOME, leaves, loss_of, sources
from torch.utils import _pytree as pytree
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
