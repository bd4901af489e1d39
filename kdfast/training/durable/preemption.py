"""SIGTERM, the usual notice before a machine is taken away: finish the step, save a checkpoint, stop the run.

transformers can do this for one process (`enable_jit_checkpoint`): it waits three seconds, then saves in the middle of
a step under the checkpoint's final name, and each process at a step of its own. Here the processes agree. The signal
may reach only some of them, at different steps, so after every step a flag is summed over all processes, and read
after the next one: they wait for a result that is one step old, and a GPU's queue never runs dry. A single process
stops at once.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from transformers import TrainerCallback

from kdfast.training.durable import processes
from kdfast.training.durable.errors import TerminatedError, how_to_resume


class Termination(TrainerCallback):
    """A callback that saves a checkpoint and raises TerminatedError after a SIGTERM received in its context.

    It acts only if SIGTERM had its default effect; a user's own handler stays in place. A signal that came too late to
    act on has its default effect after the context.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = self._stopping = self._installed = False
        # how many processes the last step found signaled, on its way to the host
        self._pending: tuple[Tensor, torch.Event | None] = torch.zeros(()), None

    def __enter__(self) -> Termination:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._ask)
            self._installed = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._installed = False
            if self._asked and exception[0] is None:
                signal.raise_signal(signal.SIGTERM)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_due():
            self._stopping = True
            control.should_save, control.should_evaluate = True, False  # there is little time left

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if self._stopping:
            step = state.global_step
            saved = str(Path(args.output_dir) / f"checkpoint-{step}")
            advice = "It cannot be gone on from: save_only_model" if args.save_only_model else how_to_resume(saved)
            raise TerminatedError(
                f"step {step}: SIGTERM was received and {saved} was saved. The run was stopped. {advice}", saved
            )

    def is_due(self) -> bool:
        """Return whether to stop now, the same in all processes. All must call it after every step."""
        if processes.count() == 1:
            return self._asked
        flag = torch.full((), float(self._asked), device=self._device)
        torch.distributed.all_reduce(flag)
        on_host, copied = flag.to("cpu", non_blocking=True), None
        if self._device.type != "cpu":
            copied = torch.Event(self._device)
            copied.record()
        (asked, event), self._pending = self._pending, (on_host, copied)
        if event is not None:
            event.synchronize()
        return asked.item() > 0
