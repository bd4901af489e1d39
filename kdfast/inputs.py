"""The inputs of the loss: the student's head, the kinds of teacher, and the options.

Heads and teachers are frozen dataclasses and registered pytrees, so `torch.compile`, activation checkpointing, forward
hooks, DDP and FSDP see the tensors inside. Reentrant checkpointing (`use_reentrant=True`) and full backward hooks see
only tensors that are arguments themselves: pass the former the leaves of `torch.utils._pytree.tree_flatten`. Nothing is
checked here; `fused_kd_loss` checks every field and names it in its errors.

Letters: `*` any leading shape (the same for student, teacher and labels), `V` vocabulary, `Hs`/`Ht` student and teacher
width, `K` entries kept per token.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal

from torch import Tensor
from torch.utils import _pytree as pytree

from kdfast.divergences import Divergence

MOST_ENTRIES = 1024  # per token of a sparse teacher: a kernel's program holds them in registers


@dataclass(frozen=True, eq=False)
class Head:
    """Hidden states and the head that turns them into logits, `softcap·tanh(logit_scale·(h Wᵀ + b)/softcap)`.

    hidden       (*, H)  float32, bfloat16, float16 or float64
    weight       (V, H)  the embedding or `lm_head.weight`, in the same dtype (outside autocast)
    bias         (V,)    or None; any dtype (float64 only with float64), added in fp32
    logit_scale          multiplies the logits before the cap: Cohere's `logit_scale`, 1/x for Granite's divisor x
    softcap              Gemma-2's `final_logit_softcapping`; None = no cap
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class Projected:
    """A teacher whose hidden states go through a projector and then through the student's own head.

    The projector runs in its own dtype, as nn.Linear does (also under autocast), or in the student's if that is wider,
    and its output is cast to the student's dtype. On a CPU the `torch` engine takes fp32 at least; elsewhere a bf16
    student's rounding limits accuracy near convergence (docs/conventions.md).

    hidden            (*, Ht)   the teacher's hidden states; without a projector (*, Hs), and they receive a gradient
    projector_weight  (Hs, Ht)  as `nn.Linear(Ht, Hs).weight`
    projector_bias    (Hs,)     or None; any dtype (float64 only with float64)
    temperature                 τ_t > 0, a number or 0-d tensor that divides the teacher's logits in the KD term; None =
                                the loss's τ, which divides the student's. The factor τ² is always the loss's, and
                                anchor and entropies are at 1. DSKD has kd_temperature·teacher_temperature, and no τ²
    """

    hidden: Tensor
    projector_weight: Tensor | None = None
    projector_bias: Tensor | None = None
    _: KW_ONLY
    temperature: float | Tensor | None = None


@dataclass(frozen=True, eq=False)
class Logits:
    """A teacher given as dense logits, which are not copied, whatever their strides (`logits[:, :-1]` is fine).

    logits  (*, V)  any float dtype
    """

    logits: Tensor


@dataclass(frozen=True, eq=False)
class SparseLogits:
    """A teacher given as K log-probabilities per token; the cost grows with K, not with K·V.

    indices    (*, K)  integer ids, in any order, K ≤ 1024. The probabilities of equal ids add up
    log_probs  (*, K)  any float dtype, at τ = 1; −inf marks padding, whatever its id. With "renormalize" and
                       "renormalize_both" every row that counts needs at least one entry
    tempered           log_probs are at the loss's temperature: entries of log_softmax(z/τ) over all V. "bucket" is
                       then exact at any τ, and "none" is allowed
    log_tail   (*,)    "bucket" only: log of the mass on all ids not given, at the temperature of log_probs; −inf if
                       they have none. None computes 1 − Σ exp(log_probs), but no less than the rounding error of that
                       sum: Σ |p log p| roundings of their dtype, or 2⁻²³ (float64 2⁻⁵²). Pass it if you know it: beside
                       a log-probability of 0.0 it cannot be computed. There is no tail if the ids cover all of V
    tail               how to treat the ids not given. The student is normalized over all of V, except with the last:

    "renormalize"  give them no teacher mass; the K entries are renormalized at τ. Reverse and symmetric KL are infinite
    "bucket"       sum them into one more category on both sides. Exact at τ = 1. At another τ, unless tempered, both
                   sides' K + 1 masses are raised to the power 1/τ and normalized again: the loss is still zero exactly
                   where the student has the teacher's masses, but differs from that of dense logits
    "none"         give them no teacher mass; the K weights exp(log_probs) are not normalized. Only at τ = 1, unless
                   tempered. For ids drawn at random with weight counts/n (random-sampling KD), whose expectation is the
                   dense gradient. Source: Anshumann et al. 2025, arXiv:2503.16870
    "renormalize_both"  ignore them on both sides: compare softmax(log_probs/τ) with the student's softmax(z/τ) over the
                   K ids alone, finite for every divergence. The student's mass elsewhere is unconstrained; CE, still
                   over all of V, can hold it down. TRL's, axolotl's and NeMo-RL's top-k losses do this
    """

    indices: Tensor
    log_probs: Tensor
    _: KW_ONLY
    log_tail: Tensor | None = None
    tail: Literal["renormalize", "bucket", "none", "renormalize_both"] = "renormalize"
    tempered: bool = False


Teacher = Projected | Head | Logits | SparseLogits


def is_asked(weight: float | Tensor) -> bool:
    """Return whether a term with this weight may count; any tensor may, since its value is not read."""
    return isinstance(weight, Tensor) or weight != 0


def same_vocabulary(one: int, other: int, valid: int | None, vocab: str = "error") -> bool:
    """Return whether heads of `one` and `other` rows can be compared: beyond their `valid` real ids they differ only in
    padding, or vocab="truncate" compares the first ids alone."""
    return vocab == "truncate" or one == other or (valid is not None and valid <= min(one, other))


def short(value: object) -> str:
    """Return the value's repr for an error message, cut to one line."""
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to print a few thousand digits
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def did_you_mean(name: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """Return "; did you mean 'x'?" for a near miss of one of the `known` names, else "": no hint beats a wrong one.

    elsewhere: other libraries' names → ours.
    """
    slip = name.lower().replace("-", "_")
    names = {key.lower().replace("-", "_"): key for key in known}
    if len(slip) < 6:  # a short name may differ in one letter of four, but not in the first
        near = difflib.get_close_matches(slip, [key for key in names if key[:1] == slip[:1]], n=1, cutoff=0.75)
    else:
        near = difflib.get_close_matches(slip, names, n=1, cutoff=0.88)
        near = near or [key for key in names if sorted(key) == sorted(slip)]  # letters that changed places
    meant = (elsewhere or {}).get(slip) or (names[near[0]] if near else None)
    return f"; did you mean {meant!r}?" if meant else ""


def kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


@dataclass(frozen=True, eq=False)
class Options:
    """The keyword options of `fused_kd_loss`, which documents them; `divergence` is an instance here."""

    temperature: float | Tensor
    divergence: Divergence
    kd_weight: float | Tensor
    ce_weight: float | Tensor
    anchor_weight: float | Tensor
    anchor_targets: Tensor | None
    teacher_grad: str
    token_weights: Tensor | None
    kd_token_weights: Tensor | None
    ignore_index: int
    reduction: str
    num_items_in_batch: int | Tensor | None
    temperature_squared: bool
    valid_vocab: int | None
    vocab: str
    kd_vocab_mask: Tensor | None
    process_group: Any
    vocab_start: int | None
    engine: str
    scratch_bytes: int | None
    return_metrics: bool | Literal["terms"]

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]


def _register(cls: type, tensors: tuple[str, ...]) -> None:
    options = tuple(f.name for f in fields(cls) if f.name not in tensors)

    def flatten(source: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(source, name) for name in tensors], tuple(getattr(source, name) for name in options)

    def flatten_with_keys(source: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        leaves, context = flatten(source)
        return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(tensors, leaves, strict=True)], context

    def unflatten(leaves: Any, context: tuple[Any, ...]) -> Any:
        return cls(**dict(zip((*tensors, *options), (*leaves, *context), strict=True)))

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"kdfast.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


_register(Head, ("hidden", "weight", "bias"))
_register(Projected, ("hidden", "projector_weight", "projector_bias"))
_register(Logits, ("logits",))
_register(SparseLogits, ("indices", "log_probs", "log_tail"))
