"""What came out of the experiment: one JSON, a table a case, and a picture.

    python bench/recipes/results.py [--runs runs/recipes] [--out bench/results]

recipes.json   every finished run: case, recipe, learning rate, seed, tuning or not, and its final figures
recipes.md     a table a case, recipes by their mean cross entropy: mean over seeds, ± half the range, and the
               difference to "lm_only" of the same seeds; ✓ where every one is better, by more than the differences
               vary; ✓✓ where besides the worst seed is better than the best of lm_only
recipes.png    those differences, one dot a seed
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this one

import setting
from experiment import Plan, read, slug

FIGURES = (
    "eval_ce", "kl_teacher_student", "kl_teacher_projected", "ce_projected", "kd", "agreement", "tokens", "seconds",
)  # fmt: skip
BASELINE = "lm_only"
HEALTH = (
    "Health is what a run's log said when it was made: where `true_head` or `compressed head` has `initial_loss`, that "
    "was before the check left the KL of a fixed teacher out."
)
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    rows = collect(args.runs)
    if not rows:
        parser.error(f"--runs {args.runs}: no finished run; make some with bench/recipes/experiment.py")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "recipes.json").write_text(json.dumps({"setting": _setting(args.runs), "runs": rows}, indent=1) + "\n")
    text = "\n\n".join(f"### {case}\n\n{_table([r for r in rows if r['case'] == case])}" for case in _cases(rows))
    (args.out / "recipes.md").write_text(f"{HEALTH}\n\n{text}\n")
    print(text)
    _picture(rows, args.out / "recipes.png")


def collect(root: Path) -> list[Row]:
    """A row a finished run. `counts` is False for a run that only served to choose a learning rate."""
    rows = []
    for case in setting.CASES.values():
        for name in Plan(case, "").contenders:
            chosen = Plan(case, name).rate(root)
            for path in sorted((root / case.name).glob(f"{slug(name)}--lr*--seed*/")):
                if (ce := read(path)) is not None:
                    rate, seed = (part.lstrip("-lrsed") for part in path.name.removeprefix(slug(name)).split("--")[1:])
                    row = {"case": case.name, "recipe": name, "rate": float(rate), "seed": int(seed)}
                    figures = _figures(path) if math.isfinite(ce) else {"eval_ce": None}
                    rows.append({**row, "counts": float(rate) == chosen, **figures})
    return rows


def _figures(path: Path) -> Row:
    summary = json.loads((path / "summary.json").read_text())
    health = sorted({finding["kind"] for finding in summary["health"]})
    return {**{name: summary[name] for name in FIGURES}, "health": health, "starts": summary.get("starts")}


def _setting(root: Path) -> Row:
    prepared = {path.parent.name: json.loads(path.read_text()) for path in (root / "prepared").glob("*/summary.json")}
    kept = ("eval_ce", "tokens", "eval_tokens", "student_parameters")
    one = next((root.glob("*/*/summary.json")), None)
    versions = {} if one is None else json.loads(one.read_text())["versions"]
    return {
        "models": {name: {key: summary[key] for key in kept} for name, summary in prepared.items()},
        "vocabulary": setting.VOCABULARY,
        "tokens_a_step": setting.BATCH * setting.CONTEXT,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def by_recipe(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """recipe → seed → row, of one case; best mean cross entropy first."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["counts"]:
            found.setdefault(row["recipe"], {})[row["seed"]] = row
    return dict(sorted(found.items(), key=lambda item: _mean(item[1], "eval_ce") or math.inf))


def _mean(seeds: dict[int, Row], key: str) -> float | None:
    values = [row.get(key) for row in seeds.values()]
    return None if any(value is None for value in values) else statistics.fmean(values)  # type: ignore[arg-type]


def differences(seeds: dict[int, Row], baseline: dict[int, Row]) -> list[float]:
    """Cross entropy less that of the baseline with the same seed: same first weights, same order of the text."""
    shared = [seed for seed in seeds if seed in baseline]
    return [seeds[s]["eval_ce"] - baseline[s]["eval_ce"] for s in shared if seeds[s]["eval_ce"] is not None]


def _table(rows: list[Row]) -> str:
    recipes = by_recipe(rows)
    baseline = recipes.get(BASELINE, {})
    lines = [
        "| recipe | rate | seeds | CE | minus LM only | | KL(true‖student) | KL(true‖stand-in) | KL seen | health |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    best_of_baseline = min((row["eval_ce"] for row in baseline.values()), default=math.inf)
    for name, seeds in recipes.items():
        ces = [row["eval_ce"] for row in seeds.values() if row["eval_ce"] is not None]
        if len(ces) < len(seeds):
            lines.append(f"| {name} | {next(iter(seeds.values()))['rate']:g} | {len(seeds)} | not finite | | | | | | |")
            continue
        spread = (max(ces) - min(ces)) / 2
        gains = differences(seeds, baseline)
        gain = better = ""
        if gains and name != BASELINE:
            gain = f"{statistics.fmean(gains):+.3f} ± {(max(gains) - min(gains)) / 2:.3f}"
            if len(gains) > 2 and max(gains) < 0 and -statistics.fmean(gains) > max(gains) - min(gains):
                better = "✓✓" if max(ces) < best_of_baseline else "✓"
        cells = [_cell(_mean(seeds, key)) for key in ("kl_teacher_student", "kl_teacher_projected", "kd")]
        said = ", ".join(sorted({kind for row in seeds.values() for kind in row["health"]}))
        rate = next(iter(seeds.values()))["rate"]
        ce = f"{statistics.fmean(ces):.3f} ± {spread:.3f}"
        lines.append(f"| {name} | {rate:g} | {len(seeds)} | {ce} | {gain} | {better} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cases(rows: list[Row]) -> list[str]:
    return [name for name in setting.CASES if any(row["case"] == name for row in rows)]


def _picture(rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    cases = _cases(rows)
    figure = Figure(figsize=(6.2 * len(cases), 7), layout="constrained")
    for i, case in enumerate(cases):
        recipes = by_recipe([row for row in rows if row["case"] == case])
        baseline = recipes.get(BASELINE, {})
        axes = figure.add_subplot(1, len(cases), i + 1, title=case, xlabel="cross entropy minus LM only, nats")
        names = list(recipes)[::-1]
        for y, name in enumerate(names):
            gains = differences(recipes[name], baseline)
            axes.plot(gains, [y] * len(gains), "o", color="#0072B2" if max(gains, default=1) < 0 else "#D55E00")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
