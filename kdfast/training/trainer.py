"""`KDTrainer`: transformers.Trainer over a `DistillationModel`.

The Trainer keeps the loop, the optimizer, resuming, progress bars and trackers. This class adds schedules, the divisor
of the loss, learning rates by part, logs of the distillation, and evaluation without logits. Checkpoints hold the
student alone and appear only when they are complete; the first loss that is not finite stops the run.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from kdfast.param_groups import distillation_param_groups
from kdfast.plan.price import Price
from kdfast.schedules import Schedule
from kdfast.training import fsdp
from kdfast.training.adapters import check_adapter
from kdfast.training.cache.precompute import Precomputation
from kdfast.training.cache.read import cached_blocks, take_head
from kdfast.training.callbacks import HealthCallback
from kdfast.training.config import KDConfig
from kdfast.training.data.columns import MEDIA, by_name, check_names
from kdfast.training.data.counts import Counts
from kdfast.training.data.packing import PaddingCollator
from kdfast.training.data.rows import ENTRIES, PROMPTS, PROMPTS_MASK, Collator
from kdfast.training.data.shared_vocabulary import token_lengths
from kdfast.training.data.tokenizers import text_tokenizer
from kdfast.training.durable import processes, resume
from kdfast.training.durable.nan_guard import NonFiniteGuard
from kdfast.training.durable.trainer import DurableTrainer, replaced
from kdfast.training.hf import IGNORE_INDEX, head_shape, may_skip_parameters
from kdfast.training.initialization.calibration import Start, share_starts, text_loader
from kdfast.training.metrics import (
    EvaluationMeter,
    TrainingMeter,
    check_best,
    eval_ce,
    mask_repeats,
    memory_bytes,
    of_log_probs,
)
from kdfast.training.model import DistillationModel
from kdfast.training.on_policy.run import WRITER, OnPolicy, PromptCollator
from kdfast.training.prepare import Preparation, check_arguments
from kdfast.training.recipes import Choice
from kdfast.training.teachers.own_inputs import NAMES
from kdfast.training.teachers.self_teacher import TeacherUpdate
from kdfast.training.teachers.several import COLUMN, read_route

# Private methods of transformers.Trainer that this class or DurableTrainer overrides, and the reason for each.
PRIVATE_OVERRIDES = {
    "_save_checkpoint": "a checkpoint appears only when it is complete; no hook surrounds a save",
    "_save_optimizer_and_scheduler": "under FSDP Trainer's writes the model once more, in FSDP's own format",
    "_load_from_checkpoint": "a checkpoint holds the student alone, with the projector in a file of its own",
    "_load_best_model": "the same, and it is compared with its checksums first",
    "_set_signature_columns_if_needed": "columns that the backbones read, images among them, are in no signature here",
    "_get_grad_norm": "a step that is not finite is left out before the optimizer acts, and no callback sees the norm",
}


class KDTrainer(DurableTrainer):
    """A `transformers.Trainer` that distills one or more teachers into a student.

    Example:
        student, teacher = load_student("gpt2"), load_teacher("gpt2-medium")
        args = KDConfig(output_dir="out", max_steps=1000, bf16=True)
        trainer = KDTrainer(student, args, teacher=teacher, train_dataset=train, eval_dataset=held_out)
        trainer.train()
        print(trainer.evaluate()["eval_ce"])

    Batches need input_ids and labels (*not* shifted; −100 is ignored). attention_mask, position_ids and any other input
    that both backbones read, such as pixel_values, are used if present. Each step's loss is divided by the number of
    targets in all its micro-batches and processes, so k micro-batches of b rows give the gradient of one of k·b rows.
    KD weight and temperature follow global_step / max_steps. Where the KD weight is 0, as it is after `kd_until`, the
    teacher does not run.

    Training logs, besides the Trainer's values: kd (without τ²), ce, ce_projected, agreement, student_entropy,
    teacher_entropy, aux_loss (of experts, without its coefficient), kd_weight, temperature, lr_<part>,
    tokens_per_second, tokens_seen (targets, without padding), skipped_steps, and memory_bytes (this process; on a GPU
    the allocator's peak so far). They are means since the previous log line. Without a projector, however, agreement,
    the entropies and a ce of weight 0 are computed in the logged step only. Evaluation logs loss (under the current
    weights; before training, the last ones), ce, perplexity, bits_per_byte (if the tokens' bytes are known), kd,
    aux_loss, and, against the teacher's own head over the ids that both models have, kl_teacher_student and
    kl_teacher_projected. A value that does not exist under a recipe is left out. docs/training.md lists what is logged
    about generated text.

    Args:
        model: the student, which is wrapped under the recipe of `args`, or a `DistillationModel`.
        args: a `KDConfig`.
        teacher: the teacher of a student that is not wrapped yet. The recipes "lm_only" and "cached" do without one,
            or use it for evaluation only. "self" is the student's own weights at the start, or their moving average
            with `KDConfig.teacher_update_rate`. For several teachers, pass a list or a mapping from names; it may
            contain a `TeacherCache` or its folder, with the splits "train" and "eval" (or eval_dataset's keys). Each
            row learns from all of them under `teacher_weights`, or from the one that its `teacher_id` column
            (`teacher_column`) names. Each has its own kd_<name> in the log, and kl_teacher_student_<name> and
            kl_teacher_projected_<name> in evaluations.
        peft_config: as in `DistillationModel`. A student with an adapter is trained and saved as that adapter alone:
            `PeftModel.from_pretrained(base, output_dir)` reads it, and `kdfast merge` merges it into its base.
        train_dataset, eval_dataset, processing_class, data_collator, callbacks, optimizers: as in Trainer. Without a
            data_collator, rows of text, prompt and completion, or messages are tokenized by `tokenize_dataset`, and
            batches are padded. Data sets from a `TeacherCache` select the recipe "cached". A tokenizer saved with the
            student must have processing_class's tokens, whatever the special ones are called. If the teacher's
            tokenizer has others, rows also get the ids that it reads.
        model_init: instead of model, a function that makes a new student for each `train`. It may take a trial, as in
            Trainer.
        compute_metrics: as in Trainer, but called with an `EvalLogProbs`: log_probs (N, T) of label_ids (N, T), which
            are shifted already; no logits.
        kd_weight_schedule, temperature_schedule: functions of progress in [0, 1] that replace the recipe's.
        others: not accepted. The TypeError says what to use instead of, for example, compute_loss_func.

    Raises:
        TypeError, ValueError: args is not a KDConfig, several GPUs are visible without a launcher, the launch is not
            supported, or as `DistillationModel` raises.
        NonFiniteLossError: from `train` and `save_model`; it names the last good checkpoint, which is kept.
        TerminatedError, LostProcessError, CheckpointWriteError, DamagedCheckpointError: from `train`.
    """

    model: DistillationModel
    args: KDConfig
    counts: dict[str, Counts]  # by data set: the rows that were tokenized and skipped

    def __init__(
        self,
        model: PreTrainedModel | DistillationModel | None = None,
        args: KDConfig | None = None,
        *,
        teacher: PreTrainedModel | str | Sequence[Any] | Mapping[str, Any] | None = None,
        peft_config: Any = None,
        model_init: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        kd_weight_schedule: Schedule | None = None,
        temperature_schedule: Schedule | None = None,
        **others: Any,
    ) -> None:
        check_arguments(model, args, model_init, optimizers, others, inspect.signature(KDTrainer).parameters)
        assert args is not None
        if model_init is not None:
            self.model_init = model_init
            set_seed(args.seed)
            model = super().call_model_init()  # type: ignore[assignment]
        self.args, self._schedules = args, (kd_weight_schedule, temperature_schedule)
        self._preparation = Preparation(
            model, args, teacher, peft_config, processing_class, train_dataset, eval_dataset, temperature_schedule,
            raw=data_collator is None,
        )  # fmt: skip
        self.counts = self._preparation.counts
        model, choice, wrapped_here = self._preparation.wrap(model)
        train_dataset, eval_dataset = self._preparation.with_entries(model)
        own = type(self).evaluate is KDTrainer.evaluate and type(self).evaluation_loop is KDTrainer.evaluation_loop
        packages = {one.on_evaluate.__module__.partition(".")[0] for one in callbacks or ()}
        own = own and packages <= {"transformers", "kdfast"}  # another package's on_evaluate may add to the logs
        own = own and compute_metrics is None
        if args.health and not any(isinstance(callback, HealthCallback) for callback in callbacks or ()):
            callbacks = [*(callbacks or ()), HealthCallback(args.health_thresholds)]  # type: ignore[arg-type]  # parsed by now
        if model.average is not None:
            steps = args.teacher_sync_steps or 1
            callbacks = [TeacherUpdate(lambda: self.model.average, steps, self._was_left_out), *(callbacks or ())]
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, optimizers=optimizers,
            data_collator=PaddingCollator(processing_class) if data_collator is None else data_collator,
            compute_metrics=compute_metrics and of_log_probs(compute_metrics), callbacks=callbacks,
            processing_class=processing_class,
        )  # fmt: skip
        self.model_init = model_init  # type: ignore[assignment]  # Trainer would make the model once more
        if use_cache is not None:  # Trainer turns it off in the saved config; forward() passes use_cache=False anyway
            model.config.use_cache = use_cache
        fsdp.check_launch(self, args.shard_teacher, model.recipe.projector_resolve_steps)
        if self.is_fsdp_enabled and model_init is not None:
            raise ValueError("model_init under FSDP, which shards a model once; expected the model itself")
        if self.is_fsdp_enabled:
            fsdp.set_mixed_precision(self.accelerator)
            fsdp.place_teacher(model, self.accelerator, args.shard_teacher)
        self._adopt(choice, wrapped_here)
        if own and args.metric_for_best_model is not None and args.eval_strategy != "no" and eval_dataset is not None:
            check_best(args.metric_for_best_model, model, eval_dataset, self._lengths is not None)

    def _adopt(self, choice: Choice | None, wrapped_here: bool) -> None:
        """Prepare a run of `self.model`: its cache entries, schedules and generated text."""
        model, args, (kd_weight_schedule, temperature_schedule) = self.model, self.args, self._schedules
        text, processor = self._preparation.train_dataset, self._preparation.processor
        if choice is not None:
            processes.print_once(str(choice))
        if model.several:
            processes.print_once(model.sides.describe(self._preparation.teacher_column))
        sharded = self.is_fsdp_enabled and args.shard_teacher
        how = temperature_schedule, sharded, self._collator, processor
        before = Precomputation(model, args, text, wrapped_here, *how)
        self._precomputation = before if before.is_wanted() else None
        if self._precomputation is not None:
            model.learn_from_entries(kd_until=1.0 if wrapped_here and args.kd_until is None else None)
        if kd_weight_schedule is not None:  # it decides where the KD term ends
            if args.kd_until is not None:
                raise ValueError(f"kd_until={args.kd_until} and kd_weight_schedule; expected one of them")
            model.recipe = replace(model.recipe, kd_until=1.0)
        self.kd_weight_schedule = kd_weight_schedule or model.recipe.kd_weight_schedule()
        self.temperature_schedule = temperature_schedule or model.recipe.temperature_schedule()
        self._solved, self._recipe = False, model.recipe
        self._on_policy: OnPolicy | None = None
        if args.generates:
            self._on_policy = OnPolicy(args, model, text_tokenizer(processor, model.student), text)
        self.starts: list[Start] = []  # solved before the first step
        self.solve_seconds = 0.0  # how long solving them took
        self._start_run()

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as Trainer does, and turn FSDP on for CPUs too."""
        self._may_skip_parameters = may_skip_parameters(self.model.student)  # checked before the model is sharded
        find = self.args.ddp_find_unused_parameters
        find = self._may_skip_parameters if find is None else find
        with replaced(self.args, ddp_find_unused_parameters=find):
            super().create_accelerator_and_postprocess()
        fsdp.turn_on_for_cpus(self.accelerator, self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def _start_run(self) -> None:
        self._meter = TrainingMeter(self.args.device, self.model.several)
        self._solved_at = -1  # the step before which the projector was last solved
        self._guard = NonFiniteGuard(
            self.args.device,
            self.last_checkpoint,
            most_skips=self.args.max_skipped_steps if self.args.non_finite == "skip" else 0,
            report=self._report_non_finite,
        )
        self._left_out = False  # whether the last step was left out
        self._kd_items: Tensor | None = None  # tokens with a KD term in the current step
        self._before_step: tuple[Any, Any] | None = None  # logged loss and meter, restored if the step is left out
        self._weights: dict[str, float] = {}  # kd_weight and temperature of the last batch
        self._learning_rates: dict[str, float] = {}  # of the last step, by part of the model

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as Trainer does, resuming from complete checkpoints only. With `model_init`, make a new student."""
        if self.model_init is not None:
            with replaced(self, create_accelerator_and_postprocess=lambda: None):
                self._hp_search_setup(trial)  # Trainer does this too, but only after its settings are needed
            self.args._check()
            set_seed(self.args.seed)
            self.model, choice, wrapped_here = self._preparation.wrap(super().call_model_init(trial))
            self.train_dataset, self.eval_dataset = self._preparation.with_entries(self.model)
            self.model_wrapped = self.model.to(self.args.device)
            self._adopt(choice, wrapped_here)
        return super().train(resume_from_checkpoint, trial, *args, **kwargs)

    def call_model_init(self, trial: Any = None) -> DistillationModel:
        """Return the model that `train` has already made for this run."""
        return self.model

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Search as Trainer does: each trial trains a new student under its settings; all share one teacher.

        compute_objective: None means eval_ce, where Trainer would take the sum of everything evaluated.
        """
        return super().hyperparameter_search(hp_space, compute_objective or eval_ce, *args, **kwargs)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Solve the starts before a run, and keep the heads in the root while the model is sharded."""
        check_adapter(self.accelerator.unwrap_model(self.model).student)  # the caller may have added one since
        self._start_run()
        self._solve_starts()
        if self._on_policy is not None:
            self._on_policy.begin(self._newest)
        until = self._recipe.kd_until
        ends = f"; the KD term ends after {until:.0%} of the run (kd_until)" if until < 1 else ""
        processes.print_once(f"{self._recipe.name}: {self.price}{ends}")
        student = self.accelerator.unwrap_model(self.model).student
        if (trained := student.num_parameters(only_trainable=True)) < (every := student.num_parameters()):
            processes.print_once(f"{trained:,} of the student's {every:,} parameters are trained")
        if halves := {p.dtype for p in student.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}:
            name = str(halves.pop()).removeprefix("torch.")
            processes.print_once(
                f"the trained weights are {name}, which rounds small updates away: load the student with "
                "dtype=torch.float32, and set bf16=True if it is to compute in bfloat16"
            )
        self._precompute()
        if self.model_wrapped is self.model and self.accelerator.num_processes > 1 and not self.is_fsdp_enabled:
            # an evaluation before the run has marked the model as prepared; accelerate would not wrap it in DDP
            self.model._is_accelerate_prepared = False  # type: ignore[assignment]
        with fsdp.root_owns_the_heads(self.model) if self.is_fsdp_enabled else nullcontext():
            yield

    def load_finished(self, folder: str | Path) -> bool:
        """Load the model and state of a run that ended with the checkpoint `folder`; return whether it had ended.

        Loads the best model under `load_best_model_at_end`. If steps are left, loads nothing and returns False: such a
        run is for `train`, which would take one step more after the last.
        """
        state = TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self._solve_starts()  # before loading, which overwrites what is solved with trained weights
        self.state = state
        if self.health is not None:
            self.health.restore(state)
        if self.args.load_best_model_at_end and resume.best_checkpoint(state, self._run) is not None:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(folder))
        return True

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as Trainer does, solving the starts before the first evaluation."""
        self._solve_starts()
        if self.is_fsdp_enabled and self.optimizer is None:  # before any training
            self.create_optimizer()  # accelerate shards a model only together with its optimizer
            with fsdp.root_owns_the_heads(self.model):
                self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
        with self.naming_lost_processes():
            return super().evaluate(*args, **kwargs)

    def _solve_starts(self) -> None:
        """Solve the starts once, the same in every process. A resumed run then loads its weights over them."""
        if self._solved or self.train_dataset is None:
            return
        self._solved = True
        model: DistillationModel = self.accelerator.unwrap_model(self.model)
        began = time.perf_counter()
        if self.is_fsdp_enabled and model.recipe.solves:
            model.to(self.args.device)  # unsharded so far
        with self.naming_lost_processes():
            if not model.solved:  # an earlier trainer may have solved and trained it
                self.starts = model.solve(self._calibration_batches(), self.args.calibration_tokens)
            if self.accelerator.num_processes > 1:
                self.starts = share_starts(model, self.starts, self.args.device)
        self.solve_seconds = time.perf_counter() - began if self.starts else 0.0
        for start in self.starts:
            processes.print_once(str(start))

    def _precompute(self) -> None:
        """Run the teacher once over the training text, if the run is to learn from a cache of its own."""
        text = self.train_dataset
        if self._precomputation is not None and text is not None and not cached_blocks(text):
            with self.naming_lost_processes():
                self.train_dataset = self._precomputation.make(text, self.compute_loss_context_manager())
            take_head(self._precomputation.model, {"train_dataset": self.train_dataset})
        if self.health is not None:
            caches: list[Any] = [*cached_blocks(self.train_dataset), *self.model.sides.caches.values()]
            drawn = [one.description.method == "sample" for one in caches]
            self.health.drawn = self._recipe.teacher == "cached" and any(drawn)

    def _calibration_batches(self) -> Iterator[dict[str, Any]]:
        """Yield batches of training text, independent of the training loader and its order."""
        loader = text_loader(self.train_dataset, self.args.per_device_train_batch_size, self._collator)
        for batch in map(self._prepare_inputs, loader):
            if self._on_policy is not None and not (batch["labels"] != IGNORE_INDEX).any():  # prompts alone
                batch["labels"] = batch["input_ids"]
                batch = {name: value for name, value in batch.items() if name not in NAMES}
            yield {name: value for name, value in batch.items() if name not in (PROMPTS, PROMPTS_MASK)}

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns += sorted(MEDIA.union(*self.model.inputs.values()))
            columns += [f"{column}_{name}" for name in self.model.sides.caches for column in ENTRIES]

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's loader; its collator also finds columns, by name, that no model reads."""
        collator: Any = self._collator if self._on_policy is None else PromptCollator(self._collator, self._on_policy)
        with replaced(self, data_collator=collator), replaced(self.args, remove_unused_columns=False):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return Trainer's loader with the collator of `get_train_dataloader`."""
        with replaced(self, data_collator=self._collator), replaced(self.args, remove_unused_columns=False):
            return super().get_eval_dataloader(eval_dataset)

    @property
    def _collator(self) -> Collator:
        self._set_signature_columns_if_needed()
        model: DistillationModel = self.accelerator.unwrap_model(self.model)
        column = self._preparation.teacher_column
        route = None if column is None else functools.partial(read_route, column=column, names=[*model.sides])
        columns = self._signature_columns if self.args.remove_unused_columns else None
        return Collator(self.data_collator, columns, route, {COLUMN, column or COLUMN})

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer with a learning rate for each part of the model."""
        if self.optimizer is None:
            model = self.model if model is None else model
            recipe = self._recipe
            groups = distillation_param_groups(
                model,
                self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                projector_lr=recipe.projector_lr,
                projector_lr_multiplier=recipe.projector_lr_multiplier,
                router_lr_multiplier=recipe.router_lr_multiplier,
            )
            asked = self.args.router_lr_multiplier
            if asked not in (None, 1) and not any(group["name"] == "router" for group in groups):
                processes.print_once(f"router_lr_multiplier={asked:g} has no use: the student has no routers to train")
            cls, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer_cls_and_kwargs = (cls, {"params": groups, **options})
        return super().create_optimizer(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one micro-batch, divided by the number of targets of the whole step."""
        self._meter.start()
        if self._guard.most_skips and self._before_step is None:
            self._before_step = (self._tr_loss.clone(), self._meter.mark())
        self._weights = self._weights_in_force()
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        self._learning_rates = {f"lr_{group['name']}": float(group["lr"]) for group in groups if "name" in group}
        self._solve_projector_again()
        check_names("the batch", inputs)
        weights: dict[str, Any] = self._on_device(self._weights)
        if self._weights["kd_weight"] == 0:
            weights["kd_weight"] = 0.0  # a plain number: the model sees it without waiting for the device
        writer = inputs.pop(WRITER, None)
        if writer == "student":  # text that the student wrote has no labels
            weights["ce_weight"] = 0.0
        with_metrics = return_outputs or writer is not None or self._may_be_logged(self.state.global_step + 1)
        items = {"num_items_in_batch": num_items_in_batch, "kd_items_in_batch": self._kd_items}
        output = model(**inputs, **weights, **items, with_metrics=with_metrics)
        loss, metrics = output.loss, output.metrics
        self._guard.watch_loss(self.state.global_step + 1, loss, metrics.ce, metrics.kd, **self._weights)
        if self._on_policy is not None:
            metrics = self._on_policy.add(writer, metrics)
        self._meter.add(metrics, output.aux_loss, output.targets, output.compared, output.by_teacher)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP and FSDP average gradients over processes; divided by all processes' targets, they must be summed
            loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _solve_projector_again(self) -> None:
        step, every = self.state.global_step, self._recipe.projector_resolve_steps
        if every > 0 and step % every == 0 and step != self._solved_at:
            model: DistillationModel = self.accelerator.unwrap_model(self.model)
            model.solve_projector_again()
            if self.accelerator.num_processes > 1:
                assert model.logit_projector is not None
                processes.broadcast(model.logit_projector.parameters(), self.args.device)
            self._solved_at = step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return a step's batches and their number of targets, which are shifted and exclude padding."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if self._on_policy is not None:
            self._meter.start()
            step, kd_weight = self.state.global_step, self._weights_in_force()["kd_weight"]
            logged = self._may_be_logged(step + 1)
            batches = self._on_policy.replace(batches, step, self._write, kd_weight=kd_weight, logged=logged)
        if not batches or "labels" not in batches[0]:
            return batches, None
        if self.is_fsdp_enabled and self._may_skip_parameters:
            images = torch.tensor([not MEDIA.isdisjoint(batch) for batch in batches], dtype=torch.int, device=device)
            if (self._reduce(images) % self.accelerator.num_processes).any():
                raise ValueError(
                    "a micro-batch has images in some processes and none in others: under FSDP2 they would wait for "
                    "each other's shards. Give each of its rows an image, or none, or use DDP"
                )
        targets = [self.model.targets(batch["labels"], batch.get("attention_mask")) for batch in batches]
        names = ("input_ids", "attention_mask", "position_ids", "teacher_positions")
        targets += [self.model.kd_targets(t, *map(b.get, names)) for t, b in zip(targets, batches, strict=True)]
        counts = torch.stack([(t != IGNORE_INDEX).sum() for t in targets]).view(2, -1).sum(1).to(device)
        counts = self._reduce(counts) if self.args.average_tokens_across_devices else counts
        self._kd_items = counts[1]
        return batches, counts[0]

    def _write(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's forward to generate text, in the wrapper that training uses."""
        with torch.no_grad(), self.compute_loss_context_manager():
            if not self.is_fsdp_enabled:
                return self.accelerator.unwrap_model(self.model_wrapped)(*args, **kwargs)
            with fsdp.gathered_once(self.model, self.accelerator):
                return self.model_wrapped(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch forward and backward, as Trainer does."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        in_pieces = self._scaled or self.is_fsdp_enabled
        if self._guard.most_skips and self.accelerator.sync_gradients and not in_pieces:
            self._guard.watch_gradients(model.named_parameters())  # before clipping, which would spread a NaN
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if isinstance(norm, Tensor) and not self._scaled:
            self._guard.watch_gradient(norm)
        if self._guard.most_skips:
            bad = self._guard.skip(self.state.global_step + 1, self._reduce)
            self._left_out = bool(bad)
            if bad:
                self._leave_out(model, bad)
                norm = None  # not logged
            self._before_step = None
        return norm

    def _leave_out(self, model: nn.Module, what: str) -> None:
        """Remove the step's gradients, so that the optimizer does nothing, and its part of the log."""
        if not self._scaled:
            model.zero_grad(set_to_none=True)
        assert self._before_step is not None
        loss, meter = self._before_step
        self._tr_loss.copy_(loss)
        self._meter.rewind(meter)
        self._report_non_finite(self.state.global_step + 1, f"{what}; the step was left out", aloud=True)

    def _was_left_out(self) -> bool:
        """Return whether the last step changed no weight."""
        return self._left_out or self.accelerator.optimizer_step_was_skipped

    @property
    def _scaled(self) -> bool:
        """Return whether a gradient scaler is in use. It skips steps with inf itself, so those are not reported."""
        return getattr(self.accelerator, "scaler", None) is not None

    @property
    def health(self) -> HealthCallback | None:
        """Return the callback whose `findings` say what went wrong; None with `health=False`."""
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, HealthCallback)), None)

    def _report_non_finite(self, step: int, what: str, *, aloud: bool = False) -> None:
        if self.health is not None:
            self.health.report_non_finite(step, what, aloud=aloud and self.is_world_process_zero())

    def _weights_in_force(self) -> dict[str, float]:
        # a model that was not trained here is evaluated under the final weights
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 1.0
        return {"kd_weight": self.kd_weight_schedule(progress), "temperature": self.temperature_schedule(progress)}

    def _on_device(self, weights: dict[str, float]) -> dict[str, Tensor]:
        """Return 0-d tensors created on the device, without synchronizing or changing a compiled graph."""
        return {name: torch.full((), value, device=self.args.device) for name, value in weights.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the values listed in the class docstring."""
        if "loss" in logs:  # a line of training
            self._guard.check()
            logs |= self._learning_rates
            logs |= self._meter.read(self._reduce)
            if self._on_policy is not None:
                logs |= self._on_policy.meter.read(self._reduce)
            if self._recipe.teacher != "none":
                logs |= self._weights
            self._count_tokens()
            logs["tokens_seen"] = self.state.num_input_tokens_seen
            logs["memory_bytes"] = memory_bytes(self.args.device)
            if self._guard.most_skips:
                skipped, steps = self._guard.read_skips()
                logs["skipped_steps"] = skipped
                logs["loss"] *= steps / max(steps - skipped, 1)  # Trainer's is the mean over all steps
                if skipped == steps:
                    del logs["loss"]
        super().log(logs, start_time)

    def _may_be_logged(self, step: int) -> bool:
        """Return whether `step` may be logged; always True unless `logging_strategy` is "steps"."""
        first, last = self.args.logging_first_step and step == 1, step == self.state.max_steps
        by_steps = self.args.logging_strategy == "steps"
        return not by_steps or first or last or step % max(self.state.logging_steps, 1) == 0

    def _count_tokens(self) -> None:
        tokens = self._meter.count_tokens(self._reduce)
        if self.args.include_num_input_tokens_seen == "no":  # otherwise Trainer counts, and synchronizes at every step
            self.state.num_input_tokens_seen += tokens

    def _reduce(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, but with token-weighted means over the whole set and no logits."""
        if self.model.recipe.teacher == "cached":  # all hidden states go through one head
            take_head(self.model, by_name(train_dataset=self.train_dataset, eval_dataset=dataloader.dataset))
        self._evaluation = EvaluationMeter(self.args.device, self._lengths, self.model.several)
        prefix = metric_key_prefix
        with self._meter.paused():
            loss_only = self.args.prediction_loss_only or self.compute_metrics is None
            output = super().evaluation_loop(dataloader, description, loss_only, ignore_keys, prefix)
        metrics = dict(output.metrics or {})
        metrics.pop(f"{prefix}_loss", None)  # Trainer's: a mean over samples
        own = {f"{prefix}_{name}": value for name, value in self._evaluation.read(self._reduce).items()}
        if twice := own.keys() & metrics.keys():
            raise ValueError(f"compute_metrics returned {min(twice)!r}, which an evaluation has; expected another name")
        metrics |= own
        if self.is_fsdp_enabled:
            fsdp.reshard(self.model)
        return output._replace(metrics=metrics)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return a batch's loss, the log-probabilities of its targets, and the targets; record its metrics."""
        inputs = mask_repeats(self._prepare_inputs(inputs), self.accelerator)
        check_names("the batch", inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            asked = {"with_fidelity": True, "with_log_probs": not prediction_loss_only}
            output = model(**inputs, **self._on_device(self._weights_in_force()), **asked)
        targets = self.model.targets(inputs["labels"], inputs.get("attention_mask"))
        self._evaluation.add(output, targets)
        if prediction_loss_only:
            return output.loss, None, None
        return output.loss, output.log_probs, targets

    @functools.cached_property
    def _lengths(self) -> Tensor | None:
        """Return the number of bytes of each of the student's ids, (V,); None if they are not known."""
        tokenizer = text_tokenizer(self._preparation.processor, self.model.student)
        return None if tokenizer is None else token_lengths(tokenizer, head_shape(self.model.student)[0])

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError, since logits are never made."""
        raise NotImplementedError(
            "predict would return logits, which are never made here; use evaluate, or the student itself "
            "(trainer.model.student)"
        )

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Refuse to save weights that are not finite, and leave the time out of tokens_per_second."""
        with self._meter.paused():
            trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
            self._guard.check_weights(trained, self._reduce)
            self._count_tokens()
            yield

    def save_state_beside(self, folder: Path) -> None:
        """Write the generated texts that will be trained on again."""
        if self._on_policy is not None:
            self._on_policy.buffer.save(folder, self.args.process_index)

    @property
    def price(self) -> Price:
        """Return the cost of training on one token, with a teacher's single pass over the text shared out."""
        model: DistillationModel = self.accelerator.unwrap_model(self.model)
        passes = None if self._precomputation is None else self._precomputation.passes
        held, routed = model.compressed_head or model.cached_head, self._preparation.teacher_column is not None
        return model.sides.price(model.student, model.recipe, held, passes, routed=routed)
