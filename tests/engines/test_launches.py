"""What is launched on a GPU: products whose part of the vocabulary is a multiple of 8, and a rest of at most 7 entries;
and few operators beside them."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cases import LEAVES, copy, make, student
from fake_gpu import highest_on_a_gpu
from teachers import ENGINES, KINDS, leaves, loss_of, sources
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from kdfast import fused_kd_loss
from kdfast.engines import operators
from kdfast.frontend import checks
from kdfast.kernels import block_sizes, tiled_forward
from kdfast.ops import matmul

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's kernels can be left out")
FUSED = ENGINES[1:]
aten = torch.ops.aten


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *args, **options: None)


def meta(x):
    return x.detach().to("meta").requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


class Products(TorchDispatchMode):
    """(rows, summed over, columns) of every product made inside."""

    def __init__(self):
        super().__init__()
        self.extents = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            a, b = args[:2] if function.overloadpacket is aten.mm else args[1:3]
            self.extents.append((*a.shape, b.shape[1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device_that_is_no_cpu(engine, kind, dtype, monkeypatch, no_kernels):
    """Meta tensors go a GPU's way. Every other extent is a multiple of 8 here, and V = 101, 99 or 97 is odd."""
    monkeypatch.setattr(checks, "unavailable", lambda engine, device, *dtypes: None)
    monkeypatch.setattr(block_sizes, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tiled_forward, "splits_of", lambda *sizes: 2)
    for name in ("fused_kd", "fused_kd_gradients"):  # as they run, behind no boundary
        monkeypatch.setattr(operators, name, getattr(operators, name)._init_fn)
    case = copy(make(n=48, hs=16, ht=24), dtype)

    head, (source, own), labels = pytree.tree_map(meta, (student(case), sources(case, kind), case.labels))
    with Products() as products:
        for valid in ({}, {"valid_vocab": 99}):
            fused_kd_loss(head, source, labels, engine=engine, ce_weight=0.5, scratch_bytes=24 * 2**10, **valid, **own)
    vocabulary = {n for extents in products.extents for n in extents if n not in (16, 24, 32, 48, 96)}
    assert {5, 3} <= vocabulary
    assert all(n % 8 == 0 or n < 8 for n in vocabulary)
    assert sum(max(extents) >= 32 for extents in products.extents) > 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", FUSED)
def test_the_results_are_those_of_whole_products(engine, kind, monkeypatch):
    results = []
    for extent in (1, 8):
        monkeypatch.setattr(matmul, "extent", lambda device, extent=extent: extent)
        case = make(n=10)
        with mock.patch.object(matmul, "_multiply", wraps=matmul._multiply) as multiply:
            loss = loss_of(fused_kd_loss, case, kind, engine=engine, valid_vocab=99, scratch_bytes=5 * 2 * 128 * 8)
            loss.backward()
        rests = [call for call in multiply.call_args_list if 3 in (*call.args[0].shape, call.args[1].shape[1])]
        assert bool(rests) == (extent == 8)
        results.append([loss.detach(), *(getattr(case, name).grad for name in leaves(kind) if name in LEAVES)])
    for split, whole in zip(*reversed(results), strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 8, 96, 101, 9001])
@pytest.mark.parametrize("add", [False, True])
def test_what_is_there_is_written_over_or_added_to(dtype, vocab, add, monkeypatch):
    """Not read where nothing is added: uninitialized memory may hold NaN."""
    monkeypatch.setattr(matmul, "extent", lambda device: 8)
    wide = torch.promote_types(dtype, torch.float32)
    x, w, g = (torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in ((6, 5), (vocab, 5), (6, vocab)))
    logits = matmul.logits(x, w, torch.full((6, vocab + 3), torch.nan, dtype=wide)[:, :vocab])
    there = 1.0 if add else torch.nan
    d_x = matmul.input_gradient(g.to(wide), w, torch.full((6, 5), there, dtype=wide), add=add)
    d_w = matmul.weight_gradient(g.to(wide), x, torch.full((vocab, 5), there, dtype=wide), add=add)
    exact = [x.double() @ w.double().t(), g.double() @ w.double() + add, g.double().t() @ x.double() + add]
    for found, expected, tolerance in zip((logits, d_x, d_w), exact, (1e-5, 1e-2, 1e-5), strict=True):
        assert found.dtype == wide
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=100 * tolerance)
    if not add:
        rounded = matmul.weight_gradient(g.to(wide), x, torch.full((vocab, 5), torch.nan, dtype=dtype))
        assert torch.equal(rounded, d_w.to(dtype))


class Launches(TorchDispatchMode):
    """Operators that compute something: neither views nor allocations."""

    IDLE = ("view", "_unsafe_view", "slice", "select", "t", "transpose", "unsqueeze", "expand", "split", "unbind",
            "detach", "alias", "empty", "new_empty", "empty_like")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names += [name] * (name not in self.IDLE)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("engine", "kind", "metrics", "most"),
    [
        ("triton_chunked", "projected", False, 53),
        ("triton_chunked", "projected", True, 62),
        ("triton_chunked", "head", False, 45),
        ("triton_tiled", "projected", False, 56),
    ],
)
def test_few_operators_beside_products_and_kernels(engine, kind, metrics, most, no_kernels):
    """Of a forward and backward of one chunk, and of one chunk more. Half of them make coefficients of the options."""
    counts = []
    for N in (256, 512):
        case = SimpleNamespace(**{name: meta(x) for name, x in vars(copy(make(n=N), torch.bfloat16)).items()})

        def run(case, N=N):
            with Launches() as launches:
                scratch = 128 * 12 * 256 if engine == "triton_chunked" else 0
                loss = loss_of(
                    fused_kd_loss, case, kind, engine=engine, return_metrics=metrics, scratch_bytes=scratch or None
                )
                (loss[0] if metrics else loss).backward()
            counts.append(len(launches.names))

        highest_on_a_gpu(case, run)
    assert counts[0] <= most
    assert counts[1] - counts[0] <= 7


@pytest.mark.parametrize(
    ("hip", "since_2_10", "gradients"),
    [
        (None, False, torch.bfloat16),
        (None, True, torch.bfloat16),
        ("6.4", False, torch.float32),
        ("6.4", True, torch.bfloat16),
    ],
)
def test_rocm_has_no_mixed_product_before_torch_2_10(hip, since_2_10, gradients, monkeypatch):
    """There 16-bit operands are widened, as on a CPU."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(matmul, "SINCE_2_10", since_2_10)
    gpu = torch.device("cuda")
    assert matmul.gradient_dtype(torch.bfloat16, gpu) == gradients
    assert matmul.widens(gpu) == (gradients == torch.float32)
    assert matmul.gradient_dtype(torch.float64, gpu) == torch.float64
    operand = type("Operand", (), {"dtype": torch.bfloat16, "device": gpu, "is_cuda": True})()
    assert matmul._multiplies(operand, torch.float32) == (gradients == torch.bfloat16)


@pytest.mark.parametrize(
    ("hip", "chip", "expected"),
    [(None, "", True), ("6.4", "gfx942:sramecc+:xnack-", True), ("6.4", "gfx90a:sramecc+", False)],
)
def test_kernels_round_to_tf32_where_triton_can(hip, chip, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=chip))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert matmul.tf32(torch.device("cuda")) == expected
