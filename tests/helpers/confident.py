"""Rows in which one entry has nearly all of the mass, where a − softmax·Σa cancels, and what engines make of them."""

import processes
import torch

from kdfast import JSD, Head, Projected, SkewKL, SkewReverseKL, fused_kd_loss

ROWS, VOCAB, WIDTH = 32, 100, 16
DIVERGENCES = [
    "forward_kl", "reverse_kl", "symmetric_kl", "total_variation", JSD(0.01), JSD(0.5), JSD(0.99), SkewKL(0.1),
    SkewKL(0.9), SkewReverseKL(0.1), SkewReverseKL(0.9),
]  # fmt: skip


def draw(agreement, size, seed=0):
    """(student's hidden, W, teacher's hidden, its W) whose logits have a standard deviation of 4·size; agreement: of
    their most probable entries, "none" (independent draws), "most" or "all"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    h, W, ht, Wt = normal(ROWS, WIDTH), normal(VOCAB, WIDTH), normal(ROWS, WIDTH), normal(VOCAB, WIDTH)
    if agreement != "none":
        noise = {"most": 0.3, "all": 0.03}[agreement]
        ht, Wt = h + noise * ht, W + noise * Wt
    return size * h, W, size * ht, Wt


def row_gradients(tensors, kind, divergence, dtype, engine, *, edges=None, **options):
    """The gradients of the sum over the rows towards each row's student's and, "projected", teacher's hidden states.
    edges: of this process's slice of the vocabulary."""
    h, W, ht, Wt = (t.to(dtype) for t in tensors)
    leaves = [h.requires_grad_(), *([ht.requires_grad_()] if kind == "projected" else [])]
    where = slice(None)
    if edges is not None:
        rank = processes.rank()
        where = slice(edges[rank], edges[rank + 1])
        options |= {"process_group": processes.group(), "vocab_start": edges[rank]}
    teacher = Projected(ht) if kind == "projected" else Head(ht, Wt[where], logit_scale=0.25)
    loss = fused_kd_loss(
        Head(h, W[where], logit_scale=0.25), teacher, engine=engine, divergence=divergence, reduction="sum", **options
    )
    return [gradient.double() for gradient in torch.autograd.grad(loss, leaves)]


def check(found, tensors, kind, divergence, **options):
    """Hold an engine's `row_gradients` in float32 against float64: a row's relative error, at the median and for nine
    rows of ten, is no more than six times eager float32's (rows are few), and the norm of all no more than twice.
    """
    exact = row_gradients(tensors, kind, divergence, torch.float64, "reference", **options)
    eager = row_gradients(tensors, kind, divergence, torch.float32, "reference", **options)
    for side, truth, theirs, ours in zip(("student", "teacher"), exact, eager, found, strict=False):
        size = truth.norm(dim=1)
        counts = size > 1e-6 * size.max()  # of the others eager float32 knows nothing
        allowed, errors = (((g - truth).norm(dim=1) / size)[counts] for g in (theirs, ours))
        for quantile in (0.5, 0.9):
            assert errors.quantile(quantile) <= 6 * allowed.quantile(quantile) + 4e-6, (side, quantile)
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 4e-6 * truth.norm(), side
