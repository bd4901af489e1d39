"""What a student loses when its teacher was run once: caches of several sizes against the live teacher.

    python bench/recipes/cached.py [--runs runs/recipes] [--out bench/results] [--seeds 3] [--quick]

The teacher, tokenizer and evaluation text of experiment.py, and the wider fresh student at the learning rate that was
tuned there for "true_head". The text is the first TEXT_BYTES of the training files, about one pass; so a cache of all
of it is small. Every contender sees the same batches. A finished run or cache is read, never made again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this one

import setting

from kdfast.cli.arguments import parse_mapping
from kdfast.cli.cache import make_cache
from kdfast.demo.toy_text import once
from kdfast.training.durable.atomic_io import write_text
from kdfast.versions import versions

TEXT_BYTES = 300_000
CASE = setting.CASES["fresh-192"]
RATE = 1e-3
CACHES: dict[str, dict[str, Any]] = {
    "top-4": {"cache_top_k": 4},
    "top-16": {"cache_top_k": 16},
    "top-64": {"cache_top_k": 64},
    "top-256": {"cache_top_k": 256},
    "64 drawn": {"cache_method": "sample", "cache_samples": 64},
    "16 drawn": {"cache_method": "sample", "cache_samples": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="four steps a run: whether it works, not what comes out")
    args = parser.parse_args()
    prepared, here = args.runs / "prepared", args.runs / "cached"
    setting.prepare(prepared, [CASE], quick=args.quick)
    here.mkdir(parents=True, exist_ok=True)
    train = prepared / "train"
    once(here / "text", lambda folder: write_text(folder / "text.txt", setting.first_files(train, TEXT_BYTES)))
    steps = 4 if args.quick else None
    rows = []
    live = {"recipe": "teacher_head", "precompute_teacher_log_probs": False}
    for name, keys in {"lm_only": {"recipe": "lm_only"}, "live": live, **CACHES}.items():
        row: dict[str, Any] = {"teacher": name, "bytes_per_token": None, "runs": []}
        for seed in range(args.seeds):
            run = {**setting.student(prepared, CASE, RATE, seed, steps), "train_file": str(here / "text"), **keys}
            if name in CACHES:
                run |= {"teacher_cache": str(here / f"cache-{name.replace(' ', '-')}"), "seed": 0}
                row["bytes_per_token"] = make_cache(parse_mapping(name, run, command="cache")).bytes_per_token
                run["seed"] = seed
            summary = setting.run(here / f"{name.replace(' ', '-')}--seed{seed}", run).summary
            row["runs"].append({key: summary[key] for key in ("seed", "eval_ce", "kl_teacher_student", "tokens")})
        rows.append(row)
        print(_line(row), flush=True)
    result = {"date": datetime.date.today().isoformat(), "rate": RATE, "rows": rows, "versions": versions()}
    write_text(args.out / "cached.json", json.dumps(result, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    ces = [run["eval_ce"] for run in row["runs"]]
    size = "" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:.0f}"
    spread = f" ± {(max(ces) - min(ces)) / 2:.3f}" if len(ces) > 1 else ""
    return f"| {row['teacher']} | {size} | {statistics.mean(ces):.3f}{spread} |"


if __name__ == "__main__":
    main()
