"""The pictures: time and memory of a step against N and V, gradients' error against the KL; two of them in words."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from truth import worst_gradients

# Okabe and Ito's colors, which stay apart for color-blind readers
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLES = (((), "o"), ((4, 1.5), "s"), ((1, 1.2), "^"), ((5, 1.5, 1, 1.5), "D"))  # (dashes, marker)
NAMES = {  # a contender has one color and one marker in every panel
    "floor B (our products)": "black",
    "kdfast torch": COLORS[0],
    "kdfast triton_chunked": COLORS[0],
    "kdfast triton_tiled": COLORS[5],
    "eager": COLORS[1],
    "eager, torch.compile": COLORS[4],
    "TRL ChunkedDivergence": COLORS[2],
    "Liger chunked JSD (beta=0)": COLORS[3],
    "Liger Triton JSD (beta=0)": COLORS[3],
    "torchtune chunked KL": COLORS[7],
    "fla fused KL": COLORS[6],
}


def draw(sweeps: dict[str, list[dict[str, Any]]], closeness: dict[str, dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 3)
    for row, (axis, key) in enumerate((("N", "tokens"), ("V", "vocab"))):
        entries = sorted(sweeps[axis], key=lambda entry: entry[key])
        step = {n: [(e[key], statistics.median(r["step"])) for e, r in of(entries, n, "step")] for n in NAMES}
        peak = {n: [(e[key], r["peak_bytes"] / 2**20) for e, r in of(entries, n, "peak_bytes")] for n in NAMES}
        fixed = {k: v for k, v in (entries[0] if entries else {}).items() if k in ("tokens", "vocab") and k != key}
        said = ", ".join(f"{'NV'[k == 'vocab']}={v}" for k, v in fixed.items())
        lines(panels[row][0], step, f"{axis} ({said})", "seconds, forward and backward")
        lines(panels[row][1], peak, f"{axis} ({said})", "MiB above inputs and gradients")
    for row, dtype in enumerate(("fp32", "bf16")):
        entry = closeness.get(dtype, {"kl": [], "rows": {}})
        points = {}
        for name in NAMES:
            worst = worst_gradients(entry["rows"].get(name, {}))
            points[name] = list(zip(entry["kl"], worst, strict=False))
        lines(panels[row][2], points, "KL(teacher ‖ student)", f"worst gradient's relative error, {dtype}")
        panels[row][2].invert_xaxis()
    handles = {line.get_label(): line for panel in figure.axes for line in panel.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    temporary = file.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(file)


FRONT = {  # contender: what a reader who knows none of them calls it
    "kdfast torch": "kdfast",
    "eager": "plain PyTorch",
    "TRL ChunkedDivergence": "TRL",
    "Liger chunked JSD (beta=0)": "Liger",
}


def draw_front(memory: list[dict[str, Any]], closeness: dict[str, Any], file: Path) -> None:
    """Draw memory against tokens, and gradients' error against the KL, every line with its name and last value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    entries = sorted((entry for entry in memory if entry["tokens"] >= 256), key=lambda entry: entry["tokens"])
    vocab = entries[0]["vocab"]
    for name, said in FRONT.items():
        peaks = [(entry["tokens"], row["peak_bytes"] / 2**20) for entry, row in of(entries, name, "peak_bytes")]
        _named(left, peaks, name, f"{said}: {peaks[-1][1]:,.0f} MiB")
        errors = [100 * error for error in worst_gradients(closeness["rows"][name])]
        points = [(kl, error) for kl, error in zip(closeness["kl"], errors, strict=True) if kl <= 0.1]
        _named(right, points, name, f"{said}: {float(f'{points[-1][1]:.2g}'):g}%")
    left.set_title(f"Memory of one step (MiB)\nfp32, vocabulary of {vocab:,}", loc="left", fontsize=11)
    left.set(xticks=[entry["tokens"] for entry in entries], ylim=(0, None), xlabel="tokens in the batch")
    right.set_title("Error of the gradients (%)\nbf16, as the student comes near its teacher", loc="left", fontsize=11)
    right.set(xscale="log", yscale="log", xlabel="KL between teacher and student")
    right.invert_xaxis()
    right.yaxis.set_major_formatter("{x:g}")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    temporary = file.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(file)


def _named(panel: Any, points: list[tuple[float, float]], name: str, said: str) -> None:
    ours = name.startswith("kdfast")
    panel.plot(*zip(*points, strict=True), color=NAMES[name], marker="o", ms=4, linewidth=3 if ours else 1.5)
    up = 5 if name.startswith("TRL") else -3  # two lines that end side by side
    style = {"color": NAMES[name], "weight": "bold" if ours else "normal", "va": "center", "annotation_clip": False}
    panel.annotate(said, points[-1], xytext=(8, up), textcoords="offset points", **style)


def of(entries: list[dict[str, Any]], name: str, key: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(entry, row) for entry in entries if key in (row := entry["rows"].get(name, {}))]


def lines(panel: Any, points: dict[str, list[tuple[float, float]]], across: str, up: str) -> None:
    for i, (name, found) in enumerate(points.items()):
        if found:
            dashes, marker = STYLES[i % len(STYLES)]
            style = {"linestyle": (0, dashes)} if dashes else {}
            bold = {"linewidth": 2.5, "zorder": 3} if name.startswith("kdfast") else {"linewidth": 1.3}
            panel.plot(*zip(*found, strict=True), color=NAMES[name], marker=marker, ms=4, label=name, **style, **bold)
    panel.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
    panel.grid(alpha=0.25)
