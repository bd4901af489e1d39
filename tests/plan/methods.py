"""Every method of `kdfast.plan` that runs on a CPU, on real tensors: forward and backward at temperature 2."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kdfast import Head, Projected, fused_kd_loss

TEMPERATURE = 2.0


def case(shape):
    """Inputs of a shape; `leaves` get gradients."""

    def normal(*size):
        return torch.randn(*size, device=shape.device).mul_(0.3).to(shape.dtype)

    N, V, Hs, Ht = shape.tokens, shape.vocab, shape.student_width, shape.teacher_width
    made = SimpleNamespace(kind=shape.teacher, scratch_bytes=shape.scratch_bytes or None)
    made.hs, made.W = normal(N, Hs).requires_grad_(), normal(V, Hs).requires_grad_()
    made.labels = torch.randint(V, (N,), device=shape.device)
    made.leaves = [made.hs, made.W]
    if shape.teacher != "none":
        made.ht = normal(N, Ht)
    if shape.teacher == "projected":
        made.P = normal(Hs, Ht).requires_grad_()
        made.leaves.append(made.P)
    elif shape.teacher == "head":
        made.Wt = normal(V, Ht)
    return made


def eager(x):
    z_s = F.linear(x.hs, x.W)
    if x.kind == "none":
        F.cross_entropy(z_s, x.labels).backward()
        return
    z_t = F.linear(F.linear(x.ht, x.P), x.W) if x.kind == "projected" else F.linear(x.ht, x.Wt)
    log_q, log_p = (z_s / TEMPERATURE).log_softmax(-1), (z_t / TEMPERATURE).log_softmax(-1)
    F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).backward()


def ours(engine):
    def run(x):
        student = Head(x.hs, x.W)
        options = {"temperature": TEMPERATURE, "engine": engine, "scratch_bytes": x.scratch_bytes}
        if x.kind == "none":
            fused_kd_loss(student, None, x.labels, ce_weight=1.0, **options).backward()
            return
        teacher = Projected(x.ht, x.P) if x.kind == "projected" else Head(x.ht, x.Wt)
        fused_kd_loss(student, teacher, temperature_squared=False, **options).backward()

    return run


def trl(x):
    function = pytest.importorskip("trl.kernels.chunked_divergence", exc_type=ImportError).ChunkedDivergenceFunction
    function.apply(x.hs, x.W, None, x.ht, x.Wt, None, 0.0, TEMPERATURE)[0].mean().backward()


def liger_chunked(x):
    module = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0, "compiled": False}
    module.LigerFusedLinearJSDLoss(temperature=TEMPERATURE, **options)(x.hs, x.W, x.ht, x.Wt, x.labels).backward()


def liger_triton_jsd(x):
    module = pytest.importorskip("liger_kernel.transformers.fused_linear_jsd", exc_type=ImportError)
    module.LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)(x.hs, x.W, x.ht, x.Wt, None).backward()


def fla(x):
    """It has no temperature."""
    pytest.importorskip("fla.modules.fused_kl_div", exc_type=ImportError).FusedKLDivLoss()(
        x.hs, x.ht, x.W, x.Wt
    ).backward()


def torchtune(x):
    """From its file alone: the package wants other versions than are installed here."""
    package = importlib.util.find_spec("torchtune")
    if package is None:
        pytest.skip("could not import 'torchtune'")
    file = Path(package.submodule_search_locations[0]) / "modules/loss/kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=8)
    with torch.no_grad():
        z_t = [F.linear(h, x.Wt) / TEMPERATURE for h in x.ht[None].chunk(8, dim=1)]
    z_s = [F.linear(h, x.W) / TEMPERATURE for h in x.hs[None].chunk(8, dim=1)]
    loss(z_s, z_t, x.labels[None]).backward()


def linear_cross_entropy(x):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(x.hs, x.W, x.labels, options=options).backward()


RUN = {
    "eager": eager,
    "reference": ours("reference"),
    "torch": ours("torch"),
    "triton_chunked": ours("triton_chunked"),
    "triton_tiled": ours("triton_tiled"),
    "trl": trl,
    "liger_chunked": liger_chunked,
    "liger_triton_jsd": liger_triton_jsd,
    "fla": fla,
    "torchtune": torchtune,
    "linear_cross_entropy": linear_cross_entropy,
}


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
