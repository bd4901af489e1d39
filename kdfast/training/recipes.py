"""Recipes: named sets of choices for a whole run. `KDConfig` starts from one and overrides what is given explicitly.

    total = ce_weight·LM + kd_weight(progress)·τ²·KL + anchor_weight·anchor + hidden_weight·hidden states

lm_only          no distillation: the baseline that every other recipe has to beat
projector        projected teacher, nn.Linear's start, constant KD weight, one learning rate
projector_fixed  projected teacher with three fixes for runs that diverge: a small normal start, a KD weight that ramps
                 from 0.1 over the first fifth of the run, and a 5× learning rate for the projector
teacher_head     the teacher's own head instead of a projector, for teachers that share the student's vocabulary
compressed_head  that head as two thin fixed factors, of the rank that keeps the KL to it at 0.01; KD weight 2
svd_init         compressed_head for a fresh student, whose embedding is solved from the teacher's head
svd_blocks       svd_init with the layers solved from the teacher's too
projector_refit  the best recipe with a projector: svd_init's start, the projector solved again every 16 steps
probe            a projector with its own head, trained on the labels alone
shared_tokens    the teacher's own head over the strings that its different tokenizer shares with the student's
cached           the teacher's distribution from `kdfast cache`: no teacher in memory

docs/recipes.md has their results.

A projector trained by the KD loss alone learns to imitate the student, the easiest way to a low KL. So judge the
projected teacher by its fidelity, `eval_kl_teacher_projected`, not by the KL in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from kdfast.divergences import DIVERGENCES, Divergence, get_divergence
from kdfast.inputs import same_vocabulary
from kdfast.projector import ProjectorInit
from kdfast.schedules import Constant, Piecewise, Ramp, Schedule, Until
from kdfast.training.adapters import adapted_layer, unwrap
from kdfast.training.data.tokenizers import other_vocabulary
from kdfast.training.hf import check_model, head_shape
from kdfast.training.initialization.layers import find_misfit, has_trained_layers

# Where the KD term's teacher logits come from
TeacherKind = Literal[
    "none",
    "own_head",  # the teacher's own head
    "shared_head",  # its rows for the strings that two tokenizers share
    "compressed_head",  # its own head as two thin fixed factors
    "projected",  # a projector, then the student's own head
    "probe",  # a projector and its own head, trained by the anchor alone
    "cached",  # entries of the teacher's distribution, which come with the batch
]
ProjectorStart = Literal[ProjectorInit, "svd", "lstsq"]
StudentStart = Literal["own", "svd", "svd_blocks"]


@dataclass(frozen=True)
class Recipe:
    """All settings of one run's loss. `KDConfig.resolved()` makes one; fields have the same names there.

    Raises ValueError if nothing would be learned after `kd_until`, or for alpha or beta that `divergence` lacks.
    """

    name: str
    teacher: TeacherKind
    temperature: float = 2.0
    temperature_steps: tuple[float, ...] | None = None  # replaces `temperature`, each for an equal part of the run
    divergence: str = "forward_kl"
    alpha: float | None = None  # of the divergence, as is beta; None = its default
    beta: float | None = None
    kd_weight: float = 0.7
    kd_ramp: float = 0.0  # fraction of the run the KD weight ramps over; 0 = constant
    kd_ramp_start: float = 0.1
    kd_until: float = 1.0  # fraction of the run after which the KD term ends and the teacher no longer runs
    kd_on: Literal["completion", "all"] = "completion"  # KD where labels count, or on every token
    ce_weight: float = 1.0
    student_init: StudentStart = "own"  # for a fresh student: "svd" solves its embedding, "svd_blocks" all of it
    compressed_rank: int | None = None  # None = chosen by compressed_kl, or the student's width
    compressed_kl: float | None = None  # nats; choose the smallest rank whose KL to the whole head is at most this
    anchor_weight: float = 0.0  # multiplies the projected teacher's own cross entropy on the labels
    teacher_grad: Literal["full", "projector", "none"] = "full"
    projector_init: ProjectorStart = "default"
    projector_resolve_steps: int = 0  # solve the projector again every so many steps instead of training it; 0 = never
    projector_lr: float | None = None
    projector_lr_multiplier: float = 1.0
    router_lr_multiplier: float = 1.0
    hidden_weight: float = 0.0  # multiplies the layer-wise hidden-state loss

    def __post_init__(self) -> None:
        if self.kd_until < 1 and self.ce_weight == 0 and self.hidden_weight == 0:
            raise ValueError(
                f"kd_until={self.kd_until:g} and ce_weight=0; after the KD term nothing would be left to learn from. "
                "Expected kd_until=1, or a ce_weight > 0"
            )
        self.make_divergence()

    def make_divergence(self) -> Divergence:
        """Return the divergence with its parameters; at the ends of their range, such as β = 0 in the JSD, a KL.

        Raises ValueError for an unknown name, and for alpha or beta that it does not have or that are out of range.
        """
        get_divergence(self.divergence)
        given = {name: x for name in ("alpha", "beta") if (x := getattr(self, name)) is not None}
        known = {name: [f.name for f in fields(cls)] for name, cls in DIVERGENCES.items()}
        for name, value in given.items():
            if name not in known[self.divergence]:
                having = ", ".join(divergence for divergence, names in known.items() if name in names)
                raise ValueError(
                    f"{name}={value:g} with divergence={self.divergence!r}, which has none; expected divergence to be "
                    f"one of {having}"
                )
        return get_divergence(DIVERGENCES[self.divergence](**given) if given else self.divergence)

    @property
    def has_projector(self) -> bool:
        return self.teacher in ("projected", "probe")

    @property
    def solves_projector(self) -> bool:
        return self.has_projector and (self.projector_init in ("svd", "lstsq") or self.projector_resolve_steps > 0)

    @property
    def solves(self) -> bool:
        """Return whether something is solved in closed form, from training text, before the first step."""
        return self.solves_projector or self.student_init != "own" or self.teacher == "compressed_head"

    @property
    def needs_true_head(self) -> bool:
        """Return whether the teacher's own head is compared with the student's, token by token."""
        return self.solves or self.teacher == "own_head"

    @property
    def needs_teacher_always(self) -> bool:
        """Return whether the teacher runs even at KD weight 0: DDP waits for a trained projector's gradient."""
        trained = self.has_projector and self.projector_resolve_steps == 0
        return trained or self.anchor_weight > 0 or self.hidden_weight > 0

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Return all temperatures of the run."""
        return self.temperature_steps or (self.temperature,)

    def kd_weight_schedule(self) -> Schedule:
        schedule: Schedule = Constant(self.kd_weight)
        if self.kd_ramp > 0:
            schedule = Ramp(self.kd_weight, start=self.kd_ramp_start, until=self.kd_ramp)
        return schedule if self.kd_until == 1 else Until(schedule, self.kd_until)

    def temperature_schedule(self) -> Schedule:
        if self.temperature_steps is None:
            return Constant(self.temperature)
        return Piecewise(self.temperature_steps)


CACHED = "cached"  # learns from a teacher's entries instead of a teacher

# former names, still found in configurations and records of runs
ALIASES = {
    "run4": "projector",
    "run5": "projector_fixed",
    "true_head": "teacher_head",
    "svd": "svd_init",
    "resolved": "projector_refit",
}


class RecipeTable(dict[str, Recipe]):
    """A mapping from names to recipes; `RECIPES[name]` accepts a former name too."""

    def __missing__(self, name: str) -> Recipe:
        return self[ALIASES[name]]


COMPRESSED = Recipe("compressed_head", teacher="compressed_head", compressed_kl=0.01, kd_weight=2.0, kd_until=0.5)
RECIPES = RecipeTable(
    (recipe.name, recipe)
    for recipe in (
        Recipe("lm_only", teacher="none", kd_weight=0.0),
        Recipe("projector", teacher="projected"),
        Recipe(
            "projector_fixed",
            teacher="projected",
            kd_ramp=0.2,
            projector_init="normal",
            projector_lr_multiplier=5.0,
            router_lr_multiplier=2.0,
        ),
        Recipe("teacher_head", teacher="own_head"),
        COMPRESSED,
        replace(COMPRESSED, name="svd_init", student_init="svd"),
        replace(COMPRESSED, name="svd_blocks", student_init="svd_blocks"),
        Recipe(
            "projector_refit",
            teacher="projected",
            student_init="svd",
            projector_init="svd",
            projector_resolve_steps=16,
            teacher_grad="none",
        ),
        Recipe("probe", teacher="probe", anchor_weight=1.0),
        Recipe("shared_tokens", teacher="shared_head", temperature=1.0, kd_weight=1.0),
        Recipe(CACHED, teacher="cached"),
    )
)

SELF = "self"  # as a teacher: the student's own earlier self
FEW_STRINGS = 0.5  # KD over 64% of the student's strings helped, over 33% it did harm (docs/recipes.md)

AUTO = "auto"  # as a recipe: choose_recipe picks one for the models

# Settings that a kind of recipe does not use: given explicitly, they are left out, and the log says so.
_PROJECTOR = (
    "projector_init", "projector_resolve_steps", "projector_lr", "projector_lr_multiplier",
    "anchor_weight", "teacher_grad",
)  # fmt: skip
_COMPRESSED = ("compressed_rank", "compressed_kl")
_KD = ("kd_on", "kd_weight", "kd_ramp", "kd_ramp_start", "kd_until", "temperature", "temperature_steps", "divergence",
       "alpha", "beta")  # fmt: skip
UNUSED: dict[str, tuple[str, ...]] = {
    "none": (*_KD, *_PROJECTOR, *_COMPRESSED),
    "own_head": (*_PROJECTOR, *_COMPRESSED),
    "shared_head": (*_PROJECTOR, *_COMPRESSED),
    "compressed_head": _PROJECTOR,
    "projected": _COMPRESSED,
    "probe": (*_COMPRESSED, "teacher_grad", "projector_resolve_steps"),
    "cached": (*_PROJECTOR, *_COMPRESSED, "hidden_weight"),
}


def get_recipe(name: str) -> Recipe:
    """Return the recipe of that name, current or former. Raise ValueError listing the names that exist."""
    try:
        return RECIPES[name]
    except KeyError:
        raise ValueError(f"recipe={name!r} is unknown; expected one of {', '.join(RECIPES)}, or {AUTO}") from None


def current_name(name: str) -> str:
    """Return the current name of a recipe; an unknown name as it is."""
    return ALIASES.get(name, name)


class Choice(NamedTuple):
    recipe: str
    why: str

    def __str__(self) -> str:
        """Return the lines that a run prints: which recipe, why, and its measured results (docs/recipes.md)."""
        expected = f". Expect it {EXPECTED[self.recipe]}" if self.recipe in EXPECTED else ""
        return f"recipe {self.recipe}: {self.why}{expected}"


EXPECTED = {
    "svd_blocks": "near its teacher before the first step, as a pretrained model is; the more new text it sees, the "
    "less a teacher adds: compare recipe=lm_only, student_init=svd_blocks",
    "svd_init": "ahead of LM only at equal tokens, and near it at equal seconds while text is new; try higher learning "
    "rates than LM only's",
    "shared_tokens": "ahead of LM only at equal tokens where most strings and positions are shared; compare "
    "recipe=lm_only, at its own best learning rate",
    "compressed_head": "ahead of LM only at equal tokens where the teacher knows this text better than the student "
    "does; compare recipe=lm_only at equal seconds, at its own best learning rate",
}


FROM_CACHE = Choice(CACHED, "the data set brings a teacher's cached entries")


def choose_recipe(
    student: PreTrainedModel,
    teacher: PreTrainedModel | str | None,
    valid_vocab: int | None = None,
    vocab: str = "error",
    shared_strings: float | None = None,
) -> Choice:
    """Return the best measured recipe for two models, and why: what recipe="auto" picks.

    The choice rests on the experiment in `bench/recipes/`, whose figures are in docs/recipes.md.

    Args:
        student, teacher: causal models. A teacher of None gives `lm_only`, "self" gives `teacher_head`.
        valid_vocab: as in `fused_kd_loss`. Heads that differ only by padding rows count as equal.
        vocab: "truncate" compares other heads over the ids that both have; nothing is solved from such a teacher.
        shared_strings: if the teacher is known to have another tokenizer, the share of the student's tokens in it.

    Raises ValueError if the teacher has another vocabulary.
    """
    student, teacher = unwrap(student, "student"), unwrap(teacher, "teacher")
    check_model(student, "student", compare=False)
    if teacher is None:
        return Choice("lm_only", "there is no teacher")
    if isinstance(teacher, str):
        return Choice("teacher_head", "the teacher is the student's own earlier self")
    check_model(teacher, "teacher", compare=False)
    if shared_strings is not None:
        why = f"the teacher has another tokenizer, with {shared_strings:.0%} of the student's strings"
        if shared_strings < FEW_STRINGS:
            return Choice("lm_only", f"{why}, and KD over so few did harm; recipe='shared_tokens' does it all the same")
        return Choice("shared_tokens", f"{why}: KD is over those")
    rows = head_shape(student)[0], head_shape(teacher)[0]
    if not same_vocabulary(*rows, valid_vocab, vocab):
        raise ValueError(f"recipe='auto' has no use for this teacher: {other_vocabulary(student, teacher)}")
    if not same_vocabulary(*rows, valid_vocab):
        return Choice(
            "compressed_head", f"the student has {rows[0]} ids, the teacher {rows[1]}: the first are compared"
        )
    if adapted_layer(student) is None and is_fresh(student):
        misfit = find_misfit(student, teacher)
        if misfit is None and has_trained_layers(student):
            misfit = "they are trained, as their norms' gains tell"
        if misfit is None:
            why = "the student is fresh and fits into its teacher, so its layers are solved from the teacher's"
            return Choice("svd_blocks", why)
        why = "the student is fresh and has the teacher's vocabulary, so its embedding is solved from the teacher's"
        return Choice("svd_init", f"{why}. Its layers can't be ({misfit})")
    return Choice("compressed_head", "the student is pretrained and has the teacher's vocabulary")


@torch.no_grad()
def is_fresh(student: PreTrainedModel) -> bool:
    """Return whether the student's embedding is as it was drawn: rows of independent normal numbers of one size.

    Row norms of such an embedding of width H vary by 1/√(2H); training moves rows by how often their tokens occur.
    """
    weight = student.get_output_embeddings().weight
    norms = weight.float().norm(dim=1)
    norms = norms[norms > 0]  # a padding token's row is initialized to zeros
    return len(norms) > 1 and (norms.std() / norms.mean()).item() < 1.5 * (2 * weight.shape[1]) ** -0.5
