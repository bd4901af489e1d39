"""A loss or gradient that is not finite stops the run, or its step is left out; its weights are never saved.

On the CPU every step is checked before the optimizer acts. On an accelerator that would synchronize at every step, so
the first bad step is recorded on the device and read when something is logged or saved. To leave a step out, it must
be known in time: that costs the synchronization, and a pass over the gradients to name the first bad one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdfast.training.durable.errors import RunStoppedError

FIELDS = ("step", "loss", "ce", "kd", "kd_weight", "temperature", "gradient norm")
ADVICE = (
    "Lower learning_rate or projector_lr, ramp the KD weight (kd_ramp), start from projector_init='normal', or train "
    "in a wider dtype. On a GPU KDFAST_CHECK=1 names an id or a weight that is out of range."
)


class NonFiniteLossError(RunStoppedError):
    """The error raised when the loss or a gradient becomes NaN or infinite, at `step` (from 1, as in the log)."""

    def __init__(self, message: str, step: int, checkpoint: str | None) -> None:
        super().__init__(message, checkpoint)
        self.step = step


class NonFiniteGuard:
    """A watch over the losses and gradients of one run.

    Args:
        device: where the losses are.
        last_checkpoint: returns the path of the last saved checkpoint, or None; called only for the message.
        most_skips: 0 stops the run at the first bad step. Otherwise the caller calls `skip` at the end of every step,
            and this many bad steps in a row stop the run.
        report: called with the step and a sentence before the run stops.
    """

    def __init__(
        self,
        device: torch.device,
        last_checkpoint: Callable[[], str | None],
        *,
        most_skips: int = 0,
        report: Callable[[int, str], None] = lambda step, what: None,
    ) -> None:
        self._last_checkpoint = last_checkpoint
        self._report = report
        self.most_skips = most_skips
        self._in_a_row = 0
        self._since_read = [0, 0]  # [steps left out, steps]
        self._gradients: dict[str, Tensor] = {}  # each gradient's norm
        self._every_step = device.type == "cpu" and not most_skips
        self._current = torch.zeros(len(FIELDS), device=device)
        self._first_bad = torch.zeros_like(self._current)  # 0 means no bad step so far

    def watch_loss(self, step: int, loss: Tensor, ce: Tensor, kd: Tensor, kd_weight: float, temperature: float) -> None:
        """Record 0-d tensors on the device before the backward pass of step `step` (from 1)."""
        zero = self._current.new_zeros(())
        values = (zero + step, loss, ce, kd, zero + kd_weight, zero + temperature, zero)
        self._current = torch.stack([value.detach().to(zero) for value in values])
        self._record(loss)

    def watch_gradient(self, norm: Tensor) -> None:
        """Record the gradient norm of the step last passed to `watch_loss`, before the optimizer acts."""
        self._current[-1] = norm.detach()
        self._record(norm)

    def watch_gradients(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Record each gradient's norm before clipping, which makes every gradient NaN if one is."""
        gradients = {name: p.grad for name, p in parameters if p.grad is not None}
        norms = torch._foreach_norm([*gradients.values()]) if gradients else []
        self._gradients = dict(zip(gradients, norms, strict=True))

    def skip(self, step: int, reduce: Callable[[Tensor], Tensor]) -> str | None:
        """Return, at the end of step `step`, why it must be left out, or None. Synchronizes.

        `reduce` sums over the processes, so that a step that is bad in one is left out in all.
        """
        anywhere = reduce((self._first_bad[0] != 0).float()).item()
        self._since_read[1] += 1
        if not anywhere:
            self._in_a_row = 0
            return None
        self._since_read[0] += 1
        self._in_a_row += 1
        what = self._describe()[1] if self._first_bad[0] != 0 else "the loss of another process is not finite"
        self._first_bad = torch.zeros_like(self._first_bad)
        if self._in_a_row >= self.most_skips:
            self._stop(step, f"{what}; it is step {self._in_a_row} in a row that had to be left out")
        return what

    def read_skips(self) -> tuple[int, int]:
        """Return (steps left out, all steps) since the last call."""
        skipped, steps = self._since_read
        self._since_read = [0, 0]
        return skipped, steps

    def check(self) -> None:
        """Raise NonFiniteLossError if a step so far was bad. Synchronizes."""
        step, what = self._describe()
        if step:
            self._stop(step, what)

    def _describe(self) -> tuple[int, str]:
        """Return the first bad step, or 0, and what is wrong with it."""
        bad = dict(zip(FIELDS, self._first_bad.tolist(), strict=True))
        step, norm = round(bad.pop("step")), bad.pop("gradient norm")
        what = f"loss is {bad['loss']}"
        if math.isfinite(bad["loss"]):
            first = next((name for name, value in self._gradients.items() if not torch.isfinite(value).all()), None)
            what = f"gradient norm is {norm}" + (f", first that of {first}" if first else "")
        values = ", ".join(f"{name} {value:.6g}" for name, value in bad.items())
        return step, f"the {what} ({values})"

    def check_weights(self, parameters: Iterable[tuple[str, Tensor]], reduce: Callable[[Tensor], Tensor]) -> None:
        """Raise as `check` does, or if a parameter is not finite in any process. All call it before a save."""
        self.check()
        shards = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in parameters}
        marks = torch.stack([~torch.isfinite(shard.detach()).all() for shard in shards.values()]).float()
        found = reduce(marks.to(self._current.device)).tolist()  # NCCL needs it on the device
        bad = [name for name, mark in zip(shards, found, strict=True) if mark]
        if bad:
            step = round(self._current[0].item())
            self._stop(step, f"{len(bad)} parameter(s) hold NaN or infinity, first {bad[0]}", "Lower learning_rate.")

    def _record(self, tested: Tensor) -> None:
        bad = ~torch.isfinite(tested.detach()) & (self._first_bad[0] == 0)
        self._first_bad = torch.where(bad, self._current, self._first_bad)
        if self._every_step:
            self.check()

    def _stop(self, step: int, what: str, advice: str = ADVICE) -> None:
        self._report(step, f"{what}; the run was stopped")
        checkpoint = self._last_checkpoint()
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been saved yet."
        message = f"step {step}: {what}. The run was stopped, and nothing of it was saved. {kept} {advice}"
        raise NonFiniteLossError(message, step, checkpoint)
