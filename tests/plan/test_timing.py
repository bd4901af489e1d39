"""Predicted times: arithmetic that can be checked by hand, against docs/performance.md and the engines' own count."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planned import case, run
from recorder import products

from kdfast.plan import GPUS, METHODS, Shape, get_gpu, operations, peak_bytes, predicted_seconds
from kdfast.plan.advice import fitting_portion, larger_portions, portion

PROJECTED = Shape(8192, 50257, 768, 1024)


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


def test_scratch_that_fits():
    shape = Shape(8192, 50257, 768, 1024)
    default = portion(shape)
    assert (default.engine, default.passes) == ("triton_chunked", 8)
    assert fitting_portion(shape, default.total_bytes) == default
    less = fitting_portion(shape, default.total_bytes - (200 << 20))
    assert less.engine == "triton_chunked"
    assert less.passes > 8
    assert fitting_portion(shape, 460 << 20).engine == "triton_tiled"
    assert fitting_portion(shape, 200 << 20) is None
    assert [one.passes for one in larger_portions(shape, 1 << 40)] == [4, 2, 1]
    assert larger_portions(shape, default.total_bytes) == []


def test_nothing_more_is_imported():
    """`import kdfast` does not import the planner, the planner neither transformers nor Triton's kernels."""
    code = (
        "import sys, kdfast; assert 'kdfast.plan' not in sys.modules; import kdfast.plan; "
        "sys.exit(sorted({'transformers', 'datasets', 'kdfast.training'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert importlib.util.find_spec("kdfast.plan.models")
