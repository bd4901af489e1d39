"""The progress bar: loss, KL, KD weight and tokens per second behind it; evaluations as lines above it."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

# (key of the log, label, format)
BEHIND_THE_BAR = (
    ("loss", "loss", ".3f"),
    ("kd", "KL", ".3g"),
    ("kd_weight", "weight", ".2f"),
    ("tokens_per_second", "tok/s", ",.0f"),
)
OF_AN_EVALUATION = (
    ("eval_ce", "CE", ".4f"),
    ("eval_perplexity", "perplexity", ".2f"),
    ("eval_kl_teacher_student", "KL(true‖student)", ".4f"),
    ("eval_kl_teacher_projected", "KL(true‖projected)", ".4f"),
)


class DistillationProgress(ProgressCallback):
    """In place of the Trainer's own, which prints every log as a dictionary."""

    def __init__(self, description: str = "") -> None:
        super().__init__()
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step  # not 0 after a resume
        if state.is_world_process_zero:
            interactive = sys.stderr.isatty()
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.description,
                unit="step",
                dynamic_ncols=interactive,
                mininterval=0.1 if interactive else 20,  # a log file needs fewer lines
            )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.leave = False
            self.prediction_bar.set_description_str(f"{self.description} evaluating", refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        if behind := _format(BEHIND_THE_BAR, logs):
            self.training_bar.set_postfix_str(behind, refresh=False)
        if evaluation := _format(OF_AN_EVALUATION, logs):
            self.training_bar.write(f"{self.description} step {state.global_step}: {evaluation}")


def show_progress(trainer: Trainer, description: str = "") -> None:
    """Puts the bar in the place of the Trainer's, unless `disable_tqdm` asked for none."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(DistillationProgress(description))


def _format(fields: tuple[tuple[str, str, str], ...], logs: dict[str, Any]) -> str:
    return ", ".join(f"{label} {logs[key]:{form}}" for key, label, form in fields if key in logs)
