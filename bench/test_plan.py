"""Predicted memory beside what a CPU really takes: PyTorch's allocator, and the resident set of a process.

What the vendor's library takes for a product depends on the machine (oneDNN's scratch in bf16: nothing on one, 0.6 MiB
on another), so this is a measurement; tests/plan counts what no machine changes.
"""

import gc
import os
import subprocess
import sys
from dataclasses import replace

import measure
import pytest
import torch
from live_bytes import highest_live_bytes
from plan import live_bytes
from plan.cases import CPU_SIZES, case, gradients, run, shapes, skip_unless_installed
from plan.memory import PRODUCT_BUFFERS

from kdfast.plan import Shape

CPU = ["eager", "reference", "torch", "trl", "liger_chunked", "torchtune", "linear_cross_entropy"]
# rows of a bf16 product are copied by oneDNN, which takes that memory from PyTorch: no formula has it
ONEDNN = 256 << 10


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("method", CPU)
def test_on_a_cpu(method, monkeypatch):
    gc.collect()  # what dies meanwhile must not be of an earlier test
    monkeypatch.setenv("KDFAST_SCRATCH_BYTES", str(1 << 20))  # the `torch` engine then has several chunks
    seen = 0
    for shape in shapes("cpu", CPU_SIZES):
        predicted = live_bytes(method, shape)
        if predicted is None:
            continue
        run(method, case(replace(shape, tokens=16, vocab=64)))  # whatever is allocated once
        inputs = case(shape)
        peak = highest_live_bytes(lambda inputs=inputs: run(method, inputs)) - gradients(inputs)
        assert predicted == pytest.approx(peak, rel=0.02, abs=ONEDNN * (shape.dtype == torch.bfloat16)), shape
        seen += 1
    assert seen


RESIDENT = """
import gc, sys
sys.path.insert(0, "bench")
import measure, torch
from dataclasses import replace
from kdfast.plan import Shape
torch.set_num_threads(1)
from plan.cases import case, gradients, run
shape = Shape(768, 50257, 512, 640, torch.{dtype}, "cpu", "head")
run("{method}", case(replace(shape, tokens=8, vocab=64, student_width=16)))
inputs = case(shape)
gc.collect()
peak = measure.peak_above_inputs(lambda: run("{method}", inputs))
print(peak - gradients(inputs))
"""


@pytest.mark.parametrize("method", ["eager", "torch", "trl", "liger_chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_set(method, dtype):
    """In a fresh process of one thread. glibc is told to give back what is freed: how much of its heap it keeps
    otherwise changes from run to run."""
    skip_unless_installed(method)
    environment = {**os.environ, "PYTHONPATH": str(measure.ROOT), "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    script = RESIDENT.format(method=method, dtype=str(dtype).removeprefix("torch."))
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=environment, cwd=measure.ROOT, capture_output=True, text=True, check=True)
    predicted = live_bytes(method, Shape(768, 50257, 512, 640, dtype, "cpu", "head")) + PRODUCT_BUFFERS
    assert predicted == pytest.approx(int(done.stdout.split()[-1]), rel=0.05)
