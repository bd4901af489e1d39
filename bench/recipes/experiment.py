"""The experiment that decides which recipe is the default: many students, equal tokens, tuned learning rates, seeds.

    python bench/recipes/experiment.py [--out runs/recipes] [--cases fresh-192 …] [--only NAME …] [--seeds 3]
                                       [--workers 2] [--minutes 60] [--quick]

Every run is one of `kdfast distill`, in a process of one thread. A recipe's learning rate is chosen from RATES at
seed 0 on the wider student, by final cross entropy, further ones tried while the best is the last on either side; it is
kept for the narrower student. Then come the other seeds. Variants take the rate of their relative, as
`contenders.TUNED_AS` says.
A finished run is read, never made again: the same command goes on where it stopped. `results.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this one

import setting
from contenders import FRESH, PRETRAINED, TUNED_AS, WIDTH, Keys

RATES = {False: (1e-3, 5e-4, 2e-3), True: (5e-4, 1e-3, 2.5e-4)}  # by pretrained; the likeliest first
MOST_RATES = 5


class Plan(NamedTuple):
    """What is to be run of one recipe in one case."""

    case: setting.Case
    name: str

    @property
    def contenders(self) -> dict[str, Keys]:
        return PRETRAINED if self.case.pretrained else FRESH

    def tuning(self, root: Path) -> list[Job]:
        """Runs that choose the learning rate: of RATES, and beyond as long as the best is the lowest or the highest."""
        relative = TUNED_AS.get(self.name, self.name)
        wider = setting.Case(setting.WIDTHS[0], self.case.pretrained)
        jobs = [Job(wider, relative, self.contenders[relative], rate, 0) for rate in RATES[self.case.pretrained]]
        while None not in (found := [read(job.path(root)) for job in jobs]) and len(jobs) < MOST_RATES:
            rates = [job.rate for job in jobs]
            best = rates[found.index(min(found))]
            if min(rates) < best < max(rates):
                break
            jobs.append(jobs[0]._replace(rate=best / 2 if best == min(rates) else best * 2))
        return jobs

    def next(self, root: Path, seeds: int) -> Job | None:
        """The next run that is still to be made; which it is depends on what came out of those before."""
        for job in self.tuning(root):
            if read(job.path(root)) is None:
                return job
        rate, keys = self.rate(root), self.contenders[self.name]
        jobs = (Job(self.case, self.name, keys, rate, seed) for seed in range(seeds))
        return next((job for job in jobs if read(job.path(root)) is None), None)

    def rate(self, root: Path) -> float:
        """The best learning rate of those tried."""
        return min(self.tuning(root), key=lambda job: read(job.path(root)) or float("inf")).rate


class Job(NamedTuple):
    case: setting.Case
    name: str
    keys: Keys
    rate: float
    seed: int

    def path(self, root: Path) -> Path:
        return root / self.case.name / f"{slug(self.name)}--lr{self.rate:g}--seed{self.seed}"


def main() -> None:
    args = _arguments()
    root, prepared = args.out, args.out / "prepared"
    start = time.monotonic()
    cases = [setting.CASES[name] for name in args.cases]
    setting.prepare(prepared, cases, quick=args.quick)
    plans = [
        plan
        for case in cases
        for plan in (Plan(case, name) for name in Plan(case, "").contenders)
        if not args.only or plan.name in args.only
    ]
    steps = 4 if args.quick else None
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        running: dict[Future[float], Job] = {}
        while True:
            if len(running) < args.workers and time.monotonic() - start < 60 * args.minutes:
                job = _next(plans, root, args.seeds, list(running.values()))
                if job is not None:
                    running[pool.submit(_train, root, prepared, job, steps)] = job
                    continue
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                print(f"{running.pop(future).path(root).relative_to(root)}: CE {future.result():.4f}", flush=True)
    left = [plan.name for plan in plans if plan.next(root, args.seeds)]
    print(f"{time.monotonic() - start:.0f} seconds; recipes with runs left: {', '.join(left) or 'none'}")


def _next(plans: list[Plan], root: Path, seeds: int, running: list[Job]) -> Job | None:
    """The first run that does not wait for one in progress."""
    for plan in plans:
        job = plan.next(root, seeds)
        if job is not None and job not in running and not any(other in running for other in plan.tuning(root)):
            return job
    return None


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read(path: Path) -> float | None:
    """The final cross entropy of a finished run; infinite for one that stopped at a loss that is not finite."""
    if (path / "failed").is_file():
        return float("inf")
    summary = path / "summary.json"
    return json.loads(summary.read_text())["eval_ce"] if summary.is_file() else None


def _train(root: Path, prepared: Path, job: Job, steps: int | None) -> float:
    from kdfast.cli.errors import RunFailed

    path = job.path(root)
    chosen = {key: job.case.width if value == WIDTH else value for key, value in job.keys.items()}
    keys: dict[str, Any] = {**setting.student(prepared, job.case, job.rate, job.seed, steps), **chosen}
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
    _die_with_the_parent()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the runs' own lines; the parent prints one each)


def _die_with_the_parent() -> None:
    """A worker whose parent was killed would go on writing into folders that the next call uses."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


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
