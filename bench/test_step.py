"""A whole training step of a real student with its teacher: kdfast against eager KD as trainers write it, in time,
memory and the largest batch that fits. The contenders and what a step is are in step.py.

`pytest bench/test_step.py -s` prints the tables; results go to bench/results/step-{cpu,cuda}.json row by row. Options,
with what they are on a CPU / on a GPU:

    KDFAST_BENCH_PAIRS      gpt2,qwen2.5
    KDFAST_BENCH_SEQUENCE   tokens in a sequence: 128 / 1024
    KDFAST_BENCH_BATCHES    sequences in a batch: 1,4 for gpt2 and 1 for qwen2.5 / 1,4,8
    KDFAST_BENCH_ROUNDS     3
    KDFAST_BENCH_DTYPE      float32 for gpt2 and bfloat16 for qwen2.5 / autocast
    KDFAST_BENCH_OPTIMIZER  adamw for gpt2 and sgd for qwen2.5, whose state would not fit / adamw
    KDFAST_BENCH_BUDGET     GiB above models, gradients and optimizer state that the largest batch may take: 1.5 for
                            gpt2, nothing looked for for qwen2.5, which takes too long / until the GPU is out of memory
    KDFAST_BENCH_CHECKPOINTING=1  the student's activations are made again in the backward: the logits are what is left
    KDFAST_BENCH_QUICK=1    a tiny pair, memory in this process: seconds, and no results kept

On two quiet cores gpt2 should take some nine minutes, qwen2.5 another three. A step's operations are, per token and
without attention, 6·(student's parameters) + 2·(teacher's), tied embeddings counted once. A projected teacher makes
that 3u(Hs) − u(Ht) more, u(H) = 2·V·H: its logits and their gradients go through the student's head.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
import pytest
import records
from step import CONTENDERS, EAGER, PAIRS, TITLES, Bench, Setting, peak_in_fresh_process, peak_of_step
from step_results import GIB, lines
from workloads import CUDA, DEVICE, QUICK

ATTEMPTS = 6  # at a largest batch, beyond the batches of the table
# loss, gradient of the embedding: fp32, and where products or weights are bf16
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2), "autocast": (1e-2, 5e-2)}


@dataclass(frozen=True)
class Plan:
    setting: Setting
    batches: tuple[int, ...]
    rounds: int
    search: bool  # for the largest batch
    budget: int | None  # bytes; None: the GPU's memory
    fresh_process: bool = True

    @property
    def key(self) -> str:
        return self.setting.pair + ", checkpointed" * self.setting.checkpointing


def plan_for(pair: str) -> Plan:
    def option(name: str, default: str) -> str:
        return os.environ.get(f"KDFAST_BENCH_{name}", default)

    if pair == "tiny":
        setting = Setting(pair, 32, device=DEVICE)
        return Plan(setting, (1, 2), 1, search=True, budget=16 << 20, fresh_process=False)
    large = pair != "gpt2"
    sequence, dtype, optimizer, batches, budget = (
        ("1024", "autocast", "adamw", "1,4,8", "")
        if CUDA
        else ("128", "bfloat16", "sgd", "1", "")
        if large
        else ("128", "float32", "adamw", "1,4", "1.5")
    )
    budget = option("BUDGET", budget)
    return Plan(
        Setting(
            pair,
            int(option("SEQUENCE", sequence)),
            option("DTYPE", dtype),
            option("OPTIMIZER", optimizer),
            DEVICE,
            option("CHECKPOINTING", "0") not in ("", "0"),
        ),
        tuple(int(size) for size in option("BATCHES", batches).split(",")),
        int(option("ROUNDS", "3")),
        search=CUDA or bool(budget),
        budget=int(float(budget) * GIB) if budget else None,
    )


@pytest.mark.parametrize("pair", ["tiny"] if QUICK else os.environ.get("KDFAST_BENCH_PAIRS", "gpt2,qwen2.5").split(","))
def test_step(pair, tmp_path):
    plan = plan_for(pair)
    result = measured(plan, tmp_path / "step.json" if QUICK else records.path("step"))
    result["pairs"] = {plan.key: result["pairs"][plan.key]}
    print("\n" + "\n".join(lines(result)))
    rows = {row["contender"]: row for row in result["pairs"][plan.key]["rows"]}
    if not QUICK:
        mine, eager = (
            rows[name]["batches"][max(rows[name]["batches"], key=int)] for name in (CONTENDERS[0].name, EAGER)
        )
        assert mine["peak_bytes"] < eager.get("peak_bytes", float("inf"))


def measured(plan: Plan, path: Path) -> dict[str, Any]:
    """All of a pair, into the file `path` beside the other pairs in it; written whenever a row grows."""
    result = json.loads(path.read_text()) if path.exists() else {"pairs": {}}
    setting = plan.setting
    bench = Bench(setting)
    rows = [{"contender": c.name, "missing": bench.missing.get(c.name), "batches": {}} for c in CONTENDERS]
    able = [row for row in rows if not row["missing"]]
    result["machine"] = measure.machine()
    result["pairs"][plan.key] = {
        "title": TITLES[setting.pair] + ", activation checkpointing" * setting.checkpointing,
        "setting": asdict(setting),
        "student_parameters": sum(p.numel() for p in bench.student.parameters()),
        "teacher_parameters": sum(p.numel() for p in bench.teacher.parameters()),
        "vocabulary": bench.student.config.vocab_size,
        "models": dict(zip(("student", "teacher"), PAIRS[setting.pair], strict=True)),
        "rounds": plan.rounds,
        "budget_bytes": plan.budget,
        "fresh_process": plan.fresh_process,
        "rows": rows,
    }

    def save() -> None:
        records.write(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    agree(bench, able, plan.batches[0])
    save()
    for size in plan.batches:
        time_steps(bench, able, size, plan.rounds)
        save()
    del bench  # the processes that measure memory want their own
    gc.collect()
    peak = peak_in_fresh_process if plan.fresh_process else peak_of_step
    for row in able:
        for size in plan.batches:
            row["batches"][str(size)] |= peak(setting, row["contender"], size)
            save()
    for row in able if plan.search else []:
        known = {int(size): at for size, at in row["batches"].items()}
        row["largest"] = largest_batch(partial(peak, setting, row["contender"]), known, plan.budget)
        save()
    return result


def agree(bench: Bench, rows: list[dict[str, Any]], size: int) -> None:
    """Every contender of the same loss computes it, and its gradient."""
    differences = bench.differences(bench.batch(size))
    for row in rows:
        row |= differences.get(row["contender"], {})
    for name, found in differences.items():
        loss, gradient = TOLERANCE[bench.setting.dtype]
        assert found["loss_difference"] < loss, name
        assert found["gradient_difference"] < gradient, name


def time_steps(bench: Bench, rows: list[dict[str, Any]], size: int, rounds: int) -> None:
    """Seconds of a step and of its loss alone, contenders in turn."""
    batch, names = bench.batch(size), [row["contender"] for row in rows]
    steps = [partial(bench.step, name, batch) for name in names]
    measure.alternate(steps, 1)  # warm-up
    seconds = measure.alternate(steps, rounds)
    with bench.backbones_replayed(batch) as loss_alone:
        alone = [partial(loss_alone, name) for name in names]
        measure.alternate(alone, 1)
        loss_seconds = measure.alternate(alone, rounds)
    for row, times, loss_times in zip(rows, seconds, loss_seconds, strict=True):
        step, loss = statistics.median(times), statistics.median(loss_times)
        row["batches"][str(size)] = {
            "seconds": step,
            "all_seconds": times,
            "spread": max(times) - min(times),
            "times_eager": measure.ratio(seconds[names.index(EAGER)], times),
            "loss_seconds": loss,
            "all_loss_seconds": loss_times,
            "loss_share": loss / step,
            "tokens_per_second": size * bench.setting.sequence / step,
        }


def largest_batch(
    peak: Callable[[int], dict[str, Any]],
    known: dict[int, dict[str, Any]],
    budget: int | None,
    attempts: int = ATTEMPTS,
) -> dict[str, Any]:
    """The largest batch that fits, by measuring: {"batch", "verified": one more was seen not to fit, "tries"}.

    Where to look is read off the line through the two largest peaks known. What counts is what was measured.

    Args:
        peak: of a batch of so many sequences, like `peak_of_step`.
        known: what it gave for some.
        budget: bytes; None = what the GPU has: a batch fits that does not run out of memory.
        attempts: at most so many calls of `peak`.
    """
    tries = [_judged(size, found, budget) for size, found in sorted(known.items())]
    for attempt in range(attempts):
        low = max((one["batch"] for one in tries if one["fits"]), default=0)
        high = min((one["batch"] for one in tries if not one["fits"]), default=None)
        if high == low + 1 or any(one.get("timed_out") for one in tries):
            break
        guess = _predicted(tries, budget)
        if guess is None or (attempt >= attempts // 2 and high is not None):
            guess = 2 * low if high is None else (low + high) // 2
        guess = min(guess, 16 * max(low, 1) if high is None else high - 1)
        tries.append(_judged(size := max(guess, low + 1), peak(size), budget))
    batch = max((one["batch"] for one in tries if one["fits"]), default=0)
    failed = {one["batch"] for one in tries if not one["fits"] and not one.get("timed_out")}
    return {"batch": batch, "verified": batch + 1 in failed, "tries": tries}


def _judged(size: int, found: dict[str, Any], budget: int | None) -> dict[str, Any]:
    kept = {key: found[key] for key in ("peak_bytes", "room", "out_of_memory", "timed_out") if key in found}
    return {"batch": size, "fits": "peak_bytes" in found and (budget is None or found["peak_bytes"] <= budget), **kept}


def _predicted(tries: list[dict[str, Any]], budget: int | None) -> int | None:
    points = sorted((one["batch"], one["peak_bytes"], one.get("room")) for one in tries if "peak_bytes" in one)[-2:]
    if len(points) < 2 or points[1][1] <= points[0][1]:
        return None
    (b0, p0, _), (b1, p1, room) = points
    return int(b1 + ((room if budget is None else budget) - p1) * (b1 - b0) / (p1 - p0))
