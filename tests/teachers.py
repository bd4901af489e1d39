"""Every kind of teacher and of anchor as sources and options, made of a problem of `cases.make`.

    projected, hidden              through the student's head, by a projector or of its width already
    head, logits                   the teacher's own head, or what it gives
    renormalize, bucket, weights   some of its log-probabilities, by tail (weights: tail="none")
    nothing                        no teacher
    to head, to sparse             projected, with an anchor that is a distribution
    truncated                      a head of fewer ids
"""

import torch
from cases import LEAVES, student, teacher

from kdfast import Head, Logits, SparseLogits

KINDS = [
    "projected", "hidden", "head", "logits", "renormalize", "bucket", "weights", "nothing", "to head", "to sparse",
    "truncated",
]  # fmt: skip
PROJECTED = ("projected", "hidden", "to head", "to sparse")
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
    return SparseLogits(indices, log_probs, tail=tail)


def sources(case, kind, given=None):
    """(teacher, options) of a kind. What is no leaf is taken from `given`, another problem, if there is one."""
    given = given or case
    if kind.startswith("to "):
        targets = teacher(given, "head") if kind == "to head" else sparse(given, "bucket")
        return teacher(case, "projected"), {"anchor_targets": targets, "anchor_weight": 0.3}
    if kind == "truncated":
        return Head(given.ht, given.Wt[:-4], given.bt[:-4]), {"vocab": "truncate"}
    if kind == "logits":
        return Logits(own_logits(given)), {}
    if kind in ("renormalize", "bucket"):
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
