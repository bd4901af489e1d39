"""Block sizes, one table: for each architecture and size band a frozen dataclass, with the reason that chose it.

`architecture()` names what a tensor's device is: "sm_90", "gfx942", …, or "interpreter" for CPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class RowConfig:
    """Of the row kernel."""

    rows: int  # a program
    block: int  # logits of a row at a time
    warps: int
    why: str = ""


@dataclass(frozen=True)
class TileConfig:
    """Of a kernel that multiplies: tokens × vocabulary × width of a tile."""

    block_n: int
    block_v: int
    block_h: int
    warps: int
    stages: int
    why: str = ""

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v, "BLOCK_H": self.block_h}


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


def known_architecture(device: torch.device) -> str | None:
    """The row of the tables that `device` uses: its own, or its closest older relative's."""
    name = architecture(device)
    return name if name in ROW_TABLE else None


ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def row_config(z: Tensor) -> RowConfig:
    """For logits z (m, V)."""
    return ROW_TABLE[architecture(z.device)]


def splits_of(row_blocks: int, tiles: int, device: torch.device) -> int:
    return min(2, tiles)


def interpreting() -> bool:
    """Kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return triton.knobs.runtime.interpret


TILE_TABLE: dict[tuple[str, str], TileConfig] = {
    ("interpreter", "statistics"): TileConfig(16, 64, 16, 4, 2),
    ("interpreter", "gradients"): TileConfig(16, 64, 16, 4, 2),
    ("interpreter", "projection"): TileConfig(16, 64, 16, 4, 2),
}


def tile_config(kernel: str, operand: Tensor, N: int) -> TileConfig:
    return TILE_TABLE[architecture(operand.device), kernel]
