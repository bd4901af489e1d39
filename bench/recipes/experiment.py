"""The experiment that decides which recipe is the default: many students, equal tokens, tuned learning rates, seeds.

    python bench/recipes/experiment.py [--out runs/recipes] [--cases fresh-192 …] [--only NAME …] [--seeds 3]
                                       [--workers 2] [--minutes 60] [--quick]

Every run is one of `kdfast distill`, in a process of one thread. For each recipe the learning rate is chosen from
RATES at seed 0 on the wider student, by final cross entropy, and kept for the narrower one; then come the other seeds.
A finished run is read, never made again: the same command goes on where it stopped. `results.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this one

import setting
from contenders import FRESH, PRETRAINED, Keys

RATES = {False: (4e-3, 2e-3, 8e-3), True: (1e-3, 5e-4, 2e-3)}  # by pretrained; the likeliest first


class Job(NamedTuple):
    case: setting.Case
    name: str
    keys: Keys
    rate: float
    seed: int

    def path(self, root: Path) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return root / self.case.name / f"{slug}--lr{self.rate:g}--seed{self.seed}"


def main() -> None:
    args = _arguments()
    root, prepared = args.out, args.out / "prepared"
    start = time.monotonic()
    cases = [setting.CASES[name] for name in args.cases]
    setting.prepare(prepared, cases, quick=args.quick)
    jobs: list[Iterator[Job]] = [
        _jobs(root, case, name, keys, args.seeds)
        for case in cases
        for name, keys in (PRETRAINED if case.pretrained else FRESH).items()
        if not args.only or name in args.only
    ]
    steps = 4 if args.quick else setting.STEPS
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        running: dict[Future[float], tuple[Job, Iterator[Job]]] = {}
        waiting = list(jobs)
        while waiting or running:
            while waiting and len(running) < args.workers and time.monotonic() - start < 60 * args.minutes:
                plan = waiting.pop(0)
                if (job := next(plan, None)) is not None:
                    future = pool.submit(_train, root, prepared, job, steps)
                    running[future] = (job, plan)
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job, plan = running.pop(future)
                print(f"{job.path(root).relative_to(root)}: CE {future.result():.4f}", flush=True)
                waiting.insert(0, plan)
    print(f"{len(waiting)} recipes have runs left; {time.monotonic() - start:.0f} seconds")


def _jobs(root: Path, case: setting.Case, name: str, keys: Keys, seeds: int) -> Iterator[Job]:
    """The runs of one recipe that are still to be made; what comes next depends on what came out."""
    wider = setting.Case(setting.WIDTHS[0], case.pretrained)
    tuning = [Job(wider, name, keys, rate, 0) for rate in RATES[case.pretrained]]
    yield from (job for job in tuning if read(job.path(root)) is None)
    best = min(tuning, key=lambda job: read(job.path(root)) or float("inf"))
    for seed in range(seeds):
        job = best._replace(case=case, seed=seed)
        if read(job.path(root)) is None:
            yield job


def read(path: Path) -> float | None:
    """The final cross entropy of a finished run; infinite for one that stopped at a loss that is not finite."""
    if (path / "failed").is_file():
        return float("inf")
    summary = path / "summary.json"
    return json.loads(summary.read_text())["eval_ce"] if summary.is_file() else None


def _train(root: Path, prepared: Path, job: Job, steps: int) -> float:
    from kdfast.cli.errors import RunFailed

    path = job.path(root)
    keys: dict[str, Any] = {**setting.student(prepared, job.case, job.rate, job.seed, steps), **job.keys}
    try:
        run = setting.run(path, keys)
    except RunFailed as error:
        (path / "failed").write_text(str(error))
        return float("inf")
    for weights in path.glob("*.safetensors"):  # curves and figures are what is kept
        weights.unlink()
    return run.summary["eval_ce"]


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the runs' own lines; the parent prints one each)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--cases", nargs="+", choices=setting.CASES, default=list(setting.CASES))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these recipes alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run is begun after them")
    parser.add_argument("--quick", action="store_true", help="four steps a run: whether it works, not what comes out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
