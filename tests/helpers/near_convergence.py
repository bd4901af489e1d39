"""A teacher that is nearly the student, where rounding hurts most, and what an engine makes of it."""

import torch
from torch.nn.functional import linear

from kdfast import Head, Projected, fused_kd_loss


def near_convergence(dtype, noise, *, width=256, vocab=16384, rows=256):
    """A teacher that is the student plus `noise`: (hs, W, ht, Wt, P) in `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hs, W = normal(rows, width), normal(vocab, width) / 8
    ht, Wt = hs + noise * normal(rows, width), W + noise * normal(vocab, width) / 8
    P = torch.eye(width) + noise * normal(width, width) / width**0.5
    return [t.to(dtype) for t in (hs, W, ht, Wt, P)]


def solve(tensors, kind, dtype, engine, *, rounded=False, upstream=1.0, labels=None, **options):
    """(loss, KL, gradients) with the numbers of `tensors` in `dtype`; `rounded`: projected hidden states too."""
    hs, W, ht, Wt, P = (t.to(dtype, copy=True) for t in tensors)
    leaves = [t.requires_grad_() for t in ([hs, W, P] if kind == "projected" else [hs, W])]
    if kind == "head":
        source = Head(ht, Wt)
    elif rounded:
        projected = linear(ht, P)
        source = Projected(projected + (projected.to(tensors[0].dtype).to(dtype) - projected).detach())
    else:
        source = Projected(ht, P)
    loss, metrics = fused_kd_loss(Head(hs, W), source, labels, engine=engine, return_metrics=True, **options)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    return loss, metrics.kd, [leaf.grad for leaf in leaves]
