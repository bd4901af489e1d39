"""Every kind of teacher as sources and options, made of a problem of `cases.make`.

    projected, hidden              through the student's head, by a projector or of its width already
    tempered                       projected, at a temperature of its own; not among KINDS
    head, logits                   the teacher's own head, or what it gives
    renormalize, bucket, renormalize_both, weights   some of its log-probabilities, by tail (weights: tail="none")
    log_tail                       a bucket whose mass is given
    nothing                        no teacher
    truncated                      a head of fewer ids
    masked                         a head of the same ids, of which some are compared
"""

import math
from dataclasses import replace

import torch
from cases import LEAVES, student, teacher

from kdfast import Head, Logits, SparseLogits

KINDS = [
    "projected", "hidden", "head", "logits", "renormalize", "bucket", "log_tail", "renormalize_both", "weights",
    "nothing", "truncated", "masked",
]  # fmt: skip
PROJECTED = ("projected", "hidden")
ENGINES = ["reference", "torch", "triton_chunked", "triton_tiled"]
# for what hardly depends on the engine: all kinds with two of them, a few with those that the interpreter runs
SOME = [(engine, kind) for engine in ENGINES[:2] for kind in KINDS]
SOME += [(engine, kind) for engine in ENGINES[2:] for kind in ("projected", "logits", "bucket")]
K = 3


def own_logits(case):
    """(*, V) of the teacher's own head."""
    return torch.nn.functional.linear(case.ht, case.Wt, case.bt).detach()


def sparse(case, tail):
    log_probs, indices = own_logits(case).log_softmax(-1).topk(K, dim=-1)
    if tail == "log_tail":
        return SparseLogits(indices, log_probs, log_tail=torch.log1p(-log_probs.exp().sum(-1)), tail="bucket")
    return SparseLogits(indices, log_probs, tail=tail)


def entries(case, *, kind="top", k=7, seed=1):
    """(indices, log_probs) of the teacher's own head: its largest, random ones, or everything."""
    generator = torch.Generator().manual_seed(seed)
    log_p = own_logits(case).log_softmax(-1)
    n, vocab = log_p.shape
    if kind == "top":
        log_probs, indices = log_p.topk(k, dim=-1)
        return indices, log_probs
    if kind == "whole":
        indices = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(n)])
        return indices, log_p.gather(1, indices)
    if kind == "sampled":  # ids drawn with replacement, each of weight 1/k
        indices = torch.multinomial(log_p.exp(), k, replacement=True, generator=generator)
        return indices, torch.full(indices.shape, -math.log(k), dtype=torch.float64)
    # ids that come twice, entries of no mass, some of them of no valid id, and one row with a single entry
    indices = torch.randint(0, vocab, (n, k), generator=generator)
    log_probs = log_p.gather(1, indices) - 0.1
    indices[:, 3], log_probs[:, 3] = indices[:, 0], log_probs[:, 0] - 1
    indices[:, 4], log_probs[:, 4] = indices[:, 0], log_probs[:, 0] - 2
    indices[1::3, 5], log_probs[1::3, 5] = -1, -torch.inf
    indices[2::3, 5], log_probs[2::3, 5] = indices[2::3, 1], -torch.inf
    log_probs[4, 1:] = -torch.inf
    return indices, log_probs


def sources(case, kind, given=None):
    """(teacher, options) of a kind. What is no leaf is taken from `given`, another problem, if there is one."""
    given = given or case
    if kind == "truncated":
        return Head(given.ht, given.Wt[:-4], given.bt[:-4]), {"vocab": "truncate"}
    if kind == "masked":
        ids = torch.arange(len(given.Wt), device=given.Wt.device)
        return teacher(given, "head"), {"kd_vocab_mask": ids * 7 % 11 < 6}
    if kind == "tempered":  # projected, with a temperature of its own
        return replace(teacher(case, "projected"), temperature=0.7), {}
    if kind == "logits":
        return Logits(own_logits(given)), {}
    if kind in ("renormalize", "bucket", "log_tail", "renormalize_both"):
        return sparse(given, kind), {}
    if kind == "weights":
        return sparse(given, "none"), {"temperature": 1.0}
    return teacher(case, "none" if kind == "nothing" else kind), {}


def leaves(kind):
    """Names of the tensors that a loss of this kind has gradients for."""
    return LEAVES if kind in PROJECTED else LEAVES[:3]


def loss_of(function, case, kind, *, head=None, given=None, **options):
    """`function`, one like `fused_kd_loss`, of this kind with a cross entropy; an option given here wins."""
    source, own = sources(case, kind, given)
    return function(student(case, **(head or {})), source, case.labels, **{"ce_weight": 0.5} | own | options)
