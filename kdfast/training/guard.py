"""A loss or gradient that is not finite stops the run, and nothing that came of it is saved.

On the CPU every step is checked before the optimizer acts. On an accelerator that would cost a synchronisation a
step: the first bad step is recorded on the device, and read whenever something is logged or saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

FIELDS = ("step", "loss", "ce", "kd", "kd_weight", "temperature", "gradient norm")


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite.

    Attributes: `step` (counted from 1, as in the log) and `checkpoint`, the last good one, or None.
    """

    def __init__(self, message: str, step: int, checkpoint: str | None) -> None:
        super().__init__(message)
        self.step = step
        self.checkpoint = checkpoint


class NonFiniteGuard:
    """Watches one run.

    Args:
        device: where the losses are.
        last_checkpoint: gives the path of the last checkpoint saved, or None; asked only for the message.
    """

    def __init__(self, device: torch.device, last_checkpoint: Callable[[], str | None]) -> None:
        self._last_checkpoint = last_checkpoint
        self._every_step = device.type == "cpu"
        self._current = torch.zeros(len(FIELDS), device=device)
        self._first_bad = torch.zeros_like(self._current)  # step 0: none so far

    def watch_loss(self, step: int, loss: Tensor, ce: Tensor, kd: Tensor, kd_weight: float, temperature: float) -> None:
        """Before the backward pass of step `step` (from 1); 0-d tensors on the device."""
        zero = self._current.new_zeros(())
        values = (zero + step, loss, ce, kd, zero + kd_weight, zero + temperature, zero)
        self._current = torch.stack([value.detach().to(zero) for value in values])
        self._record(loss)

    def watch_gradient(self, norm: Tensor) -> None:
        """After the backward pass of the step last given to `watch_loss`, before the optimizer acts."""
        self._current[-1] = norm.detach()
        self._record(norm)

    def check(self) -> None:
        """Raise NonFiniteLossError if a step so far was bad. Synchronises."""
        bad = dict(zip(FIELDS, self._first_bad.tolist(), strict=True))
        step = round(bad.pop("step"))
        if step == 0:
            return
        norm = bad.pop("gradient norm")
        what = f"gradient norm is {norm}" if math.isfinite(bad["loss"]) else f"loss is {bad['loss']}"
        values = ", ".join(f"{name} {value:.6g}" for name, value in bad.items())
        self._stop(
            step,
            f"the {what} ({values})",
            "Lower learning_rate or projector_lr, ramp the KD weight (kd_ramp), start from projector_init='normal', "
            "or train in a wider dtype.",
        )

    def check_weights(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Before every save: raise as `check` does, or if a parameter is not finite."""
        self.check()
        named = [(name, p.detach()) for name, p in parameters]
        finite = torch.stack([torch.isfinite(p).all() for _, p in named]).tolist()
        bad = [name for (name, _), good in zip(named, finite, strict=True) if not good]
        if bad:
            step = round(self._current[0].item())
            self._stop(step, f"{len(bad)} parameter(s) hold NaN or infinity, first {bad[0]}", "Lower learning_rate.")

    def _record(self, tested: Tensor) -> None:
        bad = ~torch.isfinite(tested.detach()) & (self._first_bad[0] == 0)
        self._first_bad = torch.where(bad, self._current, self._first_bad)
        if self._every_step:
            self.check()

    def _stop(self, step: int, what: str, advice: str) -> None:
        checkpoint = self._last_checkpoint()
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been saved yet."
        message = f"step {step}: {what}. The run was stopped, and nothing of it was saved. {kept} {advice}"
        raise NonFiniteLossError(message, step, checkpoint)
