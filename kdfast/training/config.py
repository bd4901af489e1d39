"""`KDConfig`: every `TrainingArguments` field, and those of a distillation.

A distillation field left at None comes from the recipe; `resolved()` gives what is in force.
"""

# ruff: noqa: RUF009  (_from_recipe is a field(), not a default that is shared)

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, get_args

from transformers import TrainingArguments

from kdfast import engines
from kdfast.divergences import DIVERGENCES, get_divergence
from kdfast.training.diagnostics import HealthThresholds
from kdfast.training.hf import read_mapping
from kdfast.training.recipes import AUTO, RECIPES, UNUSED, ProjectorStart, Recipe, StudentStart, get_recipe
from kdfast.training.teachers.entries import TeacherTail

logger = logging.getLogger(__name__)

DRAWN, KEPT = 32, 64  # ids drawn, or kept, per token where nothing is said

# evaluation metrics → whether a greater value is better, for metric_for_best_model; None: neither is
GREATER_IS_BETTER: dict[str, bool | None] = {
    **dict.fromkeys(("loss", "ce", "ce_projected", "perplexity", "kd", "aux_loss", "kl_teacher_student"), False),
    **dict.fromkeys(("kl_teacher_projected", "bits_per_byte", "runtime"), False),
    **dict.fromkeys(("agreement", "samples_per_second", "steps_per_second"), True),
    **dict.fromkeys(("student_entropy", "teacher_entropy", "tokens"), None),
}

OF_EACH = ("kl_teacher_student", "kl_teacher_projected", "kd")  # of several teachers: also kd_<name> and so on

# what is expected of numbers → whether it holds, and of which fields
NUMBERS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a number ≥ 0": (lambda x: x >= 0, (
        "kd_weight", "kd_ramp_start", "ce_weight", "anchor_weight", "projector_lr", "projector_lr_multiplier",
        "router_lr_multiplier", "hidden_weight", "router_aux_loss_coef", "sampling_temperature",
    )),
    "a number > 0": (lambda x: x > 0, ("temperature", "compressed_kl")),
    "a fraction of the run in [0, 1]": (lambda x: 0 <= x <= 1, ("kd_ramp", "kd_until")),
    "a number in [0, 1]": (lambda x: 0 <= x <= 1, ("kd_ratio", "on_policy")),
    "a number in (0, 1]": (lambda x: 0 < x <= 1, ("top_p", "teacher_update_rate")),
    "a number": (lambda x: True, ("alpha", "beta")),
    "an int > 0": (lambda x: x > 0 and x == int(x), (
        "cache_samples", "cache_top_k", "cache_shard_tokens",
        "scratch_bytes", "valid_vocab", "compressed_rank", "calibration_tokens", "max_skipped_steps",
        "max_length", "dataset_num_proc", "max_new_tokens", "generations_per_prompt", "on_policy_buffer",
        "teacher_sync_steps",
    )),
    "an int ≥ 0": (lambda x: x >= 0 and x == int(x), ("projector_resolve_steps", "top_k")),
}  # fmt: skip
CHOICES = {
    "kd_on": ("completion", "all"),
    "truncation_mode": ("keep_start", "keep_end"),
    "teacher_grad": ("full", "projector", "none"),
    "projector_init": get_args(ProjectorStart),
    "student_init": get_args(StudentStart),
    "engine": engines.NAMES,
    "teacher_tail": get_args(TeacherTail),
    "non_finite": ("stop", "skip"),
    "cache_method": ("hidden", "sample", "top_k"),
    "cache_dtype": ("float16", "float32", "int8"),
    "vocab": ("error", "truncate"),
}

# what `tokenize_dataset` takes of the settings
DATA = (
    "max_length", "truncation_mode", "packing", "completion_only_loss", "assistant_only_loss", "chat_template",
    "teacher_prompt_template", "text_column", "dataset_num_proc",
)  # fmt: skip


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _from_recipe(help: str) -> Any:
    return _field(None, f"{help} None = from the recipe.")


@dataclass
class KDConfig(TrainingArguments):
    """Extend `TrainingArguments` by the settings of a distillation.

    Changed defaults: `logging_nan_inf_filter=False` (a NaN is never averaged away);
    `ddp_find_unused_parameters=None` means True where text alone leaves parts of the student unused, such as a vision
    tower; and of `metric_for_best_model="ce"`, "eval_web_ce" (of a data set "web") and the like less is better.

    Raises ValueError naming the field, what came and what was expected.
    """

    recipe: str = _field(AUTO, f"{', '.join(RECIPES)}; auto takes the best measured one for the models given.")
    temperature: float | None = _from_recipe("τ > 0 of the KD term.")
    temperature_steps: list[float] | None = _from_recipe("Instead: a value for each equal part of the run, as 3 2 1.5.")
    divergence: str | None = _from_recipe(f"{', '.join(DIVERGENCES)}.")
    beta: float | None = _field(
        None, "β of jsd (taken alone, it means jsd): 0 forward, 1 reverse KL; or of alpha_beta."
    )
    alpha: float | None = _field(None, "α of skew_kl and skew_reverse_kl, the other side's share, or of alpha_beta.")
    kd_weight: float | None = _from_recipe("Multiplies τ²·KL; the value after the ramp.")
    kd_ratio: float | None = _field(None, "r: kd_weight r and ce_weight 1 − r, in place of the two.")
    kd_ramp: float | None = _from_recipe("Fraction of the run over which the KD weight ramps up; 0 = constant.")
    kd_ramp_start: float | None = _from_recipe("KD weight at the start of the ramp.")
    kd_until: float | None = _from_recipe("Fraction of the run that has a KD term; no teacher is run after it.")
    kd_on: str | None = _from_recipe("completion: the KD term where labels count; all: on every token.")
    ce_weight: float | None = _from_recipe("Multiplies the language-model loss.")
    student_init: str | None = _from_recipe("A fresh student: own; svd, its embedding solved; svd_blocks, all of it.")
    compressed_rank: int | None = _from_recipe("Rank of a compressed teacher's head, and of hidden states kept of it.")
    compressed_kl: float | None = _from_recipe("Instead: the smallest rank whose KL to the whole head is at most this.")
    anchor_weight: float | None = _from_recipe("Multiplies the projected teacher's own cross entropy on the labels.")
    teacher_grad: str | None = _from_recipe("Where the KD gradient goes on the teacher's side: full, projector, none.")
    projector_init: str | None = _from_recipe("default (nn.Linear's), normal (std 0.01), or solved: svd, lstsq.")
    projector_resolve_steps: int | None = _from_recipe("Steps between solves of an untrained projector; 0 = never.")
    projector_lr: float | None = _from_recipe("The projector's learning rate, in place of the multiplier.")
    projector_lr_multiplier: float | None = _from_recipe("The projector's learning rate over learning_rate.")
    router_lr_multiplier: float | None = _from_recipe("The routers' learning rate over learning_rate.")
    hidden_weight: float | None = _from_recipe("Multiplies the layer-wise hidden-state loss.")
    router_aux_loss_coef: float | None = _field(
        None, "Multiplies a mixture of experts' load-balancing loss; None = as its configuration says, 0 = without."
    )
    calibration_tokens: int | None = _field(None, "Tokens read to solve starts; None = 16 × the teacher's width.")
    engine: str = _field("auto", "Engine of the loss; auto picks by device.")
    scratch_bytes: int | None = _field(None, "Memory for one chunk's logits; None = the engine's default.")
    teacher_tail: str | None = _field(
        None, "What teacher_log_probs of the data's own are: bucket, renormalize, renormalize_both; none, of drawn ids."
    )
    teacher_update_rate: float | None = _field(
        None, "Makes the teacher self a moving average of the student, whose share in an update this is."
    )
    teacher_sync_steps: int | None = _field(None, "Steps between those updates; None = 1.")
    valid_vocab: int | None = _field(None, "Ids from here on are padding rows; None = as the tokenizer says, or none.")
    vocab: str = _field("error", "For heads of other sizes: error, or truncate: KD on the first ids, which both have.")

    max_length: int | None = _field(1024, "Tokens in a row at most; of a block of text.")
    truncation_mode: str = _field("keep_start", "What is kept of a longer row: keep_start or keep_end.")
    packing: bool | None = _field(
        None, "Whole rows, as many as fit, in one; false: padded rows. None = false, but text is cut into blocks."
    )
    completion_only_loss: bool | None = _field(None, "No label on the prompt. None = where there is a completion.")
    assistant_only_loss: bool = _field(False, "Labels on what the assistant says alone; a template with generation.")
    chat_template: str | None = _field(None, "A Jinja template or its file; None = the tokenizer's.")
    teacher_prompt_template: str | None = _field(
        None, "The teacher's own prompt, of columns: None = {prompt}\\n\\n{privileged_context}, where that is one."
    )
    text_column: str = _field("text", "The column that holds the text.")
    dataset_num_proc: int | None = _field(None, "Processes that tokenize.")

    on_policy: float = _field(0.0, "Share of the batches whose completions the student writes; TRL's lmbda.")
    seq_kd: bool = _field(False, "The teacher writes the completions of the other batches.")
    max_new_tokens: int = _field(128, "Tokens of a completion at most.")
    sampling_temperature: float = _field(1.0, "At which it is drawn, whatever the loss's is; 0 = the likeliest tokens.")
    top_p: float = _field(1.0, "Draw from the likeliest tokens of this mass.")
    top_k: int = _field(0, "Draw from so many likeliest tokens; 0 = all.")
    generations_per_prompt: int = _field(1, "Completions of each of a batch's prompts, rows of one batch.")
    on_policy_buffer: int = _field(1, "Keep so many of the student's batches, and train on each so many times.")

    teacher_tokenizer_name_or_path: str | None = _field(
        None, "The teacher's own tokenizer; None = the one beside its weights."
    )
    precompute_teacher_log_probs: bool | None = _field(
        None, "Run the teacher once over the training text, before the first step. None = where the text comes again."
    )
    teacher_cache: str | None = _field(
        None, "Folder of the teacher's entries: read, or made where it is not there; None = output_dir/teacher_cache."
    )
    cache_method: str | None = _field(
        None, "sample: ids drawn at random; hidden: compressed states; top_k. None = by the number given or the run."
    )
    cache_samples: int | None = _field(None, f"Ids drawn per token, at most 1024; None = {DRAWN}.")
    cache_top_k: int | None = _field(None, f"Ids kept per token, at most 1024; None = {KEPT}.")
    cache_dtype: str | None = _field(
        None, "Of top_k's log-probabilities: float16 or float32; of hidden's coordinates also int8, their default."
    )
    cache_temperatures: list[float] | None = _field(None, "Of the runs to come, besides 1; default: the run's.")
    cache_shard_tokens: int | None = _field(None, "Tokens in a shard; None = a 64th of the text, 2^14 to 2^20.")

    teacher_weights: list[float] | None = _field(
        None, "Of several teachers, what multiplies each one's KD term; None = equal ones that sum to 1."
    )
    teacher_column: str | None = _field(
        None,
        "Each row learns from the one of several teachers that this column names; None = teacher_id, if it is there.",
    )
    offload_teachers: bool = _field(
        False, "Keep teachers on the CPU; their layers are copied to the device one by one, as they run."
    )
    shard_teacher: bool = _field(False, "Under FSDP: shard the teacher too, in place of a whole copy per process.")
    non_finite: str = _field("stop", "At a loss or gradient that is not finite: stop, or skip the step (synchronizes).")
    max_skipped_steps: int = _field(10, "With non_finite=skip: so many steps in a row stop the run nevertheless.")
    health: bool = _field(True, "Watch the log and say in words what goes wrong.")
    health_thresholds: dict | str | None = _field(None, "HealthThresholds that differ from the defaults, as JSON.")

    logging_nan_inf_filter: bool = _field(False, "Hide NaN and inf losses in the log.")

    def __post_init__(self) -> None:
        self._check()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = _greater_is_better(self.metric_for_best_model)
        if str(self.fsdp).lower() in ("true", "false"):  # as text, TrainingArguments takes it for an option of old
            self.fsdp = str(self.fsdp).lower() == "true" or None  # type: ignore[assignment]
        super().__post_init__()

    def resolved(self, recipe: str | None = None) -> Recipe:
        """Return the recipe with every explicit value in it; those it has no use for are left out, with a log line.

        Under "auto" the recipe depends on the models: give the name that `choose_recipe` found.
        """
        if recipe is None and self.recipe == AUTO:
            raise ValueError("recipe='auto' depends on the models; give resolved() a name, as choose_recipe finds it")
        found = get_recipe(recipe or self.recipe)
        given = {f.name: value for f in fields(Recipe) if (value := getattr(self, f.name, None)) is not None}
        if self.kd_ratio is not None:
            shares = {"kd_weight": self.kd_ratio, "ce_weight": 1 - self.kd_ratio}
            given |= shares if found.teacher != "none" else {"kd_ratio": self.kd_ratio}
        if self.teacher_tail is not None and found.teacher not in ("none", "cached"):
            given["teacher_tail"] = self.teacher_tail
        unused = [name for name in given if name in (*UNUSED[found.teacher], "teacher_tail", "kd_ratio")]
        if lost := [name for name in unused if name not in self._of_cache]:
            logger.warning("recipe=%r has no use for %s: left out", found.name, ", ".join(lost))
        if self.on_policy and found.teacher != "none":
            given.setdefault("kd_until", 1.0)
        if "temperature_steps" in given:
            given["temperature_steps"] = tuple(given["temperature_steps"])
        given = {name: value for name, value in given.items() if name not in unused}
        if given.get("ce_weight") == 0:
            given.setdefault("kd_until", 1.0)  # a recipe's own would leave nothing to learn from after it
        return replace(found, **given)

    @property
    def data_options(self) -> dict[str, Any]:
        """Return the arguments of `tokenize_dataset` that are settings."""
        return {name: getattr(self, name) for name in DATA}

    @property
    def prompts(self) -> str | None:
        """Return the same of rows to train on: whether completions are written to their prompts, and all of them."""
        return None if not self.generates else "alone" if self.seq_kd or self.on_policy == 1 else "beside"

    @property
    def generates(self) -> bool:
        """Whether text is generated to be trained on."""
        return self.on_policy > 0 or self.seq_kd

    def cache_options(self, temperatures: Sequence[float], method: str) -> dict[str, Any]:
        """Return the arguments of `cache_teacher` that are settings; `temperatures` and `method` where none are set."""
        counts = {"sample": self.cache_samples, "top_k": self.cache_top_k}
        method = self.cache_method or next((name for name, count in counts.items() if count is not None), method)
        hidden = {"rank": self.compressed_rank, "max_kl": self.compressed_kl}
        return {
            "method": method,
            **(hidden if method == "hidden" else {"k": counts[method] or {"sample": DRAWN, "top_k": KEPT}[method]}),
            "temperatures": self.cache_temperatures or sorted(set(temperatures)),
            "dtype": self.cache_dtype or ("int8" if method == "hidden" else "float16"),
            "seed": self.seed,
            "shard_tokens": self.cache_shard_tokens,
        }

    @property
    def _of_cache(self) -> tuple[str, ...]:
        """The settings of a compressed head that a cache of hidden states has a use for, whatever the recipe."""
        return ("compressed_rank", "compressed_kl") if self.cache_options([], "hidden")["method"] == "hidden" else ()

    def _check(self) -> None:
        if self.recipe != AUTO:
            self.recipe = get_recipe(self.recipe).name
        for expected, (holds, names) in NUMBERS.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not (_is_number(value) and holds(value)):
                    raise ValueError(f"{name}={value!r}; expected {expected}, or None")
        if self.temperature_steps is not None:
            steps = self.temperature_steps
            if not isinstance(steps, list | tuple) or not all(_is_number(x) and x > 0 for x in steps) or not steps:
                raise ValueError(f"temperature_steps={steps!r}; expected a list of numbers > 0, such as [3, 2, 1.5]")
            if self.temperature is not None:
                raise ValueError(f"temperature={self.temperature} and temperature_steps={steps}; expected one of them")
        if self.divergence is not None:
            if not isinstance(self.divergence, str):
                raise ValueError(f"divergence={self.divergence!r}; expected a name, such as 'forward_kl'")
            get_divergence(self.divergence)
        elif self.beta is not None and self.alpha is None:
            self.divergence = "jsd"  # as TRL's trainers, which know no other
        if self.alpha is not None or self.beta is not None:
            Recipe("", "none", divergence=self.divergence or Recipe.divergence, alpha=self.alpha, beta=self.beta)
        both = {name: x for name in ("ce_weight", "kd_weight") if (x := getattr(self, name)) is not None}
        if self.kd_ratio is not None and both:
            raise ValueError(
                f"kd_ratio={self.kd_ratio:g} and {', '.join(f'{name}={x:g}' for name, x in both.items())}; expected "
                "kd_ratio, or ce_weight and kd_weight: kd_ratio r is ce_weight 1 − r and kd_weight r"
            )
        if self.teacher_sync_steps is not None and self.teacher_update_rate is None:
            raise ValueError(f"teacher_sync_steps={self.teacher_sync_steps}; expected a teacher_update_rate with it")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name}={value!r}; expected one of {', '.join(allowed)}")
        if self.generates:
            asked = f"on_policy={self.on_policy:g}" if self.on_policy else "seq_kd=True"
            cached = ("precompute_teacher_log_probs", "teacher_cache")
            given = [name for name in (*cached, "packing") if getattr(self, name)]
            given += ["recipe"] * (self.recipe == "cached" or (self.recipe == "lm_only" and self.on_policy > 0))
            if given:
                what = f"{given[0]}={getattr(self, given[0])!r} and {asked}"
                raise ValueError(
                    f"{what}; expected rows that are padded: leave packing out"
                    if given == ["packing"]
                    else f"{what}; a teacher's entries, made beforehand, say nothing of text that is written during "
                    f"the run: it has to run. Leave {given[0]} out, or set on_policy=0 and seq_kd=False"
                )
        counts = {"sample": self.cache_samples, "top_k": self.cache_top_k}
        given = [method for method, count in counts.items() if count is not None]
        if len(given) > 1 or (given and self.cache_method not in (None, *given)):
            raise ValueError(
                f"cache_samples={self.cache_samples}, cache_top_k={self.cache_top_k} and "
                f"cache_method={self.cache_method!r}; expected cache_samples for 'sample', or cache_top_k for 'top_k'"
            )
        if (thresholds := self.health_thresholds) is not None:
            try:
                self.health_thresholds = read_mapping("expected HealthThresholds", thresholds)
                HealthThresholds.of(self.health_thresholds)
            except ValueError as error:
                raise ValueError(f"health_thresholds={thresholds!r}: {error}") from error
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint=True; KDTrainer saves a checkpoint on SIGTERM by itself, at the same step in "
                "all processes. Leave it out"
            )
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}; it would need the logits, which are never "
                "made. Leave it at 0"
            )


def _greater_is_better(metric: str) -> bool | None:
    """Return whether a greater value is better, by the end of the name: "eval_" and a data set's name may precede it.

    None for a name that is not known here; TrainingArguments decides on those.
    """
    known = max((name for name in GREATER_IS_BETTER if f"_{metric}".endswith(f"_{name}")), key=len, default=None)
    known = known or next((name for name in OF_EACH if f"_{name}_" in f"_{metric}"), None)  # of one of several teachers
    if known is None:
        return None
    if (greater := GREATER_IS_BETTER[known]) is None:
        raise ValueError(
            f"metric_for_best_model={metric!r}: neither more nor less of {known} is better in itself; give "
            "greater_is_better, or take another metric, such as 'ce'"
        )
    return greater


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
