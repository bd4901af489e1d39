"""What a student loses when its teacher was run once: caches of several methods and sizes against the live teacher.

    python bench/recipes/cached.py [--runs runs/worth] [--out bench/results] [--only TEXT …] [--seeds 3] [--minutes 60]
    python bench/recipes/cached.py --speed [--runs runs/worth] [--out bench/results]

The teachers of worth.py, "strong" and the one of 16,384 tokens, and the wider fresh student of experiment.py at the
learning rate that was tuned there for "true_head". The text is the first bytes of the training files: about one pass,
which drawn ids like best, for none comes twice; or, "again", a quarter of it in four passes, where a run keeps its
teacher's entries unasked. Every contender sees the same batches, and evaluation is against the live teacher, whose KL
to the student it measures. A finished run or cache is read, never made again. `--speed` times writing and training in
processor seconds of one thread, the contenders in turn.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this one

import setting
import worth
from datasets import Dataset
from transformers import AutoTokenizer

from kdfast.demo.toy_text import once
from kdfast.training import DistillationModel, TeacherCache, cache_teacher, load_student, load_teacher
from kdfast.training.cache.read import take_head
from kdfast.training.data.packing import PaddingCollator
from kdfast.training.durable.atomic_io import write_text
from kdfast.versions import versions

STUDENT = setting.CASES["fresh-192"]
RATE = 1e-3
# case → folder, teacher, folder of the text and how many bytes it has
CASES = {
    "strong": ("prepared", "strong", "little", 300_000),
    "again": ("prepared", "strong", "less", 75_000),
    "wide": ("wide", "teacher", "little", 300_000),
}
LIVE = {"recipe": "teacher_head", "precompute_teacher_log_probs": False}
TOP_K = {64: 14, 128: 30, 256: 62, 512: 126, 1024: 254}  # bytes per token → ids: 4·k + 8
DRAWN = {64: 22, 128: 46, 256: 95, 512: 200}  # of the strong teacher, as measured: an id that comes again costs nothing
HIDDEN = {"float16": {64: 32, 128: 64, 256: 128, 512: 256}, "int8": {64: 62, 128: 126, 256: 254}}  # → rank


class Contender(NamedTuple):
    name: str
    size: int | None  # bytes per token, about
    keys: dict[str, Any]


SPEEDS: dict[str, dict[str, Any]] = {
    "lm_only": {},
    "live": {},
    "top-30": {"k": 30},
    "drawn-46": {"method": "sample", "k": 46},
    "hidden-int8-126": {"rank": 126},
}
BLOCKS = 48  # of text, for speeds
CONTENDERS = [
    Contender("lm_only", None, {"recipe": "lm_only"}),
    Contender("live", None, LIVE),
    *(
        Contender(f"{name}-{count}", size, {"recipe": "teacher_head", key: count})
        for name, key, counts in (("top", "cache_top_k", TOP_K), ("drawn", "cache_samples", DRAWN))
        for size, count in counts.items()
    ),
    *(
        Contender(
            f"hidden-{dtype}-{rank}",
            size,
            {"recipe": "teacher_head", "cache_method": "hidden", "cache_dtype": dtype, "compressed_rank": rank},
        )
        for dtype, ranks in HIDDEN.items()
        for size, rank in ranks.items()
    ),
]


class Job(NamedTuple):
    case: str
    contender: Contender
    seed: int

    def settings(self, runs: Path) -> dict[str, Any]:
        folder, teacher, text, _ = CASES[self.case]
        prepared = runs / folder
        keys = setting.student(prepared, STUDENT, RATE, self.seed)
        keys |= {"teacher_model_name_or_path": str(prepared / teacher), "train_file": str(prepared / text)}
        if self.contender.size is not None:
            keys |= {"precompute_teacher_log_probs": True, "teacher_cache": str(self.cache(runs))}
        return keys | self.contender.keys

    def cache(self, runs: Path) -> Path:
        return runs / self.case / f"cache-{self.contender.name}"

    def path(self, runs: Path) -> Path:
        return runs / self.case / f"{self.contender.name}--seed{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/worth"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="case and contender that hold one")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run is begun after them")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    worth.prepare(args.runs, {"strong", "wide"}, quick=False)
    for folder, _, name, size in CASES.values():
        text = setting.first_files(args.runs / folder / "train", size)
        once(args.runs / folder / name, lambda made, text=text: write_text(made / "text.txt", text))
    jobs = [Job(case, contender, seed) for case in CASES for seed in range(args.seeds) for contender in CONTENDERS]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.speed:
        write_text(args.out / "cached_speed.json", json.dumps(speeds(args.runs), indent=1) + "\n")
    for job in [] if args.speed else jobs:
        if time.monotonic() < end and any(text in f"{job.case} {job.contender.name}" for text in args.only):
            summary = setting.run(job.path(args.runs), job.settings(args.runs)).summary
            print(f"{job.path(args.runs)}: CE {summary['eval_ce']:.4f}", flush=True)
            for weights in job.path(args.runs).glob("*.safetensors"):  # figures are what is kept
                weights.unlink()
    rows = collect(args.runs, jobs)
    result = {"date": datetime.date.today().isoformat(), "rate": RATE, "rows": rows, "versions": versions()}
    write_text(args.out / "cached.json", json.dumps(result, indent=1) + "\n")
    print("\n".join(map(_line, rows)))


def collect(runs: Path, jobs: list[Job]) -> list[dict[str, Any]]:
    """Return a row for every case and contender that has a finished run."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for job in jobs:
        if not (found := job.path(runs) / "summary.json").is_file():
            continue
        row = rows.setdefault(
            (job.case, job.contender.name),
            {"case": job.case, "name": job.contender.name, "size": job.contender.size, "cache": None, "runs": []},
        )
        summary = json.loads(found.read_text())
        keys = ("seed", "eval_ce", "kl_teacher_student", "tokens", "tokens_per_second")
        row["runs"].append({key: summary[key] for key in keys})
        if (written := job.cache(runs) / "summary.json").is_file():
            row["cache"] = json.loads(written.read_text())
    return list(rows.values())


def speeds(runs: Path) -> dict[str, dict[str, float]]:
    """Return tokens per processor second of writing, and of training on one batch after the other, by contender."""
    folder, name, text, _ = CASES["strong"]
    tokenizer = AutoTokenizer.from_pretrained(runs / folder / "tokenizer")
    ids = tokenizer((runs / folder / text / "text.txt").read_text(), return_tensors="pt").input_ids[0]
    rows = ids[: BLOCKS * setting.CONTEXT].view(BLOCKS, setting.CONTEXT).tolist()
    blocks = Dataset.from_dict({"input_ids": rows, "labels": rows})
    student = setting.student(runs / folder, STUDENT, RATE, 0)["student_config"]
    found: dict[str, dict[str, float]] = {}
    steps, collate = {}, PaddingCollator()
    with tempfile.TemporaryDirectory() as place:
        for which, keys in SPEEDS.items():
            teacher = load_teacher(str(runs / folder / name))
            model = DistillationModel(
                load_student(None, student_config={**student, "vocab_size": setting.VOCABULARY}),
                None if keys or which == "lm_only" else teacher,
                recipe="lm_only" if which == "lm_only" else "cached" if keys else "teacher_head",
            )
            found[which], data = {}, blocks
            if keys:
                began = time.process_time()
                cache_teacher(teacher, {"train": blocks}, Path(place) / which, batch_size=16, **keys)
                found[which]["written"] = BLOCKS * setting.CONTEXT / (time.process_time() - began)
                data = TeacherCache(Path(place) / which).dataset("train", blocks)
                take_head(model, {"data": data})
            steps[which] = (model, data)
        spent: dict[str, list[float]] = {which: [] for which in steps}
        for at in range(0, BLOCKS, setting.BATCH):
            for which, (model, data) in steps.items():
                began = time.process_time()
                batch = collate([data[i] for i in range(at, at + setting.BATCH)])
                model(**batch, with_metrics=False).loss.backward()
                spent[which].append(time.process_time() - began)
        for which, seconds in spent.items():
            found[which]["trained"] = setting.BATCH * setting.CONTEXT / statistics.median(seconds)
    return found


def _line(row: dict[str, Any]) -> str:
    cells = [row["case"], row["name"], f"{row['cache']['bytes_per_token']:.0f}" if row["cache"] else ""]
    for key in ("eval_ce", "kl_teacher_student"):
        found = [run[key] for run in row["runs"]]
        spread = f" ± {(max(found) - min(found)) / 2:.3f}" if len(found) > 1 else ""
        cells.append(f"{statistics.mean(found):.3f}{spread}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
