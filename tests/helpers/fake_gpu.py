"""Highest live bytes of a run on a GPU that is not there, or on a CPU, whichever it is.

Meta tensors have shapes and dtypes and no memory; everything that is not a CPU takes a GPU's way through our code.
Every storage is counted from the operator that makes it until it dies. Kernels of Triton are not launched; what their
launchers allocate is. The vendor's products, which meta tensors do not have in the forms a GPU has (16-bit operands,
fp32 result), are replaced by what they allocate: `PRODUCTS`.

Seen are the results of operators, not what a C++ kernel takes for itself while it runs: a vendor's library takes more
on one machine than on another.
"""

import weakref
from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kdfast.engines import operators
from kdfast.frontend import checks
from kdfast.kernels import block_sizes, projector, row_kernel, tiled_backward, tiled_forward
from kdfast.ops import matmul
from kdfast.ops.problem import Problem


class _Live(TorchDispatchMode):
    def __init__(self, inputs):
        super().__init__()
        storages = [value.untyped_storage() for value in inputs if isinstance(value, torch.Tensor)]
        self.live, self.highest, self.known = 0, 0, {storage._cdata for storage in storages}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.live += size
        self.highest = max(self.highest, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.known.discard(key)
        self.live -= size


class _Unrolled(torch.autograd.Function):
    """`kdfast::fused_kd` and its backward without the operator boundary, behind which nothing is seen."""

    @staticmethod
    def forward(ctx, *arguments):
        result = tuple(operators._solve(Problem(*arguments)))
        operators._save(ctx, arguments, result)
        return result

    @staticmethod
    def backward(ctx, *upstream):
        return operators._backward(ctx, *upstream)


class _NotLaunched:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def _weight_gradient(g, x, out, add=False):
    return out if out.itemsize >= 4 else out.copy_(x.new_empty(out.shape, dtype=torch.float32))


PRODUCTS = {
    "logits": lambda x, weight, out: out,
    "input_gradient": lambda g, weight, out, add=False: out,
    "weight_gradient": _weight_gradient,
}


BOUNDARY = [(operators, "fused_kd", _Unrolled.apply), (operators, "finalize_gradient", operators._finalize)]
KERNELS = [
    (row_kernel, "row_kernel"),
    (row_kernel, "states_kernel"),
    (row_kernel, "terms_kernel"),
    (row_kernel, "row_gradients_kernel"),
    (tiled_forward, "statistics_kernel"),
    (tiled_forward, "combine_kernel"),
    (tiled_backward, "gradients_kernel"),
    (projector, "projection_kernel"),
]


def highest_on_a_cpu(inputs, run):
    """Above what `inputs` hold, which are CPU tensors: everything is computed."""
    with ExitStack() as stack:
        for module, name, stand_in in BOUNDARY:
            stack.enter_context(mock.patch.object(module, name, stand_in))
        tracker = stack.enter_context(_Live(vars(inputs).values()))
        run(inputs)
        return tracker.highest


def highest_on_a_gpu(inputs, run, replaced=()):
    """Above what `inputs` hold. replaced: (module, name, what stands for it, None = a kernel that is not launched)."""
    with ExitStack() as stack:
        change = [(matmul, name, function) for name, function in PRODUCTS.items()]
        change += [*BOUNDARY, (checks, "unavailable", lambda engine, device, *dtypes: None)]
        change += [(block_sizes, "architecture", lambda device: "sm_90")]
        change += [
            (tiled_forward, "splits_of", lambda blocks, tiles, device: block_sizes._splits(blocks, tiles, 132))
        ]
        change += [(module, name, None) for module, name in KERNELS]
        for module, name, stand_in in [*change, *replaced]:
            stack.enter_context(mock.patch.object(module, name, stand_in or _NotLaunched()))
        tracker = stack.enter_context(_Live(vars(inputs).values()))
        run(inputs)
        return tracker.highest
