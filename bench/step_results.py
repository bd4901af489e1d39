"""The results of bench/test_step.py as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MIB, GIB = 2**20, 2**30


def lines(result: dict[str, Any]) -> list[str]:
    """Markdown of all pairs in a results file; what is not measured yet is a blank."""
    machine = result["machine"]
    out = [
        "A step is the forward pass of both models and the loss, backward, optimizer step, zero_grad. *Loss alone*: "
        "the heads and the loss, forward and backward, from given hidden states. *× eager*: plain torch's time over "
        "this one's, round by round; more is faster. *Memory*: the peak of a step above models, gradients and "
        "optimizer state, in a process of its own. A projected teacher is another loss than the others'. Weights are "
        "random, dropout is off.",
        "",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}.",
    ]
    for pair in result["pairs"].values():
        out += ["", *_pair(pair)]
    return out


def _pair(pair: dict[str, Any]) -> list[str]:
    setting = pair["setting"]
    out = [
        f"### {pair['title']}",
        "",
        f"{pair['student_parameters'] / 1e6:.3g}M from {pair['teacher_parameters'] / 1e6:.3g}M parameters, V = "
        f"{pair['vocabulary']}, sequences of {setting['sequence']} tokens, {setting['dtype']}, {setting['optimizer']}; "
        f"median of {pair['rounds']} alternating rounds.",
        "",
        "| contender | sequences | step, s | spread, s | × eager | loss alone, s | of step | tokens/s | memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in pair["rows"]:
        if not row["batches"]:
            out.append(f"| {row['contender']} | | {row['missing'] or 'not measured yet'} | | | | | | |")
        for size, at in row["batches"].items():
            out.append(f"| {row['contender']} | {size} | {_timing(at)} | {_memory(at)} |")
    out += ["", *_agreement(pair), *_largest(pair)]
    if not any(row["batches"] for row in pair["rows"]):
        return out
    losses = [f"- {line}" for line in losing(pair)]
    return [*out, "", "Where kdfast loses:", "", *(losses or ["- nowhere in what was measured"])]


def _timing(at: dict[str, Any]) -> str:
    if "seconds" not in at:
        return " | | | | | "
    return (
        f"{at['seconds']:.2f} | {at['spread']:.2f} | {at['times_eager']:.2f} | {at['loss_seconds']:.2f} "
        f"| {at['loss_share']:.0%} | {at['tokens_per_second']:.0f}"
    )


def _memory(at: dict[str, Any]) -> str:
    if "peak_bytes" in at:
        return f"{at['peak_bytes'] / MIB:.0f}"
    return next((name.replace("_", " ") for name in ("out_of_memory", "timed_out") if at.get(name)), "")


def _agreement(pair: dict[str, Any]) -> list[str]:
    compared = [row for row in pair["rows"] if "loss_difference" in row]
    if not compared:
        return []
    loss, gradient = (max(row[f"{what}_difference"] for row in compared) for what in ("loss", "gradient"))
    return [
        f"Checked before timing, over {len(compared)} contenders that compute the same loss: it differs by at most "
        f"{loss:.0e}, the gradient of the student's embedding by {gradient:.0e}, relative to plain torch."
    ]


def _largest(pair: dict[str, Any]) -> list[str]:
    rows = [row for row in pair["rows"] if "largest" in row]
    if not rows:
        return []
    budget = pair["budget_bytes"]
    limit = "this GPU" if budget is None else f"{budget / GIB:.3g} GiB above models, gradients and optimizer state"
    out = ["", f"Largest batch in {limit}, both it and the next one measured:", ""]
    out += ["| contender | sequences | tokens | measured there | one more |", "|---|---|---|---|---|"]
    for row in rows:
        found = row["largest"]
        tries = {one["batch"]: one for one in found["tries"]}
        at, after = (_try(tries.get(found["batch"] + more)) for more in (0, 1))
        least = "" if found["verified"] else "≥ "
        tokens = found["batch"] * pair["setting"]["sequence"]
        out.append(f"| {row['contender']} | {least}{found['batch']} | {least}{tokens} | {at} | {after} |")
    return out


def _try(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    peak = f"{one['peak_bytes'] / MIB:.0f} MiB" if "peak_bytes" in one else _memory(one)
    return peak if one["fits"] or "peak_bytes" not in one else f"{peak}, does not fit"


def losing(pair: dict[str, Any]) -> Iterator[str]:
    """Every comparison in which a contender that is not ours does better than one of ours."""
    ours = [row for row in pair["rows"] if row["contender"].startswith("kdfast")]
    others = [row for row in pair["rows"] if not row["contender"].startswith("kdfast")]
    for row in ours:
        for size, mine in row["batches"].items():
            for what, verb in (("seconds", "slower than"), ("peak_bytes", "more memory than")):
                better = []
                for other in others:
                    theirs = other["batches"].get(size, {}).get(what, float("inf"))
                    if theirs < mine.get(what, 0):
                        better.append(f"{other['contender']} ({mine[what] / theirs - 1:.0%})")
                if better:
                    yield f"{row['contender']}, {size} sequences: {verb} {'; '.join(better)}"
        for other in others:
            if "largest" in row and other.get("largest", {}).get("batch", 0) > row["largest"]["batch"]:
                yield f"{row['contender']}: {other['contender']} fits a larger batch"
