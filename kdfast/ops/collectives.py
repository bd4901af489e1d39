"""Every collective of a vocabulary-parallel loss, in one place.

    all_gather   every process's x → (R, *x.shape) on all, in rank order
    all_reduce   sum over processes, in place
    sum_traced   sum over processes into a new tensor; used outside the operators, where compiled graphs trace it
    exchange     one small object from every process, on the host

`all_gather` and `all_reduce` return at once; `wait` makes the result usable (on a GPU, for the current stream; the host
does not wait). The reference engine uses the differentiable pair `gather_from_group` and `copy_to_group`: autograd sees
one model, computed alike by every process, whose vocabulary lies in slices.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


class Pending(NamedTuple):
    """The result of a collective that may still be running."""

    result: Tensor
    work: Any

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.result


def all_gather(x: Tensor, group: str) -> Pending:
    """Start gathering every process's x into (R, *x.shape); x has the same shape on all."""
    x = x.contiguous()
    out = x.new_empty(size(group), *x.shape)
    return Pending(out, _all_gather_into(out.view(-1), x.view(-1), group=named(group), async_op=True))


def all_reduce(x: Tensor, group: str) -> Pending:
    """Start summing x over the processes, in place; x is contiguous and has the same shape on all."""
    return Pending(x, dist.all_reduce(x, group=named(group), async_op=True))


def sum_traced(x: Tensor, group: Any) -> Tensor:
    """Return x summed over the processes of a ProcessGroup; x has the same shape on all."""
    # `import torch` does not import this module
    from torch.distributed import _functional_collectives as functional_collectives

    return functional_collectives.all_reduce(x, "sum", group)


def exchange(value: Any, group: Any, device: torch.device) -> list[Any]:
    """Return every process's value, which may be any picklable object. group: a ProcessGroup or its name."""
    group = named(group) if isinstance(group, str) else group
    found: list[Any] = [None] * dist.get_world_size(group)
    on = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # NCCL sends from the current device
    with on, temporarily_clear_interpreter_stack():  # torch.func must not transform the pickled bytes
        dist.all_gather_object(found, value, group=group)
    return found


def size(group: str) -> int:
    """Return the number of processes in the group."""
    return dist.get_world_size(named(group))


def named(name: str) -> Any:
    """Return the ProcessGroup of that name, which is how operators refer to groups."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def copy_to_group(x: Tensor, group: str) -> Tensor:
    """Return x for each process to use in its own way; the gradient of x is the sum over the processes."""

    def summed(x: Tensor) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), group).wait()

    return _Linear.apply(x, lambda x: x.view_as(x), summed) if group else x


def gather_from_group(slices: Tensor, group: str, start: int) -> Tensor:
    """Return (N, V) on every process, put together from each one's entries (N, v) from `start` on; v may differ."""
    if not group:
        return slices
    own = slices.shape[1]
    sizes = exchange((start, own), group, slices.device)
    before = sum(count for first, count in sizes if first < start)
    order = sorted(range(len(sizes)), key=lambda rank: sizes[rank])
    filled = [rank for rank in order if sizes[rank][1]] or [0]

    def gathered(slices: Tensor) -> Tensor:
        padded = slices.new_zeros(slices.shape[0], max(count for _, count in sizes))
        padded[:, :own] = slices
        parts = all_gather(padded, group).wait()
        return torch.cat([parts[rank, :, : sizes[rank][1]] for rank in filled], dim=1)

    return _Linear.apply(slices, gathered, lambda whole: whole[:, before : before + own].contiguous())


class _Linear(torch.autograd.Function):
    """A linear map and its adjoint, each the derivative of the other."""

    @staticmethod
    def forward(x: Tensor, function: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.function, ctx.adjoint = inputs

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Linear.apply(tangent, ctx.function, ctx.adjoint)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *functions: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        return torch.stack([_Linear.apply(each, *functions) for each in x.movedim(in_dims[0], 0)]), 0

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(upstream, ctx.adjoint, ctx.function), None, None


def _all_gather_into(*args: Any, **kwargs: Any) -> Any:
    renamed = getattr(dist, "all_gather_single", None)  # torch ≥ 2.13
    return (renamed or dist.all_gather_into_tensor)(*args, **kwargs)
