"""Learning rates for each part of a distillation model: parameter groups for any torch optimizer.

    optimizer = torch.optim.AdamW(distillation_param_groups(model, lr=5e-5, weight_decay=0.01))

A new projector must move much faster than a pretrained student, or the student learns from noise while the projector
catches up. Parts are recognized by their names in `model.named_parameters()`:

    projector   names that contain "logit_projector"           5 × lr, or projector_lr
    router      those that `router_parameters` finds           2 × lr
    student     everything else, or only names under `student.` if the model has such a submodule
    other       whatever is left then, such as auxiliary modules, at lr

Biases and parameters of norms get no weight decay and have groups of their own.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

PARTS = ("student", "router", "projector", "other")

# name parts added by DDP, torch.compile, FSDP and activation checkpointing
_WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_ROUTER = re.compile(r"Router$|MoE\w*Gate$")  # class names in transformers; the latter is Hunyuan's


def distillation_param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    projector_lr: float | None = None,
    projector_lr_multiplier: float = 5.0,
    router_lr_multiplier: float = 2.0,
) -> list[dict[str, Any]]:
    """Return optimizer groups that contain every trainable parameter of `model` exactly once.

    Args:
        model: any module; frozen parameters are left out, tied ones appear once.
        lr: learning rate of the student and of other modules.
        weight_decay: applies to everything except biases and norms.
        projector_lr: the projector's learning rate; None = projector_lr_multiplier · lr.
        projector_lr_multiplier, router_lr_multiplier: factors of lr.

    Returns:
        Non-empty dicts with "name" (one of `PARTS`), "params", "lr" and "weight_decay", in the order of `PARTS`, groups
        with weight decay first. torch optimizers keep "name", so logs can use it.

    Raises:
        ValueError: a rate, multiplier or weight decay is negative or NaN, or nothing is trainable.
    """
    numbers = {
        "lr": lr,
        "weight_decay": weight_decay,
        "projector_lr": projector_lr,
        "projector_lr_multiplier": projector_lr_multiplier,
        "router_lr_multiplier": router_lr_multiplier,
    }
    for argument, value in numbers.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{argument}={value!r}; expected a number ≥ 0")

    rates = {
        "student": lr,
        "router": router_lr_multiplier * lr,
        "projector": projector_lr_multiplier * lr if projector_lr is None else projector_lr,
        "other": lr,
    }
    parameters = [(_WRAPPERS.sub("", name), p) for name, p in model.named_parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "model has no parameter that requires a gradient; expected something to train: "
            "student.requires_grad_(True) (PEFT's merge_and_unload() leaves all frozen)"
        )
    has_student = any(name.startswith("student.") for name, _ in parameters)
    undecayed, routers = _biases_and_norms(model), router_parameters(model)

    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (part, decays): {"name": part, "params": [], "lr": rates[part], "weight_decay": weight_decay if decays else 0.0}
        for part in PARTS
        for decays in (True, False)
    }
    for name, parameter in parameters:
        part = "router" if id(parameter) in routers else _part(name, has_student)
        groups[part, id(parameter) not in undecayed]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def router_parameters(model: nn.Module) -> set[int]:
    """Return the ids (as of `id()`) of the parameters that choose experts.

    Their name contains "router", or their module's class name does: Mixtral's mlp.gate is a MixtralTopKRouter. An
    adapter on such a module (PEFT's target_parameters) counts as part of it.
    """
    named = {id(p) for name, p in model.named_parameters() if "router" in name}
    modules: Any = model.modules()
    whole = ((module, getattr(module, "get_base_layer", lambda m=module: m)()) for module in modules)
    routers = (module for module, base in whole if _ROUTER.search(type(base).__name__))
    return named.union(id(p) for module in routers for p in module.parameters())


def _part(name: str, has_student: bool) -> str:
    if "logit_projector" in name:
        return "projector"
    return "student" if not has_student or name.startswith("student.") else "other"


def _biases_and_norms(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that get no weight decay, found by their name or their module's class."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or name.endswith("_bias") or "norm" in type(module).__name__.lower()
    }
