"""make fuzz ARGS="--minutes 10 interface configs checkpoints"

Random cases of each kind, one after the other, as long as time or number allow: what they came to, counted, and every
finding with what repeats it. Exit code 1 if there is one. `--seed S --cases 1 KIND` repeats a single case.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    "MPLBACKEND": "agg", "WANDB_MODE": "disabled",
}  # fmt: skip  # before what reads them is imported

KINDS = {  # what it takes → longest a case may take, seconds
    "interface": 120,
    "configs": 200,
    "checkpoints": 400,
    "caches": 400,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.splitlines()[2])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--minutes", type=float, default=1.0, help="of each kind (default: %(default)s)")
    parser.add_argument("--cases", type=int, help="at most so many of each kind")
    parser.add_argument("--seed", type=int, help="of the first case; the next one has the next (default: drawn)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="counts and findings, added to what it has of others")
    args = parser.parse_args()
    kinds = args.kinds or list(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"{unknown[0]}: expected {', '.join(KINDS)}")
    seed = int.from_bytes(os.urandom(4)) if args.seed is None else args.seed
    found = {}
    for kind in kinds:
        print(f"{kind}, seed {seed}", flush=True)
        found[kind] = fuzz(kind, seed, 60 * args.minutes, args.cases)
    findings = sum(len(summary["findings"]) for summary in found.values())
    if args.json is not None:
        _add(args.json, found)
    print(f"{sum(summary['cases'] for summary in found.values())} cases, {findings} findings")
    return 1 if findings else 0


def fuzz(kind: str, seed: int, seconds: float, most: int | None = None) -> dict:
    """The summary of the cases of one kind from `seed` on. They run in a process that may die or hang: the next one
    goes on behind the case that did it, which is a finding."""
    from fuzz import worker
    from fuzz.outcome import Finding, Outcome, Tally

    tally, begin = Tally(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kdfast-fuzz-") as folder:
        while (left := seconds - (time.monotonic() - begin)) > 0 and (most is None or tally.cases < most):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            arguments = (kind, folder, seed + tally.cases, None if most is None else most - tally.cases, left, theirs)
            process = multiprocessing.get_context("spawn").Process(target=worker.work, args=arguments)
            process.start()
            theirs.close()
            ended = False
            try:
                while not ended:
                    if not ours.poll(KINDS[kind]):
                        raise EOFError
                    told = ours.recv()
                    ended = told is None
                    if not ended:
                        _tell(tally, kind, told)
            except EOFError:
                process.join(1)
                how = "does not answer" if process.is_alive() else f"ended with {process.exitcode}"
                outcome = Outcome("the process", "finding", Finding(f"the process {how}", ""))
                _tell(tally, kind, outcome)
            process.kill()
            process.join()
    tally.seconds = time.monotonic() - begin
    for what, count in sorted(tally.outcomes.items()):
        print(f"{count:8} {what}")
    for what, first in tally.unforeseen.items():
        print(f"    seed {first}: {what}")
    return tally.summary()


def _tell(tally, kind, outcome) -> None:
    seed = tally.first_seed + tally.cases
    tally.add(seed, outcome)
    if outcome.finding is not None:
        print(f"FINDING {kind} {seed}: {outcome.finding.what}\n    {outcome.finding.repeat}", flush=True)


def _add(file: Path, found: dict) -> None:
    from kdfast.versions import versions

    before = json.loads(file.read_text()) if file.exists() else {}
    for kind, summary in found.items():
        summary["date"] = datetime.date.today().isoformat()
        before.setdefault(kind, []).append({**summary, "versions": versions()})
    file.write_text(json.dumps(before, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
