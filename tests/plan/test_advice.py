"""Scratch that fits, and what the planner does not import."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from kdfast.plan import Shape
from kdfast.plan.advice import fitting_portion, larger_portions, portion


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
