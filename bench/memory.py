"""`python -m memory KIND NAME N V Hs Ht` prints one contender's peak bytes above inputs and gradients, as JSON."""

from __future__ import annotations

import gc
import json
import sys

import contenders
import measure


def main() -> None:
    kind, name, *sizes = sys.argv[1:]
    contender = next(c for c in contenders.CONTENDERS if c.name == name)
    contender.run(contenders.Case(kind, 8, 64, 16, 16))  # libraries loaded, threads started
    case = contenders.Case(kind, *map(int, sizes))
    gc.collect()
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in case.leaves.values())
    peak = measure.peak_above_inputs(lambda: contender.run(case))
    print(json.dumps({"peak_above_inputs": peak, "gradients": gradients}))


if __name__ == "__main__":
    main()
