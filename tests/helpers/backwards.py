"""What autograd is promised of a loss's gradients, for one process or a slice of the vocabulary on each."""

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils import _pytree as pytree


def untracked(tree):
    """Everything that requires no grad, as inference mode makes it."""

    def one(leaf):
        if not isinstance(leaf, torch.Tensor) or leaf.requires_grad:
            return leaf
        with torch.inference_mode():
            return leaf.clone(memory_format=torch.preserve_format)

    return pytree.tree_map(one, tree)


def through_views(leaves):
    """The same tensors as views of new leaves, as hidden states and tied weights are: (leaves, views)."""
    new = {name: leaf.detach().clone().view(1, -1).requires_grad_() for name, leaf in leaves.items()}
    return new, {name: leaf.view(leaves[name].shape) for name, leaf in new.items()}


def check_backwards(loss_of, leaves):
    """Check that a kept graph gives the same gradients again, whatever has been done to those handed out.

    loss_of: the loss of tensors by name, of which `leaves` are some. Upstream gradients are 1: the saved gradient is
    the answer, where an engine has one.
    """
    for views in (True, False):
        new, views_of = through_views(leaves) if views else (leaves, leaves)
        wanted = list(new.values())
        loss = loss_of(views_of)
        ones = torch.ones_like(loss)

        def taken(loss=loss, ones=ones, wanted=wanted, keep=True):
            return torch.autograd.grad(loss, wanted, ones, retain_graph=keep)

        expected = [gradient.clone() for gradient in taken()]
        several = [taken(), taken(), torch.autograd.grad(loss_of(views_of), wanted, ones)]
        places = [gradient.untyped_storage().data_ptr() for result in several for gradient in result]
        assert len(set(places)) == len(places), "two gradients share memory"
        for result in several:
            for gradient in result:
                gradient.mul_(-7)
        for step in range(3):
            loss.backward(ones, retain_graph=True)
            for leaf, gradient in zip(wanted, expected, strict=True):
                torch.testing.assert_close(leaf.grad, sum([gradient] * step, gradient))
        clip_grad_norm_(wanted, 1e-3)
        for leaf in wanted:
            leaf.grad.zero_()  # zero_grad(set_to_none=False)
        loss.backward(ones, retain_graph=True)
        for leaf in wanted:
            leaf.grad.mul_(3)
            leaf.grad = None
        loss.backward(ones)  # the last, which may hand out what was saved
        for leaf, gradient in zip(wanted, expected, strict=True):
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)
            leaf.grad = None
