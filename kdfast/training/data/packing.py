"""Rows of different lengths: packed whole into rows of a given length, or padded to one length per batch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, default_data_collator

from kdfast.training.data.rows import PACKED, PROMPTS, TEACHER_PROMPTS, lengths_of
from kdfast.training.data.text import map_rows
from kdfast.training.hf import IGNORE_INDEX, check_inputs, embedding_rows, input_device, run_backbone

SEES = 1e-6  # relative to the largest hidden state; between masked documents nothing changes
# padding by column; 0 for others
FILL: dict[str, Any] = {"labels": IGNORE_INDEX, "teacher_log_probs": -torch.inf, "teacher_positions": -1}
OWN = ("teacher_input_ids", "teacher_attention_mask")  # columns with their own length


def best_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return groups of `lengths` that share a bin of `size`: longest first, each into the fullest bin with room.

    Source: Ding et al. 2024, arXiv:2404.10830. In a bin, and between bins by their first, the data's order is kept.
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
    """Return rows of at most `size` tokens, packed from whole ones of `rows`; `seq_lengths` has their lengths."""

    def join(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        bins = best_fit_decreasing([len(ids) for ids in batch["input_ids"]], size)
        # no token predicts a document's first token
        labels = [[IGNORE_INDEX, *labels[1:]] for labels in batch["labels"]]
        return {
            "input_ids": [[token for i in some for token in batch["input_ids"][i]] for some in bins],
            "labels": [[token for i in some for token in labels[i]] for some in bins],
            PACKED: [[len(batch["input_ids"][i]) for i in some] for some in bins],
        }

    return map_rows(rows, join, f"Packing {argument}", num_proc, batched=True, batch_size=1000)


@torch.no_grad()
def check_apart(model: PreTrainedModel, role: str) -> None:
    """Raise ValueError if documents in one row see each other despite position_ids; tried on the model itself."""
    check_inputs(model, role, ["position_ids"])
    ids = torch.arange(1, 9, device=input_device(model)).repeat(2, 1) % embedding_rows(model)
    ids[1, :4] = ids[1, :4].flip(0)  # two rows that share only their second documents
    modes = [(module, module.training) for module in model.modules()]
    positions = torch.arange(4).repeat(2, 2)
    hidden = run_backbone(model.eval(), input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    for module, training in modes:
        module.training = training
    one, other = hidden[:, 4:].float()
    if not (one - other).abs().amax() <= SEES * one.abs().amax():
        raise ValueError(
            f"packing: the {role}, {type(model).__name__} with attn_implementation="
            f"{model.config._attn_implementation!r}, lets a document see the one before it in its row, whatever "
            "position_ids say. Set packing: false, or take another attn_implementation"
        )


class PaddingCollator:
    """A collator for rows of any lengths; pads on the right, with the label −100.

    Packed rows (`seq_lengths`) get position_ids that restart with each document. Padding has position 0 everywhere,
    so that each of its tokens is a document of its own. Rows of equal length are stacked as they are.
    """

    def __init__(self, processor: Any = None) -> None:
        """Read the padding id from a tokenizer, or from a processor's tokenizer."""
        tokenizer = getattr(processor, "tokenizer", processor)
        ids = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
        self.pad_token_id = next((i for i in ids if i is not None), 0)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        if not all(isinstance(row, dict) and "input_ids" in row for row in rows):
            return default_data_collator(rows)
        lengths = [len(row["input_ids"]) for row in rows]
        documents = [lengths_of(row) or [n] for row, n in zip(rows, lengths, strict=True)]
        given = [torch.as_tensor(row.get("position_ids", ())) for row in rows]
        packed = max(map(len, documents)) > 1 or any((x.diff() != 1).any() for x in given if x.dim() == 1)
        if "teacher_input_ids" in rows[0]:
            if packed:
                raise ValueError(
                    "rows are packed of several documents and have teacher_input_ids, whose documents would see each "
                    "other; expected one document per row (packing=False)"
                )
            theirs = self._own_of_teacher(rows)
            return self([{name: x for name, x in row.items() if name not in OWN} for row in rows]) | theirs
        if len({*lengths}) == 1 and not packed and PROMPTS not in [*rows[0]]:
            return default_data_collator(rows)
        by_token: dict[str, list[Tensor]] = {}
        elsewhere = (PACKED, PROMPTS, TEACHER_PROMPTS)
        for name in [name for name in rows[0] if name not in elsewhere]:
            values = [row[name] for row in rows]
            if [_length(x) for x in values] == lengths:
                by_token[name] = [torch.as_tensor(x) for x in values]
        others = [{name: x for name, x in row.items() if name not in (*by_token, *elsewhere)} for row in rows]
        batch: dict[str, Any] = default_data_collator(others) if any(others) else {}
        if packed:
            positions = [torch.cat([torch.arange(n) for n in some]) for some in documents]
            positions = by_token.setdefault("position_ids", positions)
            if (masks := by_token.pop("attention_mask", None)) is not None:  # the row has padding of its own
                positions = [at * (mask != 0) for at, mask in zip(positions, masks, strict=True)]
                by_token["position_ids"] = positions
            if "labels" in by_token:  # no token predicts a document's first token
                labels = zip(by_token["labels"], positions, strict=True)
                by_token["labels"] = [x.masked_fill(at == 0, IGNORE_INDEX) for x, at in labels]
        else:
            by_token.setdefault("attention_mask", [torch.ones(n, dtype=torch.long) for n in lengths])
        fill = {**FILL, "input_ids": self.pad_token_id}
        for name, values in by_token.items():
            batch[name] = torch.stack([_padded(x, max(lengths), fill.get(name, 0)) for x in values])
        return batch

    def _own_of_teacher(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the teacher's own ids, padded, and their mask."""
        lengths = ((len(row["input_ids"]), _length(row.get("teacher_positions"))) for row in rows)
        if (bad := next((pair for pair in lengths if pair[0] != pair[1]), None)) is not None:
            raise ValueError(
                f"a row of {bad[0]} input_ids has {max(bad[1], 0)} teacher_positions; expected one each, the place in "
                "teacher_input_ids that predicts what comes after it, or -1"
            )
        ids = [torch.as_tensor(row["teacher_input_ids"]) for row in rows]
        masks = [row.get("teacher_attention_mask", torch.ones_like(x)) for row, x in zip(rows, ids, strict=True)]
        length = max(map(len, ids))
        return {
            "teacher_input_ids": torch.stack([_padded(x, length, self.pad_token_id) for x in ids]),
            "teacher_attention_mask": torch.stack([_padded(torch.as_tensor(x), length, 0) for x in masks]),
        }


def _length(x: Any) -> int:
    """Return the length of a list, array or tensor; −1 for anything else."""
    return len(x) if isinstance(x, list) or (isinstance(x, Tensor | np.ndarray) and x.ndim) else -1


def _padded(x: Tensor, length: int, value: float) -> Tensor:
    """Return x (T, …) padded with `value` to (length, …)."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, length - len(x)), value=value)
