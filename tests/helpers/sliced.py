"""A problem of problems.py under vocabulary parallelism: what each process does, and the parts put together."""

import random
from types import SimpleNamespace

import processes
import torch

from kdfast import Head, Logits, fused_kd_loss


def cuts(problem, ranks):
    """Where each rank's slice starts, and the end: drawn, uneven, some empty."""
    drawn = random.Random(problem.seed * 7 + ranks)
    if drawn.random() < 0.3:  # as torch.chunk, and DTensor, cut
        width = -(-problem.vocab // ranks)
        return [min(i * width, problem.vocab) for i in range(ranks + 1)]
    inner = sorted(drawn.randint(0, problem.vocab) for _ in range(ranks - 1))
    return [0, *inner, problem.vocab]


def run(pool, ranks, problem, engine):
    """As `agree.run`, by several processes, which must agree on everything they share."""
    parts = pool.run(ranks, solve, problem, engine, cuts(problem, ranks))
    first = parts[0]
    for part in parts[1:]:
        assert torch.equal(part.loss.nan_to_num(), first.loss.nan_to_num()), "the loss differs between processes"
        assert str(part.metrics) == str(first.metrics)
    gradients = {}
    for name in first.gradients:
        found = [part.gradients[name] for part in parts]
        if name in ("W", "b"):
            gradients[name] = torch.cat(found)
        else:
            for other in found[1:]:
                torch.testing.assert_close(other, found[0], rtol=0, atol=0, equal_nan=True)
            gradients[name] = found[0]
    return SimpleNamespace(loss=first.loss, metrics=first.metrics, gradients=gradients)


def solve(problem, engine, edges):
    """One process's part."""
    rank = processes.rank()
    start, stop = edges[rank], edges[rank + 1]
    last = rank == len(edges) - 2
    c = problem.case()
    leaves = dict(c.leaves)
    for name, whole in (("W", c.student.weight), ("b", c.student.bias)):
        if whole is not None:
            leaves[name] = whole.detach()[start:stop].requires_grad_(whole.requires_grad)
    student = Head(
        c.student.hidden, leaves["W"], leaves.get("b"), logit_scale=c.student.logit_scale, softcap=c.student.softcap
    )

    def cut(source):
        end = None if last else stop
        if not isinstance(source, Head | Logits):
            return source
        size = source.weight.shape[0] if isinstance(source, Head) else source.logits.shape[-1]
        if problem.seed % 3 == 0 and size >= problem.vocab:
            return source  # whole
        if isinstance(source, Head):
            bias = None if source.bias is None else source.bias[start:end]
            more = {"logit_scale": source.logit_scale, "softcap": source.softcap}
            return Head(source.hidden, source.weight[start:end], bias, **more)
        return Logits(source.logits[..., start:end])

    mask = c.options.get("kd_vocab_mask")
    more = {} if mask is None else {"kd_vocab_mask": mask[start:stop]}
    result = fused_kd_loss(
        student, cut(c.teacher), c.labels, engine=engine, scratch_bytes=c.scratch, return_metrics=problem.metrics,
        process_group=processes.group(), vocab_start=start, **c.options | more,
    )  # fmt: skip
    loss, metrics = result if problem.metrics else (result, None)
    metrics = {} if metrics is None else {name: float(value) for name, value in metrics._asdict().items()}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if loss.requires_grad:
        loss.backward(c.upstream.to(loss.dtype))
    gradients = {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}
    return SimpleNamespace(loss=loss.detach(), metrics=metrics, gradients=gradients)
