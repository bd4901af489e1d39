"""Tables and pictures of everything that has been measured.

    python bench/report.py [--device cpu|cuda] [--out bench/results]

bench-DEVICE.md    a table a workload, who is first, where it is lost, the planner beside what was measured
bench-DEVICE.png   time and memory against N and V, gradients' error against the KL
front-DEVICE.png   memory, and gradients' error near convergence, for the front page

"Right near convergence": every gradient within 1% (fp32: 0.1%) of float64's at a KL of 1e-3 (test_accuracy.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import measure
import plan
import records
import step_results
import torch
from methods import BY_NAME
from truth import worst_gradients
from workloads import DEVICE

from kdfast.plan import Shape

Row = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEAR = 1e-3  # KL
RIGHT = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-2}
AIMS = {"fp32": 0.85, "bf16": 0.70}
TEACHERS = {
    "projected": "teacher projected through the student's head; gradients to hidden states, W and projector",
    "head": "teacher with its own head; gradients to the student's hidden states and W",
    "none": "cross entropy alone",
}
COLUMNS = (
    "contender", "operations", "forward", "step", "spread", "floor A / step", "floor B / step", "tokens/s", "GFLOP/s",
    "memory", "planned", "time planned", "gradient error", f"at KL {NEAR:g}",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)
    parser.add_argument("--out", type=Path, default=records.FOLDER)
    args = parser.parse_args()
    loss, accuracy = (records.read(name, args.device, args.out) for name in ("loss", "accuracy"))
    near = near_convergence(accuracy)
    lines = ["# Measured: the loss by every contender", "", *introduction(loss), ""]
    lines += [*verdicts(loss, near), "", *planner(loss, args.device), ""]
    for entry in sorted(loss.values(), key=lambda entry: is_sweep(entry)):
        lines += [*table(entry, near, args.device), ""]
    lines += [*accuracy_table(accuracy), ""]
    if (step := records.path("step", args.device, args.out)).exists():
        lines += ["## A whole training step", "", *step_results.lines(json.loads(step.read_text()))]
    records.write(args.out / f"bench-{args.device}.md", "\n".join(lines).rstrip() + "\n")
    pictures(loss, accuracy, args.out, args.device)
    print("\n".join(lines))


def introduction(loss: dict[str, Row]) -> list[str]:
    machines = {
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, {m['date']}"
        for m in (entry["machine"] for entry in loss.values())
    }
    return [
        f"{'; '.join(sorted(machines))}. Median of the rounds, contenders in turn; spread = slowest − fastest round. "
        "u(H) = 2·N·V·H operations. Floor A: the products of the problem, whole; floor B: our engine's own products; "
        "neither does anything else. GFLOP/s are of the operations the problem takes. Memory is a step's peak above "
        "inputs and gradients (resident set of a process of its own, or the GPU's allocator); planned is what "
        "bench/plan predicts. Gradient error: the worst of the gradients against float64, relative, on the inputs that "
        "are timed, whose teacher is another model altogether; and with a teacher that near. ᴺ keeps whole logits.",
    ]


def is_sweep(entry: Row) -> bool:
    return entry["workload"][0] in "NV"


def sizes(entry: Row) -> str:
    teacher = "" if entry["teacher"] == "none" else f"Ht={entry['teacher_width']}, "
    head = f"N={entry['tokens']}, V={entry['vocab']}, {teacher}Hs={entry['student_width']}"
    return f"{head}, {entry['dtype']}, {entry['rounds']} rounds, {entry['machine']['date']}"


def ranked(entry: Row) -> list[tuple[str, Row]]:
    """Floors, then contenders by time, then those that did not run."""
    rows = entry["rows"].items()

    def key(item: tuple[str, Row]) -> tuple[bool, bool, float]:
        row = item[1]
        return "missing" in row, not row.get("floor"), statistics.median(row["step"]) if "step" in row else 0.0

    return sorted(rows, key=key)


def table(entry: Row, near: dict[tuple[str, str, str], float], device: str = DEVICE) -> list[str]:
    lines = [f"## {entry['workload']}, {entry['dtype']}: {TEACHERS[entry['teacher']]}", "", sizes(entry), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    absent = []
    for name, row in ranked(entry):
        if "missing" in row:
            absent.append(f"{name} ({row['missing']})")
            continue
        bytes_planned, time_planned = planned(entry, name, device)
        step, bold = statistics.median(row["step"]), "**" * bool(row["ours"])
        close = near.get((entry["teacher"], entry["dtype"], name))
        wrong = close is not None and close > RIGHT[entry["dtype"]]
        error = max(value for leaf, value in row["errors"].items() if leaf != "value") if "errors" in row else None
        cells = [
            f"{bold}{name}{bold}{'ᴺ' * row['whole_logits']}",
            row["operations"],
            seconds(statistics.median(row["forward"])) if "forward" in row else "",
            seconds(step),
            seconds(max(row["step"]) - min(row["step"])) if len(row["step"]) > 1 else "one round",
            f"{row['of_floor_a']:.0%}" if "of_floor_a" in row else "",
            f"{row['of_floor_b']:.0%}" if "of_floor_b" in row else "",
            f"{row['tokens_per_second']:.0f}",
            f"{row['flops'] / 1e9:.0f}",
            mebibytes(row.get("peak_bytes")),
            mebibytes(bytes_planned),
            "" if time_planned is None else seconds(time_planned),
            "" if error is None else f"{error:.0e}",
            "" if close is None else f"{close:.0e}{' ✗' * wrong}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"Not run: {'; '.join(absent)}."] if absent else lines


def planned(entry: Row, name: str, device: str = DEVICE) -> tuple[int | None, float | None]:
    """Return what bench/plan says of it: bytes above inputs and gradients, seconds on a known GPU."""
    method = BY_NAME[name]
    if method.plan is None:
        return None, None
    sizes = (entry["tokens"], entry["vocab"], entry["student_width"], entry["teacher_width"])
    gpu = measure.known_gpu(entry["machine"]["device"])
    shape = Shape(*sizes, dtype=DTYPES[entry["dtype"]], device=device, teacher=entry["teacher"])
    time = plan.predicted_seconds(method.plan, shape, gpu) if gpu else None
    return plan.peak_bytes(method.plan, shape), time


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f} MiB"


def near_convergence(accuracy: dict[str, Row]) -> dict[tuple[str, str, str], float]:
    """The worst gradient error at the KL nearest to NEAR, by (teacher, dtype, name)."""
    found = {}
    for entry in accuracy.values():
        at = min(range(len(entry["kl"])), key=lambda i: abs(entry["kl"][i] - NEAR))
        for name, row in entry["rows"].items():
            if "missing" not in row:
                found[entry["teacher"], entry["dtype"], name] = worst_gradients(row)[at]
    return found


def best_of_ours(entry: Row) -> tuple[str, Row] | None:
    """Our fastest engine that does not keep whole logits."""
    ours = [(n, r) for n, r in ranked(entry) if r.get("ours") and not r["whole_logits"]]
    return ours[0] if ours else None


def verdicts(loss: dict[str, Row], near: dict[tuple[str, str, str], float]) -> list[str]:
    """Who is first, and every case that is lost or falls short of its aim."""
    lines = [
        "## Who is first, and where it is lost",
        "",
        "| workload | our engine | floor A | floor B | faster without whole logits | faster with whole logits |",
        "|---|---|---|---|---|---|",
    ]
    for entry in sorted(loss.values(), key=is_sweep):
        if (best := best_of_ours(entry)) is None:
            continue
        name, row = best
        faster: dict[bool, list[str]] = {True: [], False: []}
        for other, it in ranked(entry):
            if "step" in it and not it["floor"] and not it["ours"]:
                ratio = statistics.median(row["step"]) / statistics.median(it["step"])
                close = near.get((entry["teacher"], entry["dtype"], other), 0.0)
                wrong = f", gradients {close:.0%} off at KL {NEAR:g}" if close > RIGHT[entry["dtype"]] else ""
                if ratio > 1:
                    faster[it["whole_logits"]].append(f"{other} ({ratio:.2f}×{wrong})")
        short = " (below the aim)" if row.get("of_floor_b", 1) < AIMS.get(entry["dtype"], 0) else ""
        lines.append(
            f"| {entry['workload']}, {entry['teacher']}, {entry['dtype']} | {name} | {row.get('of_floor_a', 0):.0%} "
            f"| {row.get('of_floor_b', 0):.0%}{short} | {'; '.join(faster[False]) or 'none'} "
            f"| {'; '.join(faster[True]) or 'none'} |"
        )
    return lines


def planner(loss: dict[str, Row], device: str = DEVICE) -> list[str]:
    """The planner's peaks beside those measured: median and worst ratio of each method."""
    ratios: dict[str, list[tuple[float, str]]] = {}
    for entry in loss.values():
        for name, row in entry["rows"].items():
            predicted = planned(entry, name, device)[0] if row.get("peak_bytes") else None
            if predicted is not None:
                where = f"{entry['workload']}, {entry['teacher']}, {entry['dtype']}"
                ratios.setdefault(name, []).append((predicted / row["peak_bytes"], where))
    lines = [
        "## The planner beside the measurements",
        "",
        "Predicted over measured peak memory of a step, over all workloads.",
        "",
        "| contender | workloads | median | within 10% | furthest off |",
        "|---|---|---|---|---|",
    ]
    for name, found in ratios.items():
        worst, where = max(found, key=lambda pair: abs(pair[0] - 1))
        close = sum(abs(ratio - 1) <= 0.1 for ratio, _ in found)
        median = statistics.median(ratio for ratio, _ in found)
        lines.append(f"| {name} | {len(found)} | {median:.2f} | {close} of {len(found)} | {worst:.2f} ({where}) |")
    return lines


def accuracy_table(accuracy: dict[str, Row]) -> list[str]:
    lines = ["## Near convergence: the worst gradient's relative error against float64", ""]
    for entry in accuracy.values():
        lines += [f"{TEACHERS[entry['teacher']]}; {entry['sizes']}, τ = 2, {entry['machine']['date']}", ""]
        kl = [f"{kl:.0e}" for kl in entry["kl"]]
        lines += [f"| KL | {' | '.join(kl)} |", "|---" * (1 + len(kl)) + "|"]
        for name, row in entry["rows"].items():
            if "missing" not in row:
                lines.append(f"| {name} | " + " | ".join(f"{error:.1e}" for error in worst_gradients(row)) + " |")
        absent = [f"{name} ({row['missing']})" for name, row in entry["rows"].items() if "missing" in row]
        lines += ["", f"Not run: {'; '.join(absent)}.", ""] if absent else [""]
    return lines[:-1]


def pictures(loss: dict[str, Row], accuracy: dict[str, Row], folder: Path, device: str) -> None:
    import plots

    sweeps = {axis: [e for e in loss.values() if e["workload"][0] == axis] for axis in ("N", "V")}
    closeness = {e["dtype"]: e for e in accuracy.values() if e["teacher"] == "head"}
    plots.draw(sweeps, closeness, folder / f"bench-{device}.png")
    if sweeps["N"] and "bf16" in closeness:
        plots.draw_front(sweeps["N"], closeness["bf16"], folder / f"front-{device}.png")


if __name__ == "__main__":
    main()
