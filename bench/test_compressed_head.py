"""The compressed teacher's head against the whole one: time and memory of a step, and seconds to make it.

`pytest bench/test_compressed_head.py -s` prints the table and writes bench/results/compressed-head-*.json. Sizes:
KDFAST_BENCH_TOKENS (4096), KDFAST_BENCH_ROUNDS (3); V = 50257, 1024 → 768, fp32.

Operations: 3u(Hs) + u(Ht) with the whole head, 3u(Hs) + u(r) with rank r (and 2·N·Ht·r, next to nothing), where
u(H) = 2·N·V·H; "of its GEMMs" is the ratio of these counts. Memory of the teacher's head: 4·V·Ht bytes, or
4·V·r + 4·r·Ht. The head is random, so its ranks say nothing about fidelity: docs/recipes.md has that for trained ones.
"""

from __future__ import annotations

import json
import os
import statistics
import time

import measure
import records
import torch

from kdfast import Head, fused_kd_loss
from kdfast.closed_form import Factors
from kdfast.low_rank_head import CompressedHead

TOKENS = int(os.environ.get("KDFAST_BENCH_TOKENS", "4096"))
ROUNDS = int(os.environ.get("KDFAST_BENCH_ROUNDS", "3"))
V, HS, HT = 50257, 768, 1024
RANKS = (128, 256, 512, 1024)


def test_compressed_head():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    teacher_hidden, whole = draw(TOKENS, HT), 0.05 * draw(V, HT)
    hidden, weight = draw(TOKENS, HS).requires_grad_(), (0.05 * draw(V, HS)).requires_grad_()

    start = time.perf_counter()
    factors = Factors(Head(draw(4 * HT, HT), whole))
    solving = time.perf_counter() - start
    heads = [CompressedHead(factors.cut(rank), Head(teacher_hidden, whole)) for rank in RANKS]

    def step(teacher):
        def run():
            hidden.grad = weight.grad = None
            fused_kd_loss(Head(hidden, weight), teacher()).backward()

        return run

    compressed = [step(lambda head=head: head(teacher_hidden)) for head in heads]
    runs = [step(lambda: Head(teacher_hidden, whole)), *compressed]
    for run in runs:
        run()  # warm-up
    seconds = measure.alternate(runs, ROUNDS)
    rows = []
    for rank, times in zip((None, *RANKS), seconds, strict=True):
        width = HT if rank is None else rank
        rows.append(
            {
                "rank": rank,
                "seconds": statistics.median(times),
                "all_seconds": times,
                "of_whole": 1 / measure.ratio(seconds[0], times),
                "of_gemms": (3 * HS + width) / (3 * HS + HT),
                "head_bytes": 4 * V * HT if rank is None else 4 * rank * (V + HT),
            }
        )
    _report(rows, solving)
    assert rows[1]["head_bytes"] < rows[0]["head_bytes"]


def _report(rows, solving):
    machine = measure.machine()
    print(
        f"\n### The teacher's head at lower rank\nN={TOKENS}, V={V}, Hs={HS}, Ht={HT}, fp32, forward and backward; "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}; median of "
        f"{ROUNDS} alternating rounds. Making the factors took {solving:.1f} s, once for all ranks.\n\n"
        "| teacher's head | seconds | of the whole head's | of its GEMMs | memory of the head |\n|---|---|---|---|---|"
    )
    for row in rows:
        name = "whole" if row["rank"] is None else f"rank {row['rank']}"
        print(
            f"| {name} | {row['seconds']:.2f} | {row['of_whole']:.0%} | {row['of_gemms']:.0%} "
            f"| {row['head_bytes'] / 2**20:.0f} MiB |"
        )
    result = {"machine": machine, "tokens": TOKENS, "solving_seconds": solving, "rows": rows}
    records.write(records.path("compressed-head"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
