"""`KDConfig`: every `TrainingArguments` field, and the settings of a distillation.

A distillation setting that is None comes from the recipe; `resolved()` returns the values in force.
"""

# ruff: noqa: RUF009  (_from_recipe is a field(), not a default that is shared)

import inspect
import logging
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from numbers import Real
from typing import Any, get_args

from transformers import TrainingArguments

from kdfast import engines
from kdfast.divergences import DIVERGENCES, get_divergence
from kdfast.training.diagnostics import HealthThresholds
from kdfast.training.loading import read_mapping
from kdfast.training.recipes import AUTO, RECIPES, UNUSED, ProjectorStart, Recipe, StudentStart, get_recipe
from kdfast.training.teachers.entries import TeacherTail

logger = logging.getLogger(__name__)

DRAWN, KEPT = 32, 64  # defaults: ids drawn, or kept, per token

# evaluation metrics, for metric_for_best_model → whether greater is better; None: neither
GREATER_IS_BETTER: dict[str, bool | None] = {
    **dict.fromkeys(("loss", "ce", "ce_projected", "perplexity", "kd", "aux_loss", "kl_teacher_student"), False),
    **dict.fromkeys(("kl_teacher_projected", "bits_per_byte", "runtime"), False),
    **dict.fromkeys(("agreement", "samples_per_second", "steps_per_second"), True),
    **dict.fromkeys(("student_entropy", "teacher_entropy", "tokens"), None),
}

OF_EACH = ("kl_teacher_student", "kl_teacher_projected", "kd")  # with several teachers, also kd_<name> and so on

# expectation in errors → its check, and the fields that it applies to
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

# settings that are arguments of `tokenize_dataset`
DATA = (
    "max_length", "truncation_mode", "packing", "completion_only_loss", "assistant_only_loss", "chat_template",
    "teacher_prompt_template", "text_column", "dataset_num_proc",
)  # fmt: skip

# the first key of each group → what help texts call it
GROUPS = {
    "recipe": "the recipe and its loss",
    "student_init": "solved starts and projectors",
    "max_length": "rows",
    "on_policy": "generated text",
    "teacher_tokenizer_name_or_path": "teachers",
    "precompute_teacher_log_probs": "a teacher that runs once",
    "non_finite": "when something goes wrong",
}


def help_of(key: Field) -> str:
    """Return the help text of a dataclass's field, with its default."""
    default = str(key.default).lower() if isinstance(key.default, bool) else key.default
    return key.metadata["help"] + ("" if default in (None, MISSING) else f" (default: {default})")


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _from_recipe(help: str) -> Any:
    return _field(None, f"{help} Default: the recipe's.")


@dataclass
class KDConfig(TrainingArguments):
    """`TrainingArguments` with the settings of a distillation.

    Example:
        args = KDConfig(output_dir="out", recipe="teacher_head", temperature=2.0, max_steps=1000, bf16=True)

    Three defaults differ. `logging_nan_inf_filter=False`: a NaN is never averaged away. With
    `ddp_find_unused_parameters=None`, DDP looks for unused parameters if plain text leaves parts of the student, such
    as a vision tower, unused. For `metric_for_best_model="ce"`, "eval_web_ce" (of a data set "web") and the like, less
    is better.

    Raises ValueError naming the field, the value and what was expected.
    """

    recipe: str = _field(
        AUTO,
        f"Where the teacher's logits come from and how the student starts: {', '.join(RECIPES)}. auto takes the one "
        "that measured best for models such as these, and prints why.",
    )
    temperature: float | None = _from_recipe("τ > 0, by which the KD term divides the logits of both models.")
    temperature_steps: list[float] | None = _from_recipe(
        "In place of temperature, one value for each equal part of the run, such as 3 2 1.5."
    )
    divergence: str | None = _from_recipe(f"What the KD term measures: {', '.join(DIVERGENCES)}.")
    beta: float | None = _field(
        None, "β of jsd, where 0 is forward KL and 1 reverse KL; given alone, it selects jsd. Also β of alpha_beta."
    )
    alpha: float | None = _field(
        None,
        "α of skew_kl and skew_reverse_kl: how much of the first distribution is mixed into the second. Also α of "
        "alpha_beta. Default: the divergence's.",
    )
    kd_weight: float | None = _from_recipe("Multiplies τ²·KL. If the weight ramps, this is its final value.")
    kd_ratio: float | None = _field(None, "A number r in [0, 1] that sets kd_weight to r and ce_weight to 1 − r.")
    kd_ramp: float | None = _from_recipe("Fraction of the run over which the KD weight rises; 0 keeps it constant.")
    kd_ramp_start: float | None = _from_recipe("KD weight at the start of the ramp.")
    kd_until: float | None = _from_recipe(
        "Fraction of the run after which the KD term is dropped. The teacher then runs only for a trained projector, "
        "anchor_weight or hidden_weight."
    )
    kd_on: str | None = _from_recipe(
        "completion: the KD term covers the tokens that have labels; all: every token, prompts included."
    )
    ce_weight: float | None = _from_recipe("Multiplies the language-model loss.")
    hidden_weight: float | None = _from_recipe(
        "Multiplies a loss on hidden states: 1 − the correlation of student and teacher layers, through a trained map."
    )
    router_aux_loss_coef: float | None = _field(
        None,
        "Multiplies the load-balancing loss of a mixture of experts; 0 leaves it out. Default: as the student's "
        "configuration says.",
    )
    valid_vocab: int | None = _field(
        None,
        "Number of real tokens; rows of the heads from there on are padding. Default: the tokenizer's number of ids if "
        "the two heads are padded differently.",
    )
    vocab: str = _field(
        "error",
        "What to do with heads of different sizes: error, or truncate, which compares the ids that both have.",
    )
    engine: str = _field("auto", "Which implementation computes the loss; auto picks one for the device.")
    scratch_bytes: int | None = _field(None, "Bytes for the logits of one chunk. Default: the engine's.")

    student_init: str | None = _from_recipe(
        "How the student starts: own, as it is; svd, its embedding is solved from the teacher's head; svd_blocks, its "
        "layers too, from the teacher's."
    )
    calibration_tokens: int | None = _field(
        None, "Tokens of the training text from which starts are solved. Default: 16 times the teacher's width."
    )
    compressed_rank: int | None = _from_recipe(
        "Rank of a compressed teacher head, and of the hidden states kept for it."
    )
    compressed_kl: float | None = _from_recipe(
        "In place of compressed_rank: the lowest rank whose KL to the whole head is at most this many nats."
    )
    projector_init: str | None = _from_recipe(
        "How the projector starts: default, as nn.Linear; normal, std 0.01; svd or lstsq, solved."
    )
    projector_resolve_steps: int | None = _from_recipe(
        "Solve the projector again every so many steps, and don't train it; 0 = never."
    )
    projector_lr: float | None = _from_recipe("Learning rate of the projector, in place of the multiplier.")
    projector_lr_multiplier: float | None = _from_recipe("The projector's learning rate divided by learning_rate.")
    router_lr_multiplier: float | None = _from_recipe("The learning rate of expert routers divided by learning_rate.")
    anchor_weight: float | None = _from_recipe("Multiplies the projected teacher's own cross entropy on the labels.")
    teacher_grad: str | None = _from_recipe(
        "How far the KD gradient goes on the teacher's side. full: into the projector and the student's head below it; "
        "projector: into the projector alone; none."
    )

    max_length: int | None = _field(1024, "Most tokens in a row, and the length of a block of text.")
    truncation_mode: str = _field("keep_start", "Which end of a longer row is kept: keep_start or keep_end.")
    packing: bool | None = _field(
        None,
        "true: several whole rows share one of max_length, and none sees another. false: one row each, padded. "
        "Default: false, but text is joined and cut into blocks of max_length.",
    )
    completion_only_loss: bool | None = _field(
        None, "Train on the completion and not on the prompt. Default: true if rows have a completion."
    )
    assistant_only_loss: bool = _field(
        False, "Train only on what the assistant says, as the generation block of the chat template marks it."
    )
    chat_template: str | None = _field(None, "A Jinja template or a file that holds one. Default: the tokenizer's.")
    teacher_prompt_template: str | None = _field(
        None,
        "The teacher's own prompt, with columns in braces. Default: {prompt}\\n\\n{privileged_context}, if there is "
        "such a column.",
    )
    text_column: str = _field("text", "The column that holds the text.")
    dataset_num_proc: int | None = _field(None, "Number of processes that tokenize.")

    on_policy: float = _field(0.0, "Share of the batches whose completions the student writes (TRL's lmbda).")
    seq_kd: bool = _field(False, "Have the teacher write the completions of the other batches.")
    max_new_tokens: int = _field(128, "Most tokens in a completion that is written.")
    sampling_temperature: float = _field(
        1.0, "Temperature at which completions are drawn; the loss keeps its own. 0 takes the likeliest token."
    )
    top_p: float = _field(1.0, "Draw from the likeliest tokens that together have this probability.")
    top_k: int = _field(0, "Draw from this many of the likeliest tokens; 0 = from all.")
    generations_per_prompt: int = _field(1, "Completions written for each prompt; the batch grows by this factor.")
    on_policy_buffer: int = _field(1, "Keep this many of the student's batches, and train this many times on each.")

    teacher_tokenizer_name_or_path: str | None = _field(
        None, "The teacher's tokenizer, if it has another one. Default: the one beside its weights."
    )
    teacher_weights: list[float] | None = _field(
        None, "What multiplies the KD term of each of several teachers. Default: equal weights that sum to 1."
    )
    teacher_column: str | None = _field(
        None,
        "The column that names the one teacher of several from which a row learns. Default: teacher_id, if the data "
        "has it and no teacher_weights are given.",
    )
    teacher_update_rate: float | None = _field(
        None, "Make the teacher self a moving average of the student, which has this share in each update."
    )
    teacher_sync_steps: int | None = _field(None, "Steps from one such update to the next. Default: 1.")
    offload_teachers: bool = _field(
        False, "Keep teachers on the CPU, and copy their layers to the device one by one as they run."
    )
    shard_teacher: bool = _field(False, "Under FSDP, shard the teacher too, instead of one whole copy per process.")

    precompute_teacher_log_probs: bool | None = _field(
        None,
        "Run the teacher over the training text once, before the first step, and learn from what is kept. Default: "
        "true if the run goes over its text more than once and nothing is in the way.",
    )
    teacher_cache: str | None = _field(
        None, "Folder of what is kept; it is read, or made if it isn't there. Default: output_dir/teacher_cache."
    )
    cache_method: str | None = _field(
        None,
        "What is kept per token. sample: ids drawn at random; top_k: the likeliest ids; hidden: compressed hidden "
        "states. Default: the one whose number is given, else as the run needs it; for kdfast cache "
        "hidden, or top_k from a server or file.",
    )
    cache_samples: int | None = _field(None, f"Ids drawn per token, at most 1024. Default: {DRAWN}.")
    cache_top_k: int | None = _field(None, f"Ids kept per token, at most 1024. Default: {KEPT}.")
    cache_dtype: str | None = _field(
        None, "float16 or float32, and for hidden also int8. Default: int8 for hidden, else float16."
    )
    cache_temperatures: list[float] | None = _field(
        None, "Temperatures of the runs that will read the cache, besides 1. Default: the run's."
    )
    cache_shard_tokens: int | None = _field(
        None, "Tokens in a shard. Default: a 64th of the text, but at least 2^14 and at most 2^20."
    )
    teacher_tail: str | None = _field(
        None,
        "What log-probabilities from elsewhere say about the ids they leave out. bucket: their sum; renormalize or "
        "renormalize_both: nothing; none: the ids were drawn at random.",
    )

    non_finite: str = _field(
        "stop",
        "What to do at a loss or gradient that is NaN or infinite: stop, or skip the step, which costs a "
        "synchronization and a pass over the gradients per step.",
    )
    max_skipped_steps: int = _field(10, "Under non_finite=skip, stop after this many skipped steps in a row.")
    health: bool = _field(True, "Watch the log and say in words what goes wrong.")
    health_thresholds: dict | str | None = _field(
        None, 'Fields of HealthThresholds to change, as a mapping or JSON, such as {"kl": 4.0}.'
    )
    logging_nan_inf_filter: bool = _field(
        False, "In place of a loss that is NaN or infinite, log the mean of those before it."
    )

    def __post_init__(self) -> None:
        self._check()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = _greater_is_better(self.metric_for_best_model)
        if str(self.fsdp).lower() in ("true", "false"):  # TrainingArguments would read the text as a former option
            self.fsdp = str(self.fsdp).lower() == "true" or None  # type: ignore[assignment]
        super().__post_init__()

    def resolved(self, recipe: str | None = None) -> Recipe:
        """Return the recipe with every explicit value in it. Values that it does not use are left out, with a log line.

        With recipe="auto" it depends on the models: pass the name that `choose_recipe` found.
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
            given.setdefault("kd_until", 1.0)  # without it, nothing would be learned after the recipe's own
        return replace(found, **given)

    @property
    def prompts(self) -> str | None:
        """Return `tokenize_dataset`'s argument `prompts` for rows to train on."""
        return None if not self.generates else "alone" if self.seq_kd or self.on_policy == 1 else "beside"

    @property
    def generates(self) -> bool:
        """Return whether text is generated to train on."""
        return self.on_policy > 0 or self.seq_kd

    def cache_options(self, temperatures: Sequence[float], method: str) -> dict[str, Any]:
        """Return `cache_teacher`'s arguments from the settings; `temperatures` and `method` are defaults."""
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
        """Return the compressed head's settings that a cache of hidden states uses, whatever the recipe."""
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
            self.divergence = "jsd"  # as in TRL's trainers, which have no other divergence
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


def _list_keys() -> str:
    """Return our keys, their help texts and defaults, by group: what `help(KDConfig)` shows."""
    lines, theirs = [], {key.name for key in fields(TrainingArguments)}
    for key in (key for key in fields(KDConfig) if key.name not in theirs):
        lines += ["", f"{GROUPS[key.name]}:", ""] if key.name in GROUPS else []
        lines.append(textwrap.fill(f"{key.name}: {help_of(key)}", 115, subsequent_indent=" " * 4, initial_indent="  "))
    return "\n".join(lines)


KDConfig.__doc__ = f"{inspect.cleandoc(KDConfig.__doc__ or '')}\n{_list_keys()}\n"


def _greater_is_better(metric: str) -> bool | None:
    """Return whether greater is better, by the end of the name; None for an unknown one."""
    known = max((name for name in GREATER_IS_BETTER if f"_{metric}".endswith(f"_{name}")), key=len, default=None)
    known = known or next((name for name in OF_EACH if f"_{name}_" in f"_{metric}"), None)  # one of several teachers
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
