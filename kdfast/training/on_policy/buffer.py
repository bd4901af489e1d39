"""Generated batches that are trained on more than once (DistiLLM's replay buffer, Ko et al. 2024, arXiv:2402.03898)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

Batch = dict[str, Any]


class Buffer:
    """A buffer of `size` batches, each used `size` times: `size` new ones in turn, then the same ones again.

    The batch number alone decides which batch is new, so a resumed run needs only `save`'s file, for the texts. A text
    that is missing, as after a resume without the file, is written anew.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[int, Batch] = {}

    def find(self, number: int) -> Batch | None:
        """Return the run's generated batch `number`, counted from 0; None if it must be written."""
        return None if number % self.size**2 < self.size else self._kept.get(number % self.size)

    def keep(self, number: int, batch: Batch) -> None:
        """Store the new batch `number` if it will be used again."""
        if self.size > 1:
            self._kept[number % self.size] = batch

    def save(self, folder: Path, rank: int) -> None:
        """Write this process's batches into a checkpoint."""
        if self.size > 1:
            torch.save(self._kept, folder / _name(rank))

    def load(self, folder: Path | None, rank: int, device: torch.device) -> None:
        """Read this process's batches from a checkpoint, if it has any."""
        self._kept = {}
        if folder is not None and (path := folder / _name(rank)).is_file():
            kept = torch.load(path, map_location="cpu", weights_only=True)
            self._kept = send_to_device(kept, device)


def _name(rank: int) -> str:
    return f"on_policy_buffer_{rank}.pt"
