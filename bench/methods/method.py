"""What a contender is: a loss, and what is known of it beforehand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from workloads import Inputs

Run = Callable[[], object]


@dataclass(frozen=True)
class Method:
    """A way to compute the loss of `Inputs`.

    Attributes:
        loss: the differentiable loss, (); or, with `is_floor`, the products to make: (forward, step).
        operations: by the kind of teacher, in units of u(H) = 2·N·V·H; a kind that is not there cannot be done.
        plan: its name in bench/plan, or None.
        needs: modules.
        gpu: it runs on a GPU only.
        whole_logits: (N, V) of one side or more exists.
        cross_entropy: its value is −Σ p log q, the teacher's entropy more than the KL.
    """

    name: str
    loss: Callable[[Inputs], Tensor] | Callable[[Inputs], tuple[Run, Run]]
    operations: dict[str, str]
    plan: str | None = None
    needs: tuple[str, ...] = ()
    gpu: bool = False
    whole_logits: bool = False
    cross_entropy: bool = False
    is_floor: bool = False
    ours: bool = False
    compiles: bool = False  # what the first call allocates is the compiler's
    why_not: Callable[[str], str | None] | None = None  # device → why it cannot run there

    def missing(self, teacher: str, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if teacher not in self.operations:
            return "cannot do this case"
        for module in self.needs:
            if not _found(module):
                return f"{module.partition('.')[0]} is not installed"
        if self.gpu and device != "cuda":
            return "needs a GPU"
        return self.why_not(device) if self.why_not else None

    def runs(self, inputs: Inputs) -> tuple[Run, Run]:
        """(forward, step): the loss without gradients, and the loss with its backward from gradients of None."""
        if self.is_floor:
            return self.loss(inputs)  # type: ignore[return-value]

        def forward() -> object:
            with torch.no_grad():
                return self.loss(inputs)

        def step() -> object:
            inputs.clear()
            loss = self.loss(inputs)
            loss.backward()  # type: ignore[union-attr]
            return loss

        return forward, step


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it is in
        return False
