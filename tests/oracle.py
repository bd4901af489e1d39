"""The loss written out once more, straight from its definition: whole logits, autograd, no shared code.

Everything is computed in the inputs' dtype: float64 gives the truth, another dtype what an eager implementation gets.

    loss    a dense teacher, or none: arguments of `fused_kd_loss` as plain tensors, flat rows
    solve   all that `fused_kd_loss` takes, as it takes it, and the metrics

A teacher's probability of exactly 0 is a log-probability of −inf, or one whose exponential underflows.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import Logits, Projected, SparseLogits


def logits(hidden, weight, bias=None, scale=1.0, softcap=None):
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def kl(log_p, log_q):
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def divergence(name, log_p, log_q, beta=0.5, alpha=0.1):
    """p is the teacher."""
    if name == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if name == "symmetric_kl":
        return (kl(log_p, log_q) + kl(log_q, log_p)) / 2
    if name == "jsd" and 0 < beta < 1:
        log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    if name == "skew_kl":
        return kl(log_p, torch.log(alpha * log_p.exp() + (1 - alpha) * log_q.exp()))
    if name == "skew_reverse_kl":
        return kl(log_q, torch.log((1 - alpha) * log_p.exp() + alpha * log_q.exp()))
    forward = name == "forward_kl" or (name == "jsd" and beta == 0)
    return kl(log_p, log_q) if forward else kl(log_q, log_p)


def loss(
    hs, W, b=None, *, ht=None, P=None, p=None, Wt=None, bt=None, scale=1.0, softcap=None,
    t_scale=1.0, t_softcap=None, labels=None, temperature=2.0, name="forward_kl", beta=0.5, alpha=0.1,
    kd_weight=1.0,
    ce_weight=0.0, anchor_weight=0.0, anchor_targets=None, teacher_grad="full", token_weights=None,
    kd_token_weights=None, ignore_index=-100, reduction="mean", num_items=None, temperature_squared=True, valid=None,
):  # fmt: skip
    """Wt given: the teacher's own head; else ht through (P, p), if given, and the student's head; ht None: no KD."""
    N = hs.shape[0]
    valid = W.shape[0] if valid is None else valid
    W, b = W[:valid], None if b is None else b[:valid]
    ones = torch.ones(N, dtype=hs.dtype)
    weights = ones if token_weights is None else token_weights
    if labels is not None:
        weights = weights * (labels != ignore_index)
    kd_weights = weights if kd_token_weights is None else kd_token_weights
    z_s = logits(hs, W, b, scale, softcap)
    terms = []

    if ht is not None and Wt is not None:
        z_t = logits(ht, Wt[:valid], None if bt is None else bt[:valid], t_scale, t_softcap)
    elif ht is not None:
        hp = ht if P is None else F.linear(ht, P, p)
        fixed = (W.detach(), None if b is None else b.detach(), scale, softcap)
        z_a = logits(hp, *fixed)
        z_t = {"full": lambda: logits(hp, W, b, scale, softcap), "projector": lambda: z_a, "none": z_a.detach}[
            teacher_grad
        ]()
        targets = labels if anchor_targets is None else anchor_targets
        if anchor_weight:
            anchor_weights = weights * (targets != ignore_index)
            value = F.cross_entropy(z_a, targets.clamp_min(0), reduction="none")
            terms.append((anchor_weight, anchor_weights, value))
    if ht is not None:
        tau = temperature
        value = divergence(name, (z_t / tau).log_softmax(-1), (z_s / tau).log_softmax(-1), beta, alpha)
        terms.append((kd_weight * (tau**2 if temperature_squared else 1.0), kd_weights, value))
    if ce_weight:
        terms.append((ce_weight, weights, F.cross_entropy(z_s, labels.clamp_min(0), reduction="none")))

    total = torch.zeros(N, dtype=hs.dtype)
    for weight, w, value in terms:
        divisor = 1.0
        if reduction == "mean":
            divisor = w.sum() if num_items is None else num_items
            if divisor == 0:
                continue
        total = total + weight * w * value / divisor
    return total if reduction == "none" else total.sum()


def value(divergence, log_p, log_q):
    """(N,) of an instance or a name; p is the teacher, and need not sum to one. Either side may lack mass anywhere."""
    name, parameters = (divergence, []) if isinstance(divergence, str) else (divergence.name, divergence.parameters)
    (number,) = parameters or [{"jsd": 0.5}.get(name, 0.1)]

    def kl(log_a, log_b):
        a = log_a.exp()
        return (a * (log_a.masked_fill(a == 0, 0) - log_b.masked_fill(a == 0, 0))).sum(-1)

    def mixture(weight):
        both = log_p.isneginf() & log_q.isneginf()
        return torch.logaddexp(
            log_p.masked_fill(both, 0) + math.log(weight), log_q.masked_fill(both, 0) + math.log(1 - weight)
        )

    if name == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if name == "symmetric_kl":
        return (kl(log_p, log_q) + kl(log_q, log_p)) / 2
    if name == "jsd" and 0 < number < 1:
        return number * kl(log_p, mixture(number)) + (1 - number) * kl(log_q, mixture(number))
    if name == "skew_kl" and number > 0:
        return kl(log_p, mixture(number))
    if name == "skew_reverse_kl" and number > 0:
        return kl(log_q, mixture(1 - number))
    forward = name in ("forward_kl", "skew_kl") or (name == "jsd" and number == 0)
    return kl(log_p, log_q) if forward else kl(log_q, log_p)


def masses(ids, log_probs, vocab):
    """{id: probability} of one row's entries, those of equal ids added up, ids out of the vocabulary left out."""
    mass = {}
    for i, log_prob in zip(ids, log_probs, strict=True):
        if log_prob > -math.inf and 0 <= i < vocab:
            mass[i] = mass.get(i, 0.0) + math.exp(log_prob)
    return mass


def sparse_pair(indices, log_probs, tail, z, tau):
    """(log_p, log_q), (N, V + 1) each, of a teacher given by entries (N, K) and the student's logits z (N, V), row by
    row. With a bucket, first its ids' categories, then the bucket, then nothing; else the vocabulary, then nothing."""
    pairs = []
    for ids, given, row in zip(indices.tolist(), log_probs.tolist(), z, strict=True):
        mass = masses(ids, given, len(row))
        support, impossible = sorted(mass), row.new_full((1,), -torch.inf)
        p = torch.tensor([mass[i] for i in support], dtype=torch.float64).log()
        if tail == "bucket":
            q = row.log_softmax(-1)
            outside = [i for i in range(len(row)) if i not in mass]
            reachable = [i for i in outside if row[i] > -torch.inf]
            rest = q[reachable].logsumexp(-1, keepdim=True) if reachable else impossible
            left = torch.tensor([1 - sum(mass.values())], dtype=torch.float64).clamp_min(0)
            missing = left.log() if outside else impossible.double()
            q = (torch.cat([q[support], rest]) / tau).log_softmax(-1)
            p = (torch.cat([p, missing]) / tau).log_softmax(-1)
            nothing = row.new_full((len(row) - len(support),), -torch.inf)
            pairs.append((torch.cat([p.to(row.dtype), nothing]), torch.cat([q, nothing])))
        else:
            whole = row.new_full((len(row) + 1,), -torch.inf).detach()
            whole[support] = ((p / tau).log_softmax(-1) if tail == "renormalize" else p).to(row.dtype)
            pairs.append((whole, torch.cat([(row / tau).log_softmax(-1), impossible])))
    return tuple(torch.stack(side) for side in zip(*pairs, strict=True))


class Solved(NamedTuple):
    loss: Tensor
    metrics: dict[str, float]
    margin: float  # the least gap between a row's two largest logits, of either side: what the agreement hangs on


def solve(
    student, teacher, labels=None, *, temperature=2.0, divergence="forward_kl", kd_weight=1.0, ce_weight=0.0,
    anchor_weight=0.0, anchor_targets=None, teacher_grad="full", token_weights=None, kd_token_weights=None,
    ignore_index=-100, reduction="mean", num_items_in_batch=None, temperature_squared=True, valid_vocab=None,
    vocab="error",
):  # fmt: skip
    """Each term is computed on the rows that it counts, and on nothing else."""
    tau, leading = float(temperature), student.hidden.shape[:-1]
    valid = student.weight.shape[0] if valid_vocab is None else valid_vocab
    metrics = dict.fromkeys(("kd", "ce", "anchor", "student_entropy", "teacher_entropy", "agreement"), math.nan)
    margins = [math.inf]

    def flat(tensor):
        return tensor.reshape(-1, tensor.shape[-1])

    def head_logits(head, hidden, size, *, fixed=False):
        weight, bias = head.weight[:size], None if head.bias is None else head.bias[:size]
        if fixed:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return logits(hidden, weight, bias, head.logit_scale, head.softcap)

    def student_logits(rows):
        return head_logits(student, flat(student.hidden)[rows], valid)

    def projected_logits(rows, *, fixed):
        hidden = flat(teacher.hidden)[rows]
        if teacher.projector_weight is not None:
            hidden = F.linear(hidden, teacher.projector_weight, teacher.projector_bias)
        return head_logits(student, hidden.to(student.weight.dtype), valid, fixed=fixed)

    def given_logits(source, rows, size):
        if isinstance(source, Logits):
            return flat(source.logits)[rows][:, :size]
        return head_logits(source, flat(source.hidden)[rows], size)

    def against(source, rows, z, tau):
        """(log_p, log_q, z_t or None) of a given distribution and one of logits z."""
        if isinstance(source, SparseLogits):
            entries = flat(source.indices)[rows], flat(source.log_probs)[rows]
            return *sparse_pair(*entries, source.tail, z, tau), None
        z_t = given_logits(source, rows, valid).to(z.dtype)
        shared = z[:, : z_t.shape[1]]
        return (z_t / tau).log_softmax(-1), (shared / tau).log_softmax(-1), z_t

    def entropy(z):
        p = z.softmax(-1)
        return -(p * z.log_softmax(-1).masked_fill(p == 0, 0)).sum(-1)

    def best(z):
        if z.shape[1] > 1 and len(z):
            first, second = z.detach().double().topk(2, dim=-1).values.unbind(-1)
            margins.append(float((first - second).min()))
        return z.argmax(-1)

    def most_probable(source, rows):
        chosen = []
        for ids, given in zip(flat(source.indices)[rows].tolist(), flat(source.log_probs)[rows].tolist(), strict=True):
            mass = sorted((-p, i) for i, p in masses(ids, given, valid).items())
            margins.append(math.log(mass[0][0] / mass[1][0]) if len(mass) > 1 else math.inf if mass else 0.0)
            chosen.append(mass[0][1] if mass else 0)
        return torch.tensor(chosen)

    def mean(name, rows, values, w):
        metrics[name] = float((w[rows] * values.detach().double()).sum() / w.sum())

    base = torch.ones(leading.numel(), dtype=torch.float64)
    if token_weights is not None:
        base = token_weights.reshape(-1).double()
    targets = labels = None if labels is None else labels.reshape(-1).long()
    if labels is not None:
        base = base * (labels != ignore_index)
    kd = base if kd_token_weights is None else kd_token_weights.reshape(-1).double()
    anchored = base
    if isinstance(anchor_targets, Tensor):
        targets = anchor_targets.reshape(-1).long()
        anchored = base * (targets != ignore_index)
    terms = []

    main = base if teacher is None else kd
    rows = main.nonzero().squeeze(1)
    metrics["tokens"] = float(len(rows))
    z_s = student_logits(rows)
    mean("student_entropy", rows, entropy(z_s), main)
    if isinstance(teacher, Projected):
        full = projected_logits(rows, fixed=teacher_grad != "full")
        z_t = full.detach() if teacher_grad == "none" else full
        log_p, log_q = (z_t / tau).log_softmax(-1), (z_s / tau).log_softmax(-1)
    elif teacher is not None and len(rows):
        log_p, log_q, z_t = against(teacher, rows, z_s, tau)
    if teacher is not None:
        values = value(divergence, log_p, log_q) if len(rows) else z_s.sum(-1)
        terms.append((float(kd_weight) * (tau**2 if temperature_squared else 1.0), kd, rows, values))
        mean("kd", rows, values, kd)
        if len(rows) and z_t is not None:
            mean("teacher_entropy", rows, entropy(z_t), kd)
        if len(rows):
            theirs = most_probable(teacher, rows) if z_t is None else best(z_t)
            mean("agreement", rows, (best(z_s if z_t is None else z_s[:, : z_t.shape[1]]) == theirs).double(), kd)

    if labels is not None:
        rows = base.nonzero().squeeze(1)
        values = F.cross_entropy(student_logits(rows), labels[rows], reduction="none")
        terms.append((float(ce_weight), base, rows, values))
        mean("ce", rows, values, base)

    if isinstance(teacher, Projected) and (targets is not None or anchor_targets is not None):
        rows = anchored.nonzero().squeeze(1)
        z_a = projected_logits(rows, fixed=True)
        if anchor_targets is None or isinstance(anchor_targets, Tensor):
            values = F.cross_entropy(z_a, targets[rows], reduction="none")
        elif len(rows):
            log_a, log_z, _ = against(anchor_targets, rows, z_a, 1.0)
            a = log_a.exp()
            values = -(a * log_z.masked_fill(a == 0, 0)).sum(-1)
        else:
            values = z_a.sum(-1)
        terms.append((float(anchor_weight), anchored, rows, values))
        mean("anchor", rows, values, anchored)

    total = torch.zeros(leading.numel(), dtype=z_s.dtype)
    for weight, w, rows, values in terms:
        divisor = 1.0
        if reduction == "mean":
            divisor = float(w.sum() if num_items_in_batch is None else num_items_in_batch)
        if weight and divisor:
            total = total.index_add(0, rows, (weight / divisor * w[rows]).to(total.dtype) * values)
    return Solved(total.reshape(leading) if reduction == "none" else total.sum(), metrics, min(margins))
