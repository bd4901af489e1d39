"""The engines on a GPU: values at sizes a user has, and what no interpreter can show.

The rules are those of helpers/gpu_checks.py. Warnings are shown, not raised: one of a stack that CI never runs would
hide everything else.
"""

import gc
from functools import partial

import oracle
import pytest
import teachers
import torch
from autocast_checks import check_autocast, check_grad_scaler
from cases import relative, student, teacher
from gpu_checks import (
    BF16,
    FP16,
    FP32,
    KINDS,
    PRECISIONS,
    TRITON,
    TWO,
    assert_close,
    check_backwards,
    check_replay,
    check_slice,
    compare,
    every,
    fused,
    gradients_of,
    make,
)
from near_convergence import errors_of_rows, near_convergence, solve
from operator_arguments import problem

from kdfast import JSD, SkewKL, SymmetricKL, fused_kd_loss
from kdfast.engines import triton_rows
from kdfast.engines.chunk_loop import GradientBuffers
from kdfast.ops import matmul
from kdfast.ops.planning import grad_flags, gradient_scale, row_stride
from kdfast.ops.problem import Problem

if not torch.cuda.is_available():  # once, rather than a skip for each of hundreds of tests, which would hide another
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
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
EVERY_SIZE = [(size, p, *two) for size in SIZES for p in ("bf16", "fp32") for two in TWO]
LONGEST = [("16384x50257", p, "projected", "forward_kl") for p in ("fp16", "tf32")]
COMBINATIONS = list(dict.fromkeys(EVERY_OPTION + EVERY_SIZE + LONGEST))


@pytest.mark.parametrize(("size", "precision", "kind", "divergence"), COMBINATIONS)
def test_no_worse_than_eager(size, precision, kind, divergence, request):
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    assert matmul.tf32(torch.device("cuda")) == (precision == "tf32")
    compare("cuda", precision, SIZES[size], kind, divergence, ["torch", *TRITON])


@pytest.mark.parametrize("engine", TRITON)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "divergence"), [*((BF16, d) for d in [*DIVERGENCES, "alpha_beta"]), (FP16, "forward_kl")]
)
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



@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("engine", TRITON)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", JSD(0.5), SkewKL(0.1), SymmetricKL(0.5)], ids=str)
def test_values_of_rows_near_convergence(divergence, engine, dtype):
    """Here exponentials and quotients are the device's own; test_device_accuracy.py has a model of them."""
    assert errors_of_rows(divergence, engine, dtype, "cuda").max() <= 4e-6


EVERY = [(engine, kind) for engine in teachers.ENGINES for kind in teachers.KINDS]
SIZE = (257, 5003, 256, 320)  # a vocabulary that is odd; one row more than whole blocks


@pytest.mark.parametrize(("engine", "kind"), EVERY[len(teachers.KINDS) :])
def test_slice_of_the_vocabulary(engine, kind):
    check_slice("cuda", BF16, SIZE, engine, kind)


@pytest.mark.parametrize(("engine", "kind"), EVERY)
def test_captured_in_a_graph(engine, kind):
    check_replay("cuda", BF16, SIZE, engine, kind)


@pytest.mark.parametrize(("engine", "kind"), EVERY)
def test_inputs_are_not_written_to_and_a_second_backward_is_right(engine, kind):
    check_backwards("cuda", BF16, SIZE, engine, kind)


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


@pytest.mark.parametrize("kind", ["projected", "logits", "bucket"])
@pytest.mark.parametrize("engine", teachers.ENGINES)
def test_compiled(engine, kind):
    torch._dynamo.reset()
    _, run = every("cuda", BF16, SIZE, engine, kind)
    assert_close(run(torch.compile(fused_kd_loss, fullgraph=True)), run())


@pytest.mark.parametrize(("engine", "kind"), EVERY)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast(engine, kind, dtype):
    check_autocast("cuda", engine, kind, dtype, n=64, v=501, hs=64, ht=96)


@pytest.mark.parametrize("kind", ["projected", "bucket"])
@pytest.mark.parametrize("engine", teachers.ENGINES)
def test_grad_scaler(engine, kind):
    check_grad_scaler("cuda", engine, kind)


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


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_row_kernel_in_place(divergence):
    """In float32 gradients are written over the logits they are taken of: fifty times the bits of one written apart."""
    case, m, V = make("cuda", FP32, 1024, 50257, 64, 64), 1024, 50257
    x = Problem(*problem(case, "projected", engine="triton_chunked", divergence=divergence, ce_weight=0.5))
    shape = (2 * m, row_stride(V, x.hidden.device, x.engine))
    logits, scratch, apart = (torch.randn(shape, device=x.hidden.device)[:, :V] for _ in range(3))
    stats = torch.zeros(6, m, device=x.hidden.device)
    solve_rows = triton_rows.TritonRows(x, gradient_scale(x), grad_flags(x), stats)

    def solve_chunk(z, g):
        solve_rows(slice(0, m), z[:m], z[m:], GradientBuffers(g[:m], g[m:], None, None, None))

    solve_chunk(logits, apart)
    for _ in range(50):
        scratch.copy_(logits)
        solve_chunk(scratch, scratch)
        assert torch.equal(scratch, apart)


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
