"""Value and gradients in float64, written out by hand: what every contender is held against before it is timed.

With p and q the teacher's and the student's probabilities at τ, g = log p − log q, KL = Σ p·g:

    dKL/dz_s = (q − p)/τ        dKL/dz_t = p·(g − KL)/τ        dCE/dz_s = q − onehot

A few tokens at a time, whole vocabulary. The gradient of W is taken at its first `CHECKED` rows, that of the hidden
states at all tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from workloads import TEMPERATURE, Inputs

CHECKED = 1024  # rows of W
ROWS = 64


class Truth(NamedTuple):
    """float64: the loss, the teacher's entropy at τ (both means over tokens, ()), gradients by leaf."""

    value: Tensor
    entropy: Tensor
    gradients: dict[str, Tensor]


def truth(inputs: Inputs) -> Truth:
    kind, V = inputs.workload.teacher, inputs.workload.vocab
    N, checked = inputs.workload.tokens, min(CHECKED, V)
    W, hs = inputs.W.detach().double(), inputs.hs.detach().double()
    gradients = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in inputs.leaves.items()}
    gradients["weight"] = gradients["weight"][:checked].clone()
    value, entropy = (torch.zeros((), dtype=torch.float64, device=W.device) for _ in range(2))
    if kind == "projected":
        P, head = inputs.P.detach().double(), W
    elif kind == "head":
        P, head = None, inputs.Wt.double()
    for rows in torch.arange(N, device=W.device).split(ROWS):
        x = hs[rows]
        if kind == "none":
            log_q = (x @ W.T).log_softmax(-1)
            value -= log_q.gather(1, inputs.labels[rows, None]).sum() / N
            g_s = log_q.exp()
            g_s[torch.arange(len(rows), device=W.device), inputs.labels[rows]] -= 1
            g_t = None
        else:
            teacher = inputs.ht[rows].double()
            projected = teacher if P is None else teacher @ P.T
            log_q, log_p = ((z / TEMPERATURE).log_softmax(-1) for z in (x @ W.T, projected @ head.T))
            p, g = log_p.exp(), log_p - log_q
            kl = (p * g).sum(-1, keepdim=True)
            value += kl.sum() / N
            entropy -= (p * log_p).sum() / N
            g_s = (log_q.exp() - p) / TEMPERATURE
            g_t = None if P is None else p * (g - kl) / TEMPERATURE / N
        g_s /= N
        gradients["hidden"][rows] = g_s @ W
        gradients["weight"] += g_s[:, :checked].T @ x
        if g_t is not None:
            gradients["weight"] += g_t[:, :checked].T @ projected
            gradients["projector"] += (g_t @ W).T @ teacher
    return Truth(value, entropy, gradients)


def errors(inputs: Inputs, loss: Tensor, exact: Truth, *, cross_entropy: bool = False) -> dict[str, float]:
    """Relative errors after a step: of the value, and of each leaf's gradient (Frobenius norm; ∞ if there is none)."""
    value = exact.value + exact.entropy if cross_entropy else exact.value
    found = {"value": float((loss.detach().double() - value).abs() / value.abs())}
    for name, leaf in inputs.leaves.items():
        expected = exact.gradients[name]
        if leaf.grad is None:
            found[name] = float("inf")
        else:
            found[name] = float((leaf.grad[: len(expected)].double() - expected).norm() / expected.norm())
    return found


def worst_gradients(row: dict[str, list[float]]) -> list[float]:
    """Of errors step by step, by leaf as above: the worst gradient's at each; none of a row without errors."""
    gradients = [errors for leaf, errors in row.items() if leaf not in ("value", "missing")]
    return [max(step) for step in zip(*gradients, strict=True)]
