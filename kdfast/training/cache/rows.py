"""A sequence's entries as a row of a data set, and back.

top_k   indices (T·k) uint16, or int32 for more than 65536 ids;  log_probs (T·k) float16 or float32;
        log_tails (T·(1 + temperatures)) float32
sample  indices (all) likewise;  counts (all) uint8, or uint16 for more than 255 draws;  distinct (T) uint16

float16 keeps eleven bits: a log-probability of −0.01 to 5e-6, one of −10 to 4e-3, so probabilities are kept to 0.4%
where they are 5e-5 and to better where they are larger. What that takes from their sum is given back when they are
used: the tail has its own fp32 number, and the entries are normalised to the rest.
"""

from __future__ import annotations

from math import inf, log
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kdfast.training.cache.description import Description, count_type, id_type
from kdfast.training.cache.entries import Drawn, TopK


def encode_top_k(entries: TopK, description: Description) -> dict[str, np.ndarray]:
    """One sequence's, (T, …) each."""
    log_probs = _numpy(entries.log_probs).astype(description.dtype)
    return {
        "indices": _numpy(entries.indices).astype(id_type(description.vocab)).reshape(-1),
        "log_probs": log_probs.reshape(-1),
        "log_tails": _numpy(entries.log_tails).astype("float32").reshape(-1),
    }


def encode_drawn(entries: Drawn, description: Description) -> dict[str, np.ndarray]:
    return {
        "indices": _numpy(entries.indices).astype(id_type(description.vocab)),
        "counts": _numpy(entries.counts).astype(count_type(description.k)),
        "distinct": _numpy(entries.distinct).astype("uint16"),
    }


def table(rows: list[dict[str, np.ndarray]]) -> pa.Table:
    """Of rows as the functions above make them."""
    return pa.table({name: _lists([row[name] for row in rows]) for name in rows[0]})


def decode(row: pa.Table, description: Description, temperature: float) -> dict[str, Tensor]:
    """Of a table's one row, what `DistillationModel` takes besides tokens:

    teacher_indices    (T, K) int32
    teacher_log_probs  (T, K) top_k: at τ = 1, as it was kept; sample: log(counts/n), −inf beyond a token's ids
    teacher_log_tails  (T, 2) fp32: at τ = 1 and at `temperature`; top_k alone
    """
    columns = {name: _values(row, name) for name in row.column_names}
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
    return {"teacher_indices": torch.from_numpy(indices), "teacher_log_probs": torch.from_numpy(log_probs)}


def _lists(arrays: list[np.ndarray]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, arrays)])
    values = pa.array(np.concatenate(arrays))
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)


def _values(row: pa.Table, name: str) -> np.ndarray:
    return row.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().numpy()
