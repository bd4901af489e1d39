"""Records of generated text: numbers for the log, and some of the texts themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.loss import KDMetrics
from kdfast.training.hf import IGNORE_INDEX
from kdfast.training.metrics import Reduce, TokenMeans
from kdfast.training.on_policy.generation import Written

TEXTS = "completions.jsonl"  # in output_dir
PER_STEP = 2  # texts kept per batch
N = 4  # length of the n-grams that repetition counts


class TextMeter:
    """Statistics of generated text between two log lines, and the KL on it, apart from the data's."""

    BY_TOKEN = ("kd_on_policy", "kd_data", "entropy_on_policy")
    BY_TEXT = ("completion_length", "eos_share")

    def __init__(self, device: torch.device) -> None:
        self._means = TokenMeans((*self.BY_TOKEN, *self.BY_TEXT, "repetition"), device)
        self._seconds = 0.0

    def add_texts(self, written: Written, seconds: float) -> None:
        """Count generated texts; `seconds`: how long generating them took."""
        counted = written.labels != IGNORE_INDEX
        n = torch.tensor(len(counted), device=counted.device)
        texts = {"completion_length": counted.sum(1).float().mean(), "eos_share": written.ended.float().mean()}
        self._means.add(texts, n)
        repeated, grams = count_repeated(written)
        if grams:
            share = torch.tensor(repeated / grams, device=counted.device)
            self._means.add({"repetition": share}, torch.tensor(grams, device=counted.device))
        self._seconds += seconds

    def add_metrics(self, writer: str | None, metrics: KDMetrics) -> None:
        """Count a batch that was trained on."""
        own = writer == "student"
        values = {"kd_on_policy": metrics.kd, "entropy_on_policy": metrics.student_entropy}
        self._means.add(values if own else {"kd_data": metrics.kd}, metrics.tokens)

    def read(self, reduce: Reduce) -> dict[str, float]:
        """Return the means that exist, and this process's `generation_seconds`; reset the counts."""
        means, seconds = self._means.read(reduce)[0], self._seconds
        self._seconds = 0.0
        return {**means, "generation_seconds": round(seconds, 4)}


def count_repeated(written: Written) -> tuple[int, int]:
    """Return how many of the completions' 4-grams occurred before in the same completion, and how many there are."""
    repeated = grams = 0
    for labels in written.labels.tolist():
        ids = [one for one in labels if one != IGNORE_INDEX]
        found = [tuple(ids[i : i + N]) for i in range(len(ids) - N + 1)]
        repeated, grams = repeated + len(found) - len(set(found)), grams + len(found)
    return repeated, grams


class Text(NamedTuple):
    """One completion for the report."""

    step: int
    writer: str
    prompt: str
    completion: str


class Texts:
    """A file of some texts in a run's folder; a text that a resumed run writes again is not kept twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begun = False

    def add(self, step: int, writer: str, written: Written, tokenizer: Any) -> None:
        """Keep the first texts of a batch that is trained on after `step` steps."""
        if not self._begun:
            self._begun = True
            self.folder.mkdir(parents=True, exist_ok=True)
            before = [text for text in read_texts(self.folder) if text.step < step + 1]
            (self.folder / TEXTS).write_text("".join(map(_line, before)), encoding="utf-8")
        with (self.folder / TEXTS).open("a", encoding="utf-8") as file:
            for ids, mask, labels in zip(*(x[:PER_STEP] for x in written[:3]), strict=True):
                prompt, completion = (tokenizer.decode(ids[of]) for of in _parts(mask, labels))
                file.write(_line(Text(step + 1, writer, prompt, completion)))


def _parts(mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    written = labels != IGNORE_INDEX
    return (mask != 0) & ~written, written


def _line(text: Text) -> str:
    return json.dumps(text._asdict(), ensure_ascii=False) + "\n"


def read_texts(folder: Path) -> list[Text]:
    """Return the texts that a run has kept; [] if there is no such file, or it is broken."""
    try:
        lines = (folder / TEXTS).read_text(encoding="utf-8").splitlines()
        return [Text(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError):
        return []
