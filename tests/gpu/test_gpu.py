"""The engines on a GPU: values at sizes a user has, and what no interpreter can show.

The rule: ‖ours − truth‖ ≤ ‖eager in the same dtype − truth‖ + tolerance·‖truth‖, for the loss and every gradient. Truth
(float64) and eager are helpers/oracle.py, whole logits of 256 rows at a time, summed in float64. The upstream gradient
is N, as under a loss scaler: without it eager underflows in float16 and excuses anything. Warnings are shown, not
raised: one of a stack that CI never runs would hide everything else.
"""

import gc
from functools import partial
from types import SimpleNamespace

import oracle
import pytest
import teachers
import torch
from cases import LEAVES, copy, relative, student, teacher
from test_autocast import check_autocast, check_grad_scaler
from test_chunked import near_convergence, solve
from test_operators import problem
from torch.utils import _pytree as pytree

from kdfast import Projected, fused_kd_loss
from kdfast.engines import triton_rows
from kdfast.engines.row_work import Buffers
from kdfast.ops import matmul
from kdfast.ops.planning import gradient_scale, row_stride, wanted
from kdfast.ops.problem import Problem

TRITON = ["triton_chunked", "triton_tiled"]
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
KINDS = {  # leaves and options
    "projected": (LEAVES, {"temperature": 2.0, "ce_weight": 0.5, "anchor_weight": 0.3}),
    "head": (("hs", "W", "b"), {"temperature": 2.0, "ce_weight": 0.5}),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# tolerance: half a unit in the last place of what products round their operands to; in float32 some hundred of 6e-8
PRECISIONS = {"bf16": (BF16, 2**-9), "fp16": (FP16, 2**-11), "tf32": (FP32, 2**-11), "fp32": (FP32, 2e-5)}
SIZES = {  # N, V, Hs, Ht
    "1024x32000": (1024, 32000, 768, 1024),
    "16384x50257": (16384, 50257, 768, 1024),  # V odd: no row of logits ends on an aligned address
    "2048x151936": (2048, 151936, 4096, 4096),
    "512x262144": (512, 262144, 2048, 4096),
    "1x50257": (1, 50257, 768, 1024),
    "257x50257": (257, 50257, 768, 1024),  # one row more than whole blocks, whatever they are
}
MIDDLE = (2048, 50257, 768, 1024)
EVERY_OPTION = [("257x50257", p, kind, d) for p in PRECISIONS for kind in KINDS for d in DIVERGENCES]
TWO = [("projected", "forward_kl"), ("head", "jsd")]
EVERY_SIZE = [(size, p, *two) for size in SIZES for p in ("bf16", "fp32") for two in TWO]
LONGEST = [("16384x50257", p, "projected", "forward_kl") for p in ("fp16", "tf32")]
COMBINATIONS = list(dict.fromkeys(EVERY_OPTION + EVERY_SIZE + LONGEST))


def gpu(test):
    return pytest.mark.gpu(pytest.mark.filterwarnings("default")(test))


def make(device, dtype, N, V, Hs, Ht):
    """Normal inputs as in cases.make, but made on `device`: logits of standard deviation 2, every fifth row ignored."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, std=1.0):
        return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

    case = SimpleNamespace(
        hs=normal(N, Hs), W=normal(V, Hs, std=2 * Hs**-0.5), b=normal(V, std=0.5),
        ht=normal(N, Ht), Wt=normal(V, Ht, std=2 * Ht**-0.5), bt=normal(V, std=0.5),
        P=normal(Hs, Ht, std=Ht**-0.5), p=normal(Hs, std=0.1),
        labels=torch.randint(0, V, (N,), generator=generator, device=device),
    )  # fmt: skip
    case.labels[4::5] = -100
    return copy(case, dtype)


def gradients_of(loss, leaves, upstream=1.0):
    return torch.autograd.grad(loss, tuple(leaves), torch.full_like(loss, upstream))


def in_blocks(case, kind, divergence, dtype, *, rows=256):
    """(loss, gradients by name) of the definition, all in `dtype`, `rows` rows at a time, added up in float64."""
    c, N, (names, options) = copy(case, dtype), len(case.hs), KINDS[kind]
    leaves, total = {name: getattr(c, name) for name in names}, 0
    sums = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
    sources = {"P": c.P, "p": c.p} if kind == "projected" else {"Wt": c.Wt, "bt": c.bt}
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        rest = sources | options | {"labels": c.labels[part], "name": divergence, "num_items": N}
        with torch.device(c.hs.device):
            loss = oracle.loss(c.hs[part], c.W, c.b, ht=c.ht[part], **rest)
        total += loss.detach().double()
        for name, gradient in zip(names, gradients_of(loss, leaves.values(), N), strict=True):
            sums[name] += gradient
    return total, sums


def fused(case, kind, engine, function=fused_kd_loss, **more):
    """(loss, gradients by name) of ours on the tensors of `case`."""
    N, (names, options) = len(case.hs), KINDS[kind]
    sources = (student(case), teacher(case, kind), case.labels)
    loss = function(*sources, num_items_in_batch=N, engine=engine, **options, **more)
    gradients = gradients_of(loss, (getattr(case, name) for name in names), N)
    return loss.detach(), dict(zip(names, gradients, strict=True))


def compare(device, precision, sizes, kind, divergence, engines, *, rows=256):
    """Hold every engine to the rule."""
    dtype, tolerance = PRECISIONS[precision]
    case = make(device, dtype, *sizes)
    truth, exact = in_blocks(case, kind, divergence, torch.float64, rows=rows)
    theirs, eager = in_blocks(case, kind, divergence, dtype, rows=rows)
    largest = max(gradient.norm() for gradient in exact.values())
    for name, gradient in exact.items():  # where a gradient all but cancels, its own size is no measure
        slack = tolerance * float(max(1, 1e-3 * largest / gradient.norm()))
        eager[name] = relative(eager[name], gradient) + slack
    for engine in engines:
        loss, gradients = fused(case, kind, engine, divergence=divergence)
        assert relative(loss, truth) <= relative(theirs, truth) + tolerance, engine
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            assert relative(gradient, exact[name]) <= eager[name], (engine, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter")
@pytest.mark.parametrize(("kind", "divergence"), TWO)
def test_the_comparison_itself(kind, divergence, monkeypatch):
    """On a CPU, tiny: the engines pass, and an engine whose dW is off by a thousandth doesn't."""
    arguments = ("cpu", "fp32", (7, 70, 16, 20), kind, divergence)
    compare(*arguments, TRITON, rows=3)
    weight_gradient = matmul.weight_gradient
    monkeypatch.setattr(matmul, "weight_gradient", lambda g, x, out: weight_gradient(g * 1.001, x, out))
    with pytest.raises(AssertionError, match=r"'triton_chunked', 'W'"):
        compare(*arguments, TRITON[:1], rows=3)


@gpu
@pytest.mark.parametrize(("size", "precision", "kind", "divergence"), COMBINATIONS)
def test_no_worse_than_eager(size, precision, kind, divergence, request):
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    assert matmul.tf32(torch.device("cuda")) == (precision == "tf32")
    compare("cuda", precision, SIZES[size], kind, divergence, ["torch", *TRITON])


@gpu
@pytest.mark.parametrize("engine", TRITON)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "divergence"), [(BF16, d) for d in DIVERGENCES] + [(FP16, "forward_kl")])
def test_near_convergence(engine, kind, dtype, divergence, request):
    """At KL 4e-4, within 0.3% of float64's, which rounds the projected hidden states too. cuBLAS may add up a 16-bit
    projection in 16 bits; not here, or the two would round different numbers."""
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        setattr(torch.backends.cuda.matmul, name, False)
        request.addfinalizer(partial(setattr, torch.backends.cuda.matmul, name, True))
    tensors = [t.cuda() for t in near_convergence(dtype, 0.02, vocab=50257, rows=512)]
    options = {"divergence": divergence, "upstream": 2.0**14}
    with torch.device("cuda"):
        exact_loss, kl, exact = solve(tensors, kind, torch.float64, "reference", rounded=True, **options)
        loss, _, ours = solve(tensors, kind, dtype, engine, **options)
    assert kl < 1e-3
    assert relative(loss, exact_loss) < 1e-4
    for name, gradient, expected in zip(("hidden", "weight", "projector"), ours, exact, strict=False):
        assert relative(gradient, expected) < 3e-3, name


def assert_close(a, b, bits=False):
    """Two (loss, gradients): the same work, perhaps by other algorithms of the vendor's; or bit by bit."""
    assert relative(a[0], b[0]) <= (0 if bits else 1e-5)
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]) if bits else relative(a[1][name], b[1][name]) < 2**-9, name


# every engine with every kind of teacher; a CPU checks what these functions do, as far as it can

EVERY = [(engine, kind) for engine in teachers.ENGINES for kind in teachers.KINDS]
SIZE = (257, 5003, 256, 320)  # a vocabulary that is odd; one row more than whole blocks


def every(device, dtype, sizes, engine, kind, **options):
    """(tensors of one problem by name, a function (loss, gradients by name) of what they hold when it is called)."""
    case = make(device, dtype, *sizes)
    if kind == "hidden":
        case.hidden = torch.nn.functional.linear(case.ht, case.P, case.p).detach().requires_grad_()
        source, own, names = Projected(case.hidden), {}, ("hs", "W", "b", "hidden")
    else:
        (source, own), names = teachers.sources(case, kind), teachers.leaves(kind)
    numbers = {"temperature": 1.0 if kind == "weights" else 2.0, "kd_weight": 0.7, "ce_weight": 0.5}
    case.numbers = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
    case.given = pytree.tree_leaves((source, own))

    def run(function=fused_kd_loss, **more):
        arguments = (student(case, softcap=30.0), source, case.labels)
        loss = function(*arguments, engine=engine, **own | case.numbers | options | more)
        return loss.detach(), dict(zip(names, gradients_of(loss, (getattr(case, n) for n in names)), strict=True))

    return case, run


def replayable(device, run):
    """(what `run` returned, a function that runs it again into the same tensors: a CUDA graph's replay)."""
    if device == "cpu":
        result = run()

        def again():
            pytree.tree_map(lambda old, new: old.copy_(new), result, run())

        return result, again
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, allocates, loads
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return result, graph.replay


def check_replay(device, dtype, sizes, engine, kind):
    """Forward and backward, replayed on other numbers: in the tensors, and in the 0-d tensors of the term weights."""
    case, run = every(device, dtype, sizes, engine, kind)
    result, replay = replayable(device, run)
    stale = result[0].clone()
    with torch.no_grad():
        case.W.mul_(0.5)
        case.numbers["kd_weight"].fill_(1.3)
        for shift, tensor in enumerate((case.hs, case.labels, *case.given)):
            if isinstance(tensor, torch.Tensor) and tensor.shape[0] == sizes[0]:
                tensor.copy_(tensor.roll(shift, 0))
    replay()
    assert_close(result, run())
    assert relative(stale, result[0]) > 1e-2


def check_backwards(device, dtype, sizes, engine, kind):
    """Inputs are not written to, and a second backward gives the same bits."""
    case, run = every(device, dtype, sizes, engine, kind)
    inputs = (case.hs, case.W, case.b, case.P, case.p, case.labels, *case.given)
    before = [(x, x._version, x.detach().clone()) for x in inputs if isinstance(x, torch.Tensor)]
    twice = []

    def keep(*arguments, **options):
        loss = fused_kd_loss(*arguments, **options)
        twice.append(torch.autograd.grad(loss, (case.hs, case.W), torch.full_like(loss, 2.0), retain_graph=True))
        return loss

    for reduction in ("mean", "none"):
        _, gradients = run(keep, reduction=reduction)
        assert all(torch.equal(a, 2 * gradients[name]) for name, a in zip(("hs", "W"), twice.pop(), strict=True))
    for x, version, value in before:
        assert x._version == version
        assert torch.equal(x.detach(), value)


def check_slice(device, dtype, sizes, engine, kind):
    """Vocabulary-parallel in a group of one process: the phases between the collectives, which are as on more. On a GPU
    nothing waits for the host, once the slices are known."""
    _, run = every(device, dtype, sizes, engine, kind)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        sliced = partial(run, process_group=torch.distributed.group.WORLD, vocab_start=0)
        others = [] if kind in ("renormalize", "weights") else [{"divergence": "symmetric_kl"}]
        for options in ({}, {"reduction": "none"}, *others):
            assert_close(sliced(**options), run(**options))
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
                try:
                    sliced(**options)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what follows does it on a GPU")
@pytest.mark.parametrize("kind", teachers.KINDS)
def test_the_checks_themselves(kind):
    for check in (check_replay, check_backwards, check_slice):
        check("cpu", FP32, (7, 70, 16, 20), "torch", kind)


@gpu
@pytest.mark.parametrize(("engine", "kind"), EVERY[len(teachers.KINDS) :])
def test_slice_of_the_vocabulary(engine, kind):
    check_slice("cuda", BF16, SIZE, engine, kind)


@gpu
@pytest.mark.parametrize(("engine", "kind"), EVERY)
def test_captured_in_a_graph(engine, kind):
    check_replay("cuda", BF16, SIZE, engine, kind)


@gpu
@pytest.mark.parametrize(("engine", "kind"), EVERY)
def test_inputs_are_not_written_to_and_a_second_backward_is_right(engine, kind):
    check_backwards("cuda", BF16, SIZE, engine, kind)


@gpu
@pytest.mark.parametrize(("engine", "kind"), EVERY)
def test_no_host_synchronisation(engine, kind):
    """With numbers and CUDA tensors among the options, and with per-row losses."""
    case, run = every("cuda", BF16, SIZE, engine, kind)
    numbers = {"temperature": 1.0, "ce_weight": 0.5, "num_items_in_batch": 100}
    for options in (numbers, {"reduction": "none"}):
        run(**options)  # compiles and allocates
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(**options)
            with pytest.raises(RuntimeError, match="synchroniz"):  # the instrument works
                case.hs[0, 0].item()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("kind", ["projected", "logits", "bucket"])
@pytest.mark.parametrize("engine", teachers.ENGINES)
def test_compiled(engine, kind):
    torch._dynamo.reset()
    _, run = every("cuda", BF16, SIZE, engine, kind)
    assert_close(run(torch.compile(fused_kd_loss, fullgraph=True)), run())


@gpu
@pytest.mark.parametrize(("engine", "kind"), EVERY)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast(engine, kind, dtype):
    check_autocast("cuda", engine, kind, dtype, n=64, v=501, hs=64, ht=96)


@gpu
@pytest.mark.parametrize("kind", ["projected", "bucket"])
@pytest.mark.parametrize("engine", teachers.ENGINES)
def test_grad_scaler(engine, kind):
    check_grad_scaler("cuda", engine, kind)


@gpu
@pytest.mark.parametrize("engine", ["torch", *TRITON])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_two_runs_give_the_same_bits(engine, dtype):
    """The second on a stream of its own, where its input is written late: what ran on another would read NaN."""
    case, late, stream = make("cuda", dtype, *MIDDLE), make("cuda", dtype, *MIDDLE), torch.cuda.Stream()
    expected = fused(case, "projected", engine)
    with torch.no_grad():
        late.hs.fill_(torch.nan)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # cycles, about a tenth of a second
            late.hs.copy_(case.hs)
    with torch.cuda.stream(stream):
        result = fused(late, "projected", engine)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(result, expected, bits=True)


@gpu
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_row_kernel_in_place(divergence):
    """In float32 gradients are written over the logits they are taken of: fifty times the bits of one written apart."""
    case, m, V = make("cuda", FP32, 1024, 50257, 64, 64), 1024, 50257
    x = Problem(*problem(case, "projected", engine="triton_chunked", divergence=divergence, ce_weight=0.5))
    shape = (2 * m, row_stride(V, x.hidden.device, x.engine))
    logits, scratch, apart = (torch.randn(shape, device=x.hidden.device)[:, :V] for _ in range(3))
    options = {"scale": gradient_scale(x), "wanted": wanted(x), "stats": torch.zeros(6, m, device=x.hidden.device)}

    work = triton_rows.Work(x, **options)

    def solve_chunk(z, g):
        work(slice(0, m), z[:m], z[m:], Buffers(g[:m], g[m:], None, None, None))

    solve_chunk(logits, apart)
    for _ in range(50):
        scratch.copy_(logits)
        solve_chunk(scratch, scratch)
        assert torch.equal(scratch, apart)


@gpu
def test_a_chunk_of_more_than_two_billion_logits():
    """43000 rows of 50304 each: offsets past 2³¹ in the kernels and in the vendor's products."""
    case = make("cuda", BF16, 43000, 50257, 64, 64)
    expected = fused(case, "head", "triton_chunked")
    assert_close(fused(case, "head", "triton_chunked", scratch_bytes=40 << 30), expected)


def peak(run):
    """Bytes `run` allocates at most, above what is allocated before it and the gradients it returns."""
    run()  # workspaces of the libraries
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = run()
    return torch.cuda.max_memory_allocated() - before - sum(gradient.nbytes for gradient in gradients)


@gpu
def test_peak_memory(capsys):
    """triton_chunked: scratch, dW in float32, a copy of dW, and 5%; triton_tiled in slabs of 64 MiB: 5% of eager's."""
    case = make("cuda", BF16, 8192, 50257, 768, 1024)
    case.b = case.p = None
    scratch = {"triton_chunked": 512 << 20, "triton_tiled": 64 << 20}

    def run(engine):
        if engine == "eager":
            with torch.device("cuda"):
                loss = oracle.loss(case.hs, case.W, ht=case.ht, P=case.P)
        else:
            sources = student(case), teacher(case, "projected")
            loss = fused_kd_loss(*sources, engine=engine, scratch_bytes=scratch[engine])
        return gradients_of(loss, [case.hs, case.W, case.P])

    peaks = {engine: peak(partial(run, engine)) for engine in ("eager", *scratch)}
    with capsys.disabled():
        print("\n ", ", ".join(f"{engine} {size / 2**20:.0f} MiB" for engine, size in peaks.items()))
    d_weight = case.W.numel() * (4 + case.W.element_size())
    assert peaks["triton_chunked"] <= 1.05 * (scratch["triton_chunked"] + d_weight)
    assert peaks["triton_tiled"] <= 0.05 * peaks["eager"]
