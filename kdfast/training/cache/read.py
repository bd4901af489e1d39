"""`TeacherCache`: a complete cache, data sets with its entries, and checks that a run can learn from them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, load_from_disk
from torch import Tensor
from torch.utils import data
from transformers import PreTrainedTokenizerBase

from kdfast.inputs import same_vocabulary
from kdfast.schedules import Schedule
from kdfast.training.cache.description import (
    SUMMARY,
    CacheError,
    CacheSummary,
    Description,
    describe_split,
    factor_of,
    is_complete,
    read_summary,
    shards,
    tokenizer_fingerprint,
)
from kdfast.training.cache.entries import decode
from kdfast.training.cache.hidden import CachedHead
from kdfast.training.data.columns import BROUGHT, media_columns, names_of
from kdfast.training.data.rows import lengths_of
from kdfast.training.durable import checksums
from kdfast.training.durable.errors import first_line
from kdfast.training.durable.processes import print_once
from kdfast.training.hf import IGNORE_INDEX, head_shape
from kdfast.training.model import DistillationModel
from kdfast.training.teachers.entries import OWN_ENTRIES, KeptTeacher, TeacherTail


class TeacherCache(KeptTeacher):
    """A complete teacher cache, as `cache_teacher` wrote it.

        cache = TeacherCache("caches/gpt2-medium")
        train = cache.dataset("train", blocks, temperature=2.0)

    Args:
        folder: the cache's folder.
        verify: compare every file with its checksum (0.64 s of one core per GB).

    Raises CacheError, a ValueError naming the file and what to do: not a cache, incomplete or damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.description = Description.read(self.folder)
        if not is_complete(self.folder):
            raise CacheError(
                f"{str(self.folder)!r} is not complete: its making was interrupted; `kdfast cache` with the same "
                "configuration goes on from what there is"
            )
        self.summary: CacheSummary = read_summary(self.folder)
        if verify:
            factor = factor_of(self.folder)
            if self.description.method == "hidden" and (damage := factor.find_damage(self.description)):
                raise CacheError(
                    f"{str(factor.folder)!r} is damaged: {damage}. Remove that folder and {SUMMARY}, and start "
                    "`kdfast cache` again with the same configuration: it is made again, and what does not fit it"
                )
            for split in self.description.splits:
                for shard in shards(self.folder, self.description, split):
                    if damage := shard.find_damage(self.description):
                        raise CacheError(
                            f"{str(shard.folder)!r} is damaged: {damage}. Remove that folder and {SUMMARY}, and start "
                            "`kdfast cache` again with the same configuration: it makes the missing shard"
                        )

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Return the temperatures that a KD term may have; empty for hidden states, which serve all."""
        return self.description.usable_temperatures

    @cached_property
    def head(self) -> CachedHead | None:
        """Return the head that makes logits of a cache's hidden states, on the CPU; None for other methods."""
        if self.description.method != "hidden":
            return None
        folder = factor_of(self.folder).folder
        try:
            return CachedHead.load(folder)
        except Exception as error:  # of safetensors, for an intact file that is not one of its own
            raise CacheError(f"{str(folder)!r} cannot be read ({first_line(error)}); make it again") from error

    @property
    def factor_sums(self) -> str:
        """Return the checksums of that head's file."""
        return (factor_of(self.folder).folder / checksums.NAME).read_text(encoding="utf-8")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Raise CacheError if the cache was made with other tokens; None, an unknown tokenizer, passes."""
        then, now = self.description.tokenizer_sha256, tokenizer_fingerprint(tokenizer)
        if tokenizer is not None and then not in ("", now):
            raise CacheError(
                f"{str(self.folder)!r} was made with the tokenizer {self.description.tokenizer!r}, and "
                f"{str(tokenizer.name_or_path)!r} has other tokens ({then[:12]}… then, {now[:12]}… now). Use that "
                "tokenizer, or make the cache again"
            )

    def find_valid_vocab(self, vocab: int, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
        """Return the cache's valid_vocab if a student's `vocab` rows pad its tokenizer differently; else None."""
        x = self.description
        if x.valid_vocab is None or x.vocab == vocab or tokenizer is None or not x.tokenizer_sha256:
            return None
        print_once(f"valid_vocab={x.valid_vocab}: the student's head has {vocab} rows, the cached teacher's {x.vocab}")
        return x.valid_vocab

    def check_vocabulary(self, vocab: int, valid_vocab: int | None) -> None:
        """Raise CacheError if a student with `vocab` ids cannot learn from these entries."""
        x = self.description
        if not same_vocabulary(vocab, x.vocab, valid_vocab) or (x.valid_vocab or x.vocab) > (valid_vocab or vocab):
            raise CacheError(
                f"{str(self.folder)!r} is of a teacher with {x.vocab} ids (valid_vocab={x.valid_vocab}) and the "
                f"student has {vocab} (valid_vocab={valid_vocab}); expected the same vocabulary. Where only padding "
                "rows differ, make the cache and train with valid_vocab, the number of real tokens"
            )

    def dataset(
        self, split: str, dataset: Any, *, temperature: float = 2.0, tail: TeacherTail | None = None
    ) -> CachedBlocks:
        """Return the rows of `dataset` with the teacher's entries.

        Args:
            split: its name when the cache was made.
            dataset: the rows that the cache was made from, in the same order; labels and other columns stay.
            temperature: of the KD term: one that the cache was made for, or 1 unless ids were drawn. Any for hidden
                states.
            tail: the run's `teacher_tail`: entries then serve any temperature, as a data set's own do, and it says
                what the remaining mass is. None: as the cache keeps it.

        Raises CacheError for an unknown split, other rows, or another temperature; it says then and now.
        """
        if split not in self.description.splits:
            raise CacheError(
                f"{str(self.folder)!r} has no split {split!r}; expected one of {', '.join(self.description.splits)}"
            )
        if media := media_columns(dataset):
            raise CacheError(
                f"{str(self.folder)!r}, split {split!r}: the data has a column {media[0]!r}, which the teacher was not "
                "shown; a cache is of text alone. Leave the column out, or train with a live teacher"
            )
        then, now = self.description.splits[split], describe_split(dataset)
        if then != now:
            raise CacheError(
                f"{str(self.folder)!r}, split {split!r}, is of other data: then {then.sequences} sequences with "
                f"{then.tokens} tokens (SHA-256 {then.sha256[:12]}…), now {now.sequences} with {now.tokens} "
                f"({now.sha256[:12]}…). Train on the data, tokenizer and block length the cache was made with, or make "
                "it again"
            )
        if tail is not None and self.description.method != "top_k":
            raise CacheError(f"teacher_tail={tail!r}, and {str(self.folder)!r} is no cache of top_k; leave it out")
        if tail is None and not self.description.serves(temperature):
            remedy = f"make another cache, with cache_temperatures: [{temperature:g}]"
            if self.description.source is not None:
                remedy = "say what its entries leave at others: teacher_tail: renormalize_both, or bucket, renormalize"
            raise CacheError(
                f"temperature={temperature:g}; {str(self.folder)!r} was made for "
                f"{', '.join(f'{tau:g}' for tau in self.temperatures)}. Train with one of those, or {remedy}"
            )
        here = f"{str(self.folder)!r}, split {split!r},"
        try:
            entries = concatenate_datasets(
                [load_from_disk(str(shard.folder)) for shard in shards(self.folder, self.description, split)]
            )
        except Exception as error:  # of datasets and pyarrow, for intact files that are not theirs
            raise CacheError(f"{here} cannot be read ({first_line(error)}); make it again") from error
        if len(entries) != len(dataset):
            raise CacheError(f"{here} has {len(entries)} rows for {len(dataset)} of the data; make it again")
        if not (self.description.source or {}).get("whole", True):
            self._check_targets(here, dataset, entries)
        return CachedBlocks(self, dataset, entries, temperature, tail)

    def _check_targets(self, here: str, dataset: Any, entries: Dataset) -> None:
        """Raise CacheError if a token is a target for which an imported file has no entries, only a tail."""
        for n, tails in enumerate(entries.select_columns(["log_tails"]).with_format("numpy")["log_tails"]):
            row = dict(dataset[n])
            learned = np.roll(np.asarray(row.get("labels", row["input_ids"])) != IGNORE_INDEX, -1)
            learned[np.cumsum(lengths_of(row) or [len(learned)]) - 1] = False  # after a document's last token
            if lost := np.flatnonzero(learned & (tails.reshape(len(learned), -1)[:, 0] == 0)).tolist():
                raise CacheError(
                    f"{here} has no entries for token {lost[0] + 1} of row {n}, which is trained on. Expected labels "
                    "of -100 there, as when the cache was made (completion_only_loss, assistant_only_loss)"
                )


def cached_blocks(dataset: Any) -> list[CachedBlocks]:
    """Return the cached blocks that `dataset` is or contains."""
    if isinstance(dataset, data.ConcatDataset):
        return [found for one in dataset.datasets for found in cached_blocks(one)]
    if isinstance(dataset, data.Subset):
        return cached_blocks(dataset.dataset)
    return [dataset] if isinstance(dataset, CachedBlocks) else []


class CachedBlocks(data.Dataset):
    """A data set that adds a teacher cache's entries to the rows of `dataset`; `TeacherCache.dataset` makes it.

    The columns are teacher_indices, teacher_log_probs and teacher_log_tails, or teacher_hidden, as
    `DistillationModel.forward` reads them under the recipe "cached". In your own loop, `CachedEntries` turns them into
    a `SparseLogits`, or `TeacherCache.head` into a `Head`. entries: the cache's rows. temperature, tail: as in
    `TeacherCache.dataset`.
    """

    def __init__(
        self, cache: TeacherCache, dataset: Any, entries: Dataset, temperature: float, tail: TeacherTail | None = None
    ) -> None:
        self.cache, self.dataset, self.temperature, self.tail = cache, dataset, temperature, tail
        self.description = cache.description
        self.entries = entries.with_format("numpy", dtype=None)  # as they were kept

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        return {**row, **self.entries_of(index, len(row["input_ids"]))}

    def entries_of(self, index: int, tokens: int) -> dict[str, Tensor]:
        """Return the columns that are added to a row of this many tokens."""
        temperature = self.temperature if self.tail is None else 1.0
        entries: dict[str, Tensor] = decode(self.entries[index], self.description, temperature, tokens)
        if self.tail is not None:
            del entries["teacher_log_tails"]
        return entries


class SeveralCached(data.Dataset):
    """A data set that adds several caches' columns to the rows of `dataset`, under each teacher's name."""

    def __init__(self, dataset: Any, blocks: Mapping[str, CachedBlocks]) -> None:
        self.dataset, self.blocks = dataset, blocks

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.dataset[index])
        for name, blocks in self.blocks.items():
            found = blocks.entries_of(index, len(row["input_ids"]))
            row |= {f"{column}_{name}": x for column, x in found.items()}
        return row


def join_caches(model: DistillationModel, argument: str, dataset: Any, temperature: Schedule | None, split: str) -> Any:
    """Return the rows of `dataset`, or of a dict of data sets, with the entries of teachers that are caches.

    split: the caches' split; for a dict, each data set's key. A cache without it is skipped, except for "train".
    Raises CacheError if a cache does not fit the data, `model` or its recipe, or all of them lack the split.
    """
    recipe, caches = model.recipe, model.sides.caches
    if dataset is None or not caches:
        return dataset
    if isinstance(dataset, dict):
        return {k: join_caches(model, f"{argument}[{k!r}]", one, temperature, k) for k, one in dataset.items()}
    found = {}
    for name, cache in caches.items():
        assert isinstance(cache, TeacherCache)
        tau, tail = recipe.temperatures[0], model.teacher_tail if cache.description.source else None
        lacks = split != "train" and split not in cache.description.splits
        if lacks or (recipe.teacher == "none" and (split == "train" or not cache.description.serves(tau))):
            continue
        found[name] = cache.dataset(split, dataset, temperature=tau, tail=tail)
        if recipe.teacher != "none":
            _check_blocks(argument, found[name], model, temperature)
    if recipe.teacher == "cached" and not found:
        raise CacheError(
            f"{argument}: none of the teachers' caches has the split {split!r}, and recipe 'cached' learns from their "
            "entries alone; make one of them with that split, or leave the data out"
        )
    return SeveralCached(dataset, found) if found else dataset


def check_datasets(model: DistillationModel, datasets: Mapping[str, Any], temperature: Schedule | None) -> None:
    """Raise CacheError for a data set whose entries of a teacher do not fit `model` or its recipe.

    Args:
        datasets: as `by_name` returns them.
        temperature: a schedule that replaces the recipe's, or None.
    """
    recipe = model.recipe
    several = temperature is not None or len(set(recipe.temperatures)) > 1
    run = _temperatures(model, temperature)
    for argument, dataset in datasets.items():
        of_cache = cached_blocks(dataset)
        names = () if of_cache else names_of(dataset)
        unknown = "teacher_log_tails" not in names and model.teacher_tail is None
        if recipe.teacher == "cached" and "teacher_log_probs" in names and unknown:
            raise CacheError(f"{argument} has teacher_log_probs of its own, without teacher_log_tails: {OWN_ENTRIES}")
        at_one_temperature = model.teacher_tail == "none" or "teacher_log_tails" in names
        if recipe.teacher == "cached" and several and at_one_temperature and dataset is not None and not of_cache:
            raise CacheError(
                f"{argument} has a teacher's entries for one temperature (drawn ids, or teacher_log_tails), and the "
                f"run is at {run}; expected one throughout: leave out temperature_steps and temperature_schedule"
            )
        for blocks in of_cache:
            blocks.cache.check_vocabulary(head_shape(model.student)[0], model.valid_vocab)
            if recipe.teacher == "cached":
                _check_blocks(argument, blocks, model, temperature)
    take_head(model, datasets)
    names = {argument: list(names_of(dataset)) for argument, dataset in datasets.items()}
    bringing = {argument: name for argument, columns in names.items() for name in BROUGHT.intersection(columns)}
    lacking = [argument for argument, columns in names.items() if columns and argument not in bringing]
    if recipe.teacher == "cached" and model.teacher is None and bringing and lacking:
        argument, brought = next(iter(bringing.items()))
        raise CacheError(
            f"{lacking[0]} has no {brought}, which {argument} has; recipe 'cached' wants a teacher's entries in "
            "both. Cache that data too (TeacherCache.dataset gives the rows), or leave it out"
        )


def _temperatures(model: DistillationModel, schedule: Schedule | None) -> str:
    return "a temperature_schedule" if schedule else ", ".join(f"{tau:g}" for tau in model.recipe.temperatures)


def _check_blocks(argument: str, blocks: CachedBlocks, model: DistillationModel, temperature: Schedule | None) -> None:
    """Raise CacheError if the run cannot learn from these blocks. Arguments as in `check_datasets`."""
    recipe = model.recipe
    if blocks.description.method == "hidden":
        return
    if temperature is not None or set(recipe.temperatures) != {blocks.temperature}:
        raise CacheError(
            f"{argument} has a teacher's entries for temperature={blocks.temperature:g}, and the run is at "
            f"{_temperatures(model, temperature)}; expected the same, throughout the run"
        )
    if recipe.kd_on == "all" and not (blocks.description.source or {}).get("whole", True):
        raise CacheError(
            f"kd_on='all', and {argument} has entries of a file ({blocks.description.teacher}) that holds none "
            "for some tokens, such as prompts; expected kd_on='completion'"
        )
    if blocks.description.method == "sample" and model.divergence.name != "forward_kl":
        raise CacheError(
            f"divergence={recipe.divergence!r} and {argument} has ids drawn at random, which are no estimate "
            "of it: it is not linear in the teacher's probabilities, or infinite. Expected forward_kl, or a "
            "cache made with cache_method: hidden or top_k"
        )


def take_head(model: DistillationModel, datasets: Mapping[str, Any]) -> None:
    """Give `model` the head for these data sets' hidden states, if any. Raise CacheError if they need several."""
    blocks = [one for dataset in datasets.values() for one in cached_blocks(dataset)]
    hidden = {one.cache.factor_sums: one.cache for one in blocks if one.description.method == "hidden"}
    if len(hidden) > 1:
        one, other, *_ = hidden.values()
        raise CacheError(
            f"{str(one.folder)!r} and {str(other.folder)!r} hold hidden states that go through different heads; "
            "expected the splits of one cache; of several teachers' caches, each as a teacher (KDTrainer(teacher=…))"
        )
    for cache in hidden.values():
        model.cached_head = cache.head
