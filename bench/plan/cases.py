"""The benchmark's contenders, by their names in `bench/plan`: forward and backward at temperature 2."""

import importlib.util

import pytest
import torch
from methods import METHODS
from workloads import Inputs, Workload

from kdfast.plan import Shape

BY_PLAN = {method.plan: method for method in METHODS if method.plan and not method.gpu}
BY_PLAN |= {method.plan: method for method in METHODS if method.plan in ("fla", "liger_triton_jsd")}

TEACHERS = ("projected", "head", "none")
CPU_SIZES = (
    (600, 5000, 48, 80),  # several chunks, logits above all; wider on the teacher's side
    (24, 5000, 200, 120),  # dW above all; wider on the student's
    (2500, 700, 64, 96),  # two chunks of Liger's, hidden states that show
)
GPU_SIZES = (
    (2048, 50257, 768, 1024),  # one and two chunks; V that is padded; two tiles of TRL's
    (8192, 50257, 768, 1024),  # TRL's tokens are cut too
    (96, 30000, 512, 256),  # dW above all; one tile
    (4096, 128256, 2048, 4096),
    (20000, 32000, 4096, 2048),  # hidden states above all
)


def shapes(device, sizes, dtypes=(torch.float32, torch.bfloat16)):
    return [Shape(*size, dtype, device, teacher) for size in sizes for dtype in dtypes for teacher in TEACHERS]


def case(shape, device=None):
    """Inputs of a shape, on its device or another."""
    sizes = (shape.tokens, shape.vocab, shape.student_width, shape.teacher_width)
    return Inputs(Workload("planned", shape.teacher, *sizes, shape.dtype), device or shape.device)


def skip_unless_installed(method):
    contender = BY_PLAN[method]
    if any(importlib.util.find_spec(module.partition(".")[0]) is None for module in contender.needs):
        pytest.skip(f"{contender.name} is not installed")


def run(method, inputs):
    """Do one step. Skips where the peer is not installed."""
    skip_unless_installed(method)
    BY_PLAN[method].loss(inputs).backward()


def gradients(inputs):
    """Bytes."""
    return sum(leaf.grad.nbytes for leaf in inputs.leaves.values())


def on_a_gpu(method):
    """What stands in for a peer's own kernels and products where there is no GPU (`fake_gpu.highest_on_a_gpu`)."""
    if method == "trl":
        module = pytest.importorskip("trl.kernels.chunked_divergence", exc_type=ImportError)
        kernels = [(module, f"_{name}_kernel", None) for name in ("stats", "backward")]
        nothing = [(module, name, lambda *arguments: None) for name in ("_project", "_addmm_fp32")]
        return [
            *kernels,
            *nothing,
            (module, "_use_triton", lambda device: True),
            (module, "_compute_dtype", lambda x: x.dtype),
        ]
    if method == "liger_triton_jsd":
        module = pytest.importorskip("liger_kernel.ops.fused_linear_jsd", exc_type=ImportError)
        inner = pytest.importorskip("liger_kernel.ops.backends._triton.jsd", exc_type=ImportError)
        return [
            (module, "_project_to_float32", lambda x, w: x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32)),
            (module, "fused_linear_jsd_backward", lambda upstream, *gradients: gradients),
            (module, "dispatch", lambda name, *args, impl, mode: inner.jsd_loss_and_grad_triton(*args)),
            (inner, "_jsd_kernel", None),
        ]
    if method == "fla":
        module = pytest.importorskip("fla.modules.fused_kl_div.ops", exc_type=ImportError)
        return [(module, name, None) for name in ("kl_div_kernel", "elementwise_mul_kernel")]
    return []
