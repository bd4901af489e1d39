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
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from kdfast.training.durable import atomic_io, checkpoint, errors, resume
from kdfast.training.durable.preemption import Termination

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """Raises TerminatedError, LostProcessError, CheckpointWriteError and DamagedCheckpointError."""

    _found: str | None = None  # a checkpoint that was found to be complete, until a run is started
    _newest: str | None = None  # what the run saved last, or went on from

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in Trainer, from a checkpoint that is complete; True takes the newest."""
        found = self._checkpoint_to_load(resume_from_checkpoint)
        self._newest = found
        self._recover()
        self._termination = Termination(self.args.device)
        try:
            with self._termination, self._naming_lost_processes():
                return super().train(found, trial, ignore_keys_for_eval)
        finally:
            self._found = None  # whatever was read for this run

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._naming_lost_processes():
            return super().evaluate(*args, **kwargs)

    def find_checkpoint(self, given: str | bool) -> str | None:
        """The checkpoint to go on from, complete and the same in all processes; None where True finds none at all.

        Raises ValueError where there is no such folder, and DamagedCheckpointError: see `resume.py`.
        """
        self._recover()
        with self._naming_lost_processes():
            self._found = resume.choose(
                given,
                Path(str(self.args.output_dir)),
                reads=self._reads,
                renames=self.args.should_save,
                gather=_gather,
                warn=logger.warning if self.is_world_process_zero() else lambda text: None,
            )
        return self._found

    def _checkpoint_to_load(self, given: str | bool | None) -> str | None:
        known = given is not None and given == self._found  # read just now, by find_checkpoint
        found = self._found if known else self.find_checkpoint(given) if given else None
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
            step = self.state.global_step
            saved = str(Path(str(self.args.output_dir)) / f"checkpoint-{step}")
            advice = "It cannot be gone on from: save_only_model" if self.args.save_only_model else errors.go_on(saved)
            raise errors.TerminatedError(
                f"step {step}: SIGTERM was received and {saved} was saved. The run was stopped. {advice}",
                saved,
            )

    @contextmanager
    def _staging(self, staged: Path, final: Path) -> Iterator[None]:
        """No part of an earlier attempt before, nor of this one after a failure, which is named."""
        try:
            with errors.naming_failed_writes(final, self._last_checkpoint):
                if self.args.should_save:
                    atomic_io.discard(staged)
                yield
            if resume.step_of(final) >= 0:
                self._newest = str(final)
        except BaseException:
            checkpoint.discard_after_failure(staged, saves=self.args.should_save)
            raise

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> TrainOutput:
        """With save_total_limit=1 Trainer keeps the best alone, and deletes the rest file by file under their names."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if limit == 1 and best is not None and Path(best).is_dir():
            self._newest = best
            spare = [path for path in resume.checkpoints(Path(self._get_output_dir(trial))) if not path.samefile(best)]
            for path in spare if self.args.should_save else ():
                atomic_io.delete(path)
        return output

    def _save_state(self, folder: Path) -> None:
        kept: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
        for callback in (*self.callback_handler.callbacks, self.control):
            if not isinstance(callback, ExportableState):
                continue
            name = type(callback).__name__
            if isinstance(kept.get(name), list):
                kept[name].append(callback.state())
            else:
                kept[name] = callback.state()
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        resumed = super()._init_training_state(*args, **kwargs)
        if (best := self._best_checkpoint()) is not None and best.is_dir():  # Trainer forgets one that was moved
            self.state.best_model_checkpoint = str(best)
        return resumed

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with resume.naming_failed_reads(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with resume.naming_failed_reads(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with resume.naming_failed_reads(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self._best_checkpoint()
        assert best is not None
        with self._naming_lost_processes():
            found = resume.common_problem(best, self._reads, _gather)
        if found:
            raise errors.DamagedCheckpointError(
                f"the best model, {best}, cannot be loaded: {found if best.is_dir() else 'there is no such folder'}. "
                "Restore it from a copy, or keep the last step's model: load_best_model_at_end=false",
                self._last_checkpoint(),
            )
        with resume.naming_failed_reads(best):
            checkpoint.load_models(best, self.accelerator.unwrap_model(self.model))

    def _best_checkpoint(self) -> Path | None:
        """As it was recorded, or by its step, where the run's folder was moved."""
        recorded, step = self.state.best_model_checkpoint, self.state.best_global_step
        if step and (recorded is None or not Path(recorded).is_dir()):
            return Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        return Path(recorded) if recorded is not None else None

    @property
    def _reads(self) -> bool:
        """One process of a node looks at checkpoints."""
        return self.args.local_process_index == 0

    def _naming_lost_processes(self) -> AbstractContextManager[None]:
        return errors.naming_lost_processes(lambda: self.state.global_step, self._last_checkpoint)

    def _last_checkpoint(self) -> str | None:
        """The newest of this run; of the folder before there is one. Later ones of another run may lie there."""
        own = self._newest or self._found
        if own is not None or self.state.global_step:
            return own
        return next((str(folder) for folder in resume.checkpoints(Path(str(self.args.output_dir)))), None)


def _gather(value: Any) -> list[Any]:
    return gather_object([value])
