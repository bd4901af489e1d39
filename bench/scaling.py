"""Predict a vocabulary-parallel loss on 2 to 1024 GPUs. Nothing here has run on two GPUs.

    python bench/scaling.py      # writes bench/results/scaling.md

Bytes are those of `communication.predicted`, which tests compare with bytes counted on processes. Seconds divide
operations and bytes by what an H200 and its links give: products at the 790 TFLOP/s seen, links at 80% of their data
sheets, one way.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import records
from communication import Step, predicted
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
        "| R | products | ours | over NVLink | over the network | gathered logits | gathered head |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks in (2, 4, 8, 16, 32, 64):
        x = Step(N, V, H, ranks, itemsize=2)
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
            ours = predicted(Step(ranks * N, V, H, ranks))["ours"]
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


PAGE = """# Predicted: a vocabulary-parallel loss on 2 to 1024 GPUs

Made by `python bench/scaling.py`. **No two GPUs have run this yet.** V = {V}, H = {H}, a projected teacher, a bf16
head, N = {N} rows; products at an H200's {products:.0f} TFLOP/s, links at 80% of their data sheets (NVLink 450 GB/s,
network 50 GB/s, one way, per GPU). Bytes come from formulas that a test compares with bytes counted on 2 and 4
processes.

## One group of R GPUs, which share N rows

"Ours" is what a GPU receives; the last two columns are what it would receive if logits, or the head, were gathered.

{groups}

## How large a group may be

Most GPUs in a group for which the sum of dX takes no longer than the products it overlaps with: R ≤ 1 + 0.75·V·B/F, for
a link of B bytes and products of F operations a second, whatever N and H are.

{limits}

A group should therefore not be larger than an NVLink domain; across nodes it pays only for the largest vocabularies.
A teacher with its own head, or `teacher_grad="none"`, allows a third more.

## 8, 64 and 1024 GPUs with N rows each

In a vocabulary group the rows of its GPUs are gathered first. The head's gradient is summed in bf16 over the copies of
the head. "W and dW here" is memory while the loss runs, bf16 and fp32.

{clusters}

On one node, vocabulary-parallel moves as much as the head's gradient would, but hides it behind products, and needs an
eighth of the memory. On several nodes, keep the vocabulary within a node and data-parallelism across them: a group of
64 would spend seven times as long on dX as on its products.
"""


def page() -> str:
    """Return bench/results/scaling.md."""
    tables = {"groups": groups(), "limits": limits(), "clusters": clusters()}
    texts = {name: "\n".join(lines) for name, lines in tables.items()}
    return PAGE.format(V=V, H=H, N=N, products=PRODUCTS / 1e12, **texts)


if __name__ == "__main__":
    (records.FOLDER / "scaling.md").write_text(page(), encoding="utf-8")
