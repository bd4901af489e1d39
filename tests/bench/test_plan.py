"""Predictions for the contenders: memory against what the same code allocates, times by hand and by the engine."""

import pytest
import torch
from fake_gpu import highest_on_a_cpu, highest_on_a_gpu
from plan import GPUS, METHODS, get_gpu, live_bytes, operations, peak_bytes, predicted_seconds
from plan.cases import CPU_SIZES, GPU_SIZES, case, gradients, on_a_gpu, run, shapes
from recorder import products

from kdfast.plan import Shape

PROJECTED = Shape(8192, 50257, 768, 1024)


@pytest.fixture(autouse=True)
def _as_users_run_it(_seeded_and_poisoned, monkeypatch):
    """Without deterministic mode, whose operators take other memory."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("KDFAST_SCRATCH_BYTES", raising=False)


def test_reference_on_a_cpu():
    for shape in shapes("cpu", CPU_SIZES):
        inputs = case(shape)
        peak = highest_on_a_cpu(inputs, lambda inputs: run("reference", inputs)) - gradients(inputs)
        assert live_bytes("reference", shape) == pytest.approx(peak, rel=0.02), shape


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("method", ["reference", "trl", "liger_triton_jsd", "fla"])
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


def test_who_can_do_what():
    def able(**changes):
        return {name for name in METHODS if peak_bytes(name, Shape(64, 1000, 32, 48, **changes)) is not None}

    ours_on_a_gpu = {"eager", "eager_compiled", "reference", "torch", "triton_chunked", "triton_tiled"}
    assert able() == ours_on_a_gpu
    peers = {"trl", "liger_chunked", "liger_triton_jsd", "torchtune", "fla"}
    assert able(teacher="head") == ours_on_a_gpu | peers
    assert able(teacher="none") == ours_on_a_gpu | {"linear_cross_entropy", "cce"}
    assert "cce" not in able(teacher="none", dtype=torch.float32)
    assert not able(teacher="head", device="cpu") & {"triton_chunked", "triton_tiled", "liger_triton_jsd", "fla"}


def test_an_h200_as_it_was_measured():
    gpu = get_gpu("h200")
    assert gpu.products == pytest.approx(790e12)
    assert gpu.copies == pytest.approx(4.3e12)
    assert gpu.lanes == pytest.approx(29.7e12, rel=0.01)  # 132 · 128 lanes at 1.755 GHz


@pytest.mark.parametrize(
    ("method", "shape", "least", "most"),
    [
        ("triton_chunked", PROJECTED, 7.7, 8.3),
        ("triton_chunked", Shape(8192, 128256, 4096, 4096), 75, 85),
        ("eager", PROJECTED, 15, 30),
    ],
)
def test_as_the_document_predicts(method, shape, least, most):
    """docs/performance.md, in milliseconds on an H200."""
    assert least < 1e3 * predicted_seconds(method, shape, "H200") < most


@pytest.mark.parametrize("teacher", ["projected", "head", "none"])
def test_operations_are_what_the_engine_counts(teacher):
    shape = Shape(40, 300, 16, 24, torch.float32, "cpu", teacher)
    with products() as calls:
        run("torch", case(shape))
    made = operations("torch", shape)
    units = made.student * shape.student_width + made.teacher * shape.teacher_width
    assert sum(call.operations for call in calls) == 2 * shape.tokens * shape.vocab * units


@pytest.mark.parametrize("method", METHODS)
def test_a_time_for_every_method_on_every_gpu(method):
    for teacher in ("projected", "head", "none"):
        shape = Shape(8192, 50257, 768, 1024, teacher=teacher)
        for name in GPUS:
            seconds = predicted_seconds(method, shape, name)
            assert (seconds is None) == (peak_bytes(method, shape) is None)
            assert seconds is None or 1e-4 < seconds < 10


def test_no_time_for_a_cpu_and_an_unknown_gpu():
    assert predicted_seconds("torch", Shape(64, 1000, 32, 48, device="cpu"), "H200") is None
    with pytest.raises(ValueError, match="A100-80GB"):
        predicted_seconds("torch", PROJECTED, "V100")
