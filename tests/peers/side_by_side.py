"""The peers' losses and ours side by side: the same inputs, values and gradients compared.

Each peer has a file of tests here: equal wherever both define the same thing; where they do not, a test says which
convention of theirs, or which fault, makes the difference, and shows it.

TRL, Liger, torchtune and flash-linear-attention (fla); a peer that is not installed skips its tests. Faults are shown
for the version they were seen in, and skipped in any other. Without a GPU the peers' Triton kernels run in Triton's
interpreter. None of the peers applies τ²: `ours` leaves it out.
"""

import warnings
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
import torch.nn.functional as F
from cases import LEAVES, make, relative

from kdfast import Head, fused_kd_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = {"trl": "1.16.0", "liger_kernel": "0.8.5", "torchtune": "0.6.1", "fla-core": "0.6.0"}
FLOAT32, FLOAT64 = 1e-5, 1e-11  # relative, in the norm
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]  # the ends are forward and reverse KL


def fault(package):
    """A test that shows a fault: later versions may have mended it."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "none"
    seen = VERSIONS[package]
    return pytest.mark.skipif(installed != seen, reason=f"seen in {package} {seen}; installed: {installed}")


def peer(module, name):
    """A name of a peer's module, or a skip. What its import warns of is the peer's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(pytest.importorskip(module, exc_type=ImportError), name)


def fresh(dtype=torch.float32, **sizes):
    """A case of normal inputs on the device at hand."""
    case = make(dtype, **sizes)
    for name, tensor in list(vars(case).items()):
        setattr(case, name, tensor.detach().to(DEVICE).requires_grad_(name in LEAVES))
    return case


def ours(case, divergence="forward_kl", labels=None, *, bias=True, teacher=None, **options):
    """Without τ², with the teacher's own head."""
    b, bt = (case.b, case.bt) if bias else (None, None)
    options = {"temperature": 1.0, "temperature_squared": False, "divergence": divergence} | options
    return fused_kd_loss(Head(case.hs, case.W, b), teacher or Head(case.ht, case.Wt, bt), labels, **options)


def logits(case, bias=True):
    """(student's, teacher's), whole: what a peer that works on logits is given."""
    b, bt = (case.b, case.bt) if bias else (None, None)
    return F.linear(case.hs, case.W, b), F.linear(case.ht, case.Wt, bt)


def entropy(z):
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


def gradients(loss, leaves, upstream=None):
    """Taken with the graph kept, and copied: a peer may write to what it returned."""
    return [g.clone() for g in torch.autograd.grad(loss, leaves, upstream, retain_graph=True)]


def agree(theirs, mine, *leaves, value=FLOAT32, gradient=FLOAT32, upstream=None):
    assert theirs.shape == mine.shape
    assert relative(theirs, mine) < value
    pairs = zip(gradients(theirs, leaves, upstream), gradients(mine, leaves, upstream), strict=True)
    for index, (one, other) in enumerate(pairs):
        assert relative(one, other) < gradient, index


# the peers' losses over hidden states and heads


def chunked_divergence(case, beta, temperature=1.0, *options, bias=True, b=None, Wt=None):
    """(rows of the divergence, rows of the student's entropy)."""
    function = peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    b, bt = (case.b, case.bt) if bias else (b, b)
    Wt = case.Wt if Wt is None else Wt
    return function.apply(case.hs, case.W, b, case.ht, Wt, bt, beta, temperature, *options)


def liger(case, beta, labels, *, bias=True, Wt=None, bt=None, **options):
    module = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0} | options
    b, bt = (case.b, case.bt) if bias else (None, bt)
    Wt = case.Wt if Wt is None else Wt
    return module(beta=beta, compiled=False, **options)(case.hs, case.W, case.ht, Wt, labels, b, bt)


def liger_triton(case, beta, labels=None, temperature=1.0, Wt=None):
    module = peer("liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD")
    Wt = case.Wt if Wt is None else Wt
    return module(jsd_beta=beta, temperature=temperature)(case.hs, case.W, case.ht, Wt, labels)


def liger_kl(case, labels=None, temperature=1.0):
    module = peer("liger_kernel.transformers.fused_linear_kl_div", "LigerFusedLinearKLDivLoss")
    probabilities = (logits(case, bias=False)[1] / temperature).softmax(-1)
    return module(temperature=temperature)(case.hs, case.W, probabilities, labels)


def fla(case, Wt=None):
    module = peer("fla.modules.fused_kl_div", "FusedKLDivLoss")
    return module()(case.hs, case.ht, case.W, case.Wt if Wt is None else Wt)
