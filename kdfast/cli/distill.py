"""`kdfast distill CONFIG.yaml`: tokenizer, data, models, training, evaluation, and files with the results.

output_dir gets the student with its tokenizer (plain `from_pretrained` reads it), the projector beside it,
summary.json, report.html, and checkpoint-N folders during training. Repeating the command resumes an interrupted run
and leaves a finished one alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from kdfast.cli.arguments import LM_ONLY, AdapterArguments, Arguments, ModelArguments, parse_argv
from kdfast.cli.data import load_text
from kdfast.cli.errors import RunFailed, RunTerminated, UserError
from kdfast.cli.output_dir import REMEDY, claim
from kdfast.report.page import text_table, write_report
from kdfast.report.read_runs import REPORT, SUMMARY, Run, is_finished, log_table, read_run
from kdfast.report.summary import engine_of, summarize, write_summary
from kdfast.training import KDTrainer, load_student, load_teacher
from kdfast.training.adapters import lora_config
from kdfast.training.cache.description import NAME, Description
from kdfast.training.cache.read import TeacherCache
from kdfast.training.callbacks import show_progress
from kdfast.training.data.text import check_positions
from kdfast.training.durable.errors import RunStoppedError, TerminatedError
from kdfast.training.durable.processes import by_first, leave, print_once
from kdfast.training.loading import read_init_kwargs, read_mapping
from kdfast.training.on_policy.texts import read_texts
from kdfast.training.recipes import AUTO, CACHED, SELF

if TYPE_CHECKING:
    from datasets import Dataset


def distill(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    run = run_distillation(parse_argv(argv, "distill"))
    print_once(text_table([run]))
    leave()
    return 0


def run_distillation(arguments: Arguments) -> Run:
    """Do one run, from its arguments to its files, and return it; a finished run with these arguments is only read.

    Raises UserError if the arguments cannot be run, RunFailed if a loss is not finite or something outside stops the
    run, RunTerminated after SIGTERM.
    """
    training = arguments.training
    training.device  # noqa: B018  # asking for it connects the processes
    assert training.output_dir is not None  # parse requires it
    output_dir = Path(training.output_dir)
    try:
        by_first(lambda: claim(output_dir, arguments.given, arguments.run.overwrite_output_dir))
    except (OSError, ValueError) as error:  # ValueError for a name that no file can have
        raise UserError(f"output_dir: {error}") from error
    try:
        return _run(arguments, output_dir)
    except TerminatedError as error:
        raise RunTerminated(str(error)) from error
    except RunStoppedError as error:
        raise RunFailed(str(error)) from error
    except ValueError as error:  # raised by data, models and trainer for arguments that do not fit
        raise UserError(str(error)) from error
    except OSError as error:  # a report or summary on a full disk
        raise RunFailed(f"{error}. The same command goes on from the last checkpoint") from error


def _run(arguments: Arguments, output_dir: Path) -> Run:
    name, training = output_dir.name, arguments.training
    if is_finished(output_dir):
        print_once(f"{name}: finished already, in {output_dir}; --overwrite_output_dir true would train it again")
        return read_run(output_dir, name)
    if training.resume_from_checkpoint is False and get_last_checkpoint(output_dir) is not None:
        raise UserError(
            f"resume_from_checkpoint: false, and {str(output_dir)!r} holds checkpoints, which this command would go on "
            f"from. {REMEDY}"
        )
    trainer = _trainer(arguments, name)
    checkpoint = trainer.find_checkpoint(training.resume_from_checkpoint or True)
    trained = checkpoint is not None and trainer.load_finished(checkpoint)
    if not trained:
        trainer.check_start(checkpoint)
    if checkpoint:
        print_once(f"{name}: going on from {checkpoint}")
    transformers.utils.logging.disable_progress_bar()  # of saving, which would break up training's
    show_progress(trainer, name)
    trainer.add_callback(_LogLastStep())

    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(training.device)
    if not trained:
        trainer.train(resume_from_checkpoint=checkpoint)
    log, step, best = trainer.state.log_history, trainer.state.global_step, training.load_best_model_at_end
    evaluated = [entry for entry in log if "eval_ce" in entry and entry["step"] == step and not best]
    evaluation = evaluated[-1] if evaluated else trainer.evaluate()  # eval_strategy has evaluated the last step
    trainer.save_model()
    run = Run(name, log_table(trainer.state.log_history), summarize(trainer, evaluation), read_texts(output_dir))

    def write() -> None:
        trainer.save_state()
        write_report(output_dir / REPORT, f"{name}: recipe {run.summary['recipe']}", [run])
        write_summary(output_dir / SUMMARY, run.summary)  # last, since it marks the run as finished

    by_first(write)
    print_once(f"{name}: model, summary.json and report.html are in {output_dir}")
    return run


def _trainer(arguments: Arguments, name: str) -> KDTrainer:
    models, training = arguments.model, arguments.training
    training.dataloader_pin_memory &= torch.accelerator.is_available()  # otherwise it only warns
    elsewhere = arguments.source.teacher_model_server_url or arguments.source.teacher_logprobs
    folder = training.teacher_cache
    if elsewhere and training.recipe != LM_ONLY and not (folder and by_first((Path(folder) / NAME).exists)):
        raise UserError(
            f"the teacher is at {elsewhere!r}, and teacher_cache={folder!r} holds nothing; kdfast distill learns "
            "from what `kdfast cache`, from the same file, has put there before"
        )
    without_teacher, own = _learns_without_teacher(arguments), models.teacher_model_name_or_path == SELF
    several = models.teachers
    given = load_text(arguments, None if without_teacher or own or several else models.teacher_model_name_or_path)
    tokenizer, train, evaluation = given.tokenizer, given.train, given.evaluation
    set_seed(training.seed)  # for a fresh student's weights
    text: dict[str, Any] = {"tokenizer": tokenizer, "valid_vocab": training.valid_vocab}
    student = load_student(
        models.model_name_or_path,
        student_config=models.student_config,
        dtype=models.dtype,
        model_init_kwargs=_init_kwargs(models, arguments.adapter),
        **text,
    )
    loaded = {"student": student}
    if without_teacher:
        train, evaluation = _with_cache(arguments, tokenizer, train, evaluation)
    elif several:
        text["dtype"] = models.teacher_dtype
        for (key, one), kwargs in zip(several.items(), models.kwargs_of_teachers, strict=True):
            if not (Path(one) / NAME).exists():  # the trainer reads caches
                loaded[f"teacher {key}"] = load_teacher(one, model_init_kwargs=kwargs, **text)
    elif not own and (teacher := models.teacher_model_name_or_path) is not None:
        text["model_init_kwargs"] = models.teacher_model_init_kwargs
        if given.other is not None:
            text = {"tokenizer": given.other.teacher.tokenizer, "model_init_kwargs": text["model_init_kwargs"]}
        loaded["teacher"] = load_teacher(teacher, dtype=models.teacher_dtype, **text)
    for which, model in loaded.items():
        check_positions(which, model, training.max_length)
    sizes = ", ".join(f"{which} {model.num_parameters() / 1e6:.1f}M parameters" for which, model in loaded.items())
    engine, rows = engine_of(training, student), given.describe(training.max_length)
    print_once(f"{name}: recipe {training.recipe}; {sizes}; {rows}; engine {engine} on {training.device}")
    teachers: Any = {key: loaded.get(f"teacher {key}", one) for key, one in several.items()} or loaded.get("teacher")
    if 0 in several:  # keys are numbers; use the folders' names
        teachers = [*teachers.values()]
    trainer = KDTrainer(
        student,
        training,
        teacher=SELF if own else teachers,
        peft_config=_peft_config(arguments.adapter),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    trainer.counts = given.counts
    return trainer


def _learns_without_teacher(arguments: Arguments) -> bool:
    """Return whether a run needs no teacher: none is named, or `kdfast cache` has kept both splits."""
    training, folder = arguments.training, arguments.training.teacher_cache
    without = training.recipe == LM_ONLY or (training.recipe == CACHED and training.student_init in (None, "own"))
    if not folder or without or arguments.model.teacher_model_name_or_path is None:
        return bool(folder)
    return training.recipe == AUTO and by_first(
        lambda: (Path(folder) / NAME).exists() and "eval" in Description.read(Path(folder)).splits
    )


def _with_cache(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, train: Dataset, evaluation: Dataset
) -> tuple[Any, Any]:
    """Return the data with the teacher's entries; training rows stay as they are if a run learns from text alone."""
    training, folder = arguments.training, arguments.training.teacher_cache or ""
    cache = by_first(lambda: TeacherCache(folder))  # checksums are read only once
    cache.check_tokenizer(tokenizer)
    then, now = cache.description.teacher, arguments.model.teacher_model_name_or_path
    if now is not None and Path(now).resolve() != Path(then).resolve():
        raise ValueError(
            f"teacher_model_name_or_path={now!r}, and {str(cache.folder)!r} is a cache of {then!r}. Name that one, or "
            "none, or make a cache of this one"
        )
    alone = training.recipe == LM_ONLY
    tau = training.resolved(CACHED).temperatures[0]  # the trainer checks that there are no others
    tail: Any = training.teacher_tail if cache.description.source else None
    if alone and not cache.description.serves(tau) and tail is None:
        return train, evaluation
    evaluation = cache.dataset("eval", evaluation, temperature=tau, tail=tail)
    return train if alone else cache.dataset("train", train, temperature=tau, tail=tail), evaluation


def _peft_config(given: AdapterArguments) -> Any:
    """Return PEFT's LoraConfig, or None without an adapter."""
    if not given.use_peft:
        return None
    kept = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")  # PEFT's names; it spells the others without lora_
    fields = {name: value for name, value in vars(given).items() if name in kept}
    fields |= {name[5:]: value for name, value in vars(given).items() if name.startswith("lora_") and name not in kept}
    return lora_config(fields | read_mapping("peft_config", given.peft_config or {}))


def _init_kwargs(models: ModelArguments, given: AdapterArguments) -> dict[str, Any]:
    """Return the student's arguments of from_pretrained, including load_in_4bit and the like."""
    kwargs = read_init_kwargs("model_init_kwargs", models.model_init_kwargs)
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(given, name)]
    if not bits:
        return kwargs
    if len(bits) > 1 or "quantization_config" in kwargs:
        raise ValueError(
            f"{' and '.join(bits)}, and model_init_kwargs has quantization_config={kwargs.get('quantization_config')}; "
            "expected one way to quantize the student"
        )
    four = {
        "bnb_4bit_compute_dtype": models.dtype or "float32",
        "bnb_4bit_quant_type": given.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": given.use_bnb_nested_quant,
        "bnb_4bit_quant_storage": given.bnb_4bit_quant_storage,
    }
    return {**kwargs, "quantization_config": {bits[0]: True, **(four if given.load_in_4bit else {})}}


class _LogLastStep(TrainerCallback):
    """A callback that logs the last step whatever logging_steps is, so that curves and token counts are complete."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True
