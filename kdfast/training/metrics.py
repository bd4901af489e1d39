"""Logged values: token-weighted means that stay on the device until they are read, and memory in use.

`TokenMeans` accumulates; `TrainingMeter` and `EvaluationMeter` choose the values and their names.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_utils import EvalPrediction

from kdfast.inputs import same_vocabulary
from kdfast.loss import KDMetrics
from kdfast.training.cache.read import cached_blocks
from kdfast.training.config import OF_EACH
from kdfast.training.data.columns import BROUGHT, brings_teacher, names_of
from kdfast.training.hf import IGNORE_INDEX, head_shape
from kdfast.training.model import DistillationModel, DistillationOutput
from kdfast.training.teachers.side import Learned

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over the processes

# KDMetrics' fields → names in logs; its anchor is the projected teacher's cross entropy on the labels
LOGGED = {name: "ce_projected" if name == "anchor" else name for name in KDMetrics._fields if name != "tokens"}
OF_KD = ("kd", "student_entropy", "teacher_entropy", "agreement")  # means over tokens with a KD term
OF_TEACHER = ("ce_projected", "kl_teacher_student", "kl_teacher_projected")  # over targets that it predicts


class TokenMeans:
    """Sums of value·tokens and of tokens, by name. Adding never synchronizes; reading does, once.

    A value that is None or NaN was not computed in that batch and is skipped. (`NonFiniteGuard` finds a loss that
    *became* NaN.)
    """

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = tuple(names)
        # float64 counts tokens exactly; MPS has none
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2, len(self.names), device=device, dtype=dtype)

    def add(self, values: Mapping[str, Tensor | None], tokens: Tensor) -> None:
        """Add one batch: 0-d values that are means over `tokens` (0-d) rows."""
        missing = self._sums.new_full((), math.nan)
        given = [values.get(name) for name in self.names]
        row = torch.stack([missing if value is None else value.detach().to(missing) for value in given])
        weights = torch.where(row.isnan(), 0.0, tokens.detach().to(missing))
        self._sums += torch.stack([torch.where(weights == 0, 0.0, row * weights), weights])

    def read(self, reduce: Reduce) -> tuple[dict[str, float], int]:
        """Return the means that exist, and the largest number of tokens behind one; reset the sums."""
        sums, tokens = reduce(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        means = {name: s / n for name, s, n in zip(self.names, sums, tokens, strict=True) if n > 0}
        return means, round(max(tokens))


class TrainingMeter:
    """Metrics and speed between two log lines, and the token count of the run."""

    def __init__(self, device: torch.device, teachers: Iterable[str] = ()) -> None:
        """Start empty. With several teachers, `teachers` has their names: each has its own kd."""
        self._means = TokenMeans((*LOGGED.values(), "aux_loss", *(f"kd_{name}" for name in teachers)), device)
        self._tokens = torch.zeros((), device=device, dtype=self._means._sums.dtype)  # since the last count
        self._since = math.nan

    def start(self) -> None:
        """Start the clock, if it is not running."""
        if math.isnan(self._since):
            self._since = time.perf_counter()

    def add(
        self,
        metrics: KDMetrics,
        aux_loss: Tensor | None = None,
        targets: Tensor | None = None,
        compared: Tensor | None = None,
        by_teacher: Mapping[str, Learned] | None = None,
    ) -> None:
        targets = metrics.tokens if targets is None else targets
        _add(self._means, {**named(metrics), "aux_loss": aux_loss}, targets, metrics.tokens, compared)
        _add_each(self._means, by_teacher)
        self._tokens += targets

    def read(self, reduce: Reduce) -> dict[str, float]:
        """Return the metrics, and tokens_per_second, since the last log line."""
        means, tokens = self._means.read(reduce)
        now = time.perf_counter()
        means["tokens_per_second"] = tokens / max(now - self._since, 1e-9)
        self._since = now
        return means

    def mark(self) -> tuple[Tensor, Tensor]:
        """Return the state of the sums, for `rewind`."""
        return self._means._sums.clone(), self._tokens.clone()

    def rewind(self, mark: tuple[Tensor, Tensor]) -> None:
        """Forget what was added since `mark`, for a step that is left out."""
        self._means._sums, self._tokens = mark

    def count_tokens(self, reduce: Reduce) -> int:
        """Return the number of tokens since the last count."""
        tokens = round(reduce(self._tokens).item())
        self._tokens = torch.zeros_like(self._tokens)
        return tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of tokens_per_second, such as for evaluating and saving."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start


class EvalLogProbs:
    """The argument of `compute_metrics`, in place of Trainer's EvalPrediction, since logits are never made.

    log_probs: (N, T) float32; at t the student's log-probability of the token after t, which is label_ids[:, t].
    label_ids: (N, T), the shifted labels; where they are −100, log_probs means nothing. inputs: (N, T) ids, or None
    without `include_for_metrics=["inputs"]`. Raises TypeError if it is used as an EvalPrediction.
    """

    def __init__(self, log_probs: Any, label_ids: Any, inputs: Any = None) -> None:
        self.log_probs, self.label_ids, self.inputs = log_probs, label_ids, inputs

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(
            "compute_metrics: predictions would be logits, which are never made; expected it to use log_probs (N, T), "
            "log p of each of label_ids (N, T), which are shifted already"
        )

    predictions = property(__iter__)


class EvaluationMeter:
    """Metrics of a whole evaluation set."""

    NAMES = ("loss", *LOGGED.values(), "aux_loss", "kl_teacher_student", "kl_teacher_projected")
    ADDED = (
        "perplexity",
        "bits_per_byte",
        "tokens",
        "runtime",
        "samples_per_second",
        "steps_per_second",
    )  # Trainer adds runtime and what follows

    def __init__(self, device: torch.device, lengths: Tensor | None = None, teachers: Iterable[str] = ()) -> None:
        """Start empty. lengths: (V,), the number of bytes of each id, if known. teachers: names of several."""
        each = (f"{x}_{name}" for name in teachers for x in OF_EACH)
        self._means = TokenMeans((*self.NAMES, "bytes", *each), device)
        self._lengths = None if lengths is None else lengths.to(device)

    def add(self, output: DistillationOutput, targets: Tensor) -> None:
        """Add a batch; targets: (B, T), whose bytes are counted."""
        values: dict[str, Tensor | None] = {"loss": output.loss, "aux_loss": output.aux_loss, **named(output.metrics)}
        if self._lengths is not None:
            found = targets[targets != IGNORE_INDEX]
            values["bytes"] = self._lengths[found].float().mean()
        if output.fidelity is not None:
            values |= {name: value for name, value in output.fidelity._asdict().items() if value is not None}
        counted = output.metrics.tokens if output.targets is None else output.targets
        _add(self._means, values, counted, output.metrics.tokens, output.compared)
        _add_each(self._means, output.by_teacher)

    def read(self, reduce: Reduce) -> dict[str, float]:
        """Return the means that exist, with `perplexity`, `bits_per_byte` and `tokens`."""
        means, tokens = self._means.read(reduce)
        if (per_token := means.pop("bytes", 0.0)) > 0 and "ce" in means:
            means["bits_per_byte"] = means["ce"] / per_token / math.log(2)
        if "ce" in means:
            means["perplexity"] = math.exp(means["ce"]) if means["ce"] < 700 else math.inf
        return {**means, "tokens": tokens}


def _add(
    means: TokenMeans,
    values: dict[str, Tensor | None],
    targets: Tensor,
    kd_tokens: Tensor,
    compared: Tensor | None,
) -> None:
    """Add a batch's values, each weighted by the tokens that it is a mean over."""
    for names, tokens in ((OF_KD, kd_tokens), (OF_TEACHER, compared)):
        if tokens is not None:
            means.add({name: values.get(name) for name in names if name in means.names}, tokens)
            values = {name: value for name, value in values.items() if name not in names}
    means.add(values, targets)


def _add_each(means: TokenMeans, by_teacher: Mapping[str, Learned] | None) -> None:
    """Add each of several teachers' values under its name."""
    for name, one in (by_teacher or {}).items():
        if f"kd_{name}" in means.names:
            means.add({f"kd_{name}": one.metrics.kd}, one.metrics.tokens)
            found = {} if one.fidelity is None else one.fidelity._asdict()
            means.add({f"{x}_{name}": value for x, value in found.items()}, one.compared)


def evaluated(model: DistillationModel, dataset: Any, knows_bytes: bool = False) -> list[str]:
    """Return the names that an evaluation of `model` on `dataset` logs; `knows_bytes`: of tokens, for bits_per_byte."""
    teacher, absent = model.recipe.teacher, set()
    if teacher == "cached" and model.teacher is not None and not brings_teacher(dataset):
        teacher = "own_head"
    caches, columns = model.sides.caches, {*names_of(dataset)}
    silent = {name for name in caches if columns.isdisjoint(f"{column}_{name}" for column in BROUGHT)}
    methods = {name: cache.description.method for name, cache in caches.items() if name not in silent}
    if model.teacher is None:  # the data set may bring the true teacher's entries
        names, blocks = names_of(dataset), cached_blocks(dataset)
        own = "teacher_indices" in names and (model.teacher_tail == "bucket" or "teacher_log_tails" in names)
        known = any(one.description.method != "sample" for one in blocks) or (own and not blocks)
        known |= bool(methods)
    else:
        options = (model.valid_vocab, model.loss_options["vocab"])
        rows, theirs = head_shape(model.student)[0], [head_shape(one)[0] for one in model.teachers.values()]
        known = model.shared_head is not None or all(same_vocabulary(rows, one, *options) for one in theirs)
    if not known:
        absent |= {"kl_teacher_student", "kl_teacher_projected"}
    if teacher in ("none", "own_head", "shared_head", "cached"):
        absent |= {"ce_projected", "kl_teacher_projected"}
    if teacher == "none" or (teacher == "cached" and "teacher_hidden" not in columns and not methods):
        absent |= {"teacher_entropy"}
    if teacher == "none":
        absent |= {"kd", "agreement"}
    if model.router_loss is None:
        absent |= {"aux_loss"}
    if not knows_bytes:
        absent |= {"bits_per_byte"}
    of_each = {name: absent for name in model.several if name not in silent}
    if methods:  # a value that one of several teachers lacks has no mean over all of them
        absent = absent | {"ce_projected", "kl_teacher_projected"}
        of_each |= {k: absent | ({"kl_teacher_student"} if x == "sample" else set()) for k, x in methods.items()}
        absent = absent.union(*(of_each[name] for name in methods))
        absent |= {"teacher_entropy"} if {*methods.values()} != {"hidden"} else set()
    logged = [name for name in (*EvaluationMeter.NAMES, *EvaluationMeter.ADDED) if name not in absent]
    return logged + [f"{x}_{name}" for name in model.several for x in OF_EACH if x not in of_each.get(name, OF_EACH)]


def check_best(metric: str, model: DistillationModel, eval_dataset: Any, knows_bytes: bool = False) -> None:
    """Raise ValueError if evaluations on `eval_dataset`, or a dict of data sets, do not log `metric`."""
    several = {"eval": eval_dataset}
    if isinstance(eval_dataset, dict):
        several = {f"eval_{name}": dataset for name, dataset in eval_dataset.items()}
    logged = [
        f"{prefix}_{name}" for prefix, dataset in several.items() for name in evaluated(model, dataset, knows_bytes)
    ]
    if (metric if metric.startswith("eval_") else f"eval_{metric}") not in logged:
        raise ValueError(
            f"metric_for_best_model={metric!r}, which no evaluation here logs; expected one of {', '.join(logged)}, or "
            "one that a callback given as callbacks= adds in its on_evaluate"
        )


def named(metrics: KDMetrics) -> dict[str, Tensor]:
    """Return the metrics under their names in logs."""
    return {name: getattr(metrics, field) for field, name in LOGGED.items()}


def memory_bytes(device: torch.device) -> int:
    """Return the allocator's peak on a GPU, elsewhere the process's current memory; never wait for the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def of_log_probs(compute_metrics: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return a function that calls `compute_metrics` with `EvalLogProbs` made from a Trainer's EvalPrediction."""

    @functools.wraps(compute_metrics)  # Trainer looks for compute_result in its signature
    def compute(given: EvalPrediction, **options: Any) -> dict[str, Any]:
        return compute_metrics(EvalLogProbs(given.predictions, given.label_ids, given.inputs), **options)

    return compute


def eval_ce(metrics: dict[str, float]) -> float:
    """Return eval_ce, the default objective of a hyperparameter search."""
    if "eval_ce" not in metrics:
        raise ValueError(f"hyperparameter_search: no eval_ce in {', '.join(metrics)}; expected compute_objective")
    return metrics["eval_ce"]


def mask_repeats(inputs: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Mask the labels of repeated samples, which fill up the last batch when there are several processes."""
    state, n_processes = accelerator.gradient_state, accelerator.num_processes
    if n_processes == 1 or not state.end_of_dataloader or state.remainder <= 0 or "labels" not in inputs:
        return inputs
    labels = inputs["labels"]
    real = min(max(state.remainder - accelerator.process_index * len(labels), 0), len(labels))
    kept = torch.arange(len(labels), device=labels.device)[:, None] < real
    return {**inputs, "labels": labels.masked_fill(~kept, IGNORE_INDEX)}
