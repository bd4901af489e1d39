"""`ResumableTrainer`: transformers.Trainer whose runs can be gone on from, however they ended.

It goes on from checkpoints that are complete only, saves one on SIGTERM, and says what happened where a process died
or the disk is full: `faults` has the errors, docs/training.md the whole of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from kdfast.training import checkpoint, faults, resume
from kdfast.training.termination import Termination

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """Raises TerminatedError, LostProcessError, CheckpointWriteError and DamagedCheckpointError."""

    _found: str | None = None  # the checkpoint that was last found to be complete

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in Trainer, from a checkpoint that is complete; True takes the newest."""
        found = self._checkpoint_to_load(resume_from_checkpoint)
        self._found = None
        self._recover()
        self._termination = Termination(self.args.device)
        with self._termination, self._naming_lost_processes():
            return super().train(found, trial, ignore_keys_for_eval)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._naming_lost_processes():
            return super().evaluate(*args, **kwargs)

    def find_checkpoint(self, given: str | bool) -> str | None:
        """The checkpoint to go on from, complete and the same in all processes; None where True finds none at all.

        Raises ValueError where there is no such folder, and DamagedCheckpointError: see `kdfast.training.resume`.
        """
        if given == self._found:
            return self._found
        self._recover()
        with self._naming_lost_processes():
            self._found = resume.choose(
                given,
                Path(str(self.args.output_dir)),
                reads=self.args.local_process_index == 0,
                renames=self.args.should_save,
                gather=lambda value: gather_object([value]),
                warn=logger.warning if self.is_world_process_zero() else lambda text: None,
            )
        return self._found

    def _checkpoint_to_load(self, given: str | bool | None) -> str | None:
        found = self.find_checkpoint(given) if given else None
        if given and found is None:
            raise ValueError(f"resume_from_checkpoint=True: no checkpoint-N in {str(self.args.output_dir)!r}")
        return found

    def _recover(self) -> None:
        if self.args.should_save:
            checkpoint.recover(Path(str(self.args.output_dir)))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Trainer comes here after every step and every epoch
        if stopping := self._termination.is_due():
            self.control.should_save, self.control.should_evaluate = True, False  # there is little time left
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if stopping:
            saved = self._last_checkpoint()
            advice = "It cannot be gone on from: save_only_model" if self.args.save_only_model else faults.GO_ON
            raise faults.TerminatedError(
                f"step {self.state.global_step}: SIGTERM was received and {saved} was saved. The run was stopped. "
                f"{advice}",
                saved,
            )

    @contextmanager
    def _staging(self, staged: Path, final: Path) -> Iterator[None]:
        """No part of an earlier attempt before, nor of this one after a failure, which is named."""
        try:
            with faults.naming_failed_writes(final, self._last_checkpoint):
                if self.args.should_save:
                    checkpoint.discard(staged)
                yield
        except faults.CheckpointWriteError:
            if self.args.should_save:
                checkpoint.discard(staged)
            raise

    def _naming_lost_processes(self) -> AbstractContextManager[None]:
        return faults.naming_lost_processes(lambda: self.state.global_step, self._last_checkpoint)

    def _last_checkpoint(self) -> str | None:
        run = self.args.output_dir
        return get_last_checkpoint(run) if run is not None and Path(run).is_dir() else None
