"""`python -m memory WORKLOAD METHOD` prints a method's peak bytes above inputs and gradients, in a process of its own:
a resident set is not to hold what another has left behind."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import measure
from methods import BY_NAME, Method
from workloads import WORKLOADS, Inputs, Workload


def peak_bytes(method: Method, inputs: Inputs) -> int:
    """Above inputs and the leaves' gradients."""
    _, step = method.runs(inputs)
    inputs.clear()
    gc.collect()
    peak = measure.peak_above_inputs(step)
    return peak - sum(leaf.grad.nbytes for leaf in inputs.leaves.values() if leaf.grad is not None)


def main() -> None:
    workload_name, name = sys.argv[1:]
    workload: Workload = next(w for w in WORKLOADS if str(w) == workload_name)
    method = BY_NAME[name]
    # what libraries, threads and a compiler take is not the loss's: the first, tiny run has it
    tiny = replace(workload, tokens=8, vocab=64, student_width=16, teacher_width=16)
    compiles = method.compiles or name == "kdfast torch"  # the latter its row work
    method.runs(Inputs(workload if compiles else tiny))[1]()
    print(peak_bytes(method, Inputs(workload)))


if __name__ == "__main__":
    main()
