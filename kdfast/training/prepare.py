"""From `KDTrainer`'s arguments to what it trains: checks, tokenized rows, teachers, and a `DistillationModel`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import cpu_offload
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from kdfast.inputs import did_you_mean
from kdfast.schedules import Schedule
from kdfast.training.adapters import adapt, check_adapter
from kdfast.training.cache.description import NAME as CACHE
from kdfast.training.cache.description import teacher_fingerprint
from kdfast.training.cache.read import TeacherCache, cached_blocks, check_datasets, join_caches
from kdfast.training.config import DATA, KDConfig
from kdfast.training.data.alignment import OtherTokenizer, find_other_tokenizer
from kdfast.training.data.chat import is_raw_text, kind_of, read_template, tokenize_dataset
from kdfast.training.data.columns import brings_teacher, by_name, check_columns, media_columns, names_of
from kdfast.training.data.counts import Counts
from kdfast.training.data.packing import check_apart
from kdfast.training.data.rows import PACKED
from kdfast.training.data.text import check_positions, columns_of
from kdfast.training.data.tokenizers import check_tokens, own_tokenizer, text_tokenizer, tokenizer_of
from kdfast.training.durable import processes
from kdfast.training.durable.trainer import replaced
from kdfast.training.hf import head_shape, is_dispatched
from kdfast.training.model import DistillationModel
from kdfast.training.recipes import AUTO, FROM_CACHE, Choice
from kdfast.training.teachers.several import (
    choose_recipe_of_all,
    column_of,
    find_column,
    find_valid_vocab_of_all,
    name_teachers,
    running,
)

# arguments of Trainer, or of TRL's trainers, that KDTrainer does not accept → what to do instead
ELSEWHERE = {
    "preprocess_logits_for_metrics": "logits are never made. compute_metrics is given log p of each label; what "
    "needs more is evaluated on trainer.model.student, in a callback's on_evaluate",
    "compute_loss_func": "the loss is the recipe's; for your own override compute_loss (examples/hf_trainer.py)",
    "optimizer_cls_and_kwargs": "pass optimizers=(optimizer, scheduler), or name one in KDConfig(optim=…)",
    "teacher_model": "it is teacher here",
    "tokenizer": "it is processing_class here",
}
# settings that are arguments of `DistillationModel`
MODEL = (
    "teacher_weights", "engine", "scratch_bytes", "vocab", "teacher_update_rate", "teacher_tail",
    "router_aux_loss_coef",
)  # fmt: skip


def check_arguments(
    model: Any, args: Any, model_init: Any, optimizers: Sequence[Any], others: Mapping[str, Any], known: Iterable[str]
) -> None:
    """Raise TypeError or ValueError for arguments that `KDTrainer` does not accept; `known` are its parameters."""
    for name, value in others.items():
        if name not in ELSEWHERE:
            raise TypeError(f"KDTrainer takes no {name}{did_you_mean(name, known)}")
        if value is not None:
            raise TypeError(f"KDTrainer takes no {name}: {ELSEWHERE[name]}")
    if model is None and model_init is None:
        raise TypeError("model is None; expected the student, a PreTrainedModel, or a DistillationModel, or model_init")
    if model_init is not None and (model is not None or any(optimizers)):
        given = "model" if model is not None else "optimizers"
        raise ValueError(
            f"model_init and {given} are given; expected model_init alone, since it makes the student anew"
        )
    if not isinstance(args, KDConfig):
        raise TypeError(f"args is {type(args).__name__}; expected a KDConfig, which has every TrainingArguments field")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would be nn.DataParallel; not supported. Start "
            "with torchrun or accelerate launch, or show one GPU: CUDA_VISIBLE_DEVICES=0"
        )


class Preparation:
    """The data sets and teachers of one `KDTrainer`, and the model that they make of a student.

    Arguments are those of `KDTrainer`; raw: whether to tokenize raw rows. Attributes: train_dataset and eval_dataset,
    tokenized; counts, what happened to their rows; other, the teacher's tokenizer if it differs from the text's;
    teacher_column, which routes rows to teachers, once a model is wrapped.
    """

    teacher_column: str | None = None

    def __init__(
        self, model: Any, args: KDConfig, teacher: Any, peft_config: Any, processor: Any, train_dataset: Any,
        eval_dataset: Any, temperature_schedule: Schedule | None, *, raw: bool,
    ) -> None:  # fmt: skip
        self.args, self.peft_config, self.processor = args, peft_config, processor
        self.temperature_schedule, self.counts = temperature_schedule, dict[str, Counts]()
        self.teachers = {name: _read_cache(one) for name, one in name_teachers(teacher).items()}
        student, live = model, {**self.teachers}
        if isinstance(model, DistillationModel):
            student, live = model.student, model.teachers
        if len(live) > 1 and args.teacher_tokenizer_name_or_path is not None:
            raise ValueError(
                f"teacher_tokenizer_name_or_path={args.teacher_tokenizer_name_or_path!r} and {len(live)} teachers; "
                "several have to share the text's tokenizer. Leave it out, or take one teacher"
            )
        only = next(iter(live.values()), None) if len(live) == 1 else None
        self.other = _other_tokenizer(student, only, processor, args)
        with args.main_process_first(desc="tokenizing"):
            how = student, raw, len(live)
            self.train_dataset = self._tokenized("train_dataset", train_dataset, args.prompts, *how)
            self.eval_dataset = self._tokenized("eval_dataset", eval_dataset, None, *how)
        self.datasets = by_name(train_dataset=self.train_dataset, eval_dataset=self.eval_dataset)
        check_columns(self.datasets, args.remove_unused_columns and raw)

    def _tokenized(
        self, argument: str, given: Any, prompts: str | None, student: Any, raw: bool, n_teachers: int
    ) -> Any:
        """Return a data set, or a dict of them, tokenized if raw, and aligned with another tokenizer if needed."""
        if isinstance(given, dict):
            how = prompts, student, raw, n_teachers
            return {k: self._tokenized(f"{argument}[{k!r}]", one, *how) for k, one in given.items()}
        rows, whole, args = given, False, self.args
        if raw and is_raw_text(given) and not media_columns(given):  # check_columns refuses media columns
            if (tokenizer := text_tokenizer(self.processor, student)) is None:
                raise ValueError(f"{argument} has text, and processing_class is None; expected its tokenizer")
            rows, self.counts[argument] = tokenize(argument, given, tokenizer, args, n_teachers, prompts, self.other)
            if args.chat_template is not None:
                tokenizer.chat_template = read_template(args.chat_template)  # saved with the student
            if self.other is not None:
                kind = kind_of(argument, columns_of(given), args.text_column)
                whole = kind != "text" or args.packing is not None  # blocks of text may begin anywhere
        known = {"teacher_input_ids", "teacher_indices"}.intersection(names_of(rows)) or cached_blocks(rows)
        if self.other is None or rows is None or known:
            return rows
        return self.other.align(argument, rows, documents=whole)

    def wrap(self, model: Any) -> tuple[DistillationModel, Choice | None, bool]:
        """Return `model` under the recipe, the choice that "auto" made, and whether it was wrapped here."""
        args, processor = self.args, self.processor
        names = ("teacher_weights", "offload_teachers", "teacher_update_rate")
        own = {"teacher": self.teachers, "peft_config": self.peft_config, **{n: getattr(args, n) for n in names}}
        choice: Choice | None = None
        wrapped_here = not isinstance(model, DistillationModel)
        if wrapped_here:
            set_seed(args.seed)  # the adapter's weights are drawn
            model, choice = self._wrap_student(adapt(model, self.peft_config))
        elif given := [name for name, x in own.items() if x]:
            raise ValueError(f"{given[0]} is given besides a DistillationModel, which has its own; leave it out")
        elif isinstance(processor, PreTrainedTokenizerBase):
            check_tokens("student", processor, tokenizer_of(model.student), model.valid_vocab)
            for side in model.sides.values():
                if side.model is not None and model.shared_head is None:
                    check_tokens(side.role, processor, own_tokenizer(side.model), model.valid_vocab)
        check_adapter(model.student)
        packed = args.packing or any(PACKED in names_of(dataset) for dataset in self.datasets.values())
        longest = max((counts.longest for counts in self.counts.values()), default=0)
        sides = {side.role: side.model for side in model.sides.values()}
        for role, one in {"student": model.student, **sides}.items():
            if one is not None:
                check_positions(role, one, longest, "a row of {} tokens")
            if one is not None and packed:
                check_apart(one, role)
        check_datasets(model, self.datasets, self.temperature_schedule)
        self.teacher_column = find_column(args.teacher_column, model.sides, self.datasets, args.packing)
        return model, choice, wrapped_here

    def _wrap_student(self, student: PreTrainedModel) -> tuple[DistillationModel, Choice | None]:
        """Return the student wrapped under the recipe, and the choice that "auto" made, if any."""
        args, teachers, processor, choice = self.args, self.teachers, self.processor, None
        recipe, shared = args.recipe, None if self.other is None else self.other.vocabulary
        valid_vocab = find_valid_vocab_of_all(student, {} if shared else teachers, processor, args.valid_vocab)
        train_dataset = self.datasets.get("train_dataset")
        cached = cached_blocks(train_dataset)
        entries = bool(cached) or brings_teacher(train_dataset)
        everywhere = [blocks.cache for one in self.datasets.values() for blocks in cached_blocks(one)]
        among = [one for one in teachers.values() if isinstance(one, TeacherCache)]
        everywhere += among
        if everywhere and isinstance(student, PreTrainedModel):
            tokenizer = text_tokenizer(processor, student)
            for cache in everywhere:
                cache.check_tokenizer(tokenizer)
            if valid_vocab is None:
                valid_vocab = everywhere[0].find_valid_vocab(head_shape(student)[0], tokenizer)
        if recipe == AUTO:
            made_of = {blocks.description.teacher_sha256 for blocks in cached}
            live = [one for one in teachers.values() if isinstance(one, PreTrainedModel)]
            if entries and teachers and made_of != set(map(teacher_fingerprint, live)):
                raise ValueError(
                    "train_dataset brings a teacher's entries (teacher_indices), and teacher is given too, which "
                    "for all that is known is another: recipe='auto' does not know which to learn from. Leave one "
                    "out, or name the recipe: 'cached' learns from the entries, and has teacher for evaluation; "
                    "the others learn from teacher"
                )
            share = None if shared is None else shared.share
            chosen = choose_recipe_of_all(student, teachers, valid_vocab, args.vocab, share) if not entries else None
            choice = chosen or FROM_CACHE
            recipe = choice.recipe
        for teacher in running(teachers).values() if args.offload_teachers else ():
            if isinstance(teacher, str):
                raise ValueError(f"offload_teachers=True and teacher={teacher!r}, which the student is; leave one out")
            if not is_dispatched(teacher):  # a device_map has placed the others
                cpu_offload(teacher, args.device)
        set_seed(args.seed)  # the projector's weights are drawn
        with replaced(args, teacher_tail=None if among else args.teacher_tail):  # only a cache uses it then
            resolved = args.resolved(recipe)
        options = {"recipe": resolved, "valid_vocab": valid_vocab, "tokenizer": processor, "shared_vocabulary": shared}
        model = DistillationModel(student, teachers or None, **options, **{name: getattr(args, name) for name in MODEL})
        model.by_default = choice is not None
        return model, choice

    def with_entries(self, model: DistillationModel) -> list[Any]:
        """Return the training and evaluation data sets, with the entries of teachers that are caches."""
        if model.sides.caches and self.args.generates:
            raise ValueError("text that is generated, and a teacher that is a cache; expected teachers that run")
        texts = (("train_dataset", self.train_dataset, "train"), ("eval_dataset", self.eval_dataset, "eval"))
        return [join_caches(model, argument, one, self.temperature_schedule, split) for argument, one, split in texts]


def tokenize(
    argument: str, rows: Any, tokenizer: PreTrainedTokenizerBase, args: KDConfig, n_teachers: int,
    prompts: str | None, other: OtherTokenizer | None,
) -> tuple[Any, Counts]:  # fmt: skip
    """Call `tokenize_dataset` with the settings of `args`, keeping the column that routes rows to teachers."""
    options: dict[str, Any] = {name: getattr(args, name) for name in DATA}
    options["teacher_column"] = column_of(args.teacher_column, args.teacher_weights, n_teachers, columns_of(rows))
    options |= {"argument": argument, "prompts": prompts, "teacher_tokenizer": other}
    return tokenize_dataset(rows, tokenizer, **options)


def _read_cache(teacher: Any) -> Any:
    """Return the `TeacherCache` in the folder `teacher`; anything else as it is."""
    if isinstance(teacher, str) and (Path(teacher) / CACHE).exists():
        return processes.by_first(lambda: TeacherCache(teacher))
    return teacher


def _other_tokenizer(student: Any, teacher: Any, processor: Any, args: KDConfig) -> OtherTokenizer | None:
    """Return the teacher's tokenizer if it is known to differ from the text's; otherwise None."""
    if not isinstance(student, PreTrainedModel) or not isinstance(teacher, PreTrainedModel):
        return None  # refused later, with a better message
    ours, given = text_tokenizer(processor, student), args.teacher_tokenizer_name_or_path
    length = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    found = find_other_tokenizer("teacher", ours, teacher, given, args.valid_vocab, length)
    for line in found.vocabulary.lines if found else ():
        processes.print_once(line)
    return found
