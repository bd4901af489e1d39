"""torch.autocast for any device, including those without it, such as "meta"."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def dtype_of(device: torch.device) -> torch.dtype | None:
    """Return the dtype that nn.Linear would compute in under autocast; None outside autocast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def disabled(device: torch.device) -> AbstractContextManager[None]:
    """Return a context manager that disables autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
