"""Rows of different lengths: several whole ones packed into one of a given length, and batches padded to one length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, default_data_collator

from kdfast.training.data.rows import PACKED, lengths_of
from kdfast.training.data.text import map_rows
from kdfast.training.hf import IGNORE_INDEX

FILL: dict[str, Any] = {"labels": IGNORE_INDEX, "teacher_log_probs": -torch.inf}  # at padding; 0 of other columns


def best_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return which of `lengths` share a bin of `size`: longest first, each into the fullest bin that has room for it.

    Source: Ding et al. 2024, arXiv:2404.10830. In a bin, and of bins by their first, the order is the data's.
    """
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (room left, bin), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(spaces, (lengths[i], -1))
        if at == len(spaces):
            space, number = size, len(bins)
            bins.append([])
        else:
            space, number = spaces.pop(at)
        bins[number].append(i)
        insort(spaces, (space - lengths[i], number))
    return sorted(map(sorted, bins))


def pack(rows: Any, size: int, argument: str, num_proc: int | None = None) -> Any:
    """Return rows of at most `size` tokens, each of whole ones of `rows`; `seq_lengths` says where they end."""

    def join(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        bins = best_fit_decreasing([len(ids) for ids in batch["input_ids"]], size)
        # nothing predicts a document's first token
        labels = [[IGNORE_INDEX, *labels[1:]] for labels in batch["labels"]]
        return {
            "input_ids": [[token for i in some for token in batch["input_ids"][i]] for some in bins],
            "labels": [[token for i in some for token in labels[i]] for some in bins],
            PACKED: [[len(batch["input_ids"][i]) for i in some] for some in bins],
        }

    return map_rows(rows, join, f"Packing {argument}", num_proc, batched=True, batch_size=1000)


class PaddingCollator:
    """Make a batch of rows of any lengths, on the right of which there is padding with the label −100.

    Packed rows (`seq_lengths`) get position_ids that begin anew with each document; padding has position 0 everywhere,
    which makes each of its tokens a document of its own. Rows of one length are stacked as they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        ids = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
        self.pad_token_id = next((i for i in ids if i is not None), 0)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        if not all(isinstance(row, dict) and "input_ids" in row for row in rows):
            return default_data_collator(rows)
        lengths = [len(row["input_ids"]) for row in rows]
        documents = [lengths_of(row) or [n] for row, n in zip(rows, lengths, strict=True)]
        packed = max(map(len, documents)) > 1
        if len({*lengths}) == 1 and not packed:
            return default_data_collator(rows)
        by_token: dict[str, list[Tensor]] = {}
        for name in [name for name in rows[0] if name != PACKED]:
            values = [row[name] for row in rows]
            if [_length(x) for x in values] == lengths:
                by_token[name] = [torch.as_tensor(x) for x in values]
        others = [{name: x for name, x in row.items() if name not in (*by_token, PACKED)} for row in rows]
        batch: dict[str, Any] = default_data_collator(others) if any(others) else {}
        if packed:
            by_token.pop("attention_mask", None)
            by_token["position_ids"] = [torch.cat([torch.arange(n) for n in some]) for some in documents]
            for i, starts in enumerate(by_token["position_ids"]):
                by_token["labels"][i] = by_token["labels"][i].masked_fill(starts == 0, IGNORE_INDEX)
        else:
            by_token.setdefault("attention_mask", [torch.ones(n, dtype=torch.long) for n in lengths])
        fill = {**FILL, "input_ids": self.pad_token_id}
        for name, values in by_token.items():
            batch[name] = torch.stack([_padded(x, max(lengths), fill.get(name, 0)) for x in values])
        return batch


def _length(x: Any) -> int:
    """Return how many items a list, array or tensor has; −1 of what is none."""
    return len(x) if isinstance(x, list) or (isinstance(x, Tensor | np.ndarray) and x.ndim) else -1


def _padded(x: Tensor, length: int, value: float) -> Tensor:
    """Return x (T, …) with `value` behind it up to (length, …)."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, length - len(x)), value=value)
