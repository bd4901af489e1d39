"""torch.compile(fullgraph=True): no graph break, the same numbers, and no second compilation for what changes in value.

What compiles anew: another engine, reduction, kind of teacher, dtype or choice of gradients; a token count of 0 or 1
(PyTorch's own specialisation). Without dynamic=True the first change of the token count does, and so does the first
change of a number that is no tensor.
"""

import shutil

import pytest
import torch
from cases import copy, gradients, make, student
from definition import EVERY
from own_divergences import Hellinger, Weighted
from teachers import ENGINES, KINDS, PROJECTED, loss_of, own_logits
from torch._dynamo.testing import CompileCounterWithBackend

from kdfast import FusedKDLoss, Logits, SymmetricKL, fused_kd_loss
from kdfast.divergences import DIVERGENCES
from kdfast.engines import chunked


def inductor(test):
    test = pytest.mark.slow(pytest.mark.filterwarnings("ignore::DeprecationWarning")(test))  # its own imports
    return pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")(test)


SMALL = {"n": 6, "v": 41}
OWN = [SymmetricKL(0.9), Hellinger(1.5), Weighted(w=0.7)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compare(compiled, case, kind, **options):
    """`compiled` against fused_kd_loss: loss, metrics and gradients."""
    results = []
    for function in (fused_kd_loss, compiled):
        own = copy(case, torch.float32)
        result = loss_of(function, own, kind, head={"softcap": 5.0}, **options)
        loss, metrics = result if options.get("return_metrics") else (result, ())
        loss.sum().backward()
        results.append((loss.detach(), tuple(metrics), gradients(own)))
    torch.testing.assert_close(results[1], results[0], equal_nan=True, rtol=1e-5, atol=1e-5)


def options(i, kind):
    """By turns."""
    return {"reduction": ("mean", "none")[(i + KINDS.index(kind)) % 2], "return_metrics": i % 2 == 0}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's look at "hidden"
@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        pytest.param(engine, kind, marks=() if engine == "torch" or kind == "projected" else pytest.mark.slow)
        for engine in ENGINES
        for kind in KINDS
    ],
)
def test_the_same_numbers(engine, kind):
    compiled = torch.compile(fused_kd_loss, fullgraph=True, backend="aot_eager", dynamic=False)
    compare(compiled, make(torch.float32, **SMALL), kind, engine=engine, **options(ENGINES.index(engine), kind))


@pytest.mark.parametrize(
    ("engine", "kind"),
    [("reference", "head"), ("torch", "projected"), ("triton_chunked", "bucket"), ("triton_tiled", "logits")],
)
@inductor
def test_the_same_numbers_of_inductor(engine, kind):
    compiled = torch.compile(fused_kd_loss, fullgraph=True, backend="inductor", dynamic=False)
    compare(compiled, make(torch.float32, **SMALL), kind, engine=engine, **options(ENGINES.index(engine), kind))


# Dynamo decides what compiles anew; "aot_eager" with symbolic shapes takes seconds
DYNAMIC = [("eager", "torch", kind) for kind in KINDS if kind != "hidden"] + [
    ("eager", "auto", "projected"), ("eager", "reference", "bucket"), ("eager", "reference", "logits"),
    ("aot_eager", "torch", "head"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "engine", "kind"),
    [pytest.param(*case, marks=() if case[2] in ("projected", "head") else pytest.mark.slow) for case in DYNAMIC],
)
def test_compiled_once_for_any_number_of_tokens_and_any_tensor_weight(backend, engine, kind):
    compiled = torch.compile(fused_kd_loss, fullgraph=True, backend=backend, dynamic=True)
    for n in (6, 9, 4):
        weights = {name: torch.tensor(n / 10) for name in ("kd_weight", "ce_weight", "anchor_weight")}
        tau = torch.tensor(1.0 if kind == "weights" else 0.5 + n / 10)
        if kind not in PROJECTED:
            del weights["anchor_weight"]
        case = make(torch.float32, **SMALL | {"n": n})
        with torch._dynamo.config.patch(error_on_recompile=n != 6):
            compare(compiled, case, kind, engine=engine, temperature=tau, **weights)


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *EVERY, *OWN], ids=str)
def test_every_divergence_by_name_and_as_an_instance(divergence, engine):
    for backend in ("eager", "aot_eager") if engine == "reference" else ("aot_eager",):
        torch._dynamo.reset()
        compiled = torch.compile(fused_kd_loss, fullgraph=True, backend=backend, dynamic=False)
        compare(compiled, make(torch.float32, **SMALL), "logits", engine=engine, divergence=divergence)


def test_numbers_that_follow_a_schedule_compile_once_more():
    """Python numbers: the first is compiled in, its first change makes it an argument."""
    counter, case = CompileCounterWithBackend("aot_eager"), make(torch.float32, **SMALL)
    criterion = FusedKDLoss(ce_weight=0.5)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for step in (1, 2, 3, 4):
        numbers = {"kd_weight": step / 5, "temperature": 1 + step / 2, "num_items_in_batch": 10 * step}
        loss = loss_of(compiled, case, "projected", **numbers)
        torch.testing.assert_close(loss, loss_of(criterion, case, "projected", **numbers))
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@inductor
def test_dense_logits_are_read_in_place(backend, monkeypatch):
    """A slice of a batch, cut inside of the compiled function: no copy reaches the engine."""
    seen, run = [], chunked.run
    monkeypatch.setattr(chunked, "run", lambda x, rows=None: (seen.append(x.teacher_logits), run(x, rows))[1])
    case = make(torch.float32, leading=(2, 3), v=41)
    longer = torch.cat([own_logits(case), torch.zeros(2, 1, 41)], dim=1)

    @torch.compile(fullgraph=True, backend=backend)
    def step(head, logits):
        return fused_kd_loss(head, Logits(logits[:, :-1]), engine="torch")

    loss = step(student(case), longer)
    assert (seen[0].data_ptr(), seen[0].stride()) == (longer.data_ptr(), longer.stride())
    torch.testing.assert_close(loss, fused_kd_loss(student(case), Logits(own_logits(case))))


def test_compiled_under_autocast():
    case = make(torch.float32, **SMALL)
    compiled = torch.compile(fused_kd_loss, fullgraph=True, backend="aot_eager")
    losses = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses += [loss_of(function, case, "projected") for function in (compiled, fused_kd_loss)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[3])
    assert losses[0] != losses[2]
