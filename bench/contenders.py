"""One small adapter per contender. Each computes forward KL at τ = 2, without τ², its mean over N tokens, and all the
gradients it can; `Case` holds what they share.

A contender is `run(case)`, which leaves gradients in `.grad`, plus the operations it makes in units of
u(H) = 2·N·V·H. The floor is the very products of our chunked loop, replayed on the same shapes and nothing else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import Head, Projected, fused_kd_loss, gemm

TEMPERATURE = 2.0


@dataclass
class Case:
    """Normal inputs of one problem. `kind`: "projected" (through the student's head) or "head" (the teacher's own)."""

    kind: str
    N: int
    V: int
    Hs: int
    Ht: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    calls: list[gemm.Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).mul_(std).to(self.dtype)

        self.hs = normal(self.N, self.Hs).requires_grad_()
        self.W = normal(self.V, self.Hs, std=self.Hs**-0.5).requires_grad_()
        self.ht = normal(self.N, self.Ht)
        self.labels = torch.zeros(self.N, dtype=torch.long, device=self.device)
        if self.kind == "projected":
            self.P = normal(self.Hs, self.Ht, std=self.Ht**-0.5).requires_grad_()
            self.leaves = {"hidden": self.hs, "weight": self.W, "projector": self.P}
        else:
            self.Wt = normal(self.V, self.Ht, std=self.Ht**-0.5)
            self.leaves = {"hidden": self.hs, "weight": self.W}

    def clear(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None


@dataclass(frozen=True)
class Contender:
    name: str
    kinds: tuple[str, ...]
    run: Callable[[Case], object]
    operations: dict[str, str]  # kind → formula
    needs: str | None = None  # module
    checked: bool = True  # has gradients to check

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        try:
            found = not self.needs or importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:  # of the package it is in
            found = False
        return None if found else f"{self.needs} is not installed"


def ours(case: Case) -> None:
    teacher = Projected(case.ht, case.P) if case.kind == "projected" else Head(case.ht, case.Wt)
    fused_kd_loss(
        Head(case.hs, case.W), teacher, temperature=TEMPERATURE, temperature_squared=False, engine="torch"
    ).backward()


def floor_b(case: Case) -> None:
    """The products of one run of ours, on buffers of their own."""
    if not case.calls:
        with gemm.record() as case.calls:
            ours(case)
        rows = max(call.rows for call in case.calls)
        wide = max(case.Hs, case.Ht)
        case.buffers = (torch.randn(rows, wide), torch.randn(rows, case.V), torch.zeros(case.V, case.Hs))  # type: ignore[attr-defined]
    x, z, d_weight = case.buffers  # type: ignore[attr-defined]
    with torch.no_grad():
        for call in case.calls:
            weight = case.W if call.width == case.Hs else case.Wt
            if call.kind == "logits":
                gemm.logits(x[: call.rows, : call.width].contiguous(), weight, z[: call.rows])
            elif call.kind == "input_gradient":
                gemm.input_gradient(z[: call.rows], weight, z.dtype)
            else:
                gemm.weight_gradient(z[: call.rows], x[: call.rows, : call.width].contiguous(), d_weight)


def eager(case: Case) -> None:
    """What one writes without a library: whole logits, autograd."""
    z_s = F.linear(case.hs, case.W)
    z_t = F.linear(F.linear(case.ht, case.P), case.W) if case.kind == "projected" else F.linear(case.ht, case.Wt)
    log_q, log_p = (z_s / TEMPERATURE).log_softmax(-1), (z_t / TEMPERATURE).log_softmax(-1)
    F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).backward()


def trl(case: Case) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(case.hs, case.W, None, case.ht, case.Wt, None, 0.0, TEMPERATURE)
    divergence.mean().backward()


def liger(case: Case) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    criterion = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE, compiled=False
    )
    criterion(case.hs, case.W, case.ht, case.Wt, case.labels).backward()


BOTH, HEAD = ("projected", "head"), ("head",)
CONTENDERS = [
    Contender(
        "floor B (our GEMMs alone)", BOTH, floor_b, {"projected": "6u(Hs)", "head": "3u(Hs)+u(Ht)"}, checked=False
    ),
    Contender("kdfast torch", BOTH, ours, {"projected": "6u(Hs)", "head": "3u(Hs)+u(Ht)"}),
    Contender("eager", BOTH, eager, {"projected": "6u(Hs)", "head": "3u(Hs)+u(Ht)"}),
    Contender("TRL ChunkedDivergence", HEAD, trl, {"head": "4u(Hs)+2u(Ht)"}, needs="trl.kernels.chunked_divergence"),
    Contender("Liger chunked JSD (β=0)", HEAD, liger, {"head": "3u(Hs)+u(Ht)"}, needs="liger_kernel"),
]
