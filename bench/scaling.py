"""The tables of docs/distributed.md: a loss on 2 to 1024 GPUs. Predictions: nothing here has run on two GPUs.

    python bench/scaling.py

Bytes are those of `communication.predicted`, which counting on processes confirms. Seconds are operations and bytes
over what an H200 and its links give: products at the 790 TFLOP/s seen, links at 80% of their data sheets, one way.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from communication import KERNEL_NUMBERS, Step, predicted
from plan import get_gpu

PRODUCTS = get_gpu("H200").products
NVLINK, NETWORK = 0.8 * 450e9, 0.8 * 50e9  # NVLink 4: 900 GB/s both ways; 400 Gb/s InfiniBand
V, H, N = 262144, 4096, 8192
NODE = 8  # GPUs with NVLink


def products(tokens: int) -> float:
    """Seconds of a projected teacher's 6u of whole products."""
    return 6 * 2 * tokens * V * H / PRODUCTS


def groups() -> list[str]:
    """One vocabulary group of R GPUs, which takes N rows."""
    lines = [
        "| GPUs | products | ours | over NVLink | over the network | gathered logits | gathered head |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks in (2, 4, 8, 16, 32, 64):
        x = Step(N, V, H, ranks, KERNEL_NUMBERS, itemsize=2)
        size = predicted(x)
        ours = size["ours"]
        cells = [
            str(ranks),
            _ms(products(N) / ranks),
            _gb(ours),
            _ms(ours / NVLINK),
            _ms(ours / NETWORK),
            _gb(size["gathered logits"]),
            _gb(size["gathered head"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def clusters() -> list[str]:
    """Layouts of G GPUs with N rows of their own each."""
    lines = [
        "| GPUs | layout | products | rows to the group | statistics, dX | head's gradient | W and dW here |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpus in (8, 64, 1024):
        for ranks in (1, NODE) if gpus == NODE else (1, NODE, 64):
            copies = gpus // ranks
            link = NVLINK if ranks <= NODE else NETWORK
            rows = (ranks - 1) * N * 2 * H * 2
            ours = predicted(Step(ranks * N, V, H, ranks, KERNEL_NUMBERS))["ours"]
            share = V * H * 2 / ranks  # of the head's gradient, in bf16, summed over the copies
            if ranks == 1:  # within a node first, then an eighth of it between nodes
                nodes = gpus // NODE
                gradient = 2 * 7 / 8 * share / NVLINK + 2 * (nodes - 1) / nodes * share / NODE / NETWORK
            else:
                gradient = 2 * (copies - 1) / copies * share / NETWORK
            cells = [
                str(gpus),
                f"data {copies}" if ranks == 1 else f"data {copies} × vocabulary {ranks}",
                _ms(products(N)),
                _ms(rows / link) if ranks > 1 else "–",
                _ms(ours / link) if ranks > 1 else "–",
                _ms(gradient) if gradient else "–",
                f"{V * H * (2 + 4) / ranks / 1e9:.1f} GB",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def limit(vocab: int, link: float) -> float:
    """Most GPUs in a group whose dX takes no longer than the products it overlaps with."""
    return 1 + 0.75 * vocab * link / PRODUCTS


def limits() -> list[str]:
    lines = ["| V | over NVLink | over the network |", "|---|---|---|"]
    for vocab in (50257, 131072, 262144):
        lines.append(f"| {vocab} | {limit(vocab, NVLINK):.0f} | {limit(vocab, NETWORK):.0f} |")
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.2g} s"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    print("\n\n".join("\n".join(table) for table in (groups(), limits(), clusters())))
