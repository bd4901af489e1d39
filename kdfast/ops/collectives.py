"""Every collective of a vocabulary-parallel loss: in one place, and counted.

    gather      each process's x → (R, *x.shape) on all, in the order of ranks
    add_up      Σ over processes, in place
    exchange    a few numbers of each process, read on the host

`gather` and `add_up` return at once; `wait` makes the result usable (on a GPU for the current stream, the host goes
on). `whole` and `spread` are the differentiable pair that the reference engine is built with: what autograd sees is
one model, computed by every process alike, whose vocabulary lies in slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops.recording import Recorder


class Call(NamedTuple):
    """One collective: its kind, the bytes a process puts in, the processes."""

    kind: str  # "gather" | "add_up"
    size: int
    ranks: int

    @property
    def received(self) -> float:
        """Bytes a process receives: of everyone else's part; of a ring's two rounds for a sum."""
        others = self.ranks - 1
        return others * self.size if self.kind == "gather" else 2 * others / self.ranks * self.size


_calls: Recorder[Call] = Recorder()
record = _calls.record


class Pending(NamedTuple):
    """The result of a collective that may still be under way."""

    result: Tensor
    work: Any

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.result


def gather(x: Tensor, group: str) -> Pending:
    """(R, *x.shape): x of each process. x: of the same shape on all."""
    x, ranks = x.contiguous(), size(group)
    _count("gather", x, ranks)
    out = x.new_empty(ranks, *x.shape)
    return Pending(out, _all_gather(out.view(-1), x.view(-1), group=named(group), async_op=True))


def add_up(x: Tensor, group: str) -> Pending:
    """x summed over the processes, in place; contiguous, of the same shape on all."""
    _count("add_up", x, size(group))
    return Pending(x, dist.all_reduce(x, group=named(group), async_op=True))


def exchange(numbers: Sequence[float], group: Any, device: torch.device) -> list[list[float]]:
    """Each process's numbers, as many on all. Waits for them; group: a ProcessGroup or its name."""
    group = named(group) if isinstance(group, str) else group
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    out = mine.new_empty(dist.get_world_size(group), len(numbers))
    _all_gather(out.view(-1), mine, group=group)
    return out.tolist()


def size(group: str) -> int:
    return dist.get_world_size(named(group))


def spread(x: Tensor, group: str) -> Tensor:
    """x, of which every process makes something of its own: its gradient is the sum of theirs."""
    return _Spread.apply(x, group) if group else x


def whole(slices: Tensor, group: str, start: int) -> Tensor:
    """(N, V) on every process from its entries (N, v), those from `start` on; v may differ."""
    return _Whole.apply(slices, group, start) if group else slices


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(upstream, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return add_up(x.clone(memory_format=torch.contiguous_format), group).wait()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(upstream, ctx.group), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slices: Tensor, group: str, start: int) -> Tensor:
        N, own = slices.shape
        ctx.group, ctx.start = group, start
        sizes = [(int(first), int(count)) for first, count in exchange([start, own], group, slices.device)]
        padded = slices.new_zeros(N, max(count for _, count in sizes))
        padded[:, :own] = slices
        parts = gather(padded, group).wait()
        order = sorted(range(len(sizes)), key=lambda rank: sizes[rank])
        filled = [rank for rank in order if sizes[rank][1]]
        ctx.own = slice(sum(count for first, count in sizes if first < start), None)
        ctx.own = slice(ctx.own.start, ctx.own.start + own)
        return torch.cat([parts[rank, :, : sizes[rank][1]] for rank in filled or [0]], dim=1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return _Own.apply(upstream, ctx.own, ctx.group, ctx.start), None, None


class _Own(torch.autograd.Function):
    """The inverse of `_Whole`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: slice, group: str, start: int) -> Tensor:
        ctx.group, ctx.start = group, start
        return x[:, own].contiguous()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return _Whole.apply(upstream, ctx.group, ctx.start), None, None, None


def _all_gather(*args: Any, **kwargs: Any) -> Any:
    renamed = getattr(dist, "all_gather_single", None)  # torch ≥ 2.13
    return (renamed or dist.all_gather_into_tensor)(*args, **kwargs)


def named(name: str) -> Any:
    """The ProcessGroup of that name: operators know groups by theirs."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _count(kind: str, x: Tensor, ranks: int) -> None:
    _calls.note(Call(kind, x.numel() * x.element_size(), ranks))
