"""The loss written out once more, straight from its definition: whole logits, float64, autograd, no shared code.

Tests hold both engines against this. It takes the arguments of `fused_kd_loss` as plain tensors.
"""

import torch
import torch.nn.functional as F


def logits(hidden, weight, bias=None, scale=1.0, softcap=None):
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def kl(log_p, log_q):
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def divergence(name, log_p, log_q, beta=0.5):
    """p is the teacher."""
    if name == "jsd" and 0 < beta < 1:
        log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    forward = name == "forward_kl" or (name == "jsd" and beta == 0)
    return kl(log_p, log_q) if forward else kl(log_q, log_p)


def loss(
    hs, W, b=None, *, ht=None, P=None, p=None, Wt=None, bt=None, scale=1.0, softcap=None,
    t_scale=1.0, t_softcap=None, labels=None, temperature=2.0, name="forward_kl", beta=0.5, kd_weight=1.0,
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
        value = divergence(name, (z_t / tau).log_softmax(-1), (z_s / tau).log_softmax(-1), beta)
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
