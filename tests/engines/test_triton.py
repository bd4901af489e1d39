"""The Triton engines where they differ from the others: blocks, strides, 16-bit gradients, what they must not read.

That they compute the loss at all is shown with every other engine in tests/loss/test_loss.py, in float64. Without a GPU
the kernels run in the interpreter: it is right in fp32, fp16 and fp64 and shows neither races nor misalignment.
"""

import mmap

import oracle
import pytest
import torch
from cases import LEAVES, copy, gradients, make, relative, student, teacher
from near_convergence import near_convergence, solve

from kdfast import JSD, AlphaBeta, Head, Projected, fused_kd_loss
from kdfast.kernels import block_sizes, tiled_forward
from kdfast.kernels.block_sizes import Row, RowConfig, TileConfig
from kdfast.kernels.launch import Gradients, Heads, Term
from kdfast.kernels.logit_gradients import add_column_sums
from kdfast.kernels.row_kernel import Chunk, solve_rows
from kdfast.kernels.tiled_backward import slab_gradients
from kdfast.kernels.tiled_forward import statistics
from kdfast.ops import matmul

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a GPU has test_gpu.py")
pytestmark = interpreted
ENGINES = ["triton_chunked", "triton_tiled"]
BLOCK = 64  # of the vocabulary, in the interpreter's rows of the tables


@pytest.fixture
def wide(monkeypatch):
    """Blocks for large problems: the interpreter pays per operation."""
    tile = TileConfig(64, 2048, 256, 4, 1)
    monkeypatch.setattr(block_sizes, "INTERPRETER", Row(RowConfig(64, 4096, 4), *[tile] * 5, why="large problems"))


def eager(case, kind, dtype, options):
    """Everything in `dtype`, logits included; loss and gradients."""
    c = copy(case, dtype)
    sources = {"P": c.P, "p": c.p} if kind == "projected" else {"Wt": c.Wt, "bt": c.bt}
    loss = oracle.loss(c.hs, c.W, c.b, ht=c.ht, **sources, labels=c.labels, **options)
    loss.backward()
    return loss.detach(), gradients(c)


# V just below, at and above a block, two blocks and one (a prime), and one entry; one row, a block's rows and one more;
# widths below, at and above a block of the width, none but 16 a multiple of it
SHAPES = [
    {"v": BLOCK - 1}, {"v": BLOCK}, {"v": BLOCK + 1}, {"v": 2 * BLOCK + 3}, {"v": 1}, {"n": 1}, {"n": 16}, {"n": 17},
    {"hs": 16, "ht": 16}, {"hs": 17, "ht": 33}, {"hs": 1, "ht": 3},
]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_eager(engine, dtype, shape):
    """|ours − truth| ≤ |eager in the same dtype − truth| + tolerance, relative to the truth's norm: 2e-5 in float32
    (some hundred roundings of 6e-8), 1e-3 in float16 (two of 5e-4)."""
    case = make(dtype, **shape)
    case.labels[0] = 0  # one row would be an ignored one
    tolerance = 2e-5 if dtype == torch.float32 else 1e-3
    for kind in ("projected", "head"):
        options = {"temperature": 2.0, "ce_weight": 0.5} | ({"anchor_weight": 0.3} if kind == "projected" else {})
        truth, truth_gradients = eager(case, kind, torch.float64, options)
        theirs, their_gradients = eager(case, kind, dtype, options)
        ours = copy(case, dtype)
        loss = fused_kd_loss(student(ours), teacher(ours, kind), ours.labels, engine=engine, **options)
        loss.backward()
        assert loss.dtype == torch.float32
        size = max(float(gradient.norm()) for gradient in truth_gradients.values())
        loss = loss.detach()
        assert abs(float(loss - truth)) <= abs(float(theirs - truth)) + tolerance * (abs(float(truth)) + 1e-3)
        for name, gradient in gradients(ours).items():
            error = float((gradient.double() - truth_gradients[name]).norm())
            eager_error = float((their_gradients[name].double() - truth_gradients[name]).norm())
            allowed = tolerance * max(float(truth_gradients[name].norm()), 1e-3 * size)
            assert error <= eager_error + allowed, (kind, name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", JSD(0.3), AlphaBeta(0.2, 0.7)], ids=str)
@pytest.mark.parametrize(("weight_std", "temperature"), [(8.0, 0.5), (800.0, 2.0), (0.3, 10.0)])
def test_extreme_logits(engine, divergence, weight_std, temperature):
    """Logits of ±100 and ±1e4: finite, and as near to float64 as logits rounded to float32 allow."""
    case = make(torch.float32, weight_std=weight_std)
    exact = copy(case)
    options = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.5}
    truth = fused_kd_loss(student(exact), teacher(exact, "head"), exact.labels, engine="reference", **options)
    loss = fused_kd_loss(student(case), teacher(case, "head"), case.labels, engine=engine, **options)
    truth.backward()
    loss.backward()
    allowed = 2e-5 if weight_std < 100 else 2e-3
    assert relative(loss, truth) < allowed
    for name, gradient in gradients(case).items():
        assert relative(gradient, gradients(exact)[name]) < allowed, name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["head", "projected"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", JSD(0.5), AlphaBeta(0.2, 0.7)], ids=str)
def test_sixteen_bit_gradients_near_convergence(engine, kind, divergence, monkeypatch, wide):
    """Gradients of the logits in 16 bits, as on a GPU, at KL 4e-4: within 0.3% of float64's (which, projected, rounds
    the projected hidden states too). dW of a projected teacher is 3–9% off where its rows are not decorrelated."""
    monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
    tensors = near_convergence(torch.float16, 0.02, width=128, vocab=8192, rows=96)
    options = {"divergence": divergence, "upstream": 2.0**14}  # as a loss scaler: fp16 gradients would underflow
    exact_loss, kl, exact = solve(tensors, kind, torch.float64, "reference", rounded=True, **options)
    loss, _, ours = solve(tensors, kind, torch.float16, engine, **options)
    assert kl < 8e-4
    assert relative(loss, exact_loss) < 1e-4
    for gradient, expected in zip(ours, exact, strict=True):
        assert gradient.dtype == torch.float16
        assert relative(gradient, expected) < 3e-3


@pytest.mark.parametrize("layout", [(4, 2), (2, 16), (2, 4)], ids=["mma", "tcgen05", "v_mfma"])
def test_threads_that_share_a_row(layout, monkeypatch, wide):
    """Whichever columns of a tile an architecture gives to a thread: loss, cross entropy, entropies, agreement."""
    monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(tiled_forward, "threads_of_row", lambda device, columns: layout)
    case = make(torch.float16, n=20, v=300)
    options = {"ce_weight": 0.5, "return_metrics": True}
    for divergence in ("forward_kl", "jsd"):
        found, expected = (
            fused_kd_loss(student(case), teacher(case, "head"), case.labels, engine=e, divergence=divergence, **options)
            for e in ("triton_tiled", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("teacher_grad", ["full", "projector", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_where_the_kd_term_and_the_anchor_go(engine, teacher_grad, divergence):
    """With "none" the projector gets the anchor's gradient alone."""
    results = []
    for name in ("reference", engine):
        case = make(n=6, v=41)
        options = {"teacher_grad": teacher_grad, "anchor_weight": 0.3, "ce_weight": 0.5, "divergence": divergence}
        fused_kd_loss(student(case), teacher(case, "projected"), case.labels, engine=name, **options).backward()
        results.append(gradients(case))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_teacher_gradient_survives_a_large_cross_entropy(engine, monkeypatch, wide):
    """Decorrelated teacher rows carry no more rounding than their own size allows, however large the student's are."""
    monkeypatch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
    tensors = near_convergence(torch.float16, 0.02, width=128, vocab=4096, rows=64)
    labels = torch.randint(0, 4096, (64,))
    options = {"labels": labels, "ce_weight": 1.0, "upstream": 2.0**8}
    _, _, exact = solve(tensors, "projected", torch.float64, "reference", rounded=True, **options)
    _, _, ours = solve(tensors, "projected", torch.float16, engine, **options)
    for name, gradient, expected in zip(("hidden", "weight", "projector"), ours, exact, strict=True):
        assert relative(gradient, expected) < 4e-3, name


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16(engine):
    """The interpreter has no bf16 product: operands are widened there."""
    case = make(torch.bfloat16)
    exact = copy(case)
    loss = fused_kd_loss(student(case), teacher(case, "head"), case.labels, ce_weight=0.5, engine=engine)
    truth = fused_kd_loss(student(exact), teacher(exact, "head"), exact.labels, ce_weight=0.5)
    loss.backward()
    truth.backward()
    assert relative(loss, truth) < 1e-5
    for name, gradient in gradients(case).items():
        assert gradient.dtype == torch.bfloat16
        assert relative(gradient, gradients(exact)[name]) < 5e-3, name


@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_give_the_same_bits(engine):
    results = []
    for _ in range(2):
        case = make(torch.float32)
        loss = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, ce_weight=0.5, engine=engine)
        loss.backward()
        results.append((loss, gradients(case)))
    assert torch.equal(results[0][0], results[1][0])
    for name in LEAVES:
        assert torch.equal(results[0][1][name], results[1][1][name])


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_rows_of_the_embedding_are_not_read(engine):
    case = make()
    case.labels.clamp_(max=89)
    with torch.no_grad():
        for tensor in (case.W, case.b, case.Wt):
            tensor[90:] = torch.nan
    for kind in ("projected", "head"):
        loss = fused_kd_loss(student(case), teacher(case, kind), case.labels, valid_vocab=90, engine=engine)
        loss.backward()
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(case).values())


def far_apart(rows, columns, stride, dtype=torch.float16):
    """(rows, columns) zeros whose rows lie `stride` elements apart, in memory that is committed page by page."""
    size = ((rows - 1) * stride + columns) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).as_strided((rows, columns), (stride, 1))


FAR = 2**31 // 4 + 64  # element offsets pass 2³¹ from the fifth row on


def term(n, **options):
    defaults = {
        "divergence": "forward_kl", "parameter": 0.0, "temperature": torch.tensor(2.0),
        "coefficients": torch.full((3, n), 0.5), "scale": torch.ones(()), "active": torch.ones(n, dtype=torch.bool),
        "labels": None, "targets": None, "ce_gradient": False, "teacher_gradient": True, "anchor_gradient": False,
        "metrics": False,
    }  # fmt: skip
    return Term(**defaults | options)


def test_row_kernel_beyond_two_billion_elements():
    n, v = 6, 70
    near_s, near_t = torch.randn(n, v), torch.randn(n, v)
    far = [far_apart(n, v, FAR, dtype) for dtype in (torch.float32, torch.float32, torch.float16, torch.float16)]
    far[0].copy_(near_s)
    far[1].copy_(near_t)
    near = [near_s, near_t, torch.empty(n, v).half(), torch.empty(n, v).half()]
    results = []
    for z_s, z_t, grad_s, grad_t in (near, far):
        stats = torch.zeros(6, n)
        t = term(n)
        heads = Heads(z_s, z_s, None, 1.0, None, None, None, None, 1.0, None, None, None, v, v, False)
        chunk = Chunk(heads, t, z_s, z_t, width=v, start=0)
        solve_rows(chunk, Gradients.of(grad_s, grad_t), stats=stats, config=RowConfig(2, 32, 4))
        sums = torch.zeros(v)
        add_column_sums(grad_s, None, sums)
        results.append((stats, grad_s.clone(), grad_t.clone(), sums))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert results[0][1].any()


def test_tiled_kernels_beyond_two_billion_elements():
    n, v, h = 6, 70, 20
    config = TileConfig(16, 32, 16, 4, 1)
    tensors = [torch.randn(n, h).half(), torch.randn(n, h).half(), torch.randn(v, h).half()]
    far = [far_apart(n, h, FAR), far_apart(n, h, FAR), far_apart(v, h, 2**31 // 64)]
    results = []
    for which in (tensors, far):
        for tensor, values in zip(which, tensors, strict=True):
            tensor.copy_(values)
        heads = Heads(which[0], which[2], None, 1.0, None, which[1], None, None, 1.0, None, None, None, v, v, False)
        t, stats, constants = term(n), torch.zeros(6, n), torch.empty(12, n)
        statistics(heads, t, stats=stats, constants=constants, decorrelate=False, config=config)
        room = 96  # whole tiles of 32
        planes = [far_apart(n, room, FAR) if which is far else torch.empty(n, room).half() for _ in range(2)]
        planes = [plane[:, :v] for plane in planes]
        slab_gradients(
            heads, t, Gradients.of(*planes), constants=constants, first=0, decorrelate=False, config=config
        )
        results.append((stats, *(plane.clone() for plane in planes)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert results[0][1].any()


def test_the_projector_is_a_kernel_of_the_tiled_engine():
    case = make(torch.float32)
    expected = torch.nn.functional.linear(case.ht.double(), case.P.double(), case.p.double())
    from kdfast.engines.operators import project

    projected = project(case.ht, case.P, case.p)
    torch.testing.assert_close(projected.double(), expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(projected)
    ours = torch.autograd.grad(projected, (case.P, case.p), upstream)
    theirs = torch.autograd.grad(expected, (case.P, case.p), upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_unfinished_head_is_refused_on_a_device_triton_cannot_reach(monkeypatch):
    monkeypatch.setattr(block_sizes, "interpreting", lambda: False)
    case = make()
    with pytest.raises(ValueError, match=r"engine='triton_tiled' .* cpu"):
        fused_kd_loss(Head(case.hs, case.W), Projected(case.ht, case.P), engine="triton_tiled")
