"""Predictions for the contenders: memory against what the same code allocates, times by hand and by the engine. What
docs/performance.md says of speed is what bench/results has."""

import importlib.util
import json
import re
import statistics
import sys

import documents
import pytest
import torch
from fake_gpu import highest_on_a_cpu, highest_on_a_gpu
from plan import GPUS, METHODS, get_gpu, live_bytes, operations, peak_bytes, predicted_seconds
from plan.cases import CPU_SIZES, GPU_SIZES, case, gradients, on_a_gpu, run, shapes
from plan.timing import traffic
from recorder import products

from kdfast.plan import Shape

PROJECTED = Shape(8192, 50257, 768, 1024)


@pytest.fixture(autouse=True)
def _as_users_run_it(_seeded_and_poisoned, monkeypatch):
    """Without deterministic mode, whose operators take other memory."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("KDFAST_SCRATCH_BYTES", raising=False)


def test_reference_on_a_cpu():
    for shape in shapes("cpu", CPU_SIZES):
        inputs = case(shape)
        peak = highest_on_a_cpu(inputs, lambda inputs: run("reference", inputs)) - gradients(inputs)
        assert live_bytes("reference", shape) == pytest.approx(peak, rel=0.02), shape


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("method", ["reference", "trl", "liger_triton_jsd", "fla"])
def test_on_a_gpu(method):
    seen = 0
    for shape in shapes("cuda", GPU_SIZES):
        predicted = live_bytes(method, shape)
        if predicted is None:
            continue
        inputs = case(shape, "meta")
        peak = highest_on_a_gpu(inputs, lambda inputs: run(method, inputs), on_a_gpu(method)) - gradients(inputs)
        assert predicted == pytest.approx(peak, rel=0.03), shape
        seen += 1
    assert seen


def test_who_can_do_what():
    def able(**changes):
        return {name for name in METHODS if peak_bytes(name, Shape(64, 1000, 32, 48, **changes)) is not None}

    ours_on_a_gpu = {"eager", "eager_compiled", "reference", "torch", "triton_chunked", "triton_tiled"}
    assert able() == ours_on_a_gpu
    peers = {"trl", "liger_chunked", "liger_triton_jsd", "torchtune", "fla"}
    assert able(teacher="head") == ours_on_a_gpu | peers
    assert able(teacher="none") == ours_on_a_gpu | {"linear_cross_entropy", "cce"}
    assert "cce" not in able(teacher="none", dtype=torch.float32)
    assert not able(teacher="head", device="cpu") & {"triton_chunked", "triton_tiled", "liger_triton_jsd", "fla"}


def test_an_h200_as_it_was_measured():
    gpu = get_gpu("h200")
    assert gpu.products == pytest.approx(790e12)
    assert gpu.copies == pytest.approx(4.3e12)
    assert gpu.lanes == pytest.approx(29.7e12, rel=0.01)  # 132 · 128 lanes at 1.755 GHz


def test_as_the_document_predicts():
    """bench/results/gpu-predicted.md, in milliseconds on an H200: what bench/plan says is within the ranges."""
    page = documents.source("bench/results/gpu-predicted.md")
    for V, shape in ((50257, PROJECTED), (128256, Shape(8192, 128256, 4096, 4096))):
        (row,) = re.findall(rf"^\| chunked, N=8192, V={V}, .*$", page, re.M)
        products, kernels, step = row.split(" | ")[1:4]
        results, moved, instructions = traffic("triton_chunked", shape)
        gpu = get_gpu("h200")
        ours = 1e3 * predicted_seconds("triton_chunked", shape, gpu)
        for said, found in (
            (products, ours - 1e3 * moved / gpu.copies),  # floor B
            (kernels, 1e3 * moved / gpu.copies),
            (step, ours),
        ):
            *_, least, most = re.findall(r"(?<![\d.–%])([\d.]+)–([\d.]+) ms", said)[-1]
            assert float(least) < found < float(most), (V, said, found)
        assert results > 0
        assert f" {1e3 * instructions / gpu.lanes:.1f} ms" in f" {kernels}"
    head = Shape(8192, 151936, 4096, 4096, teacher="head")
    ratio = predicted_seconds("trl", head, "H200") / predicted_seconds("triton_chunked", head, "H200")
    least, most = map(float, re.search(r"\*\*([\d.]+)–([\d.]+)×\*\* faster", page).groups())
    assert least < ratio < most
    assert 15 < 1e3 * predicted_seconds("eager", PROJECTED, "H200") < 30


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


def text_of(page):
    return " ".join(documents.source(page).split())


def test_products_of_the_predictions():
    """In milliseconds at an H200's rate."""
    page, products = documents.source("bench/results/gpu-predicted.md"), get_gpu("h200").products
    for V, units, Hs, Ht in ((50257, 6, 768, 1024), (128256, 6, 4096, 4096)):
        seconds = (units * 2 * 8192 * V * Hs + 4 * 8192 * Hs * Ht * (Hs != Ht)) / products
        assert re.search(rf"chunked, N=8192, V={V}, Hs={Hs}\b[^|]*\\| {1e3 * seconds:.2g} ms; floor B", page), seconds
        seconds = 2 * 2 * 8192 * V * Hs / products
        assert f"| tiled forward, N=8192, V={V}, Hs={Hs} | {1e3 * seconds:.2g} ms; " in page
    said = "75–82% of the products' speed for gpt2-medium → gpt2, and 93–96% for V = 128256"
    assert said in text_of("docs/performance.md")
    assert all(f"**{share}" in page for share in ("75–82% of floor B**", "93–96%**"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_instructions_of_the_predictions():
    """Those of bench/results/gpu-predicted.md keep to the limits that `make aot` holds the kernels to."""
    spec = importlib.util.spec_from_file_location("aot", documents.ROOT / "tests/kernels/aot.py")
    aot = importlib.util.module_from_spec(spec)
    sys.modules["aot"] = aot
    spec.loader.exec_module(aot)
    labels = {
        "forward KL, plain": "forward_kl, plain",
        "forward KL with metrics, `KDTrainer`'s": "forward_kl, metrics",
        "forward KL alone": "forward_kl alone",
        "own head, the student's gradient": "own head",
        "cross entropy alone": "cross entropy alone",
        "JSD, plain": "jsd, plain",
        "skew KL, plain": "skew_kl, plain",
        "symmetric KL, plain": "symmetric_kl, plain",
        "total variation, plain": "total_variation, plain",
    }
    limits = {f"row kernel: {name}": aot.LIMITS["row_kernel", label] for name, label in labels.items()}
    tiled = "forward_kl, plain, bfloat16, N=4096"
    limits |= {f"tiled {kind}, plain": aot.LIMITS[f"{kind}_kernel", tiled] for kind in ("statistics", "gradients")}
    rows = re.findall(r"^\| ((?:row kernel|tiled)[^|]+) \| ([\d.+]+) \| (\d+) \| (\d+) \| (.+) \|$",
                      documents.source("bench/results/gpu-predicted.md"), re.M)  # fmt: skip
    assert [name for name, *_ in rows] == list(limits)
    for name, passes, _, programs, others in rows:
        most, least_programs = limits[name]
        sm_80, sm_100, _ = map(int, others.split(", "))
        assert sum(map(float, passes.split("+"))) <= most
        assert int(programs) >= least_programs
        assert max(sm_80, sm_100) <= 1.15 * most


def test_speed_on_a_cpu():
    """Every figure of docs/performance.md's table."""
    page, report = text_of("docs/performance.md"), documents.source("bench/results/bench-cpu.md")
    rows = [
        line.strip("| ").split(" | ")
        for line in report.partition("## The planner")[0].splitlines()
        if "| kdfast torch |" in line
    ]
    assert len(rows) == 18
    shares = {row[0]: int(re.match(r"\d+", row[3]).group()) for row in rows}
    slower = {row[0]: float((re.search(r"torch\.compile \(([\d.]+)×", row[5]) or [0, 1])[1]) for row in rows}
    narrow = [name for name in shares if re.match(r"[NV]\d", name)]
    wide = [name for name in shares if name not in narrow and "fp32" in name]
    halves = [name for name in shares if "bf16" in name]

    def between(names, measured):
        return f"{min(measured[name] for name in names)}–{max(measured[name] for name in names)}%"

    worst = f"compiled PyTorch is up to {max(slower[name] for name in wide):.1f}× faster, with whole logits |"
    assert f"heads 768–4096 wide, fp32 | {between(wide, shares)} of products; {worst}" in page
    worst = f"compiled PyTorch is up to {max(slower[name] for name in halves):.1f}× faster, with gradients 4–5% off"
    assert f"the same, bf16 | {between(halves, shares)} of products, whose logits are fp32; {worst}" in page
    off = {
        int(n) for row in rows if "bf16" in row[0] for n in re.findall(r"compile \([^)]*gradients (\d+)% off", row[5])
    }
    assert off == {4, 5}
    worst = f"compiled PyTorch is up to {max(slower[name] for name in narrow):.1f}× faster"
    assert f"(384 → 256), fp32 | {between(narrow, shares)} of products; {worst}" in page
    assert f"runs at {between([*wide, *halves], shares)} of the speed of its own matrix products" in page

    entries = json.loads((documents.ROOT / "bench/results/loaded-cpu.json").read_text())["entries"].values()
    assert {entry["tokens"] for entry in entries} == {256}

    def busy(name):
        medians = [[statistics.median(entry["rows"][name][how]) for how in ("loaded", "alone")] for entry in entries]
        ratios = sorted(loaded / alone for loaded, alone in medians)
        return "–".join(dict.fromkeys(f"{ratio:.1f}" for ratio in ratios)) + "×"

    ours, compiled = busy("kdfast torch"), busy("eager, torch.compile")
    assert f"256 tokens | {ours} the time alone; compiled PyTorch {compiled} |" in page

    steps = json.loads((documents.ROOT / "bench/results/step-cpu.json").read_text())["pairs"]["gpt2"]["rows"]
    step = {row["contender"]: row["batches"]["4"] for row in steps}
    names = ("kdfast, teacher's own head", "eager, plain torch", "eager, TRL's generalized_jsd_loss")
    cells = [f"{step[name]['seconds']:.2f} s, {step[name]['peak_bytes'] / 2**20:.0f} MiB" for name in names]
    assert "4 × 128 tokens | {}; eager {}; TRL {} |".format(*cells) in page


def test_the_planner_beside_the_measurements():
    row = next(
        line
        for line in documents.source("bench/results/bench-cpu.md").splitlines()
        if line.startswith("| kdfast torch | 18 |")
    )
    _, _, median, within, _ = row.strip("| ").split(" | ")
    assert f"the median is {median} and {within} workloads are within 10%" in text_of("docs/performance.md")
