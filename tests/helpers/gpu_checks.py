"""What engines are held to on a GPU, for any device, so that a CPU checks the checks (tests/gpu/test_checks.py).

The rule of `compare`: ‖ours − truth‖ ≤ ‖eager in the same dtype − truth‖ + tolerance·‖truth‖, for the loss and every
gradient. Truth (float64) and eager are helpers/oracle.py, whole logits of 256 rows at a time, summed in float64. The
upstream gradient is N, as under a loss scaler: without it eager underflows in float16 and excuses anything.
"""

from functools import partial
from types import SimpleNamespace

import oracle
import teachers
import torch
from cases import LEAVES, copy, relative, student, teacher
from torch.utils import _pytree as pytree

from kdfast import Projected, fused_kd_loss

TRITON = ["triton_chunked", "triton_tiled"]
KINDS = {  # leaves and options
    "projected": (LEAVES, {"temperature": 2.0, "ce_weight": 0.5, "anchor_weight": 0.3}),
    "head": (("hs", "W", "b"), {"temperature": 2.0, "ce_weight": 0.5}),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# tolerance: half a unit in the last place of what products round their operands to; in float32 some hundred of 6e-8
PRECISIONS = {"bf16": (BF16, 2**-9), "fp16": (FP16, 2**-11), "tf32": (FP32, 2**-11), "fp32": (FP32, 2e-5)}
TWO = [("projected", "forward_kl"), ("head", "jsd")]


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


def assert_close(a, b, bits=False):
    """Two (loss, gradients): the same work, perhaps by other algorithms of the vendor's; or bit by bit."""
    assert relative(a[0], b[0]) <= (0 if bits else 1e-5)
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]) if bits else relative(a[1][name], b[1][name]) < 2**-9, name


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
        case.labels.copy_(case.labels.roll(1, 0))
        for tensor in case.given:
            if isinstance(tensor, torch.Tensor) and tensor.shape[0] == sizes[0]:
                tensor.copy_(tensor.roll(2, 0))  # by one number all: entries and their tail belong together
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
