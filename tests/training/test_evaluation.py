import math

import pytest
import torch
import torch.nn.functional as F
from transformers import EarlyStoppingCallback, TrainerCallback

from kdfast.training import KDTrainer
from kdfast.training.hf import shift_labels
from kdfast.training.metrics import evaluated


def log_probabilities(logits, rows, temperature=1.0):
    """(tokens, V) over all rows at once: what the whole set has to give, whatever the batches were."""
    targets = shift_labels(torch.stack([row["labels"] for row in rows]))
    kept = targets != -100
    return (logits[kept].double() / temperature).log_softmax(-1), targets[kept]


def kl(log_p, log_q):
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


@pytest.mark.parametrize("recipe", ["projector", "teacher_head", "lm_only"])
def test_means_over_the_whole_set_with_a_ragged_last_batch(tiny, rows, config, recipe):
    data = rows(5)  # batches of 2, 2 and 1, each with another number of targets
    args = config(recipe=recipe, temperature=1.5)
    trainer = KDTrainer(tiny("gpt2", dropout=0.3), args, teacher=tiny(width=24, seed=1), eval_dataset=data)
    metrics = trainer.evaluate()

    model, ids = trainer.model.eval(), torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        logits_s, logits_t = model.student(ids).logits, model.teacher(ids).logits
        log_q, targets = log_probabilities(logits_s, data)
        log_t, _ = log_probabilities(logits_t, data)
        ce = F.nll_loss(log_q, targets).item()
        assert metrics["eval_ce"] == pytest.approx(ce, rel=1e-5)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(ce), rel=1e-4)
        assert metrics["eval_tokens"] == len(targets)
        assert metrics["eval_kl_teacher_student"] == pytest.approx(kl(log_t, log_q), rel=1e-4)
        if recipe == "lm_only":
            assert metrics["eval_loss"] == pytest.approx(ce, rel=1e-5)
            assert not {"eval_kd", "eval_kl_teacher_projected", "eval_ce_projected"} & metrics.keys()
            return
        if recipe == "projector":
            hidden_t = model.teacher.model(ids).last_hidden_state
            logits_t = model.student.lm_head(model.logit_projector(hidden_t))
            log_p, _ = log_probabilities(logits_t, data)
            assert metrics["eval_kl_teacher_projected"] == pytest.approx(kl(log_t, log_p), rel=1e-4)
            assert metrics["eval_ce_projected"] == pytest.approx(F.nll_loss(log_p, targets).item(), rel=1e-5)
        else:
            assert "eval_kl_teacher_projected" not in metrics
        kd = kl(log_probabilities(logits_t, data, 1.5)[0], log_probabilities(logits_s, data, 1.5)[0])
        assert metrics["eval_kd"] == pytest.approx(kd, rel=1e-4), "at the training temperature, without its square"
        assert metrics["eval_loss"] == pytest.approx(ce + 0.7 * 1.5**2 * kd, rel=1e-4)


def test_loss_is_under_the_weights_now_in_force(tiny, rows, config):
    args = config(recipe="projector_fixed", max_steps=10, eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    trainer = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(4), eval_dataset=rows(4))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    weights = [(line["eval_loss"] - line["eval_ce"]) / (4 * line["eval_kd"]) for line in lines[:3]]
    assert weights == pytest.approx([0.4, 0.7, 0.7], rel=1e-2)  # progress 0.1, 0.2, 0.3 of the ramp


def test_a_teacher_with_another_vocabulary_has_no_kl_of_its_own(tiny, rows, config):
    trainer = KDTrainer(tiny(), config(), teacher=tiny(V=80, width=24, seed=1), eval_dataset=rows(3))
    metrics = trainer.evaluate()
    assert not {"eval_kl_teacher_student", "eval_kl_teacher_projected"} & metrics.keys()
    assert metrics["eval_kd"] > 0


def test_rows_without_targets_count_for_nothing(tiny, rows, config):
    data = rows(3)
    trainer = KDTrainer(tiny(), config(), teacher=tiny(width=24, seed=1))
    without = trainer.evaluate(data)
    masked = {"input_ids": data[0]["input_ids"], "labels": torch.full((12,), -100)}
    # the masked rows come as a batch of their own, which has no mean at all
    with_masked = trainer.evaluate([masked, masked, *data])
    for key in ("eval_loss", "eval_ce", "eval_kd", "eval_kl_teacher_student", "eval_tokens"):
        assert with_masked[key] == pytest.approx(without[key], rel=1e-5), key


def test_nothing_to_evaluate_is_absent_not_nan(tiny, rows, config):
    masked = {"input_ids": rows(1)[0]["input_ids"], "labels": torch.full((12,), -100)}
    metrics = KDTrainer(tiny(), config(recipe="lm_only"), eval_dataset=[masked]).evaluate()
    assert metrics["eval_tokens"] == 0
    assert not {"eval_loss", "eval_ce", "eval_perplexity"} & metrics.keys()


def test_callbacks_and_logs_get_the_metrics_and_training_goes_on(tiny, rows, config):
    class Seen(TrainerCallback):
        metrics, steps = [], 0

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            self.metrics.append(metrics)

        def on_prediction_step(self, *args, **kwargs):
            Seen.steps += 1

    args = config(max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer = KDTrainer(
        tiny("gpt2", dropout=0.2), args, teacher=tiny(width=24, seed=1), train_dataset=rows(8), eval_dataset=rows(3),
        callbacks=[Seen()],
    )  # fmt: skip
    trainer.train()
    logged = [line for line in trainer.state.log_history if "eval_ce" in line]
    assert [line["step"] for line in logged] == [2, 4]
    assert [metrics["eval_ce"] for metrics in Seen.metrics] == [line["eval_ce"] for line in logged]
    assert Seen.steps == 4
    assert logged[0]["eval_ce"] != logged[1]["eval_ce"]


def test_several_sets_and_a_prefix(tiny, rows, config):
    trainer = KDTrainer(tiny(), config(recipe="lm_only"), eval_dataset={"a": rows(2), "b": rows(3, seed=6)})
    metrics = trainer.evaluate()
    assert metrics["eval_a_ce"] != metrics["eval_b_ce"]
    assert trainer.evaluate(rows(2), metric_key_prefix="test")["test_ce"] == metrics["eval_a_ce"]


def test_the_loop_may_be_called_as_trainers(tiny, rows, config):
    trainer = KDTrainer(tiny("gpt2"), config(recipe="lm_only"), eval_dataset=rows(2))
    loader = trainer.get_eval_dataloader()
    assert "eval_ce" in trainer.evaluation_loop(loader, "Evaluation").metrics
    assert "mine_ce" in trainer.evaluation_loop(loader, "Evaluation", True, None, "mine").metrics


@pytest.mark.parametrize(
    "recipe", ["lm_only", "projector", "teacher_head", "compressed_head", "projector_refit", "probe"]
)
@pytest.mark.parametrize("V", [67, 80])
def test_the_names_of_what_an_evaluation_logs_are_known_before(tiny, rows, config, recipe, V):
    if V != 67 and recipe in ("teacher_head", "compressed_head", "projector_refit"):
        pytest.skip("needs one vocabulary")
    trainer = KDTrainer(
        tiny(), config(recipe=recipe), teacher=tiny(V=V, width=24, seed=1), train_dataset=rows(4), eval_dataset=rows(3)
    )
    logged = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert logged - {"epoch", "model_preparation_time"} == set(evaluated(trainer.model, rows(3)))


@pytest.mark.parametrize("prefix", ["eval_", ""])
@pytest.mark.parametrize(
    ("metric", "best"), [("ce_data_ce", 4), ("agreement_kl_teacher_student", None), ("ce_data_agreement", None)]
)
def test_the_best_checkpoint_is_the_best(tiny, rows, config, prefix, metric, best):
    # data sets named like metrics; the direction is that of the metric, and resuming keeps it
    given = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    args = config(
        **given, recipe="teacher_head", load_best_model_at_end=True, metric_for_best_model=prefix + metric,
        lr_scheduler_type="constant",
    )  # fmt: skip
    data = rows(8)
    models = tiny(), tiny(width=24, seed=1)
    trainer = KDTrainer(
        models[0], args, teacher=models[1], train_dataset=data, eval_dataset={"ce_data": data, "agreement": data},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=9)],
    )  # fmt: skip
    trainer.train()
    found = [line[f"eval_{metric}"] for line in trainer.state.log_history if f"eval_{metric}" in line]
    pick = max if metric.endswith("agreement") else min
    assert found[trainer.state.best_global_step - 1] == trainer.state.best_metric == pick(found)
    assert best in (None, trainer.state.best_global_step)
    args = config(**(given | {"max_steps": 6}), recipe="teacher_head", load_best_model_at_end=True,
                  metric_for_best_model=prefix + metric, lr_scheduler_type="constant")  # fmt: skip
    again = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=data,
                      eval_dataset={"ce_data": data, "agreement": data})  # fmt: skip
    again.train(resume_from_checkpoint=True)
    found = [line[f"eval_{metric}"] for line in again.state.log_history if f"eval_{metric}" in line]
    assert len(found) == 6
    assert again.state.best_metric == pick(found)


@pytest.mark.parametrize(
    ("recipe", "metric", "listed"),
    [
        ("teacher_head", "eval_ce", "eval_web_ce, "),  # of several sets each has its own
        ("teacher_head", "eval_wbe_ce", "eval_code_agreement"),
        ("teacher_head", "eval_web_kl_teacher_projected", "eval_web_kl_teacher_student"),
        ("lm_only", "eval_web_kd", "eval_web_perplexity"),
    ],
)
def test_a_metric_that_is_never_logged_is_refused_at_the_start(tiny, rows, config, recipe, metric, listed):
    args = config(recipe=recipe, metric_for_best_model=metric, eval_strategy="steps", eval_steps=1)
    given = {"train_dataset": rows(4), "eval_dataset": {"web": rows(2), "code": rows(2)}}
    with pytest.raises(ValueError, match=f"metric_for_best_model='{metric}', which no evaluation here logs.*{listed}"):
        KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), **given)

    class WithMore(KDTrainer):  # a subclass may log what it likes
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs)

    WithMore(tiny(), args, teacher=tiny(width=24, seed=1), **given)


def test_a_callback_may_add_the_metric(tiny, rows, config):
    class Adds(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_accuracy"] = 1.0 + (state.global_step == 1)

    every = dict.fromkeys(("eval_steps", "save_steps"), 1) | dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
    args = config(**every, recipe="lm_only", max_steps=2, metric_for_best_model="accuracy", greater_is_better=True)
    given = {"train_dataset": rows(4), "eval_dataset": rows(2)}
    trainer = KDTrainer(tiny(), args, callbacks=[Adds()], **given)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (2.0, 1)
    for callbacks in ([], [EarlyStoppingCallback()]):
        with pytest.raises(ValueError, match=r"'accuracy', which no evaluation here logs.*callbacks= adds"):
            KDTrainer(tiny(), args, callbacks=callbacks, **given)


# compute_metrics


def test_compute_metrics_is_given_the_log_probability_of_each_label(tiny, rows, config):
    student, data, seen = tiny(), rows(5), []
    for row in data:
        row["attention_mask"] = torch.ones(12, dtype=torch.long)
    data[3]["attention_mask"][9:] = 0

    def per_row(given):
        seen.append(given)
        counts = given.label_ids != -100
        return {"worst": -(given.log_probs * counts).sum(1).min(), "tokens_of_first": int(counts[0].sum())}

    args = config(recipe="teacher_head", include_for_metrics=["inputs"], metric_for_best_model="eval_worst")
    trainer = KDTrainer(
        student, args, teacher=tiny(seed=1), eval_dataset=data, train_dataset=rows(2), compute_metrics=per_row
    )
    metrics = trainer.evaluate()
    (given,) = seen
    ids = torch.stack([row["input_ids"] for row in data])
    labels = torch.stack([row["labels"] for row in data])[:, 1:].clone()
    labels[3, 8:] = -100
    log_p = student(ids).logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(0)[..., None]).squeeze(-1)
    counts = labels != -100
    assert (given.label_ids[:, :-1] == labels.numpy()).all()
    assert (given.label_ids[:, -1] == -100).all()
    assert given.inputs.tolist() == ids.tolist()
    torch.testing.assert_close(torch.tensor(given.log_probs[:, :-1])[counts], log_p[counts])
    assert metrics["eval_worst"] == pytest.approx(-(log_p * counts).sum(1).min().item(), rel=1e-5)
    assert metrics["eval_tokens_of_first"] == int(counts[0].sum())
    assert metrics["eval_ce"] == pytest.approx(-log_p[counts].mean().item(), rel=1e-5)


def test_compute_metrics_may_be_given_a_batch_at_a_time(tiny, rows, config):
    sums = []

    def mean(given, compute_result):
        counts = given.label_ids != -100
        sums.append((given.log_probs[counts].sum(), counts.sum()))
        total, number = map(sum, zip(*sums, strict=True))
        return {"mean": -(total / number).item()} if compute_result else {}

    args = config(recipe="lm_only", batch_eval_metrics=True)
    metrics = KDTrainer(tiny(), args, eval_dataset=rows(5), compute_metrics=mean).evaluate()
    assert len(sums) == 3
    assert metrics["eval_mean"] == pytest.approx(metrics["eval_ce"], rel=1e-5)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda given: {"accuracy": given.predictions.argmax(-1).mean()},
            TypeError,
            "predictions would be logits, which",
        ),
        (lambda given: dict(zip("ab", *given, strict=True)), TypeError, "expected it to use log_probs"),
        (lambda given: {"ce": 0.0}, ValueError, "compute_metrics returned 'eval_ce', which an evaluation has"),
    ],
)
def test_a_compute_metrics_of_logits_is_answered(tiny, rows, config, function, error, message):
    trainer = KDTrainer(tiny(), config(recipe="lm_only"), eval_dataset=rows(3), compute_metrics=function)
    with pytest.raises(error, match=message):
        trainer.evaluate()
