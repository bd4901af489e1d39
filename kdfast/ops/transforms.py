"""What PyTorch may be doing with a tensor besides computing: tracing, batching, forward mode, inference mode.

A fused engine computes its gradients in its own forward, behind an operator. `torch.func` and forward mode cannot see
into it and would silently return zeros or lose gradients, so they are refused; engine="reference" supports them.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

_NAMES = {"Vmap": "torch.func.vmap", "Grad": "torch.func.grad, vjp or jacrev", "Jvp": "torch.func.jvp or jacfwd"}
_DUAL, _BATCHED = "torch.autograd.forward_ad", "is_grads_batched=True"


def refuse(name: str, tensor: Tensor, *, batches: bool = False) -> None:
    """Raise NotImplementedError if the tensor called `name` goes through a transform that fused engines don't support.
    batches: allow it to be batched, but nothing more."""
    used = in_force() or (_DUAL if forward_ad._current_level >= 0 else "")  # a graph has a guard on the level
    if not torch.compiler.is_compiling():  # a graph cannot look at the tensor
        if functorch.is_legacy_batchedtensor(tensor):
            used = f"{used}, {_BATCHED}" if used else _BATCHED
        elif used and not (functorch.is_batchedtensor(tensor) or functorch.is_gradtrackingtensor(tensor)):
            used = used if has_tangent(tensor) else ""
    if not used or (batches and used in (_NAMES["Vmap"], _BATCHED)):
        return
    raise NotImplementedError(
        f"fused_kd_loss: {name} goes through {used}, and a fused engine takes its gradients in its own forward, where "
        "that cannot follow. Use engine='reference'"
    )


def in_force() -> str:
    """Return the names of the torch.func transforms around this call; "" = none."""
    names = [_NAMES.get(each.key().name, "") for each in functorch.get_interpreter_stack() or ()]
    return ", ".join(dict.fromkeys(filter(None, names)))


# nothing that a graph should hold; a change recompiles it
in_force._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_tangent(tensor: Tensor) -> bool:
    """Return whether `tensor` has a tangent in forward mode."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def traced() -> bool:
    """Return whether make_fx, or something built on it, is recording operators."""
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return module is not None and module.get_proxy_mode() is not None


def has_values(tensor: Tensor) -> bool:
    """Return whether the tensor has values to read, which it does not while traced or inside torch.func.vmap."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta" or traced():
        return False
    while torch._C._are_functorch_transforms_active() and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return type(tensor).__name__ != "FakeTensor"


def ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd can save: for one made in torch.inference_mode(), a new one that shares its memory
    and has no gradient; any other as it is."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not tensor.is_inference():
        return tensor
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.requires_grad:
        return tensor
    place = tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)
