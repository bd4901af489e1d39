"""Generated batches that are trained on more than once (DistiLLM's replay buffer, Ko et al. 2024, arXiv:2402.03898)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

Batch = dict[str, Any]


class Buffer:
    """Keep `size` batches, each of which serves `size` times: `size` new ones in turn, then the same ones again.

    Which batch is new follows from its number alone, so a resumed run needs `save`'s file for the texts and nothing
    else. A text that is not there, as after a resume without the file, is written anew.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[int, Batch] = {}

    def find(self, number: int) -> Batch | None:
        """Return the batch to train on as the run's generated batch `number`, from 0 on; None: write a new one."""
        return None if number % self.size**2 < self.size else self._kept.get(number % self.size)

    def keep(self, number: int, batch: Batch) -> None:
        """Keep the batch that was written as number `number`, if it will be wanted again."""
        if self.size > 1:
            self._kept[number % self.size] = batch

    def save(self, folder: Path, rank: int) -> None:
        """Write what this process keeps into a checkpoint."""
        if self.size > 1:
            torch.save(self._kept, folder / _name(rank))

    def load(self, folder: Path | None, rank: int, device: torch.device) -> None:
        """Read what this process kept; nothing where there is no checkpoint, or no such file in it."""
        self._kept = {}
        if folder is not None and (path := folder / _name(rank)).is_file():
            kept = torch.load(path, map_location="cpu", weights_only=True)
            self._kept = send_to_device(kept, device)


def _name(rank: int) -> str:
    return f"on_policy_buffer_{rank}.pt"
