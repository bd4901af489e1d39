"""Callbacks: `HealthCallback` reports in words what is wrong with a run; `DistillationProgress` is its progress bar.

The health check reads lines that are logged anyway, so it costs no synchronization. Above all it looks for what a low
KL hides: a projected teacher that has become the student.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState, ProgressCallback

from kdfast.training.diagnostics import HealthThresholds, Log

logger = logging.getLogger(__name__)

# key in the log → how it is displayed
BEHIND_THE_BAR = {
    "loss": "loss {:.3f}", "ce": "CE {:.3f}", "kd": "KL {:.3g}", "kd_weight": "weight {:.2f}",
    "tokens_per_second": "tok/s {:,.0f}",
}  # fmt: skip
OF_AN_EVALUATION = {
    "eval_ce": "CE {:.4f}",
    "eval_perplexity": "perplexity {:.2f}",
    "eval_kl_teacher_student": "KL(true‖student) {:.4f}",
    "eval_kl_teacher_projected": "KL(true‖projected) {:.4f}",
}


@dataclass(frozen=True)
class Finding:
    """One thing that `HealthCallback` reported."""

    step: int
    kind: str  # non_finite, initial_loss, kl, perplexity, rising, oscillating, follows, misleads, decays or collapses
    message: str  # the observed numbers, and what to do


class HealthCallback(TrainerCallback, ExportableState):
    """A callback that reads every log line and warns in words when a run goes wrong.

    `findings` lists every warning so far, including those before a resume. Each kind is reported once, and again only
    if it returns after `window` log lines without it.

    Args:
        thresholds: a `HealthThresholds`, or a mapping of the values that differ from the defaults.
    """

    def __init__(self, thresholds: HealthThresholds | Mapping[str, Any] | None = None) -> None:
        self.thresholds = HealthThresholds.of(thresholds)
        self.drawn = False  # whether the KD term uses drawn ids: its value then exceeds the KL
        self._start()

    def _start(self, vocabulary: int = 1) -> None:
        self.findings: list[Finding] = []
        self._open: dict[str, int] = {}  # current kinds: looks since each was last seen
        self._log = Log(self.thresholds, vocabulary, drawn=self.drawn)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        config = getattr(model, "config", None)
        self.restore(state, config.get_text_config().vocab_size if config is not None else 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        new = self._read(logs or {}, state.global_step, state.max_steps)
        if state.is_world_process_zero:
            for finding in new:
                _say(finding)

    def report_non_finite(self, step: int, what: str, *, aloud: bool) -> None:
        """Record what stopped the run or caused a step to be left out; warn if `aloud`."""
        for finding in self._note(step, {"non_finite": what}):
            if aloud:
                _say(finding)

    def restore(self, state: TrainerState, vocabulary: int = 1) -> None:
        """Read the log of a saved `state` again, without repeating what was reported."""
        self._start(vocabulary)
        for line in state.log_history:
            self._read(line, int(line.get("step", 0)), state.max_steps)
        kept: Any = state.stateful_callbacks
        kept = kept.get(type(self).__name__, {}) if isinstance(kept, dict) else {}
        kept = kept[0] if isinstance(kept, list) else kept
        if state.global_step > 0 and (said := kept.get("attributes", {}).get("said")) is not None:
            self.findings = [Finding(**finding) for finding in said["findings"]]
            self._open = dict(said["open"])

    def state(self) -> dict[str, Any]:
        said = {"findings": [asdict(finding) for finding in self.findings], "open": dict(self._open)}
        return {"args": {"thresholds": asdict(self.thresholds)}, "attributes": {"said": said}}

    def _read(self, line: Mapping[str, Any], step: int, max_steps: int) -> list[Finding]:
        return self._note(step, self._log.read(line, step / max_steps if max_steps > 0 else 0.0))

    def _note(self, step: int, found: Mapping[str, str | None]) -> list[Finding]:
        new = [Finding(step, kind, text) for kind, text in found.items() if text and kind not in self._open]
        for kind, text in found.items():
            if text:
                self._open[kind] = 0
            elif kind in self._open:
                self._open[kind] += 1
        self._open = {kind: looks for kind, looks in self._open.items() if looks < self.thresholds.window}
        self.findings += new
        return new


def _say(finding: Finding) -> None:
    with tqdm.external_write_mode(file=sys.stderr):  # above the progress bar
        logger.warning("step %d: %s", finding.step, finding.message)


class DistillationProgress(ProgressCallback):
    """A progress bar with loss, CE, KL, KD weight and speed, and evaluations as lines above it."""

    def __init__(self, description: str = "") -> None:
        super().__init__()
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            bar, self.current_step = self.training_bar, state.global_step
            bar.n = bar.initial = bar.last_print_n = state.global_step  # a resumed run does not start at 0
            bar.set_description_str(self.description, refresh=False)
            if not sys.stderr.isatty():
                bar.mininterval = 20  # a log file needs fewer lines

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        if behind := _format(BEHIND_THE_BAR, logs):
            self.training_bar.set_postfix_str(behind, refresh=False)
        if evaluation := _format(OF_AN_EVALUATION, logs):
            self.training_bar.write(f"{self.description} step {state.global_step}: {evaluation}")


def show_progress(trainer: Trainer, description: str = "") -> None:
    """Replace the Trainer's progress bar by ours, unless `disable_tqdm` is set."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(DistillationProgress(description))


def _format(shown: dict[str, str], logs: dict[str, Any]) -> str:
    return ", ".join(form.format(logs[key]) for key, form in shown.items() if key in logs)
