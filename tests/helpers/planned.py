"""The benchmark's contenders, by their names in `kdfast.plan`: forward and backward at temperature 2."""

import importlib.util

import pytest
import torch
from methods import METHODS
from workloads import Inputs, Workload

BY_PLAN = {method.plan: method for method in METHODS if method.plan and not method.gpu}
BY_PLAN |= {method.plan: method for method in METHODS if method.plan in ("fla", "liger_triton_jsd")}


def case(shape, device=None):
    """Inputs of a shape, on its device or another."""
    sizes = (shape.tokens, shape.vocab, shape.student_width, shape.teacher_width)
    return Inputs(Workload("planned", shape.teacher, *sizes, shape.dtype), device or shape.device)


def run(method, inputs):
    """One step. Skips where the peer is not installed."""
    contender = BY_PLAN[method]
    if any(importlib.util.find_spec(module.partition(".")[0]) is None for module in contender.needs):
        pytest.skip(f"{contender.name} is not installed")
    contender.loss(inputs).backward()


def gradients(inputs):
    """Bytes."""
    return sum(leaf.grad.nbytes for leaf in inputs.leaves.values())


def on_a_gpu(method):
    """What stands in for a peer's own kernels and products where there is no GPU (`fake_gpu.highest_live_bytes`)."""
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
