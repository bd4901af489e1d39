"""Recipes: named sets of choices for a whole run. `KDConfig` starts from one and replaces what is given explicitly.

    total = ce_weight·LM + kd_weight(progress)·τ²·KL

lm_only    no distillation: the baseline every other recipe has to beat
run4       projected teacher, nn.Linear's start, constant KD weight, one learning rate
run5       projected teacher with the three fixes for a run that diverges: a small normal start, a KD weight that
           ramps from 0.1 over the first fifth of the run, and a learning rate of 5× for the projector
true_head  the teacher's own head instead of a projector, for teachers that share the student's vocabulary

A projector trained by the KD loss alone learns to imitate the student, because that is the easiest way to a low KL.
What tells is the projected teacher's fidelity, `eval_kl_teacher_projected`, not the KL the loss sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdfast.projector import ProjectorInit
from kdfast.schedules import Constant, Piecewise, Ramp, Schedule


@dataclass(frozen=True)
class Recipe:
    """All that is in force in a run. `KDConfig.resolved()` makes one; fields are named as there."""

    name: str
    teacher: Literal["none", "projected", "own_head"]  # where the KD term's teacher logits come from
    temperature: float = 2.0
    temperature_steps: tuple[float, ...] | None = None  # in place of `temperature`: equal parts of the run
    divergence: str = "forward_kl"
    kd_weight: float = 0.7
    kd_ramp: float = 0.0  # fraction of the run the KD weight ramps over; 0 = constant
    kd_ramp_start: float = 0.1
    ce_weight: float = 1.0
    anchor_weight: float = 0.0
    teacher_grad: Literal["full", "projector", "none"] = "full"
    projector_init: ProjectorInit = "default"
    projector_lr: float | None = None
    projector_lr_multiplier: float = 1.0
    router_lr_multiplier: float = 1.0

    def kd_weight_schedule(self) -> Schedule:
        if self.kd_ramp == 0:
            return Constant(self.kd_weight)
        return Ramp(self.kd_weight, start=self.kd_ramp_start, until=self.kd_ramp)

    def temperature_schedule(self) -> Schedule:
        if self.temperature_steps is None:
            return Constant(self.temperature)
        return Piecewise(self.temperature_steps)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("lm_only", teacher="none", kd_weight=0.0),
        Recipe("run4", teacher="projected"),
        Recipe(
            "run5",
            teacher="projected",
            kd_ramp=0.2,
            projector_init="normal",
            projector_lr_multiplier=5.0,
            router_lr_multiplier=2.0,
        ),
        Recipe("true_head", teacher="own_head"),
    )
}

# What a recipe of that kind has no use for: given explicitly, it is left out, and the log says so.
_PROJECTOR = ("projector_init", "projector_lr", "projector_lr_multiplier", "anchor_weight", "teacher_grad")
UNUSED: dict[str, tuple[str, ...]] = {
    "none": (
        "kd_weight", "kd_ramp", "kd_ramp_start", "temperature", "temperature_steps", "divergence", *_PROJECTOR,
    ),
    "own_head": _PROJECTOR,
    "projected": (),
}  # fmt: skip


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError with the names there are."""
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is unknown; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]
