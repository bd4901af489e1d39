"""A run's own cache: the teacher runs once over text that is used several times, before the first step.

`cache_teacher` writes it and resumes an interrupted one; the same folder serves further students.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from kdfast.inputs import same_vocabulary
from kdfast.schedules import Schedule
from kdfast.training.cache.description import NAME, Description, is_complete
from kdfast.training.cache.read import CachedBlocks, TeacherCache, cached_blocks
from kdfast.training.cache.write import INPUTS, cache_teacher, describe
from kdfast.training.config import KDConfig
from kdfast.training.data.columns import brings_teacher
from kdfast.training.data.packing import PaddingCollator
from kdfast.training.data.rows import inputs_of_row
from kdfast.training.data.tokenizers import text_tokenizer
from kdfast.training.durable.processes import by_first, print_once
from kdfast.training.hf import head_shape
from kdfast.training.model import DistillationModel

FOLDER = "teacher_cache"  # in output_dir, by default
SPLIT = "train"
SPARE = 2**30  # bytes to leave free on the disk, for checkpoints


@dataclass
class Precomputation:
    """A run's teacher, and whether it runs over the text before the first step.

    Args:
        model: the run's model before that, with or without a live teacher.
        args: the run's settings.
        dataset: the training data.
        wrapped_here: the caller passed a student and a recipe's name, not a `DistillationModel`.
        schedule: of temperatures, replacing the recipe's.
        sharded: the teacher is split over processes.
        collate: makes the run's batches.
        processor: the text's tokenizer, or a processor that contains it.
    """

    model: DistillationModel
    args: KDConfig
    dataset: Any
    wrapped_here: bool
    schedule: Schedule | None
    sharded: bool
    collate: Callable[[list[Any]], dict[str, Any]]
    processor: Any

    def is_wanted(self) -> bool:
        """Return whether the run is to learn from entries made beforehand; the same in all processes.

        `precompute_teacher_log_probs` decides. If it is None: yes if `teacher_cache` names a folder, or if the text is
        used more than once and nothing prevents it; otherwise a line says what does.

        Raises ValueError if it was requested and is impossible.
        """
        asked, recipe, given = self.args.precompute_teacher_log_probs, self.model.recipe, self.dataset
        if given is None or cached_blocks(given) or brings_teacher(given) or self.args.generates:
            return False
        fits = recipe.teacher in ("own_head", "compressed_head", "cached") and not recipe.hidden_weight
        if self.model.teacher is None or not fits:
            if asked:
                raise ValueError(
                    f"precompute_teacher_log_probs=True; expected a teacher, and a recipe that learns from its own "
                    f"head alone, such as 'svd_init', 'compressed_head' or 'teacher_head'; this is {recipe.name!r}"
                )
            if self.args.teacher_cache is not None and self.args.recipe != "lm_only":
                raise ValueError(
                    f"teacher_cache={self.args.teacher_cache!r}, of which recipe {recipe.name!r} would learn nothing; "
                    "expected a teacher and a recipe that learns from its own head, or the rows of "
                    "TeacherCache(folder).dataset(…)"
                )
            return False
        if asked is False:
            if self.args.teacher_cache is not None:
                raise ValueError(
                    f"precompute_teacher_log_probs=False and teacher_cache={self.args.teacher_cache!r}; expected one "
                    "of them, for entries there are learned from in place of a teacher that runs at every step"
                )
            return False
        asked = asked or self.args.teacher_cache is not None or recipe.teacher == "cached"
        passes = self.passes
        if not asked and passes * (1.0 if self.args.kd_until is None else self.args.kd_until) <= 1:
            if any(x is not None for x in (self.args.cache_method, self.args.cache_samples, self.args.cache_top_k)):
                print_once(
                    "the teacher runs at every step, and nothing is kept of it, for the text does not come round "
                    "again: precompute_teacher_log_probs=True keeps it all the same"
                )
            return False
        obstacle = by_first(lambda: next(self._obstacles(not asked), None))
        if obstacle is None:
            if not asked:
                drawn = "; training then learns from drawn ids, so its KL and loss are higher than in evaluation"
                print_once(
                    f"the text comes round {passes:.3g} times: the teacher runs over it once, before the first step, "
                    f"into {str(self.folder)!r} (precompute_teacher_log_probs)"
                    + drawn * (self._options()["method"] == "sample")
                )
            return True
        if asked:
            raise ValueError(f"the teacher cannot be run beforehand, in place of once a step: {obstacle}")
        print_once(f"the teacher runs at every step, and the text comes round {passes:.3g} times: {obstacle}")
        return False

    @property
    def passes(self) -> float:
        """Return how often the run goes over its text; 0 if unknown."""
        args, given = self.args, self.dataset
        if isinstance(given, IterableDataset) or not hasattr(given, "__len__") or not len(given):
            return 0.0
        if args.max_steps <= 0:
            return float(args.num_train_epochs)
        batches = len(given) / (args.per_device_train_batch_size * args.world_size)
        batches = max(1, math.floor(batches) if args.dataloader_drop_last else math.ceil(batches))
        return args.max_steps / math.ceil(batches / args.gradient_accumulation_steps)

    def _obstacles(self, unasked: bool) -> Iterator[str]:
        """Yield the reasons against it, those that take longer to find last."""
        args, recipe, given, folder = self.args, self.model.recipe, self.dataset, self.folder
        if self.model.several:
            yield f"entries are of one teacher, and there are {len(self.model.several)}. Leave teacher_cache out"
            return
        if unasked and not self.wrapped_here:
            yield "the DistillationModel is your own. precompute_teacher_log_probs=True changes its recipe"
        if self.model.average is not None:
            yield "the teacher follows the student (teacher_update_rate)"
        options = self._options()
        if self._has_several and options["method"] != "hidden":
            yield "the run has several temperatures, and entries are of one. Set cache_method='hidden'"
        rows = head_shape(self.model.student)[0], head_shape(self._teacher)[0]
        if not same_vocabulary(*rows, self.model.valid_vocab):
            yield f"vocab='truncate', where the student has {rows[0]} ids and the teacher {rows[1]}, needs its head"
        if options["method"] == "sample" and self.model.divergence.name != "forward_kl":
            yield f"divergence={recipe.divergence!r}, of which drawn ids are no estimate. Set cache_method='hidden'"
        if self.sharded:
            yield "the teacher is sharded. Leave shard_teacher out, or make a cache beforehand (kdfast cache)"
        if isinstance(given, IterableDataset) or not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
            yield "the training text is a stream, and entries belong to rows by their number"
        if unasked and not (isinstance(given, list) or _is_fixed(given)):
            yield f"a {type(given).__name__}'s rows may change. precompute_teacher_log_probs=True says that they do not"
        if unasked and args.push_to_hub:
            yield "entries would go to the hub with output_dir. Name a folder, teacher_cache"
        if unasked and int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)) < args.world_size:
            yield "several machines may have no disk in common. Name a folder they share, teacher_cache"
        try:
            description = describe(self._teacher, {SPLIT: given}, **options)
            if not self._shows_rows_as_they_are([given[i] for i in range(min(len(given), 4))]):
                yield f"data_collator ({type(self.collate).__name__}) makes other inputs of the rows than they hold"
            if not (folder / NAME).exists():
                yield from self._lacking_room(description)
                if not description.serves(recipe.temperature):
                    yield f"cache_temperatures={args.cache_temperatures} lacks the run's, {recipe.temperature:g}"
            elif changed := self._differences(description):
                yield f"{str(folder)!r} is of something else ({'; '.join(changed)}). Name another, or remove it"
        except Exception as error:  # unless requested, it must not keep a run from starting
            if not unasked and not isinstance(error, ValueError):
                raise
            yield str(error)

    def make(self, dataset: Any, autocast: AbstractContextManager[Any]) -> CachedBlocks:
        """Return `dataset` with the teacher's entries, as all processes make, complete or find them."""
        folder = self.folder
        if by_first(lambda: is_complete(folder)):
            print_once(f"{folder}: the teacher's entries are there")
        else:
            options = {**self._options(), "batch_size": self.args.per_device_eval_batch_size}
            options["tell"] = lambda text: print_once(f"{folder}: {text}")
            with autocast:
                summary = cache_teacher(self._teacher, {SPLIT: dataset}, folder, **options)
            print_once(f"{folder}: {summary}")
        cache = by_first(lambda: TeacherCache(folder))  # checksums are read only once
        return cache.dataset(SPLIT, dataset, temperature=self.model.recipe.temperature)

    @property
    def folder(self) -> Path:
        """Return the cache's folder."""
        return Path(self.args.teacher_cache or Path(str(self.args.output_dir)) / FOLDER)

    @property
    def _teacher(self) -> PreTrainedModel:
        assert self.model.teacher is not None
        return self.model.teacher

    @property
    def _has_several(self) -> bool:
        """Return whether the run has several temperatures."""
        return self.schedule is not None or len(set(self.model.recipe.temperatures)) > 1

    def _options(self) -> dict[str, Any]:
        """Return the options of `describe` and `cache_teacher`: drawn ids, if the divergence can learn from those."""
        method = "hidden" if self._has_several or self.model.divergence.name != "forward_kl" else "sample"
        return {
            **self.args.cache_options(self.model.recipe.temperatures, method),
            "tokenizer": text_tokenizer(self.processor, self.model.student),
            "valid_vocab": self.model.valid_vocab,
        }

    def _shows_rows_as_they_are(self, rows: list[Any]) -> bool:
        """Return whether batches show the models the same rows that the teacher would see."""
        batch = self.collate([dict(row) for row in rows])
        shown = PaddingCollator(self.processor)([inputs_of_row(row, INPUTS) for row in rows])
        for name in {*INPUTS, *self.model.inputs["teacher"].intersection(batch)}:
            one, other = batch.get(name), shown.get(name)
            if name == "attention_mask":
                one, other = (None if x is None or x.all() else x.long() for x in (one, other))
            same = torch.equal(one, other) if one is not None and other is not None else one is other
            if not same:
                return False
        return True

    def _lacking_room(self, description: Description) -> Iterator[str]:
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        free, need = shutil.disk_usage(there).free, description.bytes_per_token * description.splits[SPLIT].tokens
        if free < 1.1 * need + SPARE:
            yield (
                f"entries take up to {need / 1e9:.1f} GB, and the disk of {str(self.folder)!r} has {free / 1e9:.1f} GB "
                "free. Make room, name another folder (teacher_cache), or keep less (compressed_rank; "
                "cache_method='sample')"
            )

    def _differences(self, description: Description) -> list[str]:
        """Return the differences that prevent using a complete cache, or completing an interrupted one."""
        there = Description.read(self.folder)
        if not is_complete(self.folder):
            return there.differences(description)
        recipe, args, whole = self.model.recipe, self.args, (there.source or {}).get("whole", True)
        temperature: Any = recipe.temperature
        if self._has_several and there.method != "hidden":
            temperature = recipe.temperatures if self.schedule is None else "a temperature_schedule"
        held = {**asdict(there), SPLIT: there.splits.get(SPLIT), "temperature": there.usable_temperatures}
        held |= {"divergence": "forward_kl", "kd_on": "completion"}
        asked = {**asdict(description), SPLIT: description.splits[SPLIT], "temperature": temperature}
        asked |= {"divergence": self.model.divergence.name, "kd_on": recipe.kd_on}
        names = ["tokenizer_sha256", SPLIT]  # nothing else is known of a remote teacher
        names += ["teacher_sha256", "vocab", "valid_vocab"] * (there.source is None)
        names += ["temperature"] * (not there.serves(temperature))
        names += ["divergence"] * (there.method == "sample") + ["kd_on"] * (not whole)
        count = args.cache_samples or args.cache_top_k
        if there.method == description.method == "hidden":
            names += ["max_kl"] * bool(args.compressed_kl) + ["k"] * bool(args.compressed_rank)
        names += ["method"] * bool(count or args.cache_method) + ["k"] * bool(count)
        names += ["dtype"] * bool(args.cache_dtype)
        return [f"{name}: then {held[name]}, now {asked[name]}" for name in names if held[name] != asked[name]]


def _is_fixed(dataset: Any) -> bool:
    return isinstance(dataset, Dataset) and dataset.format["type"] != "custom"  # "custom" marks a transform
