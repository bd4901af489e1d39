"""A teacher that is nearly the student, where rounding hurts most, and what an engine makes of it."""

import oracle
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


def errors_of_rows(divergence, engine, dtype, device="cpu", *, mask=None):
    """Return the relative error of every row's value, (64,), at a KL of 4e-4, against float64's on the same logits: the
    heads are identities, whose products add nothing to them. mask (3001,): which ids are compared."""
    V, tau, generator = 3001, 2.0, torch.Generator().manual_seed(0)
    z_s = (2 * torch.randn(64, V, generator=generator)).to(dtype)
    z_t = (z_s + 0.057 * torch.randn(64, V, generator=generator)).to(dtype)
    z_s, z_t, identity = (x.to(device, dtype) for x in (z_s, z_t, torch.eye(V)))
    options = {"temperature": tau, "temperature_squared": False, "reduction": "none", "engine": engine}
    options["kd_vocab_mask"] = mask = None if mask is None else mask.to(device)
    ours = fused_kd_loss(Head(z_s, identity), Head(z_t, identity), divergence=divergence, **options)
    here = slice(None) if mask is None else mask
    log_p, log_q = ((z[:, here].double() / tau).log_softmax(-1) for z in (z_t, z_s))
    assert 3e-4 < oracle.kl(log_p, log_q).mean() < 5e-4
    exact = oracle.divergence(getattr(divergence, "name", divergence), log_p, log_q)
    return ((ours.double() - exact) / exact).abs()
