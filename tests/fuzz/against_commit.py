"""Compare the losses and gradients of this checkout with those of another commit, on problems drawn at random.

    PYTHONPATH=.:tests:tests/helpers python -m fuzz.against_commit COMMIT [--number 300] [--seed 0]

Both sides solve the same problems (helpers/problems.py of the other commit, whose interface both have) on every engine,
the other commit from a worktree in a temporary folder. Values, metrics and every gradient must be the
same bits on the `reference` and `torch` engines, and within 1e-6 of the norm on the Triton engines, which run in the
interpreter. Exit status 1 and one line for each that is not.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {"reference": 0.0, "torch": 0.0, "triton_chunked": 1e-6, "triton_tiled": 1e-6}


def solve(number: int, seed: int, out: str) -> None:
    """Solve `number` problems with the kdfast that is imported, and save what comes of them to `out`."""
    import interpreter  # noqa: F401  # before any kernel
    from agree import run
    from problems import Given, a_problem

    import kdfast

    assert Path(kdfast.__file__).is_relative_to(Path.cwd()), f"{kdfast.__file__} is not of this side"
    torch.use_deterministic_algorithms(True, warn_only=True)
    chance, found = random.Random(seed), []
    while len(found) < number:
        problem = a_problem(lambda what, *choices: chance.choice(choices))
        if isinstance(problem.anchor, Given):  # a distribution as an anchor: before version 0.2 only
            continue
        answers = {}
        for engine in TOLERANCE:
            try:
                answer = run(problem, engine)
                answers[engine] = {"loss": answer.loss, **answer.gradients}
                answers[engine] |= {name: torch.tensor(value) for name, value in answer.metrics.items()}
            except (RuntimeError, TypeError, ValueError) as error:
                answers[engine] = f"{type(error).__name__}: {error}"
        found.append((repr(problem), answers))
    torch.save(found, out)


def distances(old: dict[str, torch.Tensor] | str, new: dict[str, torch.Tensor] | str) -> dict[str, float]:
    """Return how far apart each value is, relative to its norm, 0 for the same bits; an error, by its text."""
    if isinstance(old, str) or isinstance(new, str):
        return {"error": 0.0 if str(old) == str(new) else float("inf")}
    assert old.keys() == new.keys()
    found = {}
    for name, a in old.items():
        a, b = a.double().nan_to_num(7e7), new[name].double().nan_to_num(7e7)
        found[name] = 0.0 if torch.equal(a, b) else float((a - b).norm() / a.norm())
    return found


def compare(before: str, after: str) -> int:
    """Print every difference between two saved files, and return how many there are."""
    different, compared, largest = 0, dict.fromkeys(TOLERANCE, 0), dict.fromkeys(TOLERANCE, 0.0)
    for (problem, old), (other, new) in zip(torch.load(before), torch.load(after), strict=True):
        assert problem == other, "the two sides drew other problems"
        for engine, tolerance in TOLERANCE.items():
            apart = distances(old[engine], new[engine])
            compared[engine] += len(apart)
            largest[engine] = max(largest[engine], *apart.values())
            if bad := {name: distance for name, distance in apart.items() if not distance <= tolerance}:
                different += 1
                print(f"{engine}: {bad}\n    {old[engine]}\n    {new[engine]}\n    {problem}")
    for engine, count in compared.items():
        print(f"{engine}: {count} values, metrics and gradients compared, at most {largest[engine]:.1e} apart")
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solve", help=argparse.SUPPRESS)  # one side, in a process of its own
    arguments = parser.parse_args()
    if arguments.solve:
        solve(arguments.number, arguments.seed, arguments.solve)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "checkout"
        subprocess.run(["git", "worktree", "add", "--detach", other, arguments.commit], cwd=ROOT, check=True)
        try:
            for name, root in (("before", other), ("after", ROOT)):
                path = os.pathsep.join(map(str, (root, other / "tests" / "helpers", other / "tests")))
                command = [sys.executable, __file__, arguments.commit, "--solve", f"{folder}/{name}"]
                command += ["--number", str(arguments.number), "--seed", str(arguments.seed)]
                same = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}  # frozensets are printed in one order
                subprocess.run(command, cwd=root, env=same, check=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
        return int(compare(f"{folder}/before", f"{folder}/after") > 0)


if __name__ == "__main__":
    sys.exit(main())
