"""Block sizes, one table: for each architecture and size band a frozen dataclass, with the reason that chose it.

`architecture()` names what a tensor's device is: "sm_90", "gfx942", …, or "interpreter" for CPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowConfig:
    """Of the row kernel."""

    rows: int  # a program
    block: int  # logits of a row at a time
    warps: int
    why: str = ""


ROW_TABLE: dict[str, RowConfig] = {
    "interpreter": RowConfig(16, 64, 4, "few, wide programs: the interpreter pays per operation, not per element"),
    "sm_90": RowConfig(1, 4096, 8, "not measured"),
}


def architecture(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def row_config(z: Tensor) -> RowConfig:
    """For logits z (m, V)."""
    return ROW_TABLE[architecture(z.device)]
