import json
import logging
import math
import random
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, TrainerCallback
from transformers.trainer_callback import TrainerState

from kdfast.training import HealthCallback, HealthThresholds, KDConfig, KDTrainer, NonFiniteLossError

NAN = float("nan")

# Log lines of real runs: kdfast demo's text and settings, smaller. Vocabulary 1024, teacher 2 layers × 96, students
# 2 × 48, learning rate 2e-3, one seed. "short": teacher 600 steps, students 300 steps of 4 × 64 tokens; "long": 1500
# and 1200 of 8 × 64, every fourth log line. "anchored" is run5 (projector_fixed) with teacher_grad="none" and
# anchor_weight=1 (in the long run with projector_lr=2e-2), a projected teacher that stays true; "untrained" is it with
# teacher_grad="none" alone.
RUNS = json.loads((Path(__file__).parent / "data" / "health_logs.json").read_text())


def replay(lines, thresholds=None, max_steps=None, vocabulary=1):
    """The callback after `lines`, as the Trainer would have shown them to it."""
    health = HealthCallback(thresholds)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary)))
    state = TrainerState(max_steps=max_steps or max(line["step"] for line in lines))
    health.on_train_begin(None, state, None, model=model)
    for line in lines:
        state.global_step = line["step"]
        health.on_log(None, state, None, logs=line)
    return health


def kinds(lines, **given):
    return [finding.kind for finding in replay(lines, **given).findings]


def train(losses, **more):
    """One line a step of a run of that length; what is given besides may be a list too."""
    columns = {name: value if isinstance(value, list) else [value] * len(losses) for name, value in more.items()}
    rows = zip(*columns.values(), strict=True) if columns else [()] * len(losses)
    return [
        {"step": i, "loss": loss, **dict(zip(columns, row, strict=True))}
        for i, (loss, row) in enumerate(zip(losses, rows, strict=True), start=1)
    ]


def falling(n=60, start=8.0, end=3.0, noise=0.03, seed=0):
    draw = random.Random(seed)
    return [end + (start - end) * math.exp(-4 * i / n) + draw.gauss(0, noise * end) for i in range(n)]


# Real runs


@pytest.mark.parametrize("name", [name for name in RUNS if "run4" in name or "run5" in name])
@pytest.mark.parametrize("evaluated", [True, False])
def test_a_projected_teacher_that_follows_the_student_is_noticed(name, evaluated):
    lines = [line for line in RUNS[name] if evaluated or "loss" in line]
    (finding,) = replay(lines).findings
    assert finding.kind == "follows"
    assert 0.1 < finding.step / lines[-1]["step"] <= 0.3, "in time to stop the run"
    assert ("KL(true ‖ projected)" in finding.message) is evaluated
    assert "lm_only" in finding.message


@pytest.mark.parametrize("name", ["short true_head", "short anchored", "long anchored"])
@pytest.mark.parametrize("evaluated", [True, False])
def test_a_teacher_that_stays_true_is_not_complained_of(name, evaluated):
    assert kinds([line for line in RUNS[name] if evaluated or "loss" in line]) == []


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_projector_nothing_trains_misleads(evaluated):
    assert kinds([line for line in RUNS["short untrained"] if evaluated or "loss" in line]) == ["misleads"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"recipe": "projector"}, ["follows"]),
        ({"recipe": "projector_fixed"}, ["follows"]),
        ({"recipe": "teacher_head"}, []),
        ({"recipe": "lm_only"}, []),
        ({"recipe": "projector_fixed", "teacher_grad": "none", "anchor_weight": 1.0, "projector_lr": 2e-2}, []),
    ],
)
def test_in_training(tiny, rows, config, given, expected):
    data, plan = rows(8), {"max_steps": 60, "per_device_train_batch_size": 4, "logging_steps": 3}
    teacher = tiny(width=24, seed=1, spread=0.02)
    KDTrainer(teacher, config(recipe="lm_only", learning_rate=1e-2, **plan), train_dataset=data).train()
    args = config(learning_rate=5e-3, **plan, **given)
    trainer = KDTrainer(tiny(spread=0.02), args, teacher=teacher, train_dataset=data)
    trainer.train()
    assert [finding.kind for finding in trainer.health.findings] == expected


# Made-up runs


def test_a_healthy_run():
    losses = falling()
    assert kinds(train(losses, ce=losses)) == []


def test_noise_of_small_batches_is_no_oscillation():
    for seed in range(20):
        losses = falling(noise=0.08, seed=seed)
        assert kinds(train(losses, ce=losses)) == [], seed


@pytest.mark.parametrize(
    ("start", "more", "vocabulary", "expected"),
    [
        (10.1, {}, 1, ["initial_loss"]),
        (9.9, {}, 1, []),
        (12.4, {}, 262_144, []),  # that of guessing, in a vocabulary of that size
        (13.9, {"ce": 6.9, "kd": 0.0, "kd_weight": 0.1, "temperature": 2.0}, 1, []),  # as much again is the anchor's
        (30.0, {"ce": 6.9, "ce_projected": 9.0, "kd": 9.0, "kd_weight": 0.7, "temperature": 2.0}, 1, ["initial_loss"]),
        (11.2, {"ce": 8.2, "kd": 1.07, "kd_weight": 0.7, "temperature": 2.0}, 1, []),  # the teacher's own head
    ],
)
def test_the_initial_loss(start, more, vocabulary, expected):
    assert kinds(train([start], **more), vocabulary=vocabulary, max_steps=100) == expected
    assert kinds(train([5.0, start], **more), vocabulary=vocabulary, max_steps=100) == [], "the first line's alone"


# What to do is said of what the run has: a KD term, a projector
ALONE = {"ce": 13.0}
FIXED = {"ce": 13.0, "kd": 6.0, "kd_weight": 0.1, "temperature": 2.0}
PROJECTED = {**FIXED, "ce_projected": 13.0}


@pytest.mark.parametrize(
    ("more", "kd_weight", "projector_lr"),
    [(ALONE, False, False), (FIXED, True, False), (PROJECTED, True, True)],
)
def test_the_advice_is_of_what_the_run_has(more, kd_weight, projector_lr):
    losses = [14.0] * 30 + [14.0 + i for i in range(9)] + [NAN]
    said = {finding.kind: finding.message for finding in replay(train(losses, **more)).findings}
    assert said.keys() >= {"initial_loss", "perplexity", "rising", "non_finite"}
    assert "Do labels and tokenizer belong to the student?" in said["initial_loss"]
    for kind in ("perplexity", "rising"):
        assert ("kd_weight" in said[kind]) is kd_weight, kind
    assert ("kl" in said) is kd_weight
    assert ("kd_ramp" in said["non_finite"]) is kd_weight
    for kind in said.keys() & {"kl", "rising", "non_finite"}:
        assert ("projector_lr" in said[kind]) is projector_lr, kind


@pytest.mark.parametrize(
    ("ce", "expected"),
    [(13.0, "belong to the student?"), (6.9, ": 25.2 of it is the KD term, to a projected teacher")],
)
def test_a_loss_that_starts_high_is_of_labels_or_of_the_teacher(ce, expected):
    lines = train([ce + 25.2], **{**PROJECTED, "ce": ce, "kd": 9.0, "kd_weight": 0.7})
    (finding,) = replay(lines, max_steps=9).findings
    assert expected in finding.message
    assert ("kd_ramp" in finding.message) is (ce < 10)


def test_kl_and_perplexity_have_their_time():
    losses = falling(40, 8.0, 7.0, noise=0)
    found = replay(train(losses, kd=6.0, ce=9.3, kd_weight=0.1, temperature=2.0)).findings
    assert [(f.kind, f.step) for f in found] == [("kl", 9), ("perplexity", 17)]
    assert "6 after 22% of the run" in found[0].message
    assert "10,938" in found[1].message
    evaluation = [{"step": 20, "eval_ce": 9.3}, {"step": 30, "eval_ce": 800.0}]
    assert "on evaluation text is 10,938" in replay(evaluation, max_steps=40).findings[0].message
    assert kinds(train(losses, kd=4.9, ce=9.2, kd_weight=0.1, temperature=2.0)) == []


def test_a_rising_loss():
    losses = falling(40, noise=0.02) + [3.0 + 0.06 * i for i in range(20)]
    (finding,) = replay(train(losses)).findings
    assert finding.kind == "rising"
    assert 45 < finding.step < 56


def test_a_kd_term_that_begins_late_is_no_rising_loss():
    lines = train([4.0] * 30 + [6.0] * 30, kd_weight=[0.0] * 30 + [0.7] * 30, temperature=2.0, kd=2 / 0.7 / 4)
    for line in lines[:30]:
        del line["kd"]  # steps of KD weight 0 do not measure it
    assert kinds(lines) == []


def test_a_ramp_of_the_kd_weight_is_no_rising_loss():
    kd, weights = 0.5, [0.1 + 0.6 * min(1.0, i / 20) for i in range(60)]
    losses = [4.0 + w * 4 * kd for w in weights]
    assert losses[-1] > 1.2 * losses[0]
    more = {"kd": kd, "temperature": 2.0}
    assert kinds(train(losses, kd_weight=weights, **more)) == []
    assert kinds(train(losses, kd_weight=0.1, **more)) == ["rising"], "without the weights it would be one"


def test_an_oscillating_loss():
    losses = falling(30, noise=0) + [3.0 + (-1) ** i * 0.8 for i in range(30)]
    assert kinds(train(losses)) == ["oscillating"]


def test_a_projected_teacher_that_decays():
    # as from a solved start that the KD term drags: its cross entropy rises, the student's falls
    ce = falling(60, 7.0, 4.8, noise=0)
    projected = [4.0 + 0.02 * i for i in range(60)]
    more = {"ce": ce, "ce_projected": projected, "kd": 0.3, "kd_weight": 0.7, "temperature": 2.0}
    assert kinds(train(ce, **more)) == ["decays"]
    assert kinds(train(ce, **{**more, "ce_projected": 4.0})) == []
    evaluations = [
        {"step": 10 * i, "eval_ce": 5.0, "eval_ce_projected": 4.0 + 0.09 * i, "eval_kd": 0.3} for i in range(1, 7)
    ]
    lines = sorted([*train(ce, **{**more, "ce_projected": 4.0}), *evaluations], key=lambda line: line["step"])
    (finding,) = replay(lines).findings
    assert (finding.kind, finding.step) == ("decays", 40), "evaluation decides where there is one"


def test_single_batches_of_little_text_do_not_make_a_projected_teacher_decay():
    for seed in range(20):
        draw, ce = random.Random(seed), falling(300, 7.0, 5.5, noise=0)
        text = [draw.gauss(0, 0.3) for _ in ce]  # easy and hard, to both
        lines = train(
            [a + b for a, b in zip(ce, text, strict=True)],
            ce=[a + b for a, b in zip(ce, text, strict=True)],
            ce_projected=[a + b - 0.5 for a, b in zip(ce, text, strict=True)],
            kd=0.1, kd_weight=0.7, temperature=2.0,
        )  # fmt: skip
        assert kinds(lines) == [], seed


def test_a_small_kl_is_no_crime_where_the_student_has_learned_what_the_projected_teacher_knows():
    more = {"temperature": 2.0, "kd_weight": 0.7, "ce": 4.0, "ce_projected": 3.9, "kd": 0.01}
    line = {"eval_ce": 4.0, "eval_ce_projected": 3.99, "eval_kd": 0.01}
    line |= {"eval_kl_teacher_student": 0.06, "eval_kl_teacher_projected": 0.02}
    assert kinds([*train([4.0] * 10, **more), {"step": 10, **line}]) == []


def test_a_recipe_without_a_projector_is_never_told_of_one():
    assert kinds(train([4.0] * 60, ce=3.9, kd=1e-4, kd_weight=0.7, temperature=2.0)) == []


def test_a_new_temperature_starts_the_comparison_anew():
    losses = [4.0] * 20 + [6.0] * 20
    temperatures = [2.0] * 20 + [1.5] * 20
    assert kinds(train(losses, kd=0.5, kd_weight=0.7, temperature=temperatures)) == []


# Saying it


def test_said_once_and_again_when_it_comes_back(caplog):
    lines = train([4.0] * 60, kd=[1.0] * 20 + [6.0] * 10 + [1.0] * 10 + [6.0] * 20)
    with caplog.at_level(logging.WARNING, logger="kdfast"):
        found = replay(lines).findings
    assert [(f.kind, f.step) for f in found] == [("kl", 21), ("kl", 41)]
    assert [record.getMessage() for record in caplog.records] == [f"step {f.step}: {f.message}" for f in found]


def test_said_above_a_progress_bar(capsys):
    logger, handler = logging.getLogger("kdfast"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        with tqdm(total=3, desc="run", file=sys.stderr):
            replay(train([12.0]), max_steps=3)
    finally:
        logger.removeHandler(handler)
    before, after = capsys.readouterr().err.split("step 1: the loss starts at 12, above 10.")
    assert before.endswith(" \r"), "the bar is wiped away first"
    assert "\nrun:   0%" in after.replace("\r", ""), "and drawn again below"


def test_findings_and_what_led_to_them_outlive_a_resume(caplog):
    lines = train(falling(40, noise=0.02) + [3.0 + 0.06 * i for i in range(20)], kd=6.0, kd_weight=0.0, temperature=2.0)
    whole = replay(lines)
    health, state = replay(lines[:30], max_steps=60), TrainerState(max_steps=60, global_step=30)
    health.report_non_finite(30, "the loss is nan", aloud=False)
    state.log_history = lines[:30]
    state.stateful_callbacks = json.loads(json.dumps({"HealthCallback": health.state()}))
    resumed = HealthCallback()
    caplog.clear()
    resumed.on_train_begin(None, state, None)
    assert resumed.findings == health.findings
    for line in lines[30:]:
        state.global_step = line["step"]
        resumed.on_log(None, state, None, logs=line)
    said = [f for f in resumed.findings if f.kind != "non_finite"]
    assert said == whole.findings
    assert len(caplog.records) == len(whole.findings) - 1, "kl was said before"


def test_a_checkpoint_keeps_them(tiny, rows, config):
    def make():
        thresholds = {"initial_loss": 1.0}
        args = config(save_strategy="steps", save_steps=2, health_thresholds=thresholds)
        return KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(8))

    first = make()
    first.train()
    (finding,) = first.health.findings
    assert finding.kind == "initial_loss"
    json.dumps(first.state.log_history)
    for restore in (False, True):
        again = make()
        again.args.restore_callback_states_from_checkpoint = restore
        again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
        assert again.health.findings == [finding]
    again.train()
    assert [f.kind for f in again.health.findings] == ["initial_loss"]
    assert again.health.findings != [finding], "a new run starts anew"


# Options


def test_thresholds():
    assert HealthCallback({"kl": 3}).thresholds == HealthThresholds(kl=3)
    for given, message in [
        ({"kll": 3}, "'kll' is no threshold; expected some of initial_loss, kl, "),
        ({"kl": -1}, "kl=-1; expected a number > 0"),
        ({"window": 2.5}, "window=2.5; expected an int ≥ 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            HealthThresholds.of(given)


def test_the_configuration(tiny, config):
    def callbacks(given=None, **options):
        trainer = KDTrainer(tiny(), config(recipe="lm_only", **options), callbacks=given)
        return [c for c in trainer.callback_handler.callbacks if isinstance(c, HealthCallback)], trainer.health

    assert callbacks(health=False) == ([], None)
    (health,), same = callbacks(health_thresholds='{"kl": 3, "window": 7}')
    assert health.thresholds == HealthThresholds(kl=3, window=7)
    assert same is health
    own = HealthCallback()
    assert callbacks([own]) == ([own], own)
    words = ["--output_dir", "o", "--use_cpu", "true", "--health_thresholds", '{"kl": 3}', "--health", "false"]
    (args,) = HfArgumentParser(KDConfig).parse_args_into_dataclasses(words)
    assert (args.health_thresholds, args.health) == ({"kl": 3}, False)
    for bad in ("{kl: 3}", [3], {"kll": 3}):
        with pytest.raises(ValueError, match="health_thresholds="):
            config(health_thresholds=bad)
    for bad in ({"non_finite": "pass"}, {"max_skipped_steps": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            config(**bad)


# Steps that are not finite


class Poison(TrainerCallback):
    """Makes something not finite in some micro-batches, and keeps weights and optimizer around every step."""

    def __init__(self, trainer, steps, what="loss", micro=0):
        self.trainer, self.steps, self.what, self.micro = trainer, steps, what, micro
        self.weights, self.moments = [], []
        compute = trainer.compute_loss
        self.calls = 0

        def compute_loss(model, inputs, *args, **kwargs):
            forward = model.forward

            def poisoned(*a, **k):
                output = forward(*a, **k)
                return output._replace(
                    loss=output.loss * NAN, metrics=output.metrics._replace(kd=output.metrics.kd * NAN)
                )

            model.forward = poisoned if what == "loss" and self._now() else forward
            try:
                return compute(model, inputs, *args, **kwargs)
            finally:
                model.forward = forward
                self.calls += 1

        trainer.compute_loss = compute_loss
        if what == "gradient":
            trainer.model.logit_projector.weight.register_hook(lambda g: g * NAN if self._now() else g)
        trainer.add_callback(self)

    def _now(self):
        micro = self.calls % self.trainer.args.gradient_accumulation_steps
        return self.trainer.state.global_step + 1 in self.steps and micro in (self.micro, self.micro + 1)

    def on_step_begin(self, args, state, control, **kwargs):
        self.calls = 0
        self._keep()

    def on_train_end(self, args, state, control, **kwargs):
        self._keep()

    def _keep(self):
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        moments = self.trainer.optimizer.state
        self.weights.append([p.detach().clone() for p in trained])
        self.moments.append([{k: v.clone() for k, v in moments[p].items()} for p in trained if p in moments])

    def changed(self):
        """Steps that changed a weight, steps that changed the optimizer's state."""
        weights = [i for i, (a, b) in enumerate(pairwise(self.weights), 1) if not all(map(torch.equal, a, b))]
        steps = [max((float(m["step"]) for m in moments), default=0.0) for moments in self.moments]
        sums = [sum(float(m["exp_avg"].abs().sum()) for m in moments) for moments in self.moments]
        both = list(zip(steps, sums, strict=True))
        return weights, [i for i, (a, b) in enumerate(pairwise(both), 1) if a != b]


def skipping(tiny, config, rows, **given):
    args = config(**{"recipe": "projector", "max_steps": 6, "logging_steps": 2, "non_finite": "skip", **given})
    return KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(32))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_step_that_is_not_finite_is_left_out(tiny, rows, config, what, clip, caplog):
    trainer = skipping(tiny, config, rows, max_grad_norm=clip)
    poison = Poison(trainer, {2, 5}, what)
    with caplog.at_level(logging.WARNING, logger="kdfast"):
        trainer.train()
    assert poison.changed() == ([1, 3, 4, 6], [1, 3, 4, 6])
    lines = [line for line in trainer.state.log_history if "skipped_steps" in line]
    assert [line["skipped_steps"] for line in lines] == [1, 0, 1]
    found = [f for f in trainer.health.findings if f.kind == "non_finite"]
    assert [f.step for f in found] == [2], "once for both"
    named = (
        r"loss is nan (loss nan, ce "
        if what == "loss"
        else "gradient norm is nan, first that of logit_projector.weight"
    )
    assert named in found[0].message
    assert "the step was left out" in caplog.text
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    assert "grad_norm" not in lines[0], "it would be that of the step that was left out"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_left_out_is_not_in_the_log_either(tiny, rows, config, accumulate):
    def lines(steps):
        plan = {"learning_rate": 0.0, "weight_decay": 0.0, "gradient_accumulation_steps": accumulate}
        trainer = skipping(tiny, config, rows, **plan, logging_steps=1 if not steps else 3)
        Poison(trainer, steps, micro=accumulate - 1)
        trainer.train()
        return [line for line in trainer.state.log_history if "skipped_steps" in line]

    single, (first, second) = lines(set()), lines({2})
    tokens = [b["tokens_seen"] - a["tokens_seen"] for a, b in zip([{"tokens_seen": 0}, *single], single, strict=False)]
    assert first["loss"] == pytest.approx((single[0]["loss"] + single[2]["loss"]) / 2, rel=1e-5)
    assert second["loss"] == pytest.approx(sum(line["loss"] for line in single[3:]) / 3, rel=1e-5)
    for key in ("kd", "ce", "ce_projected"):
        mean = (single[0][key] * tokens[0] + single[2][key] * tokens[2]) / (tokens[0] + tokens[2])
        assert first[key] == pytest.approx(mean, rel=1e-5), key
    assert first["tokens_seen"] == tokens[0] + tokens[2]


def test_a_line_of_nothing_but_steps_left_out(tiny, rows, config):
    trainer = skipping(tiny, config, rows)
    Poison(trainer, {3, 4})
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if line.get("skipped_steps") == 2]
    assert not {"loss", "ce", "kd", "grad_norm"} & line.keys()
    assert [f.step for f in trainer.health.findings if f.kind == "non_finite"] == [3], "once for both"


def test_too_many_in_a_row_stop_the_run(tiny, rows, config):
    trainer = skipping(tiny, config, rows, max_skipped_steps=2, save_strategy="steps", save_steps=1)
    Poison(trainer, {2, 4, 5})
    with pytest.raises(
        NonFiniteLossError, match=r"step 5: the loss is nan .*step 2 in a row .* left out.*checkpoint-4"
    ):
        trainer.train()


def test_stopping_is_a_finding_too(tiny, rows, config, caplog):
    trainer = skipping(tiny, config, rows, non_finite="stop")
    poison = Poison(trainer, {3})
    with pytest.raises(NonFiniteLossError, match="step 3: the loss is nan"):
        trainer.train()
    assert poison.changed()[0] == [1, 2]
    (finding,) = [f for f in trainer.health.findings if f.kind == "non_finite"]
    assert finding.step == 3
    assert asdict(finding)["message"].endswith("the run was stopped")
    assert not caplog.records, "the error says it"


def test_a_loss_that_is_logged_as_nan_is_named():
    assert kinds(train([4.0, NAN, 4.0, math.inf])) == ["non_finite"]


# Generated text


WELL = {"eos_share": 0.9, "completion_length": 30.0, "repetition": 0.05, "entropy_on_policy": 0.1}


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        ({}, None),
        ({"repetition": 0.8, "entropy_on_policy": 1.5}, None),  # it varies: a list, or code
        ({"repetition": 0.8}, "80% of its 4-grams repeat, at an entropy of 0.1 nats"),
        ({"eos_share": 0.0, "completion_length": 128.0}, "came to an end within 128 tokens"),
    ],
)
def test_generated_text_that_repeats_itself_or_never_ends_is_seen(seen, says):
    health = replay(train(falling(), **WELL | seen), vocabulary=10_000)
    found = [finding.message for finding in health.findings if finding.kind == "collapses"]
    assert (len(found) == 1 and says in found[0]) if says else not found
    assert not any(finding.kind == "collapses" and finding.step < 5 for finding in health.findings)
