"""A second backward, and second derivatives, of every loss over hidden states and heads."""

import pytest
import torch
from cases import relative
from side_by_side import (
    FLOAT32,
    chunked_divergence,
    fault,
    fla,
    fresh,
    gradients,
    liger,
    liger_kl,
    liger_triton,
    ours,
)


@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        pytest.param(liger_kl, 0.5, marks=fault("liger_kernel")),
        pytest.param(lambda case: liger_triton(case, 0.5), 0.5, marks=fault("liger_kernel")),
        pytest.param(fla, 0.5, marks=fault("fla-core")),
        pytest.param(lambda case: liger(case, 0.5, case.labels), 1.0),
        pytest.param(lambda case: chunked_divergence(case, 0.5)[0].mean(), 1.0),
        pytest.param(lambda case: ours(case, "jsd", bias=False), 1.0),
    ],
    ids=["liger_kl", "liger_triton", "fla", "liger", "trl", "ours"],
)
def test_second_backward(loss, factor):
    """fused_linear_kl_div_backward, fused_linear_jsd_backward and fla's fused_kl_div_bwd multiply the saved gradient
    by the upstream one where it lies, by a kernel that autograd can't see: half a loss has a quarter of the gradient
    in the second backward, an eighth in the third."""
    case = fresh()
    half = loss(case) / 2
    first, second = gradients(half, [case.hs]), gradients(half, [case.hs])
    assert relative(second[0], first[0] * factor) < FLOAT32


@pytest.mark.parametrize(
    "loss",
    [liger_kl, lambda case: liger_triton(case, 0.5), lambda case: liger(case, 0.5, case.labels), fla],
    ids=["liger_kl", "liger_triton", "liger", "fla"],
)
def test_second_derivative_is_left_out_without_a_word(loss):
    """Gradients taken in the forward and returned as constants: a gradient penalty would see no gradient."""
    case = fresh()
    (gradient,) = torch.autograd.grad(loss(case), case.hs, create_graph=True)
    assert not gradient.requires_grad


def test_second_derivative_is_refused():
    """ChunkedDivergenceFunction.backward: an error about out=; ours names the engine that has them."""
    case = fresh()
    theirs = chunked_divergence(case, 0.0)[0].sum()
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        torch.autograd.grad(theirs, case.hs, create_graph=True)
    (gradient,) = torch.autograd.grad(ours(case), case.hs, create_graph=True)
    with pytest.raises(RuntimeError, match="engine='reference'"):
        gradient.sum().backward()
