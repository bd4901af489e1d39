"""What a vocabulary-parallel step communicates, next to gathering the logits or the head: counted, timed, predicted.

    python bench/communication.py [--rounds 3] [--quick]

Processes on this machine talk through gloo, each with one thread; the engine is `torch`. Bytes are counted where
collectives are called; `predicted` says the same without a run, and tests hold the two equal. Time is the ratio to one
process with as many threads as there were processes, in turn: what slices, collectives and gloo cost on the same cores.
Writes bench/results/communication-cpu.json.

Bytes a process receives in a step, of N rows, V entries, width H, R processes, two sides (a projected teacher):

    ours             N·(R−1)·numbers·4 gathered, and 2·(R−1)/R·2·N·H·4 of dX in a ring's two rounds
    gathered logits  2·N·(R−1)/R·V·4, and the same dX
    gathered head    (R−1)/R·V·H·(2 in bf16, 4 in fp32), and as many numbers of dW in fp32 scattered back; no dX
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--quick" in sys.argv:
    os.environ["KDFAST_BENCH_QUICK"] = "1"

import recorder
import records
from workloads import QUICK

from kdfast import Head, Projected, fused_kd_loss

NUMBERS = 15  # that a process tells of its slice per row, in every engine


class Step(NamedTuple):
    tokens: int
    vocab: int
    width: int
    ranks: int
    numbers: int = NUMBERS
    terms: int = 0  # numbers of a second pass: 7
    itemsize: int = 4  # of the head


def predicted(x: Step) -> dict[str, float]:
    """Bytes a process receives in a step with a projected teacher, forward and backward, by method."""
    others = (x.ranks - 1) / x.ranks
    d_inputs = 2 * others * 2 * x.tokens * x.width * 4
    return {
        "ours": x.tokens * (x.ranks - 1) * (x.numbers + x.terms) * 4 + d_inputs,
        "gathered logits": others * 2 * x.tokens * x.vocab * 4 + d_inputs,
        "gathered head": others * x.vocab * x.width * (x.itemsize + 4),
    }


def step_of(x: Step, rank: int, engine: str, group: Any) -> Any:
    """A function that takes a step with this rank's slice."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    width = -(-x.vocab // x.ranks)
    start = min(rank * width, x.vocab)
    hidden, teacher = normal(x.tokens, x.width), normal(x.tokens, x.width)
    weight = normal(x.vocab, x.width, std=x.width**-0.5)[start : start + width].clone().requires_grad_()
    projector = normal(x.width, x.width, std=x.width**-0.5).requires_grad_()
    labels = torch.randint(0, x.vocab, (x.tokens,), generator=generator)
    hidden.requires_grad_()
    where = {} if group is None else {"process_group": group, "vocab_start": start}

    def step() -> None:
        for leaf in (hidden, weight, projector):
            leaf.grad = None
        loss = fused_kd_loss(
            Head(hidden, weight), Projected(teacher, projector), labels, ce_weight=1.0, engine=engine, **where
        )
        loss.backward()

    return step


def counted(x: Step, rank: int, group: Any) -> dict[str, Any]:
    """Bytes received and collectives, by method."""
    found: dict[str, Any] = {}
    for method, engine in (("ours", "torch"), ("gathered logits", "reference")):
        step = step_of(x, rank, engine, group)
        with recorder.communication() as calls:
            step()
        kinds = [call.kind for call in calls]
        found[method] = {
            "bytes": sum(call.received for call in calls),
            "calls": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        }
    return found


def process(rank: int, x: Step, store: str, rounds: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, x.ranks), rank=rank, world_size=x.ranks)
    found = counted(x, rank, dist.group.WORLD)
    step, alone = step_of(x, rank, "torch", dist.group.WORLD), step_of(x._replace(ranks=1), 0, "torch", None)
    sliced, whole = [], []
    for _ in range(rounds + 1):  # the first warms up
        dist.barrier()
        begin = time.perf_counter()
        step()
        dist.barrier()
        sliced.append(time.perf_counter() - begin)
        if rank == 0:
            torch.set_num_threads(x.ranks)
            begin = time.perf_counter()
            alone()
            whole.append(time.perf_counter() - begin)
            torch.set_num_threads(1)
    dist.barrier()
    if rank == 0:
        pairs = list(zip(sliced[1:], whole[1:], strict=True))
        found["seconds"] = {"sliced": [s for s, _ in pairs], "one process": [w for _, w in pairs]}
        found["ratio"] = statistics.median(s / w for s, w in pairs)
        torch.save(found, out)
    dist.destroy_process_group()


def measured(x: Step, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found.pt"
        mp.spawn(process, (x, f"{folder}/store", rounds, out), nprocs=x.ranks)
        return torch.load(out, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    tokens, vocab, width = (64, 512, 32) if QUICK else (1024, 50257, 768)
    for ranks in (2, 4):
        x = Step(tokens, vocab, width, ranks)
        found = measured(x, args.rounds)
        records.add("communication", f"{ranks} processes", x._asdict() | found | {"predicted": predicted(x)})
        told = {name: f"{size / 2**20:.2f} MiB" for name, size in predicted(x).items()}
        print(f"{ranks} processes: {told}; {found['ours']}; {found['ratio']:.2f}× the time of one process")


if __name__ == "__main__":
    main()
