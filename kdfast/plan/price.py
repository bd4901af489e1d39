"""Price per token: the matrix operations of training a student with a recipe, compared with LM training alone."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from kdfast.training.recipes import Recipe

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names of the number of experts in configurations


class Size(NamedTuple):
    """The sizes of a model that its price depends on."""

    parameters: int  # in the matrices each token goes through: no embedding, no head, only the experts it is routed to
    vocab: int
    width: int
    layers: int
    frozen: int = 0  # how many of `parameters` are frozen, as below an adapter
    frozen_head: bool = False


class Price(NamedTuple):
    """Operations per token, without row work, attention products and the recomputation of activations."""

    lm_only: int
    teacher: int  # added by distillation

    @property
    def ratio(self) -> float:
        """Return the price as a multiple of LM only's."""
        return 1 + self.teacher / self.lm_only

    def __str__(self) -> str:
        return f"{self.lm_only + self.teacher:.3g} operations per token, {self.ratio:.2f} times LM only's"


def size_of(model: Any) -> Size:
    """Return the sizes of a causal transformers model on any device; for a vision-language model, its text model's."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    apart = {id(p) for module in (head, *tables) for p in module.parameters()}
    experts = next((n for name in EXPERTS if (n := getattr(config, name, None))), None)
    taken = (getattr(config, "num_experts_per_tok", None) or experts or 1) / (experts or 1)
    passed = {False: 0.0, True: 0.0}  # parameters by whether they are trained
    for name, p in model.get_decoder().named_parameters():
        if p.dim() > 1 and id(p) not in apart and not re.search(r"\b(original_module|lora_embedding_A)\b", name):
            packed = getattr(p, "quant_state", None)  # bitsandbytes' 4 bits, two per element
            elements = p.numel() if packed is None else math.prod(packed.shape)
            table = p.dim() == 3 and p.shape[0] == experts  # JetMoE's experts have other names
            of_experts = table or re.search(r"\bexperts\.(?!router)", name)
            passed[p.requires_grad] += elements * (taken if of_experts else 1)
    (vocab, width), layers = head.weight.shape, getattr(config, "num_hidden_layers", 0)
    frozen = round(passed[False])
    return Size(round(sum(passed.values())), vocab, width, layers, frozen, not head.weight.requires_grad)


def price_per_token(
    recipe: Recipe, student: Size, teacher: Size | None, *, rank: int | None = None, passes: float | None = None
) -> Price:
    """Return the price per token of `recipe`. With u = 2·V·H, one product with a head:

        LM only                    6·P + 3·u(Hs); less 2 per frozen weight, and less u for a frozen head
        any teacher that runs      + 2·Pt
        its own head               + u(Ht)
        compressed, with rank r    + 2·r·(V + Ht); rank=None: the full head
        projected                  + 2·Ht·Hs + u(Hs), and the products of its gradients
        cached                     nothing, or one run of the teacher divided by `passes`, the number of passes over the
                                   text; plus 2·r·V for cached hidden states of `rank` r

    A teacher that runs only in the first part of the run (`kd_until`) costs that share. Closed-form solves, before or
    during the run, are not included.
    """
    product = 2 * student.vocab * student.width
    lm_only = 6 * student.parameters - 2 * student.frozen + (3 - student.frozen_head) * product
    kept = 2 * (rank or 0) * student.vocab if recipe.teacher == "cached" else 0
    if teacher is None:
        return Price(lm_only, round(recipe.kd_until * kept))
    own, projector = 2 * teacher.vocab * teacher.width, 2 * teacher.width * student.width
    if recipe.teacher in ("none", "cached") and not recipe.hidden_weight:
        once = 2 * teacher.parameters + own
        share = 1 / passes if recipe.teacher == "cached" and passes else 0
        return Price(lm_only, round(share * once + recipe.kd_until * kept))
    heads = 0
    if recipe.teacher == "compressed_head" and rank is not None:
        heads = 2 * rank * (teacher.vocab + teacher.width)
    elif recipe.teacher in ("own_head", "compressed_head"):
        heads = own
    elif recipe.teacher == "shared_head":
        heads = 2 * student.vocab * teacher.width
    elif recipe.teacher == "projected":
        trained = recipe.projector_resolve_steps == 0
        reached = trained and (recipe.teacher_grad != "none" or recipe.anchor_weight > 0)
        heads = (1 + trained) * projector + (1 + reached) * product
        heads += (recipe.teacher_grad == "full" and not student.frozen_head) * product
    elif recipe.teacher == "probe":
        heads = 2 * projector + 4 * product  # three to train the probe, one for the student's loss
    if recipe.hidden_weight:
        heads += 3 * projector * student.layers
    steps = 1.0 if recipe.needs_teacher_always else recipe.kd_until
    return Price(lm_only, round(steps * (2 * teacher.parameters + heads)))
