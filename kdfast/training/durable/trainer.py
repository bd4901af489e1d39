"""`DurableTrainer`: a transformers.Trainer whose runs can be resumed, however they ended.

It writes checkpoints that appear only when complete, resumes only from complete ones, saves one on SIGTERM, and reports
a lost process or a full disk. errors.py has the errors; docs/troubleshooting.md describes them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from kdfast.training import fsdp
from kdfast.training.adapters import ADAPTER_CONFIG
from kdfast.training.durable import atomic_io, checkpoint, checksums, errors, resume
from kdfast.training.durable.preemption import Termination
from kdfast.training.model import DistillationModel

# methods of transformers.Trainer: an error below one of them at the start of a run is the checkpoint's fault
READERS = ("_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state")


class DurableTrainer(Trainer):
    """A `Trainer` whose runs can be resumed; durable/errors.py has what it raises."""

    model: DistillationModel

    _found: str | None = None  # a checkpoint known to be complete, until a run starts
    _newest: str | None = None  # the last checkpoint saved in this run, or resumed from

    def training(self) -> AbstractContextManager[None]:
        """Return a context around every run, in all processes, where a subclass prepares what is trained."""
        return nullcontext()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does, resuming from complete checkpoints only; True means the newest."""
        found, given = None, resume_from_checkpoint
        if given:
            found = self._found if given == self._found else self.find_checkpoint(given)
            if found is None:
                raise ValueError(f"resume_from_checkpoint=True: no checkpoint-N in {str(self.args.output_dir)!r}")
        self._newest = found
        self.check_start(found)
        self._recover()
        limit = self.args.save_total_limit
        termination, mended = Termination(self.args.device), _MendedState(self)
        self.add_callback(mended)
        self.add_callback(termination)  # the last one, so that requests of other callbacks at its step do not count
        try:
            with (
                self.training(),
                termination,
                self.naming_lost_processes(),
                resume.naming_failed_reads(found, READERS),
            ):
                output = super().train(found, *args, **kwargs)
        finally:
            self.remove_callback(termination)
            self.remove_callback(mended)
            self.args.save_total_limit = limit
            self._found = None  # its files may change before the next run
        if limit == 1 and (best := self.state.best_model_checkpoint) is not None and Path(best).is_dir():
            self._newest = best
            self._rotate(ended=True)
        return output

    def check_start(self, checkpoint: str | Path | None) -> None:
        """Raise ValueError, before anything takes long, if training cannot start or resume from `checkpoint`."""
        if self.is_fsdp_enabled:
            fsdp.check_dtypes(self.model)
        if checkpoint is not None:
            plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
            resume.check_optimizer(Path(checkpoint), plugin)

    def find_checkpoint(self, given: str | bool) -> str | None:
        """Return the checkpoint that `resume.choose` finds, the same in all processes; raise as it does."""
        self._recover()
        with self.naming_lost_processes():
            self._found = resume.choose(given, self._run, renames=self.args.should_save)
        return self._found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with resume.naming_failed_reads(resume_from_checkpoint):
            checkpoint.load_models(Path(resume_from_checkpoint), self.accelerator.unwrap_model(self.model))

    def _load_best_model(self) -> None:
        best = resume.best_checkpoint(self.state, self._run)
        assert best is not None
        with self.naming_lost_processes():
            found = resume.common_problem(best)
        if found:
            raise errors.DamagedCheckpointError(
                f"the best model, {best}, cannot be loaded: {found if best.is_dir() else 'there is no such folder'}. "
                "Restore it from a copy, or keep the last step's model: load_best_model_at_end=false",
                self.last_checkpoint(),
            )
        self._load_from_checkpoint(str(best))

    def saving(self) -> AbstractContextManager[None]:
        """Return a context around every save, in all processes, where a subclass checks what is saved."""
        return nullcontext()

    def save_state_beside(self, folder: Path) -> None:
        """Write a subclass's further state into a checkpoint, in every process."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write student, projector and tokenizer into `output_dir`; each file is complete or absent."""
        if _internal_call:  # the checkpoint itself is published later
            self._write_model(Path(str(output_dir)))
            return
        with self.naming_lost_processes(), self.saving():
            final = Path(output_dir or str(self.args.output_dir))
            staged = final / atomic_io.INCOMPLETE if final.is_dir() else atomic_io.staging(final)
            with self._staging(staged, staged, final):
                self._write_model(staged)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._write_arguments(staged)
                    atomic_io.publish(staged, final, replace=False)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # let Trainer save into a hidden folder in place of the run's, then move the checkpoint out of it
        final = self._run / f"checkpoint-{self.state.global_step}"
        staged = atomic_io.staging(final)
        written = staged / final.name
        with self.saving():
            with self._staging(staged, written, final):
                with replaced(self.args, output_dir=str(staged), push_to_hub=False):
                    super()._save_checkpoint(model, None)  # a trial would name another folder
                self.save_state_beside(written)
                self.accelerator.wait_for_everyone()
                best = self._run / f"checkpoint-{self.state.best_global_step}"
                if self.state.best_global_step and (best == final or best.is_dir()):  # evaluated now, or since a save
                    self.state.best_model_checkpoint = str(best)
                if self.args.should_save:
                    self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                    self._write_arguments(written)
                    checksums.write(written)
                    atomic_io.publish(written, final, replace=True)
                    staged.rmdir()
            self._newest = str(final)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))
            self._rotate()
            self.accelerator.wait_for_everyone()

    def _rotate(self, *, ended: bool = False) -> None:
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            checkpoint.rotate(self._run, limit, best, ended=ended)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _write_model(self, folder: Path) -> None:
        state = fsdp.full_state(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save_models(folder, self.accelerator.unwrap_model(self.model), state)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _write_arguments(self, folder: Path) -> None:
        (folder / "training_args.json").write_text(self.args.to_json_string())

    @contextmanager
    def _staging(self, staged: Path, written: Path, final: Path) -> Iterator[None]:
        """Clear `staged` of an earlier attempt; after a failure, clear it again and raise an error that names it."""
        try:
            with errors.naming_failed_writes(final, lambda: self.state.global_step, self.last_checkpoint):
                if self.args.should_save:
                    atomic_io.discard(staged)
                self.accelerator.wait_for_everyone()
                yield
        except BaseException:
            # other processes may still be writing; one that does not write the student removes what was created after
            # the writing process cleared up
            if self.args.should_save or not any((written / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
                for _ in range(3):  # a file that appears meanwhile stops the removal
                    shutil.rmtree(staged, ignore_errors=True)
            raise

    @property
    def _run(self) -> Path:
        return Path(self._get_output_dir(getattr(self, "_trial", None)))

    def _recover(self) -> None:
        if self.args.should_save:
            checkpoint.recover(self._run)

    def naming_lost_processes(self) -> AbstractContextManager[None]:
        """Return a context that turns a failed communication into a LostProcessError."""
        return errors.naming_lost_processes(lambda: self.state.global_step, self.last_checkpoint)

    def last_checkpoint(self) -> str | None:
        """Return this run's newest checkpoint; before it has one, the folder's, which may be of another run."""
        own = self._newest or self._found
        if own is not None or self.state.global_step:
            return own
        return next((str(folder) for folder in resume.checkpoints(self._run)), None)


class _MendedState(TrainerCallback):
    """A callback that corrects Trainer's state at the start of a resumed run and at the end of a run."""

    def __init__(self, trainer: DurableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        best = resume.best_checkpoint(state, self.trainer._run)
        if best is not None and best.is_dir():  # Trainer forgets one that was moved
            state.best_model_checkpoint = str(best)
        for callback in (*self.trainer.callback_handler.callbacks, control):  # Trainer saves only those it has loaded
            if isinstance(callback, ExportableState):
                state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if {"train_loss", "train_runtime"} <= (logs or {}).keys():
            args.save_total_limit = None  # Trainer would now delete all but the best, file by file


@contextmanager
def replaced(of: Any, **values: Any) -> Iterator[None]:
    """Set attributes temporarily, bypassing the object's own checks."""
    before = {name: getattr(of, name) for name in values}
    vars(of).update(values)
    try:
        yield
    finally:
        vars(of).update(before)
