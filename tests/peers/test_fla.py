"""flash-linear-attention's loss: hidden states and heads."""

import pytest
import torch
from cases import relative
from side_by_side import agree, fault, fla, fresh, ours

from kdfast import Head


def test_fla():
    """fla/modules/fused_kl_div/ops.py, FusedKLDivLossFunction: forward KL at τ = 1, no bias, no labels."""
    case = fresh()
    agree(fla(case), ours(case, bias=False), case.hs, case.W)


@fault("fla-core")
def test_fla_and_a_larger_teacher():
    """As above, kl_div_kernel: rows of the teacher's logits are found by the student's stride, so that a larger
    vocabulary shifts every row but a chunk's first: wrong, and no error."""
    case = fresh()
    larger = torch.cat([case.Wt, case.Wt[:9]])
    mine = ours(case, bias=False, teacher=Head(case.ht, larger), vocab="truncate")
    assert relative(fla(case, larger), mine) > 0.01


def test_fla_refuses_a_gradient_to_the_teacher():
    case = fresh()
    case.ht.requires_grad_()
    with pytest.raises(RuntimeError, match="frozen teacher"):
        torch.autograd.grad(fla(case), case.ht)
