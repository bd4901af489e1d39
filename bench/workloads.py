"""What is timed: sizes of real pairs of models, and normal inputs of one of them.

Teachers: "projected" (through the student's own head; gradients to hidden states, W and projector), "head" (the
teacher's own; gradients to the student's hidden states and W, which is the work the peers share), "none" (the cross
entropy alone). Without a GPU the number of tokens is scaled so that a step takes seconds; the sweeps have narrow heads.
KDFAST_BENCH_QUICK=1: toy sizes, to try the benchmark itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from measure import CUDA
from torch import Tensor

from kdfast.plan import Shape

DEVICE = "cuda" if CUDA else "cpu"
QUICK = os.environ.get("KDFAST_BENCH_QUICK", "0") not in ("", "0")
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Workload:
    """One problem: forward KL at τ = 2, without τ², its mean over the tokens; or the cross entropy's mean."""

    name: str
    teacher: str  # "projected" | "head" | "none"
    tokens: int
    vocab: int
    student_width: int
    teacher_width: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.name}-{self.teacher}-{self.precision}"

    @property
    def precision(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    @property
    def sizes(self) -> str:
        widths = f"H={self.student_width}" if self.teacher == "none" else f"{self.teacher_width}→{self.student_width}"
        return f"N={self.tokens}, V={self.vocab}, {widths}, {self.precision}"

    def shape(self, device: str = DEVICE) -> Shape:
        """The same, for the planner."""
        widths = (self.tokens, self.vocab, self.student_width, self.teacher_width)
        return Shape(*widths, dtype=self.dtype, device=device, teacher=self.teacher)

    def operations(self, *, backward: bool) -> int:
        """Operations it takes with nothing computed twice: 6u(Hs), 3u(Hs) + u(Ht) or 3u(Hs); forward 2u, u + u, u."""
        teacher = {"projected": (3 if backward else 1) * self.student_width, "head": self.teacher_width, "none": 0}
        return 2 * self.tokens * self.vocab * ((3 if backward else 1) * self.student_width + teacher[self.teacher])


class Inputs:
    """Normal inputs of a workload, drawn from a fixed seed. Logits have a standard deviation of 1, unless said:
    `distance` is how far the teacher is from the student, None = drawn on its own."""

    def __init__(self, workload: Workload, device: str = DEVICE, distance: float | None = None) -> None:
        self.workload, self.device = workload, device
        N, V, Hs, Ht = workload.tokens, workload.vocab, workload.student_width, workload.teacher_width
        generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(std)

        def leaf(value: Tensor) -> Tensor:
            return value.to(workload.dtype).detach().requires_grad_()  # a tensor of its own

        hs, W = normal(N, Hs), normal(V, Hs, std=Hs**-0.5)
        self.hs, self.W = leaf(hs), leaf(W)
        self.leaves = {"hidden": self.hs, "weight": self.W}
        if workload.teacher == "none":
            self.labels = torch.randint(V, (N,), generator=generator, device=device)
            return
        self.labels = torch.zeros(N, dtype=torch.long, device=device)  # some peers want them; they count for nothing
        ht = normal(N, Ht) if distance is None else hs + distance * normal(N, Hs)
        if workload.teacher == "head":
            Wt = normal(V, Ht, std=Ht**-0.5) if distance is None else W
            self.ht, self.Wt = ht.to(workload.dtype), Wt.to(workload.dtype)
        else:
            P = normal(Hs, Ht, std=Ht**-0.5)
            if distance is not None:  # any rotation: the teacher's hidden states in coordinates of their own
                P = torch.linalg.qr(P).Q
                ht = ht @ P
            self.ht, self.P = ht.to(workload.dtype), leaf(P)
            self.leaves["projector"] = self.P

    def clear(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None


BF16, FP32 = torch.bfloat16, torch.float32
# name: tokens with a GPU and without, V, Hs, Ht
PAIRS = {
    "original": (8192, 1024, 50257, 768, 1024),  # gpt2-medium → gpt2
    "latency": (256, 256, 50257, 768, 1024),
    "llama": (8192, 128, 128256, 2048, 4096),  # Llama-3.1-8B → Llama-3.2-1B
    "qwen": (8192, 256, 151936, 896, 1536),  # Qwen2.5-1.5B → 0.5B
    "gemma": (4096, 128, 262144, 1152, 2560),  # Gemma-3-4B → 1B
}
SWEEP_N = (256, 1024, 4096, 16384, 65536) if CUDA else (64, 256, 1024, 2048)
SWEEP_V = (32768, 65536, 131072, 262144) if CUDA else (8192, 32768, 131072, 262144)


def _workloads() -> list[Workload]:
    if QUICK:
        tiny = Workload("original", "projected", 32, 333, 16, 24)
        return [replace(tiny, teacher=teacher) for teacher in ("projected", "head", "none")]
    found = []
    for name, (many, few, V, Hs, Ht) in PAIRS.items():
        sizes = (many if CUDA else few, V, Hs, Ht)
        # minutes each on a CPU, and a projected teacher has no peers: there two of the large ones go without
        teachers = ("projected", "head") if CUDA or name not in ("llama", "qwen") else ("head",)
        found += [Workload(name, teacher, *sizes, BF16 if CUDA else FP32) for teacher in teachers]
        if name == "original":
            other = FP32 if CUDA else BF16
            found += [Workload(name, teacher, *sizes, other) for teacher in ("projected", "head")]
            found += [Workload(name, "none", *sizes, dtype) for dtype in (FP32, BF16)]
    widths, dtype = ((768, 1024), BF16) if CUDA else ((256, 384), FP32)
    if CUDA:  # what peers' figures are of; a CPU would take minutes a step
        sizes = (8192, 128256, 4096, 4096, BF16)
        found += [Workload("wide", teacher, *sizes) for teacher in ("projected", "head", "none")]
    found += [Workload(f"N{N}", "head", N, 50257, *widths, dtype) for N in SWEEP_N]
    found += [Workload(f"V{V}", "head", 4096 if CUDA else 512, V, *widths, dtype) for V in SWEEP_V]
    return found


WORKLOADS = _workloads()
