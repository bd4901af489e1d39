"""Generated text for `KDTrainer`: which batches are generated, by which model, from which prompts and seed."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from kdfast.inputs import did_you_mean
from kdfast.loss import KDMetrics
from kdfast.training.config import KDConfig
from kdfast.training.data.columns import names_of
from kdfast.training.data.rows import PROMPTS, PROMPTS_MASK, TEACHER_PROMPTS, TEACHER_PROMPTS_MASK
from kdfast.training.data.text import check_positions
from kdfast.training.durable.processes import print_once
from kdfast.training.hf import IGNORE_INDEX, embedding_rows
from kdfast.training.model import DistillationModel
from kdfast.training.on_policy.buffer import Batch, Buffer
from kdfast.training.on_policy.generation import Sampling, Written, behind, find_end_of_turn, positions_in, write
from kdfast.training.on_policy.texts import TextMeter, Texts
from kdfast.training.teachers.own_inputs import NAMES
from kdfast.training.teachers.several import COLUMN

WRITER = "writer"  # in a batch: who wrote its completions
# columns that generated text contains or replaces
READ = ("input_ids", "attention_mask", "labels", PROMPTS, PROMPTS_MASK, *NAMES)
COLUMNS = ((PROMPTS, PROMPTS_MASK), (TEACHER_PROMPTS, TEACHER_PROMPTS_MASK))


class OnPolicy:
    """Replacement of data batches by text that the student or the teacher writes to their prompts.

    Batch n of the run, counted in micro-batches, is the student's if n·on_policy passes a whole number, so the share
    is exact and the same in all processes. Nothing depends on the process's random state.

    Raises ValueError for a recipe or data set that does not work with generated text.
    """

    def __init__(self, args: KDConfig, model: DistillationModel, tokenizer: Any, dataset: Any) -> None:
        self.args, self.tokenizer = args, tokenizer
        _check(args, model, dataset)
        self.buffer = Buffer(args.on_policy_buffer)
        self.meter, self.texts = TextMeter(args.device), Texts(Path(str(args.output_dir)))
        models = [model.student, *model.teachers.values()]
        n_ids = min([*map(embedding_rows, models), *([] if model.valid_vocab is None else [model.valid_vocab])])
        self.samplings = {
            writer: self._sampling(one, n_ids) for writer, one in zip(("student", "teacher"), models, strict=False)
        }
        if args.on_policy > 0:
            print_once(
                f"on_policy={args.on_policy:g}: the student writes the completions of {args.on_policy:.0%} of the "
                f"batches, which have the KD term alone, under {model.recipe.divergence}"
            )
        if args.seq_kd:
            print_once("seq_kd: the teacher writes the completions" + " of the others" * (args.on_policy > 0))

    def _sampling(self, model: PreTrainedModel, n_ids: int) -> Sampling:
        args, own = self.args, model.generation_config.eos_token_id
        ends = [*(own if isinstance(own, list) else [own]), getattr(self.tokenizer, "eos_token_id", None)]
        ends.append(find_end_of_turn(self.tokenizer))
        end_ids = tuple(sorted({one for one in ends if one is not None}))
        pads = (getattr(self.tokenizer, "pad_token_id", None), *end_ids, 0)
        return Sampling(
            args.max_new_tokens, args.sampling_temperature, args.top_p, args.top_k, end_ids,
            next(one for one in pads if one is not None), n_ids,
        )  # fmt: skip

    def begin(self, checkpoint: str | None) -> None:
        """Prepare for a new run, or one resumed from `checkpoint`."""
        self.buffer.load(None if checkpoint is None else Path(checkpoint), self.args.process_index, self.args.device)
        self.texts = Texts(Path(str(self.args.output_dir)))

    def replace(
        self, batches: Sequence[Batch], step: int, run: Callable[..., Any], *, kd_weight: float, logged: bool
    ) -> list[Batch]:
        """Return a step's batches, some of them generated instead of the data's.

        Args:
            batches: the data's batches.
            step: the number of steps taken so far.
            run: calls the trained model inside its wrapper.
            kd_weight: if it is 0, the data's batches stay, since nothing could be learned from the student's text.
            logged: keep some of the texts.
        """
        first = step * self.args.gradient_accumulation_steps
        return [self._one(batch, first + i, step, run, kd_weight, logged) for i, batch in enumerate(batches)]

    def _one(
        self, batch: Batch, number: int, step: int, run: Callable[..., Any], kd_weight: float, logged: bool
    ) -> Batch:
        share = self.args.on_policy
        before, after = (math.floor(n * share + 1e-9) for n in (number, number + 1))
        writer = "student" if after > before and kd_weight != 0 else "teacher" if self.args.seq_kd else None
        (prompts, mask), (own, own_mask) = ((batch.pop(name, None) for name in pair) for pair in COLUMNS)
        if writer is None:
            return batch
        kept = self.buffer.find(before) if writer == "student" else None
        if kept is not None:
            return {**kept, WRITER: writer}
        if prompts is None:
            raise ValueError(f"the batch has no {PROMPTS}: {NO_PROMPTS}")
        known = {*READ, COLUMN} - ({*NAMES} if own is None else set())
        if strange := [name for name in batch if name not in known]:
            raise ValueError(
                f"the batch has {strange[0]!r}, and on_policy={share:g} would write other text to its prompts, which "
                "that does not belong to. Leave the column out, or set on_policy=0"
            )
        copies = self.args.generations_per_prompt
        prompts, mask = (x.repeat_interleave(copies, 0) for x in (prompts, mask))
        read = (prompts, mask)
        if own is not None:
            own, own_mask = (x.repeat_interleave(copies, 0) for x in (own, own_mask))
            read = (own, own_mask) if writer == "teacher" else read
        began = time.perf_counter()
        seed = (self.args.seed, number, self.args.process_index)
        written = run(*read, write=functools.partial(_write, writer, self.samplings[writer], seed))
        rows = behind(written, prompts, mask) if read[0] is own else written
        made = {name: getattr(rows, name) for name in ("input_ids", "attention_mask", "labels")}
        if own is not None:
            theirs = written if read[0] is own else behind(written, own, own_mask)
            made |= zip(NAMES, (theirs.input_ids, theirs.attention_mask, positions_in(theirs, rows)), strict=True)
        if (asked := batch.get(COLUMN)) is not None:
            made[COLUMN] = [one for one in getattr(asked, "tolist", lambda: asked)() for _ in range(copies)]
        self.meter.add_texts(written, time.perf_counter() - began)
        if logged and self.args.process_index == 0 and self.tokenizer is not None:
            self.texts.add(step, writer, written, self.tokenizer)
        if writer == "student":
            self.buffer.keep(before, made)
        return {**made, WRITER: writer}

    def add(self, writer: str | None, metrics: KDMetrics) -> KDMetrics:
        """Count a batch's metrics by who wrote it; return those that remain to be logged."""
        self.meter.add_metrics(writer, metrics)
        # text that the student wrote has no labels, so its cross entropy says nothing about the data
        return metrics._replace(ce=torch.full_like(metrics.ce, math.nan)) if writer == "student" else metrics


def _write(
    writer: str, sampling: Sampling, seed: Sequence[int], model: DistillationModel, prompts: Tensor, mask: Tensor
) -> Written:
    """Return what student or teacher writes; called inside the model's forward, so that FSDP gathers the weights."""
    by = model.student if writer == "student" else next(iter(model.teachers.values()))
    return write(by, prompts, mask, sampling, seed)


NO_PROMPTS = (
    "on_policy and seq_kd write completions to prompts. Expected rows of prompt and completion, or of messages; of "
    "rows of ids, a column prompts (lists of ids) besides input_ids and labels"
)


def _check(args: KDConfig, model: DistillationModel, dataset: Any) -> None:
    recipe = model.recipe
    if args.on_policy and recipe.teacher not in ("own_head", "compressed_head"):
        raise ValueError(
            f"on_policy={args.on_policy:g} with recipe {recipe.name!r}; expected one that learns from the teacher's "
            "head while it runs, such as 'teacher_head' or 'compressed_head': entries that were kept are of other "
            "text, and a projector has labels to be kept true by, which the student's own text has not"
        )
    if args.seq_kd and len(model.teachers) != 1:
        raise ValueError(f"seq_kd=True and {len(model.teachers)} teachers; expected one, which writes the completions")
    if dataset is None:
        return
    row = next(iter(dataset), None) if recipe.kd_until < 1 and not args.seq_kd else None
    if isinstance(row, Mapping) and "labels" in row and (torch.as_tensor(row["labels"]) == IGNORE_INDEX).all():
        raise ValueError(
            f"kd_until={recipe.kd_until:g} and rows of prompts alone: steps after that would learn nothing, for the "
            "student's own text has no labels. Expected kd_until=1, seq_kd=True, or rows with completions"
        )
    names = names_of(dataset)
    if names and "input_ids" in names and PROMPTS not in names:
        near = did_you_mean(PROMPTS, [name for name in names if name.startswith("prompt")])
        raise ValueError(f"train_dataset has no column {PROMPTS}{near}: {NO_PROMPTS}")
    if names and hasattr(dataset, "__len__") and PROMPTS in names:
        what = f"a prompt and max_new_tokens={args.max_new_tokens}, together {{}} tokens,"
        for role, one in {"student": model.student, **model.teachers}.items():
            column = TEACHER_PROMPTS if one is not model.student and TEACHER_PROMPTS in names else PROMPTS
            longest = args.max_new_tokens + max((len(row[column]) for row in dataset), default=0)
            check_positions(role, one, longest, what)


class PromptCollator:
    """A collator that adds the rows' prompts, padded on the left: `prompts` and their mask, (B, Tp).

    The names are those of TRL's collator for chats, whose batches may have them already. A teacher's own prompts are
    added in the same way.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], on_policy: OnPolicy) -> None:
        self.collate, self.pad_id = collate, on_policy.samplings["student"].pad_id

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        options: Any = {"batch_first": True, "padding_side": "left"}
        for name, mask in COLUMNS:
            prompts = [torch.as_tensor(row[name]).long() for row in rows if isinstance(row, Mapping) and name in row]
            if prompts and name not in batch:
                batch[name] = pad_sequence(prompts, padding_value=self.pad_id, **options)
                batch[mask] = pad_sequence([torch.ones_like(one) for one in prompts], **options)
        return batch
