"""A loss held to its definition, written out again over whole float64 logits: values and every leaf's gradient, with
every engine."""

import torch
from cases import V, copy, gradients, relative, student

from kdfast import JSD, SkewKL, SkewReverseKL, fused_kd_loss

SMALL = 5 * 2 * V * 8  # bytes: chunks of five tokens, slabs of one tile
RUNS = [("reference", None), ("torch", None), ("torch", SMALL), ("triton_chunked", 2 * SMALL), ("triton_tiled", SMALL)]
EVERY = ["forward_kl", "reverse_kl", "symmetric_kl", JSD(0.3), SkewKL(0.2), SkewReverseKL(0.2), "total_variation"]


def mean(rows, weights):
    return (weights * torch.where(weights > 0, rows, 0)).sum() / weights.sum()


def check(expected, case, source, *, runs=RUNS, tolerance=1e-9, head=None, labels=True, **options):
    """`expected(case)` is the loss of a copy of `case`; `source(case)` its teacher."""
    theirs = copy(case)
    loss = expected(theirs)
    loss.sum().backward()
    assert loss.isfinite().all()
    for engine, scratch in runs:
        ours = copy(case)
        computed = fused_kd_loss(
            student(ours, **(head or {})), source(ours), ours.labels if labels else None, engine=engine,
            scratch_bytes=scratch, **options,
        )  # fmt: skip
        computed.sum().backward()
        torch.testing.assert_close(computed, loss, rtol=tolerance, atol=1e-11, msg=lambda m, e=engine: f"{e}: {m}")
        for name, gradient in gradients(ours).items():
            assert relative(gradient, gradients(theirs)[name]) < tolerance, (engine, scratch, name)


def keep(case):
    return (case.labels != -100).double()
