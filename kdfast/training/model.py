"""`DistillationModel`: student, frozen teacher and projector under one forward, which returns the loss.

It calls the backbones and passes the heads' weights to `fused_kd_loss`, so logits are never made. Everything goes
through this forward: DDP's and FSDP's hooks run, and autocast and torch.compile see the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.closed_form import solve_lstsq
from kdfast.frontend.checks import can_read, has_values
from kdfast.inputs import Head
from kdfast.loss import KDMetrics, fused_kd_loss
from kdfast.low_rank_head import CompressedHead
from kdfast.training.adapters import adapt, adapted_layer, adapter_state
from kdfast.training.data.shared_vocabulary import SharedVocabulary
from kdfast.training.durable.processes import say_once
from kdfast.training.hf import (
    IGNORE_INDEX,
    backbone,
    check_inputs,
    check_model,
    head,
    inputs_of,
    is_dispatched,
    known_ids,
    placeholders,
    real_tokens,
    recomputes_reentrantly,
    router_loss,
    shift_labels,
)
from kdfast.training.initialization.calibration import Calibration, Start, set_projector
from kdfast.training.recipes import AUTO, SELF, Recipe, get_recipe
from kdfast.training.teachers.entries import (
    CachedEntries,
    CachedStates,
    TeacherTail,
    read_entries,
    read_states,
    take_entries,
)
from kdfast.training.teachers.fidelity import Fidelity
from kdfast.training.teachers.hidden_states import make_hidden_loss
from kdfast.training.teachers.own_inputs import read_own_inputs
from kdfast.training.teachers.self_teacher import Average, copy_student
from kdfast.training.teachers.several import (
    Teachers,
    choose_recipe_of_all,
    find_valid_vocab_of_all,
    hold,
    name_teachers,
    naming,
    running,
)
from kdfast.training.teachers.side import Learned, StudentBatch


class DistillationOutput(NamedTuple):
    loss: Tensor  # ()
    metrics: KDMetrics
    fidelity: Fidelity | None  # only if requested, and with a teacher
    aux_loss: Tensor | None = None  # (), the load-balancing loss of experts, without its coefficient
    log_probs: Tensor | None = None  # (B, T), of the targets, if requested
    targets: Tensor | None = None  # (), how many targets; metrics.tokens counts the KD term's
    compared: Tensor | None = None  # (), how many targets fidelity and anchor cover, if not all
    by_teacher: dict[str, Learned] | None = None  # with several teachers: each one's own part of metrics and fidelity


class DistillationModel(nn.Module):
    """A student, its frozen teacher and what is trained with them, as one module that returns the loss.

    Example, in any training loop:
        model = DistillationModel(student, teacher, recipe="teacher_head")
        model(**batch, kd_weight=0.9).loss.backward()

    The teacher stays in eval mode, also under `.train()`; its parameters are frozen and in no `state_dict`. The
    projector, if the recipe has one, is `logit_projector`, in fp32 (fp64 for an fp64 student).

    Args:
        student: a causal `PreTrainedModel`: plain, with a PEFT adapter in its layers, or inside a PeftModel.
            `model.student` is the transformers model.
        teacher: another causal model that reads the same token ids. None for the recipes "lm_only" and "cached", which
            use a teacher for evaluation only. A model that accelerate has offloaded or spread over devices
            (`device_map`, `cpu_offload`) stays where it is. "self" is the student's own weights as they are now; the
            base below an adapter is shared. For several teachers, pass a list or a mapping from names: the student
            learns from each under the recipe, and its start is solved from the first. A `TeacherCache` may be among
            them; batches bring its entries in columns of its name, teacher_indices_<name> and so on.
        teacher_weights: multiplies each of several teachers' KD terms; None means equal weights that sum to 1.
        recipe: a name, or a `Recipe` such as `KDConfig(…).resolved()`. "auto" is what `choose_recipe` picks for these
            models. If its starts are solved, call `solve` before the first step, as KDTrainer does.
        engine, scratch_bytes, valid_vocab, vocab: as in `fused_kd_loss`. If valid_vocab is None and the heads pad one
            tokenizer differently, it is the number of that tokenizer's ids. With vocab="truncate", nothing is solved
            from a teacher with another number of ids.
        tokenizer: the text's tokenizer; None means the one saved with the student. The models' own tokenizers must
            have the same tokens, except for a teacher's with shared_vocabulary.
        peft_config: a `LoraConfig` or the like, to put an adapter into the student and freeze its own weights.
        shared_vocabulary: what the text's tokenizer shares with a teacher's different one
            (`OtherTokenizer(…).vocabulary`). Batches must bring teacher_input_ids and teacher_positions.
        teacher_update_rate: makes the teacher "self" a moving average of the student: the student's share in each
            `average.update()`. KDTrainer calls that after each step; in your own loop you do.
        teacher_tail: what a batch's teacher_log_probs are, if they do not come from a `TeacherCache`; see
            `SparseLogits`. "bucket", "renormalize", "renormalize_both": log-probabilities at τ = 1. "none": log(n/N)
            of ids drawn n times in N draws at the KD term's temperature.
        router_aux_loss_coef: multiplies the load-balancing loss of a student that is a mixture of experts. None means
            its configuration's value, whether or not output_router_logits is set there; 0 turns it off.
        check_heads: compare both heads with their models once, on four tokens.

    Raises:
        ValueError, TypeError: the recipe needs a teacher, the vocabularies must not differ, an adapter is on a head,
            or a head does something that is not understood.
    """

    teacher: PreTrainedModel | None
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # transformers.Trainer then passes num_items_in_batch

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | str | Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        recipe: str | Recipe = AUTO,
        engine: str = "auto",
        scratch_bytes: int | None = None,
        valid_vocab: int | None = None,
        vocab: Literal["error", "truncate"] = "error",
        tokenizer: Any = None,
        peft_config: Any = None,
        shared_vocabulary: SharedVocabulary | None = None,
        teacher_update_rate: float | None = None,
        teacher_tail: TeacherTail | None = None,
        router_aux_loss_coef: float | None = None,
        check_heads: bool = True,
    ) -> None:
        super().__init__()
        student, teachers = adapt(student, peft_config), name_teachers(teacher)
        share = None if shared_vocabulary is None else shared_vocabulary.share
        valid_vocab = find_valid_vocab_of_all(student, teachers if share is None else {}, tokenizer, valid_vocab)
        self.teacher_tail = teacher_tail
        self.by_default = recipe == AUTO  # rather than the caller's choice
        if recipe == AUTO:
            recipe = choose_recipe_of_all(student, teachers, valid_vocab, vocab, share).recipe
        self.recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
        asked = [*teachers.values()]
        teachers = {k: self._copy_student(student, x) if isinstance(x, str) else x for k, x in teachers.items()}
        live = running(teachers)
        self.average: Average | None = None  # the moving average of the student that the teacher follows
        if teacher_update_rate is not None:
            self._check_average(asked, teacher_update_rate)
            self.average = Average(student, next(iter(teachers.values())), teacher_update_rate)
        self.divergence = self.recipe.make_divergence()
        self.loss_options: dict[str, Any] = {
            "engine": engine, "scratch_bytes": scratch_bytes, "valid_vocab": valid_vocab, "vocab": vocab
        }  # fmt: skip
        check_model(student, "student", compare=check_heads, router_aux_loss_coef=router_aux_loss_coef)
        self.router_loss = router_loss(student, router_aux_loss_coef)
        self.sides = Teachers(
            student, teachers, self.recipe, teacher_weights, valid_vocab=valid_vocab, vocab=vocab,
            check_heads=check_heads, shared_vocabulary=shared_vocabulary,
        )  # fmt: skip
        self.student = student
        # .to() would move a submodule that accelerate has placed
        placed = [None if is_dispatched(one) else one for one in live.values()] or [None]
        if len(placed) > 1:
            self.teacher = nn.ModuleList(placed)  # type: ignore[assignment, arg-type]
        elif placed[0] is None:
            object.__setattr__(self, "teacher", next(iter(live.values()), None))
        else:
            self.teacher = placed[0]
        self.inputs = {"student": inputs_of(student)}
        self.inputs |= {side.role: side.inputs for side in self.sides.values() if side.model is not None}
        self.placeholders = placeholders(student)
        self.valid_vocab = valid_vocab
        self.logit_projector: Any = hold([side.projector for side in self.sides.values()])
        self.shared_head = next(iter(self.sides.values())).shared_head
        # the same in every process, so DDP need not send them
        self._ddp_params_and_buffers_to_ignore = [f"shared_head.{name}" for name in ("weight", "bias", "mask")]
        self.hidden_loss = make_hidden_loss(student, next(iter(live.values()), None), self.recipe.hidden_weight)
        self.compressed_head: CompressedHead | None = None  # set by solve(); a list for several teachers
        self.cached_head: Any = None  # the cache's head for a batch's teacher_hidden; not a module
        self.solved = not self.recipe.solves
        self.looked = False  # whether ids were checked; on a GPU only in the first batch, since checking synchronizes
        self.loaded = False  # trained weights were loaded, which solving must not overwrite
        self.vocab_weights: Tensor | None = None  # (V,) float64, set by solve() for solving the projector again
        self.register_state_dict_post_hook(_drop_teacher)
        self.register_load_state_dict_post_hook(_forgive_teacher)

    def _copy_student(self, student: PreTrainedModel, asked: str) -> PreTrainedModel:
        """Return the teacher "self". Raise ValueError for another string, or a recipe that it cannot teach."""
        recipe = self.recipe
        if asked != SELF:
            raise ValueError(f"teacher={asked!r}; expected a model, as load_teacher({asked!r}) gives, or 'self'")
        if recipe.student_init != "own":
            raise ValueError(
                f"teacher='self' and recipe {recipe.name!r}, which would solve the student from itself; expected a "
                "recipe with student_init='own', such as 'teacher_head'"
            )
        return copy_student(student)

    def _check_average(self, asked: list[Any], update_rate: float) -> None:
        """Raise ValueError if no teacher can follow the student, or the recipe would not notice that it does."""
        if asked != [SELF]:
            raise ValueError(f"teacher_update_rate={update_rate:g}; expected teacher='self', alone, with it")
        if self.recipe.teacher in ("none", "cached", "compressed_head"):
            raise ValueError(
                f"teacher_update_rate={update_rate:g} and recipe {self.recipe.name!r}, which does not look at the "
                "teacher's head at every step; expected 'teacher_head', or a projector's"
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        teacher_indices: Tensor | None = None,
        teacher_log_probs: Tensor | None = None,
        teacher_log_tails: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_input_ids: Tensor | None = None,
        teacher_attention_mask: Tensor | None = None,
        teacher_positions: Tensor | None = None,
        teacher_id: Tensor | Sequence[str | int] | None = None,
        *,
        temperature: float | Tensor | None = None,
        kd_weight: float | Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        kd_items_in_batch: int | Tensor | None = None,
        with_fidelity: bool = False,
        with_metrics: bool = True,
        with_log_probs: bool = False,
        ce_weight: float | None = None,
        write: Callable[..., Any] | None = None,
        **backbone_inputs: Any,
    ) -> DistillationOutput:
        """Return the loss of one batch: ce_weight·LM + kd_weight·τ²·KL, plus anchor and load-balancing terms.

        Args:
            input_ids: (B, T) int64. An id that student or teacher has no row for raises ValueError on the CPU, in the
                first batch, and with KDFAST_CHECK=1; otherwise the loss is NaN. Padding may have any id.
            attention_mask: (B, T), 0 at padding.
            labels: (B, T) int64, *not* shifted. −100, and the place of an image, are ignored.
            position_ids: (B, T), for packed sequences; None = 0 to T − 1. Another shape if the models read that.
            teacher_indices, teacher_log_probs: (B, T, K), what the recipe "cached" learns from. Like logits, row t is
                the teacher's distribution *after* token t. −inf means no entry.
            teacher_log_tails: (B, T, 2), from a teacher cache (`CachedBlocks`) made for this temperature: log of the
                other ids' mass at τ = 1 and at that temperature. (B, T, 0) for drawn ids. None: see `teacher_tail`.
            teacher_hidden: (B, T, r), used instead with a teacher cache of method="hidden", whose head
                `learn_from_entries` was given.
            teacher_input_ids: (B, Tt) int64, what the teacher reads instead of input_ids: another prompt before the
                same completion, or the same text under another tokenizer.
            teacher_attention_mask: (B, Tt), the mask of teacher_input_ids; None = no padding.
            teacher_positions: (B, T) int64, the index in teacher_input_ids where the teacher makes the prediction that
                the student makes at t. −1: none; the KD term, anchor, hidden states and fidelity skip t.
            teacher_id: (B,) int64 or a list: the name or number of the one teacher each row learns from. None: every
                row learns from all teachers, under their weights.
            temperature, kd_weight: number or 0-d tensor; None = the recipe's, without its schedule. In training, a
                kd_weight of 0 given as a number skips the teacher unless something else needs it; kd is then NaN.
            num_items_in_batch: divisor of every term: the number of targets (`model.targets(…) != -100`) in all
                micro-batches and processes of this step. None = those of this batch. The load-balancing loss is
                already a mean, so it is weighted by this batch's share of them.
            kd_items_in_batch: the KD term's own divisor with `kd_on="all"` or teacher_positions: the number of tokens
                it counts (`model.kd_targets(…) != -100`) in the whole step. None = num_items_in_batch.
            with_fidelity: also compare with the true teacher.
            with_metrics: False computes only the metrics that cost nothing; the others are NaN. With a projector all
                are computed, since it is judged by them.
            with_log_probs: also return the student's log p of each target, at the cost of another pass over its head.
            ce_weight: replaces the recipe's. Pass 0 for text without labels, such as the student's own.
            write: return write(model, input_ids, attention_mask) instead, which generates text. (FSDP gathers weights
                only in a forward.)
            backbone_inputs: inputs that both backbones read, such as pixel_values, and the columns
                teacher_indices_<name> and so on of caches among several teachers.

        Raises ValueError for a backbone input that either model does not read, and for entries, positions or labels
        that do not fit.
        """
        if write is not None:
            return write(self, input_ids, attention_mask)
        self._check_trainable(labels)
        assert labels is not None
        given = (teacher_input_ids, teacher_attention_mask, teacher_positions)
        own_inputs = read_own_inputs(*given, shape=input_ids.shape)
        if own_inputs is not None:
            self._check_own_inputs(teacher_indices)
        targets = self.targets(labels, attention_mask)
        kd_targets = self.kd_targets(targets, input_ids, attention_mask, position_ids, teacher_positions)
        if num_items_in_batch is not None and kd_targets is not targets:  # a step without labels still has a KD term
            items = num_items_in_batch
            num_items_in_batch = items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
        kd_items = num_items_in_batch if kd_items_in_batch is None or kd_targets is targets else kd_items_in_batch
        entries = {
            name: take_entries(backbone_inputs, name, input_ids.shape, cache.head, self.teacher_tail)
            for name, cache in self.sides.caches.items()
        }
        inputs = self._inputs_of_both({**backbone_inputs, "position_ids": position_ids}, attention_mask)
        temperature = self.recipe.temperature if temperature is None else temperature
        kd_weight = self.recipe.kd_weight if kd_weight is None else kd_weight
        look = can_read(input_ids) or (not self.looked and has_values(input_ids))  # in the first batch on any device
        if look:
            self.looked = True
            self._say_what_counts_for_nothing(labels, attention_mask, targets)

        student, states, strange = self._run_student(input_ids, inputs, look=look)
        cached: CachedEntries | CachedStates | None
        cached = read_entries(teacher_indices, teacher_log_probs, teacher_log_tails, self.teacher_tail)
        cached = cached or read_states(teacher_hidden, input_ids.shape, self.cached_head)
        if cached:
            self._check_entries(cached, temperature, kd_targets, look=look)
        for one in entries.values() if look else ():
            if one is not None:
                one.check(temperature, kd_targets != IGNORE_INDEX)
        batch = StudentBatch(
            student, input_ids, inputs, targets, kd_targets, cached, temperature, kd_weight,
            self.recipe.ce_weight if ce_weight is None else ce_weight,
            items=num_items_in_batch, kd_items=kd_items, look=look, with_fidelity=with_fidelity,
            with_metrics=with_metrics, own_inputs=own_inputs,
        )  # fmt: skip
        every, by_teacher = self.sides.learn(
            batch, teacher_id, self.recipe, self.divergence, self.loss_options, train=self.training,
            compressed=self.compressed_head, entries=entries,
        )  # fmt: skip
        loss, metrics, strange = every.loss, every.metrics, strange | every.strange
        if self.hidden_loss is not None:
            assert every.hidden_states is not None
            of_layers = self.hidden_loss(states.hidden_states, every.hidden_states, kd_targets, kd_items)
            loss = loss + self.recipe.hidden_weight * of_layers
        aux_loss: Tensor | None = None
        if self.router_loss is not None:
            real = real_tokens(attention_mask, position_ids)
            aux_loss = self.router_loss(states.router_logits, real).to(loss.device)
            loss = loss + self.router_loss.coef * batch.share * aux_loss
            aux_loss = aux_loss.detach()
        if not look:  # unknown ids make the loss NaN, as bad labels do
            loss = loss * torch.where(strange, torch.nan, 1.0)

        log_probs = None
        if with_log_probs:
            log_probs = -fused_kd_loss(student, None, targets, ce_weight=1.0, reduction="none", **self.loss_options)
        n_compared = None if own_inputs is None else (batch.compared != IGNORE_INDEX).sum()
        return DistillationOutput(
            loss, metrics, every.fidelity, aux_loss, log_probs, batch.counted, n_compared, by_teacher
        )  # fmt: skip

    @property
    def teachers(self) -> dict[str, PreTrainedModel]:
        """Return the teachers that run, by name."""
        return self.sides.models

    @property
    def several(self) -> list[str]:
        """Return the names of several teachers, as in the keys of logs; empty for one teacher."""
        return [*self.sides] if len(self.sides) > 1 else []

    def _check_trainable(self, labels: Tensor | None) -> None:
        """Raise if there is nothing to learn, starts have not been solved, or a gradient would be missing."""
        if labels is None:
            raise ValueError(
                "labels is None; expected (B, T) ids, as in input_ids and not shifted, with -100 where nothing is to "
                "be learned"
            )
        if not self.solved:
            raise RuntimeError(
                f"recipe {self.recipe.name!r} starts from solved values: call model.solve(batches) with some batches "
                "of training text first, as KDTrainer does"
            )
        if torch.is_grad_enabled() and self.training and not any(p.requires_grad for p in self.student.parameters()):
            raise ValueError(
                "student: none of its parameters requires grad, so nothing of it would be trained (PEFT leaves it so "
                "with an adapter that was loaded without is_trainable=True, and after merge_and_unload()). Call "
                "student.requires_grad_(True); to evaluate, model.eval()"
            )
        if self.router_loss is not None and self.training and recomputes_reentrantly(self.student):
            raise ValueError(
                "activation checkpointing with use_reentrant=True: the load-balancing loss would have no gradient. "
                "Expected use_reentrant=False, transformers' default, or router_aux_loss_coef=0"
            )

    def _run_student(self, input_ids: Tensor, inputs: dict[str, Any], *, look: bool) -> tuple[Head, Any, Tensor]:
        """Return the student's head over a batch, its backbone's output, and whether a real token's id is unknown."""
        ids, strange = known_ids(self.student, "student", input_ids, inputs["attention_mask"], look=look)
        balanced = {} if self.router_loss is None else {"output_router_logits": True}
        states = backbone(self.student)(input_ids=ids, **inputs, **balanced)
        return head(self.student, states.last_hidden_state), states, strange

    def _check_entries(
        self, cached: CachedEntries | CachedStates, temperature: float | Tensor, kd_targets: Tensor, *, look: bool
    ) -> None:
        """Raise ValueError for entries at another temperature, or that a recipe chosen by default would ignore."""
        if self.recipe.teacher == "cached":
            if look:
                cached.check(temperature, kd_targets != IGNORE_INDEX)
        elif self.by_default and (self.training or self.teacher is None):
            column = "teacher_hidden" if isinstance(cached, CachedStates) else "teacher_indices"
            raise ValueError(
                f"the batch has {column}, and recipe='auto' took {self.recipe.name!r}, which learns nothing of "
                "them, for no column said that they would come; name the recipe: 'cached' learns from them"
            )

    def _check_own_inputs(self, teacher_indices: Tensor | None) -> None:
        """Raise ValueError if the recipe cannot use inputs of the teacher's own; print a line if nothing reads them."""
        recipe = self.recipe
        if teacher_indices is not None or recipe.teacher == "cached" or self.sides.caches:
            raise ValueError(
                "the batch has teacher_input_ids, which a teacher that runs reads, and recipe "
                f"{recipe.name!r} learns from entries; expected precompute_teacher_log_probs=False and a teacher, with "
                "a recipe that learns from it, such as 'teacher_head', or rows without teacher_input_ids"
            )
        if recipe.kd_on == "all" and (recipe.anchor_weight > 0 or recipe.teacher == "probe"):
            raise ValueError(
                f"kd_on='all' and recipe {recipe.name!r} with an anchor, in a batch with teacher_positions: the two "
                "terms would have other divisors. Expected kd_on='completion', or anchor_weight=0"
            )
        if self.teacher is None:
            say_once(f"recipe {recipe.name!r} has no teacher: teacher_input_ids are not used")

    def _inputs_of_both(self, given: dict[str, Any], attention_mask: Tensor | None) -> dict[str, Any]:
        """Return the inputs, besides ids, for both backbones. Raise ValueError if one of them does not read one."""
        inputs = {name: x for name, x in given.items() if x is not None}
        check_inputs(self.student, "student", inputs, self.inputs["student"])
        for side in self.sides.values():
            side.check_inputs(inputs)
        layers = {} if self.hidden_loss is None else {"output_hidden_states": True}
        return {**inputs, "attention_mask": attention_mask, "use_cache": False, **layers}

    def _say_what_counts_for_nothing(self, labels: Tensor, attention_mask: Tensor | None, targets: Tensor) -> None:
        if self.placeholders and not targets.equal(shift_labels(labels, attention_mask)):
            say_once(f"labels at the places of images, video and sound, {self.placeholders}, count for nothing")

    def every_target(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Return targets (B, T) of all tokens except each document's first, whatever their labels are.

        A document ends where position_ids (B, T) do not rise by one; other shapes are ignored.
        """
        targets = self.targets(input_ids, attention_mask)
        if position_ids is None or position_ids.dim() != 2:
            return targets
        return targets.masked_fill(F.pad(position_ids.diff() != 1, (0, 1), value=True), IGNORE_INDEX)

    def kd_targets(
        self,
        targets: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        teacher_positions: Tensor | None = None,
    ) -> Tensor:
        """Return the KD term's targets (B, T): `targets`, or every token with `kd_on="all"`, −100 elsewhere.

        Positions that the teacher does not predict are −100 too. The arguments are those of `forward`.
        """
        if self.recipe.kd_on == "all":
            targets = self.every_target(input_ids, attention_mask, position_ids)
        return targets if teacher_positions is None else targets.masked_fill(teacher_positions < 0, IGNORE_INDEX)

    def targets(self, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the targets (B, T) of `shift_labels`, with −100 at the places of images, video and sound too."""
        return shift_labels(labels, attention_mask, self.placeholders.values())

    def train(self, mode: bool = True) -> DistillationModel:
        """Set training mode as nn.Module does, but keep the teacher in eval mode."""
        super().train(mode)
        for teacher in self.teachers.values():
            teacher.eval()
        return self

    def learn_from_entries(self, kd_until: float | None = None, head: Any = None) -> None:
        """Learn from the teacher's entries in batches, from now on, instead of its head. Call before `solve`.

        kd_until: replaces the recipe's, which may spare a teacher that runs. head: `TeacherCache.head`, for batches
        that bring teacher_hidden.
        """
        (side,) = self.sides.values()
        kd_until = self.recipe.kd_until if kd_until is None else kd_until
        self.recipe = replace(
            self.recipe, teacher="cached", compressed_rank=None, compressed_kl=None, kd_until=kd_until
        )
        side.learn_from_entries(self.recipe)
        self.cached_head = head
        self.compressed_head, self.solved = None, self.solved or not self.recipe.solves

    @torch.no_grad()
    def solve(self, batches: Iterable[dict[str, Any]], tokens: int | None = None) -> list[Start]:
        """Solve the recipe's starts from some batches of training text. Call it once, before training.

        Weights that were loaded from a checkpoint stay as they are.

        Args:
            batches: keyword arguments of `forward`, on this model's device, the same in every process.
            tokens: how many targets to read; None = 16 times the teacher's width.

        Returns:
            What was solved and how close it is to the true teacher; empty if the recipe solves nothing.
        """
        recipe = self.recipe
        if not recipe.solves:
            return []
        starts: list[Start] = []
        heads: dict[str, CompressedHead | None] = {}
        first = next(iter(self.teachers.values()))
        for (name, teacher), some in zip(self.teachers.items(), self.sides.share_out(batches), strict=True):
            with naming(name, self.teachers):
                text = Calibration(self.student, teacher, some, tokens, self.loss_options)
            if teacher is first:
                starts += self._solve_from(text)
            if recipe.teacher == "compressed_head":
                compressed, start = text.compress(recipe)
                heads[name] = compressed
                starts.append(start._replace(what=f"{start.what}, of {name}") if len(self.sides) > 1 else start)
        if heads:
            self.compressed_head = hold([heads.get(name) for name in self.sides])
            # the same in every process, so DDP need not send them
            buffers = [] if self.compressed_head is None else self.compressed_head.named_buffers()
            self._ddp_params_and_buffers_to_ignore = [f"compressed_head.{name}" for name, _ in buffers]
        self.solved = True
        return starts

    def _solve_from(self, text: Calibration) -> list[Start]:
        """Solve the student's start and the projector from the hidden states of the first or only teacher."""
        recipe, starts, projection = self.recipe, [], None
        if recipe.student_init != "own" and not self.loaded:
            solve = text.solve_student if recipe.student_init == "svd" else text.solve_layers
            projection, start = solve()
            starts.append(start)
        if self.logit_projector is not None and not self.loaded:
            starts += text.solve_projector(self.logit_projector, recipe.projector_init, projection)
        if recipe.projector_resolve_steps > 0:
            self.vocab_weights = text.vocab_weights
        return starts

    @torch.no_grad()
    def solve_projector_again(self) -> None:
        """Replace the projector by the least-squares one for the student's current head."""
        assert self.teacher is not None
        assert self.logit_projector is not None
        assert self.vocab_weights is not None
        nothing = torch.empty(0, device=self.vocab_weights.device)
        heads = head(self.student, nothing), head(self.teacher, nothing)
        solved = solve_lstsq(*heads, vocab_weights=self.vocab_weights, valid_vocab=self.valid_vocab)
        set_projector(self.logit_projector, solved)

    # What transformers.Trainer asks its model for; all of it is the student's.

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def generation_config(self) -> Any:
        return self.student.generation_config

    @property
    def _no_split_modules(self) -> list[str]:
        """Return the classes of the layers that FSDP shards and recomputes one by one."""
        models = (self.student, *self.teachers.values())
        named = {name for model in models for name in model._no_split_modules or ()}
        return sorted(named & {type(module).__name__ for module in self.modules()})

    def get_input_embeddings(self) -> nn.Module:
        return self.student.get_input_embeddings()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.student.activation_checkpointing_enable(**options)
        self._let_gradients_through()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.student.gradient_checkpointing_enable(**options)
        self._let_gradients_through()

    def _let_gradients_through(self) -> None:
        if adapted_layer(self.student) is not None:  # recomputed layers need an input that requires grad
            self.student.enable_input_require_grads()

    def saved_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of this model's `state`: for a student with an adapter, only the adapter."""
        if adapted_layer(self.student) is None:
            return state
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("student.")}
        student = {name.removeprefix("student."): state[name] for name in state.keys() - kept.keys()}
        return kept | {f"student.{name}": tensor for name, tensor in adapter_state(self.student, student).items()}


def _drop_teacher(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    average: Average | None = getattr(module, "average", None)
    kept = set() if average is None else {f"{prefix}teacher.{name}" for name in average.names}
    for name in [name for name in state if name.startswith((f"{prefix}teacher.", f"{prefix}compressed_head."))]:
        if name not in kept:
            del state[name]


def _forgive_teacher(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [
        k for k in incompatible.missing_keys if not {"teacher", "compressed_head"} & set(k.split(".")[:-1])
    ]
