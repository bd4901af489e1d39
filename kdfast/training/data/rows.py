"""Rows on their way into a batch: columns that a collator asks for by name, and separation of packed documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

from kdfast.training.data.columns import is_raw, unread
from kdfast.training.durable.errors import first_line

ENTRIES = ("teacher_indices", "teacher_log_probs", "teacher_log_tails", "teacher_hidden")  # added by `CachedBlocks`
PROMPTS, PROMPTS_MASK = "prompts", "prompt_attention_mask"  # ids of prompts to complete, under TRL's names
TEACHER_PROMPTS, TEACHER_PROMPTS_MASK = "teacher_prompts", "teacher_prompt_attention_mask"  # the teacher's own prompts
PACKED = "seq_lengths"  # TRL's column: lengths of the documents packed into a row


class Row(dict[str, Any]):
    """A row that lists only the columns a model reads, but returns any other one by name too."""

    def __init__(self, row: Any = (), columns: Iterable[str] | None = None, **others: Any) -> None:
        self.whole = dict(row, **others)  # the whole row, for a collator that makes its batch with type(row)
        super().__init__((name, value) for name, value in self.whole.items() if columns is None or name in columns)
        self.asked: set[str] = set()

    def __missing__(self, name: str) -> Any:
        self.asked.add(name)
        return self.whole[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.whole

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, self.whole.get(name, default))

    def pop(self, name: str, *default: Any) -> Any:
        found = self.get(name, *default) if default else self[name]
        super().pop(name, None)
        return found

    def unseen(self) -> list[str]:
        """Return the columns of images and videos that were never asked for."""
        return [name for name in self.whole.keys() - self.keys() - self.asked if is_raw(name, self.whole[name])]


class Collator:
    """A collator of `Row`s around `collate`, which raises if packed documents would not be kept apart.

    A collator that goes over all columns, as transformers' do, sees those in `columns` (None = all). One that reads a
    column by name, as TRL's reads `seq_lengths`, finds it.

    route: returns a row's teacher among several, for the batch's `teacher_id`; None = there is no such column.
    hidden: columns that `collate` never sees.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], dict[str, Any]],
        columns: Iterable[str] | None,
        route: Callable[[Any], int] | None = None,
        hidden: Iterable[str] = (),
    ) -> None:
        self.route, self.hidden = route, frozenset(hidden)
        self.collate = collate
        self.columns = None if columns is None else frozenset(columns)
        self._name = getattr(collate, "__name__", type(collate).__name__)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        entries: dict[str, Tensor] = {}
        routes = None if self.route is None else torch.tensor([self.route(row) for row in rows])
        if rows and isinstance(rows[0], dict) and not self.hidden.isdisjoint(rows[0]):
            rows = [{name: value for name, value in row.items() if name not in self.hidden} for row in rows]
        if isinstance(self.collate, DataCollatorWithPadding):  # it cannot batch tensors of shape (T, K)
            names = [name for name, value in rows[0].items() if name.startswith(ENTRIES) and isinstance(value, Tensor)]
            entries = {name: torch.stack([row[name] for row in rows]) for name in names}
            rows = [{name: value for name, value in row.items() if name not in entries} for row in rows]
        given = rows
        if self.columns is not None:
            given = [Row(row, self.columns) if isinstance(row, dict) else row for row in rows]
        try:
            batch: Any = self.collate(given)
        except (ValueError, RuntimeError) as error:
            sizes = {len(row["input_ids"]) for row in rows if isinstance(row, dict) and "input_ids" in row}
            if len(sizes) < 2:
                raise
            raise ValueError(
                f"the data set's rows have {min(sizes)} to {max(sizes)} ids, and data_collator ({self._name}) cannot "
                f"make a batch of them ({first_line(error)}). Pass one that pads labels too, such as transformers' "
                "DataCollatorForSeq2Seq(tokenizer), or rows of one length"
            ) from error
        if entries:
            batch.update(entries)
        if routes is not None:
            batch["teacher_id"] = routes
        batch = _without_empty_mask(dict(batch) if isinstance(batch, Row) else batch)
        if unseen := [name for row in given if isinstance(row, Row) for name in row.unseen()]:
            raise ValueError(unread("the data set", unseen[0]))
        if isinstance(batch, Mapping) and "labels" not in batch:
            raise ValueError(
                f"the batch that data_collator ({self._name}) makes has no labels; expected a column of the data set, "
                "not shifted and −100 where nothing is learned, or a collator that adds them, such as transformers' "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        documents = [sum(n > 0 for n in lengths_of(row)) for row in rows if isinstance(row, dict)]
        if max(documents, default=0) > 1 and _segments(batch) < sum(documents):
            raise ValueError(
                f"the data set's rows are packed of several documents ({PACKED}), and the batches of data_collator "
                f"({self._name}) do not keep them apart: position_ids that begin anew with each, and no padding in an "
                "attention_mask (B, T) beside them. Take trl's DataCollatorForLanguageModeling(padding_free=True), or "
                f"remove the column {PACKED} to train on each row as one document"
            )
        return batch


def _without_empty_mask(batch: dict[str, Any]) -> dict[str, Any]:
    """Drop a mask of ones beside position_ids that restart, because transformers ignores those if there is a mask."""
    if not isinstance(batch, Mapping):  # a collator's own type, which the model will refuse
        return batch
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if not isinstance(mask, Tensor) or not isinstance(positions, Tensor) or mask.dim() != 2 or positions.dim() != 2:
        return batch
    if not mask.all() or (positions.diff() == 1).all():
        return batch
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def _segments(batch: dict[str, Any]) -> float:
    """Return how many documents a model will see in a batch; inf if position_ids cannot show it."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if (isinstance(mask, Tensor) and mask.dim() != 2) or (isinstance(positions, Tensor) and positions.dim() != 2):
        return torch.inf  # a mask or positions with several axes
    if mask is not None:  # transformers then ignores positions
        return 0
    if positions is None:
        return len(batch.get("cu_seq_lens_q", ())) - 1
    positions = torch.as_tensor(positions)
    return len(positions) + int((positions.diff() != 1).sum())


def inputs_of_row(row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return a row's inputs among `names`, and the lengths of its documents if it packs several."""
    return {name: row[name] for name in (*names, *([PACKED] if lengths_of(row) else [])) if name in row}


def lengths_of(row: dict[str, Any]) -> list[int]:
    """Return the lengths of the documents packed into a row; [] if its column of that name is something else."""
    lengths: Any = row.get(PACKED)
    lengths = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    return lengths if isinstance(lengths, list) and all(isinstance(n, int) for n in lengths) else []
