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
    return capped(hidden @ weight.T + (0 if bias is None else bias), scale, softcap)


def capped(z, scale, softcap):
    z = scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def kl(log_p, log_q):
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def divergence(name, log_p, log_q, beta=0.5, alpha=0.1, lam=0.5):
    """p is the teacher."""
    if name == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if name == "symmetric_kl":
        return (1 - lam) * kl(log_p, log_q) + lam * kl(log_q, log_p)
    if name == "alpha_beta":
        return alpha_beta(log_p, log_q, alpha, beta)
    if name == "jsd" and 0 < beta < 1:
        log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    if name == "skew_kl":
        return kl(log_p, torch.log(alpha * log_p.exp() + (1 - alpha) * log_q.exp()))
    if name == "skew_reverse_kl":
        return kl(log_q, torch.log((1 - alpha) * log_p.exp() + alpha * log_q.exp()))
    forward = name == "forward_kl" or (name == "jsd" and beta == 0)
    return kl(log_p, log_q) if forward else kl(log_q, log_p)


def alpha_beta(log_p, log_q, a, b):
    """For a > 0 and b ≥ 0, by Cichocki, Cruces and Amari's formulas; either side may lack mass anywhere."""
    both = log_p.isneginf() & log_q.isneginf()
    log_p, log_q, q = log_p.masked_fill(both, 0), log_q.masked_fill(both, 0), (a + b) * log_q
    if b == 0:
        kl_ = (a * log_p).exp() * a * (log_p - log_q).masked_fill(log_p.isneginf(), 0)
        return ((kl_ - (a * log_p).exp() + (a * log_q).exp()) / a**2).masked_fill(both, 0).sum(-1)
    p, pq = ((a + b) * log_p).exp(), (a * log_p + b * log_q).exp()
    return (-(pq - a / (a + b) * p - b / (a + b) * q.exp()) / (a * b)).masked_fill(both, 0).sum(-1)


def loss(
    hs, W, b=None, *, ht=None, P=None, p=None, Wt=None, bt=None, scale=1.0, softcap=None,
    t_scale=1.0, t_softcap=None, labels=None, temperature=2.0, name="forward_kl", beta=0.5, alpha=0.1, lam=0.5,
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
        value = divergence(name, (z_t / tau).log_softmax(-1), (z_s / tau).log_softmax(-1), beta, alpha, lam)
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
    if name == "alpha_beta":
        return alpha_beta(log_p, log_q, *(parameters or (0.5, 0.5)))
    (number,) = parameters or [{"jsd": 0.5, "symmetric_kl": 0.5}.get(name, 0.1)]

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
    if name == "symmetric_kl" and 0 < number < 1:
        return (1 - number) * kl(log_p, log_q) + number * kl(log_q, log_p)
    if name == "jsd" and 0 < number < 1:
        return number * kl(log_p, mixture(number)) + (1 - number) * kl(log_q, mixture(number))
    if name == "skew_kl" and number > 0:
        return kl(log_p, mixture(number))
    if name == "skew_reverse_kl" and number > 0:
        return kl(log_q, mixture(1 - number))
    forward = name in ("forward_kl", "skew_kl") or (name in ("jsd", "symmetric_kl") and number == 0)
    return kl(log_p, log_q) if forward else kl(log_q, log_p)


def masses(ids, log_probs, vocab):
    """{id: probability} of one row's entries, those of equal ids added up, ids out of the vocabulary left out."""
    mass = {}
    for i, log_prob in zip(ids, log_probs, strict=True):
        if log_prob > -math.inf and 0 <= i < vocab:
            mass[i] = mass.get(i, 0.0) + math.exp(log_prob)
    return mass


def guessed_tail(log_probs):
    """Mass that a row's log-probabilities leave: no less than what rounding to their dtype makes of their sum."""
    eps, p = torch.finfo(log_probs.dtype).eps, log_probs.double().exp()
    rounding = eps / 2 * float((p * log_probs.double().abs().nan_to_num(posinf=0.0)).sum())
    return max(1 - float(p.sum()), rounding, eps if log_probs.dtype == torch.float64 else 2.0**-23)


def sparse_pair(indices, log_probs, tail, z, tau, tempered=False, log_tail=None):
    """(log_p, log_q), (N, V + 1) each, of a teacher given by entries (N, K) and the student's logits z (N, V), row by
    row. With a bucket, first its ids' categories, then the bucket, then nothing; with both sides normalized over the
    ids, these and nothing; else the vocabulary, then nothing."""
    if tempered:
        z, tau = z / tau, 1.0
    pairs = []
    log_tails = [None] * len(z) if log_tail is None else log_tail.tolist()
    for ids, entries, known, row in zip(indices.tolist(), log_probs, log_tails, z, strict=True):
        mass = masses(ids, entries.tolist(), len(row))
        support, impossible = sorted(mass), row.new_full((1,), -torch.inf)
        p = torch.tensor([mass[i] for i in support], dtype=torch.float64).log()
        if tail == "bucket":
            q = row.log_softmax(-1)
            outside = [i for i in range(len(row)) if i not in mass]
            reachable = [i for i in outside if row[i] > -torch.inf]
            rest = q[reachable].logsumexp(-1, keepdim=True) if reachable else impossible
            here = torch.tensor([0 <= i < len(row) for i in ids])
            if known is None:
                left = math.log(guessed_tail(entries[here]))
            else:  # and what is on ids that the student does not have
                left = math.log(math.exp(known) + float(entries[~here].double().exp().sum())) if known > -700 else known
            missing = torch.tensor([left if outside else -math.inf], dtype=torch.float64)
            q = (torch.cat([q[support], rest]) / tau).log_softmax(-1)
            p = (torch.cat([p, missing]) / tau).log_softmax(-1)
            nothing = row.new_full((len(row) - len(support),), -torch.inf)
            pairs.append((torch.cat([p.to(row.dtype), nothing]), torch.cat([q, nothing])))
        elif tail == "renormalize_both":
            p, q = ((side / tau).log_softmax(-1) for side in (p, row[support]))
            nothing = row.new_full((len(row) + 1 - len(support),), -torch.inf)
            pairs.append((torch.cat([p.to(row.dtype), nothing]), torch.cat([q, nothing])))
        else:
            whole = row.new_full((len(row) + 1,), -torch.inf).detach()
            whole[support] = ((p / tau).log_softmax(-1) if tail == "renormalize" else p).to(row.dtype)
            pairs.append((whole, torch.cat([(row / tau).log_softmax(-1), impossible])))
    return tuple(torch.stack(side) for side in zip(*pairs, strict=True))


class Product(NamedTuple):
    """Logits that the student's head made, of a term's rows."""

    z: Tensor  # h·Wᵀ + b
    z_abs: Tensor  # |h|·|W|ᵀ + |b|
    logits: Tensor
    tau: float | None  # None = the term's


class Term(NamedTuple):
    coefficients: Tensor  # (r,) of its rows in the loss
    rows: Tensor  # (r,)
    values: Tensor  # (r,)
    tau: float
    products: list[Product]


class Solved(NamedTuple):
    loss: Tensor
    metrics: dict[str, float]
    margin: float  # the least gap between a row's two largest logits, of either side: what the agreement hangs on
    tie: float  # the least |log p − log q| of an entry: what the total variation's gradient hangs on
    terms: list[Term]

    def rounding_errors(self, upstream, relative, absolute):
        """After `backward(upstream)`, and with the leaves' gradients cleared: leaves there how far off they may be
        (signs aside), sums of absolute values that they are, where gradients of the logits are off by `relative` of
        themselves and by `absolute` of the probabilities that they are made of."""
        upstream = upstream.reshape(-1).abs()
        for term in self.terms:
            size = term.coefficients * (upstream[term.rows] if len(upstream) > 1 else upstream)
            for z, z_abs, z_capped, its_own in term.products:
                if z.grad is not None and z_abs.requires_grad:
                    tau = its_own or term.tau
                    probabilities = (z_capped.detach() / tau).softmax(-1)
                    z_abs.backward(relative * z.grad.abs() + absolute * size[:, None] / tau * probabilities)


def solve(
    student, teacher, labels=None, *, temperature=2.0, divergence="forward_kl", kd_weight=1.0, ce_weight=0.0,
    anchor_weight=0.0, anchor_targets=None, teacher_grad="full", token_weights=None, kd_token_weights=None,
    ignore_index=-100, reduction="mean", num_items_in_batch=None, temperature_squared=True, valid_vocab=None,
    vocab="error", kd_vocab_mask=None,
):  # fmt: skip
    """Each term is computed on the rows that it counts, and on nothing else; KD on the columns it is over, alone."""
    tau, leading = float(temperature), student.hidden.shape[:-1]
    valid = student.weight.shape[0] if valid_vocab is None else valid_vocab
    metrics = dict.fromkeys(("kd", "ce", "anchor", "student_entropy", "teacher_entropy", "agreement"), math.nan)
    margins, ties, terms = [math.inf], [math.inf], []
    products: list[Product] = []  # of the term at hand

    def columns(size):
        """Which of `size` ids the KD term is over."""
        return slice(None) if kd_vocab_mask is None else kd_vocab_mask[:size].nonzero().squeeze(1)

    def flat(tensor):
        return tensor.reshape(-1, tensor.shape[-1])

    def through_students_head(hidden, hidden_abs, *, fixed=False, tau=None):
        weight = student.weight[:valid]
        bias = weight.new_zeros(()) if student.bias is None else student.bias[:valid]
        if fixed:
            weight, bias = weight.detach(), bias.detach()
        z = hidden @ weight.T + bias
        z_capped = capped(z, student.logit_scale, student.softcap)
        if z.requires_grad:
            z.retain_grad()
            products.append(Product(z, hidden_abs @ weight.abs().T + bias.abs(), z_capped, tau))
        return z_capped

    def student_logits(rows):
        hidden = flat(student.hidden)[rows]
        return through_students_head(hidden, hidden.abs())

    def projected_logits(rows, *, fixed, tau=None):
        hidden, weight, bias = flat(teacher.hidden)[rows], teacher.projector_weight, teacher.projector_bias
        hidden_abs = hidden.abs()
        if weight is not None:
            hidden = F.linear(hidden, weight) + (0 if bias is None else bias)  # of whatever dtype
            hidden_abs = F.linear(hidden_abs, weight.abs()) + (0 if bias is None else bias.abs())
        dtype = student.weight.dtype
        return through_students_head(hidden.to(dtype), hidden_abs.to(dtype), fixed=fixed, tau=tau)

    def against(source, rows, z, tau):
        """(log_p, log_q) of a given distribution and one of logits z; z and z_t, or None, where the KD term is."""
        if isinstance(source, SparseLogits):
            entries = kept(source, rows)
            z = z[:, columns(valid)]
            log_tail = None if source.log_tail is None else source.log_tail.reshape(-1)[rows]
            return *sparse_pair(*entries, source.tail, z, tau, source.tempered, log_tail), z, None
        if isinstance(source, Logits):
            z_t = flat(source.logits)[rows][:, :valid]
        else:
            bias = None if source.bias is None else source.bias[:valid]
            hidden = flat(source.hidden)[rows]
            z_t = logits(hidden, source.weight[:valid], bias, source.logit_scale, source.softcap)
        here = columns(z_t.shape[1])
        shared, z_t = z[:, : z_t.shape[1]][:, here], z_t[:, here].to(z.dtype)
        return (z_t / tau).log_softmax(-1), (shared / tau).log_softmax(-1), shared, z_t

    def kept(source, rows):
        """(ids, log-probabilities): where there is a mask, ids count what it leaves, and the rest is without mass."""
        ids, log_probs = flat(source.indices)[rows].long(), flat(source.log_probs)[rows]
        if kd_vocab_mask is None:
            return ids, log_probs
        there = (ids >= 0) & (ids < valid)
        there &= kd_vocab_mask[ids.where(there, 0)]
        return (kd_vocab_mask.cumsum(0) - 1)[ids.where(there, 0)], log_probs.masked_fill(~there, -math.inf)

    def entropy(z):
        p = z.softmax(-1)
        return -(p * z.log_softmax(-1).masked_fill(p == 0, 0)).sum(-1)

    def best(z):
        if z.shape[1] > 1:
            first, second = z.detach().double().topk(2, dim=-1).values.unbind(-1)
            margins.append(float((first - second).min()))
        return z.argmax(-1)

    def most_probable(source, rows):
        chosen = []
        for ids, given in zip(*(each.tolist() for each in kept(source, rows)), strict=True):
            mass = sorted((-p, i) for i, p in masses(ids, given, valid).items())
            margins.append(math.log(mass[0][0] / mass[1][0]) if len(mass) > 1 else math.inf if mass else 0.0)
            chosen.append(mass[0][1] if mass else 0)
        return torch.tensor(chosen)

    def mean(name, values, rows, w):
        metrics[name] = float((w[rows] * values.detach().double()).sum() / w.sum())

    def term(name, weight, values, rows, w, tau=1.0):
        mean(name, values, rows, w)
        divisor = 1.0
        if reduction == "mean":
            divisor = float(w.sum() if num_items_in_batch is None else num_items_in_batch)
        if weight and divisor:
            terms.append(Term(weight / divisor * w[rows], rows, values, tau, products.copy()))
        products.clear()

    base = torch.ones(leading.numel(), dtype=torch.float64)
    if token_weights is not None:
        base = token_weights.reshape(-1).double()
    targets = labels = None if labels is None else labels.reshape(-1).long()
    if labels is not None:
        base = base * (labels != ignore_index)
    kd = base if kd_token_weights is None else kd_token_weights.reshape(-1).double()
    anchored = base
    if anchor_targets is not None:
        targets = anchor_targets.reshape(-1).long()
        anchored = base * (targets != ignore_index)

    main = base if teacher is None else kd
    rows = main.nonzero().squeeze(1)
    metrics["tokens"] = float(len(rows))
    if len(rows):
        z_s = student_logits(rows)
        mean("student_entropy", entropy(z_s), rows, main)
    if teacher is not None and len(rows):
        if isinstance(teacher, Projected):
            tau_t = tau if teacher.temperature is None else float(teacher.temperature)
            z_t = projected_logits(rows, fixed=teacher_grad != "full", tau=tau_t)
            z_t = z_t.detach() if teacher_grad == "none" else z_t
            shared, theirs = z_s[:, columns(valid)], z_t[:, columns(valid)]
            log_p, log_q = (theirs / tau_t).log_softmax(-1), (shared / tau).log_softmax(-1)
        else:
            log_p, log_q, shared, z_t = against(teacher, rows, z_s, tau)
            theirs = z_t
        squared = tau**2 if temperature_squared else 1.0
        term("kd", float(kd_weight) * squared, value(divergence, log_p, log_q), rows, kd, tau)
        gap = (log_p - log_q).detach().abs()
        ties += gap[gap.isfinite()].tolist()
        of_teacher = most_probable(teacher, rows) if theirs is None else best(theirs)
        mean("agreement", (best(shared) == of_teacher).double(), rows, kd)
        if z_t is not None:
            mean("teacher_entropy", entropy(z_t), rows, kd)

    rows = base.nonzero().squeeze(1)
    if labels is not None and len(rows):
        term("ce", float(ce_weight), F.cross_entropy(student_logits(rows), labels[rows], reduction="none"), rows, base)

    rows = anchored.nonzero().squeeze(1)
    if isinstance(teacher, Projected) and targets is not None and len(rows):
        values = F.cross_entropy(projected_logits(rows, fixed=True), targets[rows], reduction="none")
        term("anchor", float(anchor_weight), values, rows, anchored)

    dtype = torch.promote_types(student.hidden.dtype, (student.hidden if student.bias is None else student.bias).dtype)
    total = torch.zeros(leading.numel(), dtype=dtype)
    for coefficients, rows, values, *_ in terms:
        total = total.index_add(0, rows, coefficients.to(dtype) * values)
    loss = total.reshape(leading) if reduction == "none" else total.sum()
    return Solved(loss, metrics, min(margins), min(ties), terms)
