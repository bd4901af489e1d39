"""Where distillation pays: students at equal tokens and at equal seconds, the teacher's seconds counted.

    python bench/recipes/worth.py [--runs runs/worth] [--only TEXT …] [--workers 2] [--minutes 60] [--quick]
    python bench/recipes/worth.py --prices [--runs runs/worth]

Every run is one of `kdfast distill` in a process of one thread; PLAN says which. A finished one is read, never made
again. A contender is a recipe and the keys that differ from it, as in `svd_init learning_rate=3e-4`; each budget of
steps is a run of its own, with a cosine of its own. Afterwards worth.json and worth.md are written to --out.

`--prices` measures every contender's seconds per token, in turn, twice, on a machine that does nothing else. A
run's seconds are then tokens × price, plus what its solved start and its teacher's entries took. LM only is that of
the best learning rate tried; "at equal seconds" is the best that it came to within those seconds, its budgets joined by
straight lines over log seconds.
"""

from __future__ import annotations

import argparse
import bisect
import datetime
import itertools
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this one

import setting
import transformers
from experiment import _one_thread

from kdfast.demo.toy_text import middle, once
from kdfast.training.durable.atomic_io import write_text
from kdfast.training.recipes import RECIPES
from kdfast.versions import versions

ROUNDS, PRICED_STEPS, LOGGED = 2, 48, 8
BASELINE = "lm_only"
WIDTH = 128
LITTLE_BYTES = 300_000
OTHER_CHARACTERS, HELD_OUT_FILES = 6_000_000, 36
ADAPTING_STEPS = 128  # of 16 blocks, for the teacher on a text that is not its own
STRONG_STEPS, STRONG_WIDTH = 2048, 64  # twice the teacher's tokens once more, and a student half as wide
WIDE_VOCABULARY, WIDE_TEACHER_STEPS = 16384, 512

# case | contender | steps | seeds; learning rates other than 1e-3 are the best of those tried, or say so
PLAN = """
little | lm_only                                                              | 128 256 512 1024 | 3
little | svd_init                                                             | 512              | 3
little | lm_only student_init=svd_blocks learning_rate=3e-4                   | 512              | 3
little | svd_blocks learning_rate=3e-4                                        | 512              | 3
little | svd_blocks learning_rate=3e-4 ce_weight=0 temperature=1              | 512              | 3
plenty | lm_only                                                              | 256 1024         | 3
plenty | svd_init                                                             | 1024             | 3
plenty | svd_init kd_until=1                                                  | 1024             | 3
plenty | lm_only student_init=svd_blocks learning_rate=5e-4                   | 1024             | 3
plenty | svd_blocks learning_rate=5e-4                                        | 1024             | 3
plenty | lm_only learning_rate=2e-3                                           | 1024             | 3
plenty | svd_init learning_rate=2e-3                                          | 1024             | 3
strong | lm_only learning_rate=2e-3                                           | 1024             | 3
strong | svd_init learning_rate=4e-3                                          | 1024             | 3
strong | lm_only student_init=svd_blocks learning_rate=2e-3                   | 1024             | 3
strong | svd_blocks learning_rate=2e-3                                        | 1024             | 3
moved  | lm_only learning_rate=4e-3                                           | 256 1024         | 3
moved  | compressed_head teacher=adapted learning_rate=4e-3                   | 1024             | 3
little | lm_only weight_decay=0.1                                             | 1024             | 1
little | projector_fixed                                                      | 512              | 1
little | teacher_head kd_weight=2                                             | 512              | 1
little | teacher_head kd_weight=2 precompute_teacher_log_probs=false          | 512              | 1
little | svd_init                                                             | 1024             | 1
little | svd_init precompute_teacher_log_probs=false kd_until=1               | 512              | 1
little | lm_only student_init=svd_blocks learning_rate=3e-4                   | 256              | 1
little | svd_blocks learning_rate=3e-4                                        | 256              | 1
little | svd_blocks learning_rate=3e-4 cache_samples=16                       | 512              | 1
little | svd_blocks learning_rate=3e-4 cache_samples=64                       | 512              | 1
little | svd_blocks learning_rate=3e-4 cache_top_k=16                         | 512              | 1
little | svd_blocks learning_rate=3e-4 cache_top_k=64                         | 512              | 1
little | svd_blocks learning_rate=3e-4 ce_weight=0                            | 512              | 1
little | svd_blocks learning_rate=3e-4 temperature=1                          | 512              | 1
little | svd_blocks learning_rate=3e-4 kd_weight=1                            | 512              | 1
little | svd_blocks learning_rate=3e-4 kd_weight=4                            | 512              | 1
plenty | lm_only                                                              | 4096             | 1
plenty | lm_only student_init=svd                                             | 1024             | 1
plenty | svd_init kd_until=1                                                  | 256              | 1
plenty | svd_blocks learning_rate=5e-4 kd_until=1                             | 1024             | 1
plenty | lm_only learning_rate=2e-3                                           | 4096             | 1
strong | lm_only learning_rate=2e-3                                           | 256 4096 16384   | 1
strong | lm_only                                                              | 1024 4096        | 1
strong | lm_only learning_rate=4e-3                                           | 1024             | 1
strong | svd_init learning_rate=2e-3                                          | 1024             | 1
strong | svd_init learning_rate=4e-3                                          | 4096             | 1
strong | lm_only student_init=svd_blocks learning_rate=5e-4                   | 256              | 1
strong | lm_only student_init=svd_blocks learning_rate=2e-3                   | 4096             | 1
strong | svd_blocks learning_rate=1e-3                                        | 1024             | 1
strong | svd_blocks learning_rate=2e-3                                        | 4096             | 1
wide   | lm_only                                                              | 256 1024 2048    | 1
wide   | svd_init                                                             | 1024             | 1
wide   | svd_init kd_until=1                                                  | 1024             | 1
wide   | lm_only student_init=svd_blocks learning_rate=5e-4                   | 1024             | 1
wide   | svd_blocks learning_rate=5e-4                                        | 1024             | 1
moved  | lm_only learning_rate=4e-3                                           | 4096             | 1
moved  | lm_only learning_rate=2e-3                                           | 1024             | 1
moved  | lm_only                                                              | 1024             | 1
moved  | compressed_head learning_rate=2e-3                                   | 1024             | 1
moved  | compressed_head teacher=adapted learning_rate=2e-3                   | 1024             | 1
moved  | compressed_head                                                      | 1024             | 1
moved  | compressed_head kd_until=1                                           | 1024             | 1
moved  | compressed_head teacher=adapted                                      | 1024             | 1
moved  | compressed_head teacher=adapted kd_until=0.25                        | 1024             | 1
moved  | compressed_head teacher=adapted kd_until=1                           | 1024             | 1
"""


class Job(NamedTuple):
    case: str
    contender: str
    steps: int
    seed: int

    def path(self, root: Path) -> Path:
        return root / self.case / f"{self.contender.replace(' ', '+')}--{self.steps}--seed{self.seed}"


class Price(NamedTuple):
    """What a contender takes, in seconds of one thread."""

    per_token: float
    before: float  # its solved start, and the teacher's pass over the little text

    def of(self, tokens: int) -> float:
        return self.before + self.per_token * tokens


# what is priced, by the case whose models it has; a contender costs what the one does that differs in UNPRICED alone
LIVE = "precompute_teacher_log_probs=false"
BLOCKS = f"{BASELINE} student_init=svd_blocks"
OTHER_SIZES = (BASELINE, BLOCKS, f"svd_init {LIVE}", f"svd_blocks {LIVE}")
PRICED = {
    "little": (
        BASELINE, f"{BASELINE} student_init=svd", BLOCKS, "projector_fixed", "teacher_head", f"teacher_head {LIVE}",
        f"compressed_head {LIVE}", "svd_init", f"svd_init {LIVE}", "svd_blocks", f"svd_blocks {LIVE}",
    ),
    "strong": OTHER_SIZES,
    "wide": OTHER_SIZES,
}  # fmt: skip
UNPRICED = ("learning_rate", "ce_weight", "temperature", "kd_weight", "weight_decay", "teacher", "kd_until")
Prices = dict[str, dict[str, Price]]


def price(prices: Prices, case: str, contender: str) -> Price | None:
    """Return the price of a contender; under `kd_until` a part of the run costs what LM only does."""
    recipe, *changes = contender.split()
    kept = [change for change in changes if change.split("=")[0] not in UNPRICED]
    live = LIVE in kept or case != "little"
    if recipe not in (BASELINE, "projector_fixed") and live and LIVE not in kept:
        kept.append(LIVE)
    known = prices.get(case if case in PRICED else "little", {})
    if (found := known.get(" ".join([recipe, *kept]))) is None:
        return None
    given = next((float(change.split("=")[1]) for change in changes if change.startswith("kd_until=")), None)
    until = given if given is not None else RECIPES[recipe].kd_until if live else 1.0
    return found._replace(per_token=until * found.per_token + (1 - until) * known[BASELINE].per_token)


def plan(only: list[str]) -> list[Job]:
    """Return the jobs of PLAN whose case and contender hold every text of `only`.

    First the rows of several seeds, a seed of all before the next.
    """
    rows = [[cell.strip() for cell in line.split("|")] for line in PLAN.strip().splitlines()]
    jobs = [
        (int(seeds) == 1, seed, Job(case, contender, int(steps), seed))
        for case, contender, budgets, seeds in rows
        for seed in range(int(seeds))
        for steps in budgets.split()
        if all(text in f"{case} {contender}" for text in only)
    ]
    return [job for _, _, job in sorted(jobs, key=lambda entry: entry[:2])]


def settings(runs: Path, job: Job) -> dict[str, Any]:
    """Return the settings of `kdfast distill`."""
    prepared = runs / ("wide" if job.case == "wide" else "prepared")
    width = STRONG_WIDTH if job.case == "strong" else WIDTH
    keys = setting.student(prepared, setting.Case(width, False), 1e-3, job.seed, job.steps)
    keys["eval_steps"] = max(1, job.steps // 4)
    if job.case == "little":
        keys["train_file"] = str(runs / "little-text")
    if job.case == "moved":
        keys |= {"train_file": str(runs / "other-text" / "train"), "eval_file": str(runs / "other-text" / "eval")}
        keys["model_name_or_path"] = str(prepared / f"pretrained-{WIDTH}")
        del keys["student_config"]
    if job.case == "strong":
        keys["teacher_model_name_or_path"] = str(prepared / "strong")
    recipe, *changes = job.contender.split()
    given = dict(change.split("=", 1) for change in changes)
    if given.pop("teacher", None) == "adapted":
        keys["teacher_model_name_or_path"] = str(prepared / "adapted")
    return keys | {"recipe": recipe} | {key: _value(text) for key, text in given.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def prepare(runs: Path, cases: set[str], *, quick: bool) -> None:
    """Make texts, teachers and the pretrained student of `cases`, unless they are there."""
    prepared, pretrained = runs / "prepared", setting.Case(WIDTH, True)
    setting.prepare(prepared, [pretrained] if "moved" in cases else [], quick=quick)
    once(
        runs / "little-text",
        lambda path: _write(path / "text.txt", setting.first_files(prepared / "train", LITTLE_BYTES)),
    )
    if "moved" in cases:
        once(runs / "other-text", _write_other_text)
        own = {"train_file": str(runs / "other-text" / "train"), "eval_file": str(runs / "other-text" / "eval")}
        _train_on(prepared, "adapted", 2 if quick else ADAPTING_STEPS, 5e-4, **own)
    if "strong" in cases:
        _train_on(prepared, "strong", 2 if quick else STRONG_STEPS, 2e-3, seed=1, data_seed=1)
    if "wide" in cases:
        setting.prepare(runs / "wide", [], vocabulary=WIDE_VOCABULARY, teacher_steps=WIDE_TEACHER_STEPS, quick=quick)


def _train_on(prepared: Path, name: str, steps: int, learning_rate: float, **own: Any) -> None:
    """Train the teacher for so many steps more, into a folder of its own."""
    keys = setting.settings(prepared, **setting.TEACHER, steps=steps, batch=16, learning_rate=learning_rate, seed=0)
    keys |= {"recipe": BASELINE, "model_name_or_path": str(prepared / "teacher")} | own
    del keys["student_config"]
    setting.run(prepared / name, keys)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_other_text(path: Path) -> None:
    """Write the sources of transformers, every twentieth file held out; of the first of those an excerpt is kept."""
    files = sorted(Path(transformers.__file__).parent.rglob("*.py"))
    random.Random(0).shuffle(files)
    texts = list(dict.fromkeys(file.read_text(encoding="utf-8") for file in files if file.stat().st_size > 2000))
    for i, text in enumerate(texts[::20][:HELD_OUT_FILES]):
        _write(path / "eval" / f"{i:05}.py", middle(text, setting.EXCERPT))
    train = [text for i, text in enumerate(texts) if i % 20]
    ends = list(itertools.accumulate(map(len, train)))
    for i, text in enumerate(train[: bisect.bisect(ends, OTHER_CHARACTERS) + 1]):
        _write(path / "train" / f"{i:05}.py", text)


def _train(job: Job, runs: Path, quick: bool, end: float) -> float | None:
    """Make a run, unless it is there; return its cross entropy, None where the time is over."""
    path = job.path(runs)
    if not (path / "summary.json").is_file() and time.monotonic() > end:
        return None
    ce = setting.run(path, settings(runs, job)).summary["eval_ce"]
    for weights in path.glob("*.safetensors"):  # figures are what is kept
        weights.unlink()
    return ce


def _price(runs: Path, case: str, contender: str, number: int) -> Price:
    """Run a contender for some steps; return what it took."""
    job = Job(case, contender, PRICED_STEPS, 0)
    path = job.path(runs / "prices" / str(number))
    keys: dict[str, Any] = {"kd_until": 1.0, "precompute_teacher_log_probs": True} | settings(runs, job)
    if LIVE in contender or contender.startswith((BASELINE, "projector")):
        keys["precompute_teacher_log_probs"] = False
    run = setting.run(path, keys | {"logging_steps": LOGGED, "eval_strategy": "no"})
    speeds = run.log["tokens_per_second"].dropna()[1:]  # the first line's has what is compiled once
    return Price(float(1 / speeds.median()), run.summary["teacher_seconds"] or 0.0)


def main() -> None:
    args = _arguments()
    jobs, runs = plan(args.only), args.runs
    if args.quick:
        jobs = [job._replace(steps=4) for job in jobs if job.seed == 0]
    cases = {job.case for job in jobs}
    prepare(runs, cases, quick=args.quick)
    context, end = multiprocessing.get_context("spawn"), time.monotonic() + 60 * args.minutes
    with ProcessPoolExecutor(1 if args.prices else args.workers, context, _one_thread) as pool:
        if args.prices:
            prices = _prices(runs)
            for case in cases & PRICED.keys():
                names = PRICED[case]
                found = [
                    [pool.submit(_price, runs, case, name, number).result() for name in names]
                    for number in range(ROUNDS)
                ]
                rounds = zip(*found, strict=True)
                medians = [Price(*map(statistics.median, zip(*one, strict=True)))._asdict() for one in rounds]
                prices[case] = dict(zip(names, medians, strict=True))
            write_text(runs / "prices.json", json.dumps(prices, indent=1) + "\n")
        else:
            futures = {pool.submit(_train, job, runs, args.quick, end): job for job in jobs}
            for future in as_completed(futures):
                if (ce := future.result()) is not None:
                    print(f"{futures[future].path(runs)}: CE {ce:.4f}", flush=True)
    result = collect(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "worth.json", json.dumps(result, indent=1) + "\n")
    made = dict.fromkeys(row["case"] for row in result["runs"])
    text = "\n\n".join(f"### {case}\n\n{table(case, result)}" for case in made)
    write_text(args.out / "worth.md", text + "\n")
    print(text)


def collect(runs: Path) -> dict[str, Any]:
    """Return every finished run of PLAN, the prices, and what they were measured with."""
    rows = []
    for job in plan([]):
        if (path := job.path(runs) / "summary.json").is_file():
            summary = json.loads(path.read_text())
            rows.append({**job._asdict(), **{key: summary[key] for key in ("eval_ce", "kl_teacher_student", "tokens")}})
    date = datetime.date.today().isoformat()
    return {"date": date, "versions": versions(), "prices": _prices(runs), "runs": rows}


def _prices(runs: Path) -> dict[str, dict[str, dict[str, float]]]:
    path = runs / "prices.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def table(case: str, result: dict[str, Any]) -> str:
    """Return a row per contender and budget, in the order of PLAN."""
    prices = {case: {name: Price(**one) for name, one in names.items()} for case, names in result["prices"].items()}
    alone = price(prices, case, BASELINE)
    seeds: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for row in result["runs"]:
        if row["case"] == case:
            seeds.setdefault((row["contender"], row["steps"]), {})[row["seed"]] = row
    baseline: dict[int, dict[int, dict[str, Any]]] = {}
    for (name, steps), found in seeds.items():
        for seed, row in found.items() if _is_baseline(name) else ():
            best = baseline.setdefault(steps, {})
            best[seed] = min(best.get(seed, row), row, key=lambda one: one["eval_ce"])
    lines = [
        "| recipe | tokens | seconds | seeds | CE | minus LM only, equal tokens | equal seconds | KL(true‖student) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, steps), found in seeds.items():
        ces = [row["eval_ce"] for row in found.values()]
        tokens = next(iter(found.values()))["tokens"]
        priced = price(prices, case, name)
        seconds = None if priced is None else priced.of(tokens)
        cells = [name, f"{tokens:,}", "" if seconds is None else f"{seconds:.0f}", str(len(ces)), _mean(ces), "", ""]
        if not _is_baseline(name):
            same = baseline.get(steps, {})
            gains = [row["eval_ce"] - same[seed]["eval_ce"] for seed, row in found.items() if seed in same]
            cells[5] = _mean(gains, "+") if gains else ""
            if seconds is not None and alone is not None:
                ends = [_within(seconds, seed, baseline, alone) for seed in found]
                known = [ce - end for ce, end in zip(ces, ends, strict=True) if end is not None]
                cells[6] = _mean(known, "+") if known else ""
        kls = [row["kl_teacher_student"] for row in found.values() if row["kl_teacher_student"] is not None]
        lines.append("| " + " | ".join([*cells, f"{statistics.fmean(kls):.3f}" if kls else ""]) + " |")
    return "\n".join(lines)


def _is_baseline(contender: str) -> bool:
    recipe, *changes = contender.split()
    return recipe == BASELINE and all(change.startswith("learning_rate=") for change in changes)


def _mean(values: list[float], sign: str = "") -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{spread}"


def _within(seconds: float, seed: int, baseline: dict[int, dict[int, dict[str, Any]]], alone: Price) -> float | None:
    """Return the best cross entropy of LM only within so many seconds; None where no run is that short, or long."""
    points = sorted((alone.of(row["tokens"]), row["eval_ce"]) for found in baseline.values()
                    for s, row in found.items() if s == seed)  # fmt: skip
    if not points or points[0][0] > seconds:
        return None
    best = min(ce for at, ce in points if at <= seconds)
    after = [point for point in points if point[0] > seconds]
    if not after:  # the longest is shorter than that; where it is no longer the best, more text passes would not help
        return best if best < points[-1][1] else None
    (t0, c0), (t1, c1) = points[len(points) - len(after) - 1], after[0]
    return min(best, c0 + (c1 - c0) * math.log(seconds / t0) / math.log(t1 / t0))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/worth"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="jobs whose case and contender hold it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run is begun after them")
    parser.add_argument("--prices", action="store_true", help="measure seconds per token; nothing else may run")
    parser.add_argument("--quick", action="store_true", help="four steps a run: whether it works, not what comes out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
