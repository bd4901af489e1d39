"""What a process does in tests of vocabulary parallelism on device meshes: each function is one rank's part."""

import gc
from functools import cache
from types import SimpleNamespace

import communication
import processes
import pytest
import recorder
import torch
import torch.distributed as dist
from backwards import check_backwards, untracked
from cases import copy, gradients, make
from teachers import leaves, sources
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from kdfast import Head, Projected, fused_kd_loss
from kdfast.frontend import agreement
from kdfast.ops import collectives, matmul


@cache
def mesh(*shape, names=("vocab",)):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def outcome(function, *args, **kwargs):
    """Its result, or what it says is wrong."""
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def cut(options, start, stop):
    """Options of a slice."""
    return {name: value[start:stop] if name == "kd_vocab_mask" else value for name, value in options.items()}


def of_kind(kind, engine, edges, **options):
    """(loss, metrics, gradients) of a kind of teachers.py, with the slice edges[rank] … edges[rank + 1]."""
    case, rank = make(), processes.rank()
    start, stop = edges[rank], edges[rank + 1]
    case.W, case.b = (t.detach()[start:stop].requires_grad_() for t in (case.W, case.b))
    source, own = sources(case, kind)
    if isinstance(source, Head):
        source = Head(source.hidden, source.weight[start:stop], source.bias[start:stop])
    options = {"ce_weight": 0.5, "return_metrics": True} | cut(own, start, stop) | options
    loss, metrics = fused_kd_loss(
        Head(case.hs, case.W, case.b), source, case.labels, engine=engine, process_group=processes.group(),
        vocab_start=start, **options,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), metrics, gradients(case)


def _sliced(kind, engine, edges, **options):
    """A case, and its loss as a function of some of its tensors and of what every argument goes through."""
    case, rank = make(), processes.rank()
    start, stop = edges[rank], edges[rank + 1]
    case.W, case.b = (t.detach()[start:stop].requires_grad_() for t in (case.W, case.b))

    def loss(tensors, place=lambda tree: tree):
        own = SimpleNamespace(**vars(case) | tensors)
        source, more = sources(own, kind)
        if isinstance(source, Head):
            source = Head(source.hidden, source.weight[start:stop], source.bias[start:stop])
        head, source, labels = place((Head(own.hs, own.W, own.b), source, case.labels))
        return fused_kd_loss(
            head, source, labels, engine=engine, process_group=processes.group(), vocab_start=start,
            **{"ce_weight": 0.5} | cut(more, start, stop) | options,
        )  # fmt: skip

    return case, loss


def own_gradients(kind, engine, edges, **options):
    """`check_backwards` on a slice."""
    case, loss = _sliced(kind, engine, edges, **options)
    check_backwards(loss, {name: getattr(case, name) for name in leaves(kind)})


def of_inference_mode(kind, engine, edges, frozen=(), **options):
    """(loss, gradients) of ordinary tensors, and of those of inference mode where none is trained."""
    case, loss = _sliced(kind, engine, edges, **options)
    results = []
    for place in (lambda tree: tree, untracked):
        tensors = {n: getattr(case, n).detach().clone().requires_grad_(n not in frozen) for n in leaves(kind)}
        value = loss(tensors, place)
        value.sum().backward()
        results.append((value.detach(), {name: tensor.grad for name, tensor in tensors.items()}))
    return results


def transformed(kind, edges, engine="reference"):
    """Of the loss as a function of the hidden states: directional derivative, gradient, values of two."""
    _, loss = _sliced(kind, engine, edges)
    return transforms_of(lambda hidden: loss({"hs": hidden}))


def transforms_of(function):
    hidden = make().hs.detach()
    jvp = torch.func.jvp(function, (hidden,), (hidden.flip(0),))[1]
    found = jvp, torch.func.grad(function)(hidden), torch.func.vmap(function)(torch.stack([hidden, 2 * hidden]))
    return [each.detach() for each in found]


def sharded(seed, engine, cut_mask=True, **options):
    """W and b as DTensors cut by torch (101 over 4: 26, 26, 26, 23), the rest plain or replicated."""
    case = make(seed=seed)
    shards = mesh(4)
    W, b, P = (
        distribute_tensor(t.detach(), shards, [placement]).requires_grad_()
        for t, placement in ((case.W, Shard(0)), (case.b, Shard(0)), (case.P, Replicate()))
    )
    hs = distribute_tensor(case.hs.detach(), shards, [Replicate()]).requires_grad_()
    teacher = Projected(case.ht, P, case.p)
    if "kd_vocab_mask" in options:
        placement = Shard(0) if cut_mask else Replicate()
        options["kd_vocab_mask"] = distribute_tensor(options["kd_vocab_mask"], shards, [placement])
    loss = fused_kd_loss(Head(hs, W, b), teacher, case.labels, engine=engine, process_group=shards, **options)
    loss.backward()
    found = {"W": W.grad, "b": b.grad, "P": P.grad, "hs": hs.grad, "p": case.p.grad}
    return loss.detach(), {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


class Model(nn.Module):
    """A body and a projector on every process of `vocab`, a slice of the head on each."""

    def __init__(self, case, vocab):
        super().__init__()
        self.vocab = vocab
        self.body = nn.Linear(case.ht.shape[1], case.hs.shape[1], dtype=case.hs.dtype)
        self.projector = nn.Linear(*case.P.shape[::-1], dtype=case.P.dtype)
        with torch.no_grad():
            self.body.weight.copy_(case.P.flip(0) * 1.5)
            self.body.bias.copy_(case.p.flip(0))
            self.projector.weight.copy_(case.P)
            self.projector.bias.copy_(case.p)
        weight = case.W.detach().clone()
        self.head = nn.Parameter(weight if vocab is None else distribute_tensor(weight, vocab, [Shard(0)]))

    def forward(self, x, ht, labels, items):
        head = Head(self.body(x), self.head)
        teacher = Projected(ht, self.projector.weight, self.projector.bias)
        return fused_kd_loss(
            head, teacher, labels, ce_weight=0.5, num_items_in_batch=items, process_group=self.vocab, engine="torch"
        )


def alone(dtype=torch.float64):
    """(loss, gradients by name) of all rows in one process."""
    case = copy(make(n=24), dtype)
    model = Model(case, None)
    loss = model(case.ht, case.ht * 0.7, case.labels, int((case.labels >= 0).sum()))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def two_by_two(wrapper, dtype=torch.float64):
    """Half of the rows, on two processes with half of the head each. FSDP's and DDP's mean over the data is a sum over
    rows ÷ 2, so the loss is taken times 2."""
    case = copy(make(n=24), dtype)
    both = mesh(2, 2, names=("data", "vocab"))
    model = Model(case, both["vocab"])
    if wrapper == "fsdp2":
        fully_shard(model, mesh=both["data"])
    mine = slice(12, 24) if both["data"].get_local_rank() else slice(0, 12)
    items = (case.labels[mine] >= 0).sum()
    dist.all_reduce(items, group=both["data"].get_group())
    loss = model(case.ht[mine], case.ht[mine] * 0.7, case.labels[mine], items)
    (2 * loss).backward()
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad
        if wrapper == "by hand":
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            dist.all_reduce(local, group=both["data"].get_group())
            local /= 2
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    total = loss.detach().clone()
    dist.all_reduce(total, group=both["data"].get_group())
    return total, found


def sequence_sharded():
    """Each process has some of the rows and the whole head."""
    case = make(n=24)
    rank, size = processes.rank(), dist.get_world_size(processes.group())
    mine = slice(rank * 24 // size, (rank + 1) * 24 // size)
    items = (case.labels >= 0).sum()
    hs = case.hs.detach()[mine].requires_grad_()
    teacher = Projected(case.ht[mine], case.P, case.p)
    options = {"ce_weight": 0.5, "num_items_in_batch": items, "engine": "torch"}
    loss = fused_kd_loss(Head(hs, case.W, case.b), teacher, case.labels[mine], **options)
    loss.backward()
    return loss.detach(), {**gradients(case), "hs": hs.grad}


def wrong(what):
    """The error of a call that has one thing wrong, on each process."""
    case, rank, group = make(), processes.rank(), processes.group()
    rows, start = (51, 0) if rank == 0 else (50, 51)
    hs, W, labels, more = case.hs, case.W, case.labels, {"vocab_start": start, "process_group": group}
    if what == "gap":
        more["vocab_start"] = start + rank
    elif what == "overlap":
        more["vocab_start"] = start - rank
    elif what == "other rows":
        hs = case.hs + rank
    elif what == "other labels":
        labels = torch.where(labels >= 0, (labels + rank) % 101, labels)
    elif what == "fewer rows":
        hs, labels = case.hs[: 23 - rank], labels[: 23 - rank]
    elif what == "other options":
        more["temperature"] = 2.0 + rank
    elif what == "label":
        labels = labels.masked_fill(labels == labels[1], 101)
    elif what == "other weights":
        more["token_weights"] = torch.arange(23) != 3 + rank
    elif what == "one refuses":
        more["token_weights"] = torch.ones(23, requires_grad=rank == 1)
    elif what == "no start":
        more["vocab_start"] = None
    elif what == "no group":
        more["process_group"] = None
    elif what == "group":
        more["process_group"] = "vocab"
    elif what == "start":
        more["vocab_start"] = -1
    elif what == "valid_vocab":
        more["valid_vocab"] = 102
    elif what in ("mask", "mask of one", "mask of nothing"):
        mask = torch.zeros(101 if what == "mask" else rows, dtype=torch.bool)
        more["kd_vocab_mask"] = None if what == "mask of one" and rank else mask
    elif what == "mask without mesh":
        sharded = distribute_tensor(torch.ones(101, dtype=torch.bool), mesh(4), [Shard(0)])
        start, rows, more = 0, 101, {"process_group": None, "kd_vocab_mask": sharded}
    W = W.detach()[start : start + rows].requires_grad_(what != "kind of call" or rank == 0)
    b = case.b.detach()[: rows + rank] if what == "bias of one" else None
    ht = case.ht[: len(hs)] + (rank if what == "other teacher" else 0)
    if what == "mesh of two":
        more |= {"process_group": mesh(2, 2, names=("data", "vocab")), "vocab_start": None}
    elif what in ("data mesh", "no mesh", "both starts", "placement", "teacher dtensor"):
        both = mesh(2, 2, names=("data", "vocab"))
        W = distribute_tensor(case.W.detach(), both["data"], [Shard(1 if what == "placement" else 0)])
        over = {"data mesh": both["vocab"], "no mesh": None}.get(what, both["data"])
        more = {"process_group": over, "vocab_start": 0 if what == "both starts" else None}
    teacher = Head(ht, case.Wt[start : start + rows - (what == "teacher")], None)
    if what == "teacher vocabulary":
        teacher = Head(ht, case.Wt[start : 90 if rank else 51], None)
    if what == "teacher dtensor":
        teacher = Head(ht, distribute_tensor(case.Wt.detach()[:90], both["data"], [Shard(0)]))
        more["vocab"] = "truncate"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDFAST_CHECK", "1")
        result = outcome(fused_kd_loss, Head(hs, W, b), teacher, labels, engine="torch", ce_weight=0.5, **more)
    dist.barrier(group)
    return result if isinstance(result, str) else float(result)


def first_and_later_calls():
    """(what a call says or None, exchanges it took) of calls one after the other, right ones and wrong ones."""
    case, rank, group = make(), processes.rank(), processes.group()
    start, stop = (0, 51) if rank == 0 else (51, 101)
    other = torch.where(case.labels >= 0, (case.labels + rank) % 101, case.labels)
    refused = torch.ones(23, requires_grad=rank == 1)
    calls = {
        "refused at the first": {"vocab_start": None if rank == 1 else start},
        "refused by the checks": {"token_weights": refused},
        "other labels": {"labels": other},
        "right": {},
        "again": {},
        "another number": {"temperature": 3.0},
        "another kind": {"reduction": "sum"},
        "right, checked": {"check": "1"},
        "other labels, checked": {"labels": other, "check": "1"},
        "right once more": {},
    }
    agreement._known.pop(group, None)
    found = {}
    for name, options in calls.items():
        options, exchanges = {"labels": case.labels, "vocab_start": start, "check": "0"} | options, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KDFAST_CHECK", options.pop("check"))
            exchange = collectives.exchange
            patch.setattr(collectives, "exchange", lambda *of, e=exchange, x=exchanges: (x.append(of), e(*of))[1])
            W = case.W.detach()[start:stop].requires_grad_()
            head, teacher = Head(case.hs, W), Projected(case.ht, case.P, case.p)
            result = outcome(fused_kd_loss, head, teacher, engine="torch", process_group=group, **options)
        found[name] = (result if isinstance(result, str) else None, len(exchanges))
    return found


def groups_remembered():
    """How many groups are known while there is a new one that a call was made with, and when it is gone."""
    case, rank, group = make(), processes.rank(), dist.new_group([0, 1, 2, 3])
    start, stop = [0, 30, 60, 90, 101][rank : rank + 2]
    head = Head(case.hs, case.W.detach()[start:stop])
    fused_kd_loss(head, None, case.labels, ce_weight=1.0, engine="torch", process_group=group, vocab_start=start)
    known = len(agreement._known)
    dist.barrier(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return known, len(agreement._known)


def collectives_of(engine, n, scratch, **options):
    """(events in order, calls): ("all_gather" or "all_reduce", i) where collective i starts, ("wait", i),
    ("product", "")."""
    case, rank, group = make(torch.float32, n=n), processes.rank(), processes.group()
    start, stop = (0, 51) if rank == 0 else (51, 101)
    events, known = [], []

    def started(kind, function):
        def call(*args):
            pending = function(*args)
            events.append((kind, len(known)))
            known.append(pending)
            return pending

        return call

    def wait(self):
        events.append(("wait", next(i for i, pending in enumerate(known) if pending is self)))
        return waited(self)

    waited = collectives.Pending.wait
    with (
        pytest.MonkeyPatch.context() as patch,
        recorder.products(lambda product: events.append(("product", ""))),
        recorder.communication() as calls,
    ):
        patch.setattr(collectives.Pending, "wait", wait)
        for kind in ("all_gather", "all_reduce"):
            patch.setattr(collectives, kind, started(kind, getattr(collectives, kind)))
        W, b = (t.detach()[start:stop].requires_grad_() for t in (case.W, case.b))
        teacher = Projected(case.ht, case.P, case.p)
        loss = fused_kd_loss(
            Head(case.hs, W, b), teacher, case.labels, engine=engine, scratch_bytes=scratch, process_group=group,
            vocab_start=start, **options,
        )  # fmt: skip
        loss.backward()
    return events, [tuple(call) for call in calls]


def communicated(x):
    return communication.counted(x, processes.rank(), processes.group())


def compiled(engine):
    """As the eager call: one graph, with the collectives inside its operators."""
    case, rank, group = make(), processes.rank(), processes.group()
    start, stop = (0, 51) if rank == 0 else (51, 101)

    def loss_of(hs, W, b, ht, P, p, labels):
        return fused_kd_loss(
            Head(hs, W, b), Projected(ht, P, p), labels, ce_weight=0.5, engine=engine, process_group=group,
            vocab_start=start,
        )  # fmt: skip

    losses = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in (case.hs, case.W[start:stop], case.b[start:stop])]
        loss = function(*leaves, case.ht, case.P, case.p, case.labels)
        loss.backward()
        losses.append((loss.detach(), [leaf.grad for leaf in leaves]))
    return losses


def as_on_a_gpu(engine, divergence):
    """Gradients of hidden states on both sides and of W near convergence, from 16-bit gradients of logits, sliced; and
    in one process from fp32 ones, cut to the slice."""
    rank, group = processes.rank(), processes.group()
    cut = slice(0, 120) if rank == 0 else slice(120, 300)

    def solve(cut, **how):
        case = make(torch.float16, n=24, v=300, hs=32)
        noise = torch.randn(case.hs.shape, generator=torch.Generator().manual_seed(1))
        near = (case.hs.detach() * (1 + 0.02 * noise)).half().requires_grad_()
        W = case.W.detach()[cut].requires_grad_()
        loss = fused_kd_loss(Head(case.hs, W), Projected(near), scratch_bytes=30000, divergence=divergence, **how)
        loss.backward(torch.tensor(2.0**14))  # as a loss scaler: float16 holds no small gradients
        return case.hs.grad, near.grad, W.grad

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "gradient_dtype", lambda dtype, device: dtype)
        found = solve(cut, engine=engine, process_group=group, vocab_start=cut.start)
    hs, near, W = solve(slice(None), engine="torch")
    return found, (hs, near, W[cut])


def twice(reduction):
    """Gradients of W and of the hidden states after one backward, and after a second."""
    case, rank, group = make(), processes.rank(), processes.group()
    start, stop = (0, 51) if rank == 0 else (51, 101)
    W = case.W.detach()[start:stop].requires_grad_()
    loss = fused_kd_loss(
        Head(case.hs, W), Projected(case.ht, case.P, case.p), case.labels, reduction=reduction, engine="torch",
        process_group=group, vocab_start=start,
    )  # fmt: skip
    loss.backward(torch.ones_like(loss), retain_graph=True)
    once = W.grad.clone(), case.hs.grad.clone()
    loss.backward(torch.ones_like(loss))
    return once, (W.grad, case.hs.grad)
