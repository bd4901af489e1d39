"""Print the table of tests/fuzz/README.md from counts.json, which `make fuzz ARGS="--json tests/fuzz/counts.json"`
adds to.

    PYTHONPATH=.:tests:tests/helpers python -m fuzz.counts
"""

import json
from pathlib import Path

FILE = Path(__file__).with_name("counts.json")
ENDS = ("agrees", "done", "meant something", "refused", "refused, in words", "failed, in words")  # then whatever else


def rows() -> list[str]:
    """Return the table: a line for each kind, and one for all."""
    kinds = json.loads(FILE.read_text())
    lines = ["| kind | cases | minutes | seeds | outcomes | findings |", "|---|---|---|---|---|---|"]
    total = 0
    for kind, runs in kinds.items():
        cases = sum(run["cases"] for run in runs)
        total += cases
        seeds = ", ".join(f"{run['seeds'][0]} to {run['seeds'][1] - 1}" for run in runs)
        came_to: dict[str, int] = {}
        for run in runs:
            for what, count in run["outcomes"].items():
                end = what.partition(": ")[2]
                came_to[end] = came_to.get(end, 0) + count
        order = sorted(came_to, key=lambda end: (ENDS.index(end) if end in ENDS else len(ENDS), end))
        told = ", ".join(f"{came_to[end]:,} {end.removesuffix(', in words')}" for end in order if end != "finding")
        minutes = sum(run["seconds"] for run in runs) / 60
        findings = sum(len(run["findings"]) for run in runs)
        lines.append(f"| `{kind}` | {cases:,} | {minutes:.0f} | {seeds} | {told} | {findings} |")
    return [*lines, f"| all | {total:,} | | | | |"]


if __name__ == "__main__":
    print("\n".join(rows()))
