"""Block sizes: one table of every kernel's tiles for each architecture, operand width and band of N.

The rows were chosen by compiling, not yet by timing. `make aot` compiles every row for its chip and checks that nothing
spills, that it fits the shared memory and that it uses the best tensor-core instruction; each row is the largest tile
that passes. The work after a product needs registers for each logit, so a tile's columns are handled in `parts`, and a
loss with softcap, biases, metrics or an anchor ("full") gets a narrower tile than one without ("lean").
`KDFAST_AUTOTUNE=1` times the neighbors of a row on the GPU at hand and prints the row to put here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton

FEW = 64  # tokens: up to this many, a smaller block of rows wastes less


@dataclass(frozen=True)
class RowConfig:
    """Block sizes of the row kernels."""

    rows: int  # per program
    block: int  # logits per row handled at a time
    warps: int


@dataclass(frozen=True)
class TileConfig:
    """Block sizes of a kernel that multiplies: tokens × vocabulary × width of a tile."""

    block_n: int
    block_v: int
    block_h: int
    warps: int
    stages: int
    parts: int = 1  # stretches of a tile's columns, handled one after the other

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v, "BLOCK_H": self.block_h}


@dataclass(frozen=True)
class Row:
    """One row of the table: a configuration per kernel, and why."""

    rows: RowConfig
    lean: TileConfig  # statistics kernel, without softcap, bias, metrics and anchor
    full: TileConfig  # statistics kernel, with any of them
    gradients: TileConfig  # gradients kernel, for a KL or without a teacher
    projection: TileConfig
    # in place of each, for a width that is not a multiple of its block_h: it is read through masks, and element by
    # element unless it is a multiple of 16, for which a full tile leaves too few registers
    odd: TileConfig
    why: str
    given: TileConfig | None = None  # in place of `full`, for a `Logits` teacher and for a sparse teacher's bucket
    gradients_full: TileConfig | None = None  # in place of `gradients`, if a loss is "full"


ROWS = RowConfig(1, 4096, 8)
# gfx942 has wavefronts of 64, so half as many warps for as many threads; 64 KB of shared memory allow two stages
AMD_ROWS = RowConfig(1, 4096, 4)

INTERPRETER = Row(
    RowConfig(16, 64, 4),
    *[TileConfig(16, 64, 16, 4, 1, 2)] * 5,
    why="few, wide programs, the interpreter pays per operation; blocks small enough for tests to cross them",
)

SM_90 = Row(
    ROWS,
    lean=TileConfig(128, 128, 64, 8, 3, 4),
    full=TileConfig(128, 64, 64, 8, 3, 4),
    gradients=TileConfig(128, 128, 64, 8, 3, 8),
    projection=TileConfig(128, 128, 64, 8, 3),
    odd=TileConfig(128, 32, 32, 8, 3, 2),
    given=TileConfig(128, 64, 64, 8, 3, 8),
    why="two 128×128 fp32 accumulators fill half the registers; four parts spill 64 bytes with given logits. Not timed",
)
SM_90_FEW = Row(
    ROWS,
    lean=TileConfig(64, 128, 64, 4, 3, 4),
    full=TileConfig(64, 64, 64, 4, 3, 2),
    gradients=TileConfig(64, 64, 64, 4, 3, 4),
    projection=TileConfig(64, 64, 64, 4, 3),
    odd=TileConfig(64, 32, 32, 4, 3, 2),
    given=TileConfig(64, 64, 64, 4, 3, 4),
    why="wgmma takes 64 rows at least; one warpgroup, two programs a multiprocessor. Not timed",
)
SM_100 = replace(
    SM_90,
    full=TileConfig(128, 64, 64, 8, 3, 2),
    given=TileConfig(128, 32, 64, 8, 3, 4),
    gradients_full=TileConfig(128, 64, 64, 8, 3, 8),
    why="tcgen05 takes 128 rows; accumulators leave tensor memory a part at a time. Not timed",
)
SM_80 = Row(
    ROWS,
    lean=TileConfig(128, 64, 32, 8, 3, 4),
    full=TileConfig(128, 64, 32, 8, 3, 4),
    gradients=TileConfig(128, 128, 32, 8, 3, 8),
    projection=TileConfig(128, 128, 32, 8, 3),
    odd=TileConfig(128, 32, 32, 8, 3, 2),
    given=TileConfig(128, 64, 32, 8, 3, 8),
    gradients_full=TileConfig(128, 64, 32, 8, 3, 4),
    why="mma.sync reads operands into registers: 128 columns spill in all but a KL's gradients, a width of 64 always. "
    "Not timed",
)
SM_80_FEW = Row(
    ROWS,
    lean=TileConfig(64, 64, 32, 4, 3, 1),
    full=TileConfig(64, 64, 32, 4, 3, 4),
    gradients=TileConfig(64, 64, 32, 4, 3, 4),
    projection=TileConfig(64, 64, 32, 4, 3),
    odd=TileConfig(64, 32, 32, 4, 3, 2),
    given=TileConfig(64, 64, 32, 4, 3, 2),
    why="one row block of 64; more programs over V fill the chip. Not timed",
)
SM_120 = replace(
    SM_80,
    full=TileConfig(128, 32, 32, 8, 3, 2),
    given=None,
    why="as sm_80, but 64 columns spill 8–16 bytes with everything and the teacher's own head. Not timed",
)
SM_120_FEW = replace(SM_80_FEW, full=TileConfig(64, 32, 32, 4, 3, 2), given=None, why=f"one row block; {SM_120.why}")
GFX942 = Row(
    AMD_ROWS,
    lean=TileConfig(128, 64, 32, 4, 2),
    full=TileConfig(128, 64, 32, 4, 2),
    gradients=TileConfig(128, 128, 32, 8, 2),
    projection=TileConfig(128, 128, 32, 8, 2),
    odd=TileConfig(64, 64, 32, 4, 2, 2),
    given=TileConfig(128, 64, 32, 8, 2, 4),
    why="512 registers a thread, of which half are accumulators'; 64 KB of LDS; warps side by side share a row, whose "
    "parts go through LDS. Not timed",
)
GFX942_FEW = replace(
    GFX942,
    lean=GFX942.odd,
    full=GFX942.odd,
    given=None,
    gradients=TileConfig(64, 64, 32, 4, 2, 4),
    projection=TileConfig(64, 64, 32, 4, 2),
    why="one row block of 64. Not timed",
)
FP32 = Row(
    ROWS,
    lean=TileConfig(64, 32, 16, 8, 2, 2),
    full=TileConfig(64, 64, 16, 8, 2, 4),
    gradients=TileConfig(64, 64, 16, 8, 2, 4),
    projection=TileConfig(64, 64, 16, 8, 2),
    odd=TileConfig(64, 32, 16, 8, 2),
    why="fp32 without TF32 is multiplied outside the tensor cores: as many registers for operands as for sums",
)
SM_100_FP32 = replace(FP32, full=TileConfig(64, 32, 16, 8, 2, 2), why=f"{FP32.why}; 64 columns spill with TF32")
SM_120_FP32 = replace(
    FP32,
    gradients=TileConfig(64, 64, 16, 8, 2, 8),
    odd=TileConfig(64, 32, 16, 8, 2, 2),
    why=f"{FP32.why}; one part of an odd width spills 8 bytes, four of a gradient 16 without a second side",
)
AMD_FP32 = replace(FP32, rows=AMD_ROWS, why="fp32 operands: v_mfma_f32 exists, at a quarter of the 16-bit rate")
FP64 = Row(RowConfig(1, 2048, 8), *[TileConfig(16, 32, 16, 4, 2, 2)] * 5, why="a number takes two registers. Not timed")

# architecture → rows for 16-bit operands with many tokens, 16-bit operands with few tokens, fp32 operands
PRESETS = dict.fromkeys(("sm_80", "sm_86", "sm_89"), (SM_80, SM_80_FEW, FP32)) | {
    "sm_90": (SM_90, SM_90_FEW, FP32),
    "sm_100": (SM_100, SM_100, SM_100_FP32),
    "sm_120": (SM_120, SM_120_FEW, SM_120_FP32),
    "gfx942": (GFX942, GFX942_FEW, AMD_FP32),
}
# (architecture, bytes per operand, band of N) → row
TABLE: dict[tuple[str, int, str], Row] = {
    (architecture, size, band): row
    for architecture, (many, few, fp32) in PRESETS.items()
    for size, band, row in ((2, "many", many), (2, "few", few), (4, "many", fp32), (4, "few", fp32))
} | {(architecture, 8, band): FP64 for architecture in PRESETS for band in ("many", "few")}
ARCHITECTURES = tuple(PRESETS)
MULTIPLIES_FLOAT64 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)  # in tl.dot; torch 2.8 has 3.4


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return triton.knobs.runtime.interpret


def architecture(device: torch.device) -> str:
    """Return the device's architecture, "sm_90", "gfx942", …; "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def known_architecture(device: torch.device) -> str | None:
    """Return the architecture whose rows `device` uses: its own, or the closest older one of the same generation
    (sm_103 uses sm_100's, sm_87 sm_86's); None if there is none."""
    name = architecture(device)
    if name == "interpreter" or name in ARCHITECTURES:
        return name
    relatives = [a for a in ARCHITECTURES if a[:-1] == name[:-1] and int(a[3:]) < int(name[3:])]
    return max(relatives, key=lambda a: int(a[3:]), default=None)


def key_of(device: torch.device, itemsize: int, N: int) -> tuple[str, int, str]:
    """Return the key in the table for operands of `itemsize` bytes and N tokens."""
    name = known_architecture(device)
    assert name is not None, architecture(device)
    return name, itemsize, "few" if N <= FEW else "many"


def row_of(device: torch.device, itemsize: int, N: int) -> Row:
    """Return the table's row for operands of `itemsize` bytes and N tokens."""
    key = key_of(device, itemsize, N)
    return INTERPRETER if key[0] == "interpreter" else TABLE[key]


def threads_of_row(device: torch.device, columns: int) -> tuple[int, int]:
    """Return the layout of the architecture's accumulators: how many threads share a row of a product's part, and how
    many neighboring columns one has at a time. On sm_100 each of two warps has half a row; v_mfma's is transposed."""
    name = known_architecture(device) or "interpreter"
    return (2, columns // 2) if name == "sm_100" else (2, 4) if name.startswith("gfx") else (4, 2)


def splits_of(row_blocks: int, tiles: int, device: torch.device) -> int:
    """Return how many programs share a row block's vocabulary: enough to fill the chip in whole waves, and no more.

    A launch takes waves × tiles per program; this is the smallest number within 2% of the shortest time."""
    if device.type == "cpu":
        return min(2, tiles)
    return _splits(row_blocks, tiles, torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def _splits(row_blocks: int, tiles: int, multiprocessors: int) -> int:
    most = min(tiles, max(1, 4 * multiprocessors // row_blocks) + 1)
    times = {s: triton.cdiv(row_blocks * s, multiprocessors) * triton.cdiv(tiles, s) for s in range(1, most + 1)}
    return next(s for s, time in times.items() if time <= 1.02 * min(times.values()))
