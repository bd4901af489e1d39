"""Every formula against the bytes that its method allocates: all on a CPU, the results of operators on a GPU."""

import gc
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fake_gpu import highest_live_bytes as highest_on_a_gpu
from live_bytes import highest_live_bytes
from planned import case, gradients, on_a_gpu, run

from kdfast.engines import triton_tiled
from kdfast.ops import planning
from kdfast.plan import METHODS, Shape, largest_tokens, ours, peak_bytes, resident, total_bytes
from kdfast.plan.memory import live_bytes

CPU = ["eager", "reference", "torch", "trl", "liger_chunked", "torchtune", "linear_cross_entropy"]
GPU = ["eager", "reference", "torch", "triton_chunked", "triton_tiled", "trl", "liger_triton_jsd", "fla"]
TEACHERS = ["projected", "head", "none"]
DTYPES = [torch.float32, torch.bfloat16]
# rows of a bf16 product are copied by oneDNN, which takes that memory from PyTorch: no formula has it
ONEDNN = 256 << 10

CPU_SIZES = [
    (600, 5000, 48, 80),  # several chunks, logits above all; wider on the teacher's side
    (24, 5000, 200, 120),  # dW above all; wider on the student's
    (2500, 700, 64, 96),  # two chunks of Liger's, hidden states that show
]
GPU_SIZES = [
    (2048, 50257, 768, 1024),  # one and two chunks; V that is padded; two tiles of TRL's
    (8192, 50257, 768, 1024),  # TRL's tokens are cut too
    (96, 30000, 512, 256),  # dW above all; one tile
    (4096, 128256, 2048, 4096),
    (20000, 32000, 4096, 2048),  # hidden states above all
]


def shapes(device, sizes, dtypes=DTYPES):
    return [Shape(*size, dtype, device, teacher) for size in sizes for dtype in dtypes for teacher in TEACHERS]


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", GPU)
def test_on_a_gpu(method):
    seen = 0
    for shape in shapes("cuda", GPU_SIZES):
        predicted = live_bytes(method, shape)
        if predicted is None:
            continue
        inputs = case(shape, "meta")
        peak = highest_on_a_gpu(inputs, lambda inputs: run(method, inputs), on_a_gpu(method)) - gradients(inputs)
        assert predicted == pytest.approx(peak, rel=0.03), shape
        seen += 1
    assert seen


@pytest.mark.parametrize("engine", ["triton_chunked", "triton_tiled"])
@pytest.mark.parametrize("scratch", [32 << 20, 300 << 20, 4 << 30])
def test_scratch_on_a_gpu(engine, scratch, monkeypatch):
    monkeypatch.setenv("KDFAST_SCRATCH_BYTES", str(scratch))
    for teacher in TEACHERS:
        shape = Shape(4096, 50257, 768, 1024, torch.bfloat16, "cuda", teacher, scratch)
        inputs = case(shape, "meta")
        peak = highest_on_a_gpu(inputs, lambda inputs: run(engine, inputs)) - gradients(inputs)
        assert live_bytes(engine, shape) == pytest.approx(peak, rel=0.05), teacher


RESIDENT = """
import gc, sys
sys.path[:0] = ["tests/helpers", "bench"]
import measure, torch
from dataclasses import replace
from kdfast.plan import Shape
torch.set_num_threads(1)
from planned import case, gradients, run
shape = Shape(768, 50257, 512, 640, torch.{dtype}, "cpu", "head")
run("{method}", case(replace(shape, tokens=8, vocab=64, student_width=16)))
inputs = case(shape)
gc.collect()
peak = measure.peak_above_inputs(lambda: run("{method}", inputs))
print(peak - gradients(inputs))
"""


@pytest.mark.long
@pytest.mark.parametrize("method", ["eager", "torch", "trl", "liger_chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_set(method, dtype):
    """In a fresh process of one thread. glibc is told to give back what is freed: how much of its heap it keeps
    otherwise changes from run to run."""
    measure = pytest.importorskip("measure")
    environment = {**os.environ, "PYTHONPATH": str(measure.ROOT), "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    script = RESIDENT.format(method=method, dtype=str(dtype).removeprefix("torch."))
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=environment, cwd=measure.ROOT, capture_output=True, text=True, check=True)
    predicted = live_bytes(method, Shape(768, 50257, 512, 640, dtype, "cpu", "head")) + resident.PRODUCT_BUFFERS
    assert predicted == pytest.approx(int(done.stdout.split()[-1]), rel=0.05)


def test_who_can_do_what():
    def able(**changes):
        return {name for name in METHODS if peak_bytes(name, replace(Shape(64, 1000, 32, 48), **changes)) is not None}

    ours_on_a_gpu = {"eager", "eager_compiled", "reference", "torch", "triton_chunked", "triton_tiled"}
    assert able() == ours_on_a_gpu
    peers = {"trl", "liger_chunked", "liger_triton_jsd", "torchtune", "fla"}
    assert able(teacher="head") == ours_on_a_gpu | peers
    assert able(teacher="none") == ours_on_a_gpu | {"linear_cross_entropy", "cce"}
    assert "cce" not in able(teacher="none", dtype=torch.float32)
    assert not able(teacher="head", device="cpu") & {"triton_chunked", "triton_tiled", "liger_triton_jsd", "fla"}


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_number_of_tokens(method):
    memory = 2 << 30
    for shape in shapes("cuda", [(64, 50257, 768, 1024)], [torch.bfloat16]):
        most = largest_tokens(method, shape, memory)
        if peak_bytes(method, shape) is None:
            assert most == 0
            continue
        assert total_bytes(method, replace(shape, tokens=most)) <= memory
        assert total_bytes(method, replace(shape, tokens=most + 1)) > memory
        assert largest_tokens(method, shape, shape.weight) == 0
        assert largest_tokens(method, shape, memory, bytes_per_token=1 << 20) < most


def test_few_tokens_take_no_more_than_many():
    """A tiled engine's slab is the wider, the fewer tokens there are; its dW, in fp32 before it is rounded, counts."""
    shape = Shape(8192, 128256, 4096, 4096)
    assert total_bytes("triton_tiled", replace(shape, tokens=200)) < total_bytes("triton_tiled", shape)


def test_the_slab_is_the_engines():
    assert triton_tiled.slab_width is planning.slab_width
    assert ours.planning is planning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"teacher_width": 0}, "teacher_width=0"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"device": "mps"}, "device='mps'"),
        ({"teacher": "own"}, "teacher='own'"),
        ({"scratch_bytes": -1}, "scratch_bytes=-1"),
    ],
)
def test_a_wrong_shape_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        replace(Shape(64, 1000, 32, 48), **change)


def test_an_unknown_method_lists_them():
    with pytest.raises(ValueError, match="triton_tiled"):
        peak_bytes("magic", Shape(64, 1000, 32, 48))
