"""What a cache keeps of a distribution: its k most likely ids or ids drawn from it, and the mass of the others.

Logits exist for one chunk of tokens at a time, in fp32. On disk, each sequence is a row:

top_k   indices (T·k) uint16, or int32 for more than 65536 ids;  log_probs (T·k) float16 or float32;
        log_tails (T·(1 + temperatures)) float32
sample  indices (all) as for top_k;  counts (all) uint8, or uint16 for more than 255 draws;  distinct (T) uint16
hidden  coordinates (T·r) and scales (T), as in hidden.py

float16 keeps eleven bits: a log-probability of −0.01 to 5e-6, and of −10 to 4e-3. So a probability of 5e-5 is kept to
0.4%, and larger ones better. The entries' sum does not suffer: the tail has its own fp32 number, and the entries are
normalized to the rest when they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kdfast.inputs import Head
from kdfast.ops.logit_chunks import logit_chunks
from kdfast.training.cache.description import Description, count_type, id_type
from kdfast.training.cache.hidden import keep, restore

HIDDEN = ("coordinates", "scales")  # a row's columns


class TopK(NamedTuple):
    indices: Tensor  # (*, k) int64, most likely first
    log_probs: Tensor  # (*, k) at τ = 1; −inf if fewer than k ids are possible
    log_tails: Tensor  # (*, 1 + temperatures): log of all other ids' mass at τ = 1, then at each temperature


class Drawn(NamedTuple):
    """Ids drawn for several tokens, each distinct id once per token, all tokens concatenated."""

    indices: Tensor  # (all,) int64
    counts: Tensor  # (all,) int64: how often each was drawn; divided by n, its weight
    distinct: Tensor  # (N,) int64: how many ids each token has


@torch.no_grad()
def top_k(head: Head, k: int, temperatures: Sequence[float] = (), valid_vocab: int | None = None) -> TopK:
    """Return the k most likely ids of `head` (*, H) and the remaining mass at τ = 1 and each temperature."""
    taus = (1.0, *temperatures)
    found = []
    for logits in logit_chunks(head):
        z = _possible(logits, valid_vocab)
        largest, indices = z.topk(k, dim=-1)
        log_probs = largest - z.logsumexp(-1, keepdim=True)
        totals = [(z / tau).logsumexp(-1) for tau in taus]
        z.scatter_(-1, indices, -inf)
        tails = [(z / tau).logsumexp(-1) - total for tau, total in zip(taus, totals, strict=True)]
        found.append((indices, log_probs, torch.stack(tails, dim=-1)))
    shape = head.hidden.shape[:-1]
    return TopK(*(torch.cat(part).unflatten(0, shape) for part in zip(*found, strict=True)))


@torch.no_grad()
def draw(head: Head, n: int, temperature: float, generator: torch.Generator, valid_vocab: int | None = None) -> Drawn:
    """Draw n ids per row of `head` (N, H) from softmax(z/τ), at n evenly spaced points of its cumulative sum.

    counts/n are weights whose expectation is that softmax p; an id is drawn ⌊n·p⌋ or ⌈n·p⌉ times. This halves the noise
    of independent draws where p is confident, at τ = 1, and never increases it. KD from drawn ids: Anshumann et al.
    2025, arXiv:2503.16870.
    """
    found = []
    for logits in logit_chunks(head):
        z = _possible(logits, valid_vocab) / temperature
        exact = torch.float32 if z.device.type == "mps" else torch.float64  # MPS has no float64
        sums = z.softmax(-1, dtype=exact).cumsum_(-1)
        if not sums[:, -1].isfinite().all():
            raise ValueError("the teacher's logits hold NaN or infinity on this text; expected finite ones")
        rows, vocab = torch.arange(len(z), device=z.device), z.shape[1]
        first = torch.rand(len(z), 1, generator=generator, device=z.device, dtype=exact)
        points = (first + torch.arange(n, device=z.device)) / n * sums[:, -1:] * (1 - 2 * torch.finfo(exact).eps)
        ids = torch.searchsorted(sums, points, right=True)
        pairs, counts = torch.unique_consecutive(rows[:, None] * vocab + ids, return_counts=True)
        found.append((pairs % vocab, counts, torch.bincount(pairs // vocab, minlength=len(ids))))
    return Drawn(*map(torch.cat, zip(*found, strict=True)))


def _possible(logits: Tensor, valid_vocab: int | None) -> Tensor:
    return logits if valid_vocab is None else logits[:, :valid_vocab]


def encode(entries: TopK | Drawn | Tensor, description: Description) -> dict[str, np.ndarray]:
    """Return the row for one sequence's entries or coordinates, (T, …) each."""
    if isinstance(entries, Tensor):
        coordinates, scales = keep(entries, description.dtype)
        row = {"coordinates": coordinates} if scales is None else {"coordinates": coordinates, "scales": scales}
        return {name: part.cpu().numpy().reshape(-1) for name, part in row.items()}
    dtypes = {
        "indices": id_type(description.vocab),
        "log_probs": description.dtype,
        "log_tails": "float32",
        "counts": count_type(description.k),
        "distinct": "uint16",
    }
    return {name: part.cpu().numpy().astype(dtypes[name]).reshape(-1) for name, part in entries._asdict().items()}


def table(rows: list[dict[str, np.ndarray]]) -> pa.Table:
    """Return a table of rows from `encode`."""
    return pa.table({name: _lists([row[name] for row in rows]) for name in rows[0]})


def decode(
    columns: dict[str, np.ndarray], description: Description, temperature: float, tokens: int = -1
) -> dict[str, Tensor]:
    """Return one row's columns for `DistillationModel`, besides tokens. Hidden states need the number of `tokens`.

    teacher_hidden     (T, r) hidden only, and its only column: coordinates, float16 or float32
    teacher_indices    (T, K) int32
    teacher_log_probs  (T, K) top_k: at τ = 1, as kept; sample: log(counts/n), −inf beyond a token's ids
    teacher_log_tails  (T, 2) fp32: at τ = 1 and at `temperature`; sample: (T, 0), which marks drawn ids
    """
    if description.method == "hidden":
        kept, scales = (torch.from_numpy(columns[name].copy()) if name in columns else None for name in HIDDEN)
        assert kept is not None
        return {"teacher_hidden": restore(kept.view(tokens, len(kept) // tokens), scales)}
    if description.method == "sample":
        return _drawn(columns, description.k)
    indices = columns["indices"].astype("int32").reshape(-1, description.k)
    tails = columns["log_tails"].reshape(len(indices), -1)
    at = (1.0, *description.temperatures).index(temperature)
    return {
        "teacher_indices": torch.from_numpy(indices),
        "teacher_log_probs": torch.from_numpy(columns["log_probs"].reshape(indices.shape).copy()),
        "teacher_log_tails": torch.from_numpy(tails[:, [0, at]].copy()),
    }


def _drawn(columns: dict[str, np.ndarray], n: int) -> dict[str, Tensor]:
    distinct = columns["distinct"].astype("int64")
    held = np.arange(n)[None] < distinct[:, None]
    indices, log_probs = np.zeros(held.shape, "int32"), np.full(held.shape, -inf, "float32")
    indices[held] = columns["indices"]
    log_probs[held] = np.log(columns["counts"].astype("float32")) - log(n)
    return {
        "teacher_indices": torch.from_numpy(indices),
        "teacher_log_probs": torch.from_numpy(log_probs),
        "teacher_log_tails": torch.empty(len(indices), 0),
    }


def _lists(arrays: list[np.ndarray]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, arrays)])
    values = pa.array(np.concatenate(arrays))
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
