import inspect
import math
import traceback
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from tiny_models import RECOMPUTE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments, default_data_collator

from kdfast.loss import fused_kd_loss
from kdfast.schedules import Linear, Piecewise
from kdfast.training import DistillationModel, KDTrainer
from kdfast.training.data.columns import ARGUMENTS
from kdfast.training.prepare import ELSEWHERE
from kdfast.training.teachers import side


def train_logs(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def gradient_of_one_step(trainer):
    """The gradient the optimizer sees in the first step, clipping off."""
    seen = {}

    def keep(optimizer, args, kwargs):
        seen.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()
    return seen


@pytest.mark.parametrize("recipe", ["projector_fixed", "teacher_head", "lm_only"])
def test_micro_batches_add_up_to_the_whole_batch(tiny, rows, config, recipe):
    # uneven −100 masks and padding: a mean of means, or a divisor that counts unshifted labels or padding, differs
    data = rows(4)
    for i, row in enumerate(data):
        row["attention_mask"] = torch.ones(12, dtype=torch.long)
        row["attention_mask"][12 - i :] = 0

    def run(micro, accumulate):
        args = config(
            recipe=recipe, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        trainer = KDTrainer(tiny("gpt2"), args, teacher=tiny(width=24, seed=1), train_dataset=data)
        return gradient_of_one_step(trainer), train_logs(trainer)[0]

    whole, log_whole = run(4, 1)
    parts, log_parts = run(1, 4)
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for key in ("loss", "ce", "grad_norm"):
        assert log_parts[key] == pytest.approx(log_whole[key], rel=1e-4), key


def test_the_divisor_counts_targets(tiny, rows, config):
    data = rows(2)
    data[0]["attention_mask"] = data[1]["attention_mask"] = torch.tensor([0] * 3 + [1] * 9)
    trainer = KDTrainer(tiny(), config(recipe="lm_only"), train_dataset=data)
    batches = [{name: row[name][None] for name in row} for row in data]
    # row 0: 9 real tokens, the first has nothing before it → 8; row 1: labels from 3 on, the same 9 → 8
    assert trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))[1] == 16


def test_the_total_is_lm_plus_weight_times_tau_squared_kl(tiny, rows, config):
    args = config(recipe="projector", temperature=3.0, kd_weight=0.4, ce_weight=0.5)
    trainer = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(8))
    trainer.train()
    for line in train_logs(trainer):
        assert line["loss"] == pytest.approx(0.5 * line["ce"] + 0.4 * 9 * line["kd"], rel=1e-4)


def test_schedules_follow_the_run_and_are_logged(tiny, rows, config):
    args = config(recipe="projector_fixed", max_steps=20, temperature_steps=[3.0, 2.0])
    trainer = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(8))
    trainer.train()
    logs = train_logs(trainer)
    assert [line["kd_weight"] for line in logs[:6]] == pytest.approx([0.1, 0.25, 0.4, 0.55, 0.7, 0.7])
    assert [line["temperature"] for line in logs] == [3.0] * 10 + [2.0] * 10
    for line in logs:  # what is logged is what was in the loss
        expected = line["ce"] + line["kd_weight"] * line["temperature"] ** 2 * line["kd"]
        assert line["loss"] == pytest.approx(expected, rel=1e-4)


def test_kd_until_a_part_of_the_run(tiny, rows, config):
    def run(**given):
        args = config(recipe="teacher_head", kd_ramp=0.5, **given)
        return KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(8), eval_dataset=rows(2))

    trainer = run(kd_until=0.5)
    assert 2 * trainer.price.teacher == run().price.teacher
    trainer.train()
    logs = train_logs(trainer)
    assert [line["kd_weight"] for line in logs] == pytest.approx([0.1, 0.4, 0.0, 0.0])
    assert ["kd" in line for line in logs] == [True, True, False, False]
    evaluation = trainer.evaluate()
    assert evaluation["eval_loss"] == pytest.approx(evaluation["eval_ce"])
    assert evaluation["eval_kd"] > 0


def test_a_schedule_of_ones_own_has_its_own_end(tiny, rows, config):
    def price(schedule):
        args = config(recipe="svd_init")  # KD in the first half
        teacher = tiny(width=24, seed=1)
        return KDTrainer(tiny(), args, teacher=teacher, train_dataset=rows(8), kd_weight_schedule=schedule).price

    assert price(Linear(1.0, 0.1)).teacher == 2 * price(None).teacher


def test_steps_of_kd_weight_zero_do_not_run_the_teacher(tiny, rows, config):
    teacher, runs = tiny(width=24, seed=1), []
    args = config(recipe="teacher_head", max_steps=6, gradient_accumulation_steps=2, eval_strategy="epoch")
    early = Piecewise([0.7, 0.0])
    trainer = KDTrainer(
        tiny(), args, teacher=teacher, train_dataset=rows(24), eval_dataset=rows(2), kd_weight_schedule=early
    )
    teacher.base_model.register_forward_hook(lambda module, *_: runs.append(trainer.state.global_step))
    trainer.train()
    assert runs == [0, 0, 1, 1, 2, 2, 6], "the last is the evaluation"
    logs = train_logs(trainer)
    assert [("kd" in line, "agreement" in line) for line in logs] == [(True, True)] * 3 + [(False, False)] * 3
    assert all(line["loss"] == pytest.approx(line["ce"], rel=1e-6) for line in logs[3:])
    (evaluation,) = (line for line in trainer.state.log_history if "eval_ce" in line)
    assert evaluation["eval_kd"] > 0
    assert evaluation["eval_kl_teacher_student"] > 0


def test_a_schedule_of_ones_own(tiny, rows, config):
    trainer = KDTrainer(
        tiny(),
        config(max_steps=2),
        teacher=tiny(width=24, seed=1),
        train_dataset=rows(8),
        kd_weight_schedule=Linear(1.0, 0.0),
        temperature_schedule=lambda progress: 1.0 + progress,
    )
    trainer.train()
    assert [(line["kd_weight"], line["temperature"]) for line in train_logs(trainer)] == [(1.0, 1.0), (0.5, 1.5)]


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        ("projector_fixed", {}, {"lr_student": 1e-3, "lr_projector": 5e-3}),
        ("projector_fixed", {"projector_lr": 2e-2}, {"lr_student": 1e-3, "lr_projector": 2e-2}),
        ("projector", {}, {"lr_student": 1e-3, "lr_projector": 1e-3}),
        ("lm_only", {}, {"lr_student": 1e-3}),
    ],
)
def test_learning_rates_by_part(tiny, rows, config, recipe, given, expected):
    args = config(recipe=recipe, max_steps=2, lr_scheduler_type="constant", **given)
    trainer = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(8))
    trainer.train()
    line = train_logs(trainer)[-1]
    assert {name: value for name, value in line.items() if name.startswith("lr_")} == pytest.approx(expected)


def test_learning_rates_decay_together(tiny, rows, config):
    trainer = KDTrainer(tiny(), config(max_steps=4), teacher=tiny(width=24, seed=1), train_dataset=rows(8))
    trainer.train()
    for line in train_logs(trainer):
        assert line["lr_student"] == line["learning_rate"]
        assert line["lr_projector"] == pytest.approx(5 * line["learning_rate"])
    assert train_logs(trainer)[-1]["learning_rate"] == pytest.approx(2.5e-4)


def test_weight_decay_spares_norms_and_biases(tiny, config):
    trainer = KDTrainer(tiny("gpt2"), config(weight_decay=0.1), teacher=tiny(width=24, seed=1))
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    spared = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert "student.transformer.wte.weight" in decayed
    assert "logit_projector.weight" in decayed
    assert spared == {name for name in names.values() if ".ln_" in name or "bias" in name} - {
        name for name in names.values() if name.startswith("teacher.")
    }


def test_logs_average_over_tokens_between_two_lines(tiny, rows, config):
    data = rows(8)

    def logs(every):
        args = config(recipe="projector", learning_rate=0.0, logging_steps=every, weight_decay=0.0)
        trainer = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=data)
        trainer.train()
        return train_logs(trainer)

    single, (both, _) = logs(1), logs(2)
    seen = [single[0]["tokens_seen"], single[1]["tokens_seen"] - single[0]["tokens_seen"]]
    assert seen[0] != seen[1], "else a plain mean would pass"
    for key in ("kd", "ce", "ce_projected", "agreement", "student_entropy", "teacher_entropy"):
        weighted = (single[0][key] * seen[0] + single[1][key] * seen[1]) / sum(seen)
        assert both[key] == pytest.approx(weighted, rel=1e-5, abs=1e-7), key
    assert both["tokens_seen"] == sum(seen)
    assert all(line["tokens_per_second"] > 0 for line in single)


@pytest.mark.parametrize("recipe", ["teacher_head", "lm_only", "projector"])
@pytest.mark.parametrize("ce_weight", [1.0, 0.0])
def test_what_is_no_part_of_the_loss_is_computed_in_steps_that_are_logged(
    tiny, rows, config, monkeypatch, recipe, ce_weight
):
    def run(**given):
        asked = []

        def note(*args, return_metrics=False, **options):
            asked.append(return_metrics)
            return fused_kd_loss(*args, return_metrics=return_metrics, **options)

        args = config(recipe=recipe, ce_weight=ce_weight, learning_rate=0.0, weight_decay=0.0, max_steps=7, **given)
        trainer = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(28))
        monkeypatch.setattr(side, "fused_kd_loss", note)
        trainer.train()
        return asked, train_logs(trainer)

    asked, (third, sixth) = run(logging_steps=3, gradient_accumulation_steps=2)
    _, single = run(gradient_accumulation_steps=2)
    if recipe == "projector":  # whose health is judged by them
        assert asked == [True] * 14
        return
    assert asked == ["terms"] * 4 + [True] * 2 + ["terms"] * 4 + [True] * 4, "the last step may be logged too"
    seen = [0, *(line["tokens_seen"] for line in single)]
    tokens = [b - a for a, b in pairwise(seen)]
    of_terms = [name for name, there in (("kd", recipe != "lm_only"), ("ce", ce_weight)) if there]
    of_a_step = {"student_entropy", "teacher_entropy", "agreement", "ce"} & single[0].keys() - {*of_terms}
    assert of_a_step
    for line, its in ((third, slice(0, 3)), (sixth, slice(3, 6))):
        for name in of_terms:
            total = sum(x[name] * n for x, n in zip(single[its], tokens[its], strict=True))
            assert line[name] == pytest.approx(total / sum(tokens[its]), rel=1e-5), name
        for name in of_a_step:
            assert line[name] == pytest.approx(single[its][-1][name], rel=1e-5), name


def test_all_metrics_are_there_whenever_a_line_may_come(tiny, rows, config):
    args = config(recipe="teacher_head", logging_strategy="epoch", max_steps=4)
    trainer = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(4))
    trainer.train()
    assert all("agreement" in line for line in train_logs(trainer))
    assert len(train_logs(trainer)) == 2
    args = config(recipe="teacher_head", logging_steps=0.5, logging_first_step=True, max_steps=4)
    trainer = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(4))
    trainer.train()
    assert [line["step"] for line in train_logs(trainer) if "agreement" in line] == [1, 2, 4]


# on a CPU: what the process holds, which torch alone takes past 10 MB
def test_lines_of_training_note_the_memory_and_no_others_do(tiny, rows, config):
    args = config(recipe="lm_only", max_steps=2, logging_steps=1)
    trainer = KDTrainer(tiny(), args, train_dataset=rows(4), eval_dataset=rows(2))
    trainer.train()
    trainer.evaluate()
    assert all(1e7 < line["memory_bytes"] < 1e12 for line in train_logs(trainer))
    assert not any("memory_bytes" in line for line in trainer.state.log_history if "loss" not in line)


def test_what_a_recipe_does_not_have_is_not_logged(tiny, rows, config):
    trainer = KDTrainer(tiny(), config(recipe="lm_only", max_steps=1), train_dataset=rows(4))
    trainer.train()
    (line,) = train_logs(trainer)
    assert not {"kd", "kd_weight", "temperature", "ce_projected", "teacher_entropy", "agreement"} & line.keys()
    assert line["loss"] == pytest.approx(line["ce"], rel=1e-5)
    assert all(math.isfinite(value) for value in line.values())


@pytest.mark.parametrize("recipe", ["lm_only", "projector", "projector_fixed", "teacher_head"])
def test_no_logits_in_training_or_evaluation(tiny, rows, config, no_logits, recipe):
    student, teacher = tiny("gemma2"), tiny(width=24, seed=1)
    args = config(recipe=recipe, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = KDTrainer(student, args, teacher=teacher, train_dataset=rows(4), eval_dataset=rows(3))
    no_logits(student, teacher)
    trainer.train()
    trainer.evaluate()
    with pytest.raises(AssertionError, match="logits were made"):
        student(input_ids=torch.ones(1, 2, dtype=torch.long))


class Synchronisations(TorchDispatchMode):
    """Counts the reads of a tensor's value, each of which would make the host wait for a GPU.

    Not those of transformers' models, which look for packed sequences, nor those of the loss, which looks at values
    where that is free: on a CPU.
    """

    ELSEWHERE = ("transformers/models/", "kdfast/frontend/checks.py", "kdfast/engines/operators.py")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            files = {frame.filename for frame in traceback.extract_stack()}
            self.count += not any(part in file for file in files for part in self.ELSEWHERE)
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_value(tiny, rows, config, monkeypatch):
    args = config(recipe="projector_fixed", max_steps=3, logging_steps=100)
    trainer = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(8))
    seen, steps = Synchronisations(), []
    training_step = trainer.training_step

    def watched(*arguments):
        trainer._guard._every_step = False  # as on a GPU
        with seen:
            steps.append(training_step(*arguments))
            trainer._get_grad_norm(trainer.model)
        return steps[-1]

    monkeypatch.setattr(trainer, "training_step", watched)
    trainer.train()
    assert len(steps) == 3
    assert seen.count == 0
    with seen:
        assert torch.ones(()).item()
    assert seen.count == 1, "else nothing was counted"


def test_bf16_autocast(tiny, rows, config):
    def losses(**given):
        args = config(recipe="projector_fixed", **given)
        trainer = KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(8), eval_dataset=rows(3))
        trainer.train()
        assert trainer.model.student.dtype == torch.float32
        return [line["loss"] for line in train_logs(trainer)] + [trainer.evaluate()["eval_loss"]]

    narrow, wide = losses(bf16=True), losses()
    assert narrow == pytest.approx(wide, rel=1e-2)
    assert narrow != wide


def test_columns_the_model_does_not_take_are_left_out(tiny, rows, config):
    data = rows(4)
    packed = [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]] * 4  # two sequences of 6 in every row
    columns = {name: [row[name].tolist() for row in data] for name in ("input_ids", "labels")}
    columns |= {"position_ids": packed, "text": ["a"] * 4}

    def loss(columns):
        trainer = KDTrainer(tiny("gpt2"), config(recipe="lm_only"), eval_dataset=Dataset.from_dict(columns))
        return trainer.evaluate()["eval_loss"]

    with_positions = loss(columns)
    del columns["position_ids"]
    assert loss(columns) != with_positions


def test_training_learns(tiny, rows, config):
    args = config(recipe="projector_fixed", max_steps=30, learning_rate=1e-2)
    trainer = KDTrainer(tiny(spread=0.02), args, teacher=tiny(width=24, seed=1), train_dataset=rows(2))
    trainer.train()
    logs = train_logs(trainer)
    assert logs[-1]["ce"] < 0.5 * logs[0]["ce"]


def test_a_step_does_not_touch_the_teacher_or_the_configs_cache_setting(tiny, rows, config):
    student, teacher = tiny(), tiny(width=24, seed=1)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    KDTrainer(student, config(max_steps=2), teacher=teacher, train_dataset=rows(4)).train()
    for name, p in teacher.named_parameters():
        assert torch.equal(p, before[name]), name
    assert student.config.use_cache is True


def test_the_projector_starts_from_the_seed(tiny, config):
    def start(seed):
        torch.manual_seed(99 + seed)
        return KDTrainer(tiny(), config(seed=seed), teacher=tiny(width=24, seed=1)).model.logit_projector.weight

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_activation_checkpointing_gives_the_same_gradients(tiny, rows, config):
    def run(**given):
        trainer = KDTrainer(
            tiny(layers=2), config(max_steps=1, max_grad_norm=0.0, **given), teacher=tiny(width=24, seed=1),
            train_dataset=rows(2),
        )  # fmt: skip
        return gradient_of_one_step(trainer)

    plain, checkpointed = run(), run(**{RECOMPUTE: True})
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], msg=lambda m, n=name: f"{n}: {m}")


def test_errors(tiny, rows, config, tmp_path):
    with pytest.raises(TypeError, match="args is TrainingArguments; expected a KDConfig"):
        KDTrainer(tiny(), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="which has its own"):
        KDTrainer(DistillationModel(tiny(), recipe="lm_only"), config(), teacher=tiny(seed=1))
    trainer = KDTrainer(tiny(), config(recipe="lm_only"), train_dataset=[{"input_ids": torch.tensor([3, 4])}] * 4)
    with pytest.raises(ValueError, match="has no labels"):
        trainer.train()
    with pytest.raises(NotImplementedError, match="never made here"):
        trainer.predict(rows(2))


def test_names_of_arguments_are_those_of_the_forward():
    parameters = inspect.signature(DistillationModel.forward).parameters.values()
    own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.kind is p.VAR_KEYWORD}
    assert {*ARGUMENTS} == own | {"self"}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("form", ["columns", "evaluation", "rows"])
def test_a_column_named_like_an_argument_is_named(tiny, rows, config, name, form):
    given = [{**row, name: torch.tensor(0.7)} for row in rows(4)]
    sets = {"train_dataset": given}
    if form != "rows":
        given = Dataset.from_list([{key: x.tolist() for key, x in row.items()} for row in given])
        sets = (
            {"train_dataset": given} if form == "columns" else {"train_dataset": rows(4), "eval_dataset": {"a": given}}
        )
    with pytest.raises(ValueError, match=f"has a column '{name}'.*Rename the column") as raised:
        KDTrainer(tiny(), config(recipe="lm_only"), **sets)
    assert len(str(raised.value)) < 250
    assert str(raised.value).startswith({"evaluation": "eval_dataset['a']"}.get(form, "train_dataset"))


def test_a_column_that_a_collator_adds_is_named_too(tiny, rows, config):
    def collate(batch):
        return {**default_data_collator(batch), "kd_weight": torch.ones(len(batch))}

    trainer = KDTrainer(tiny(), config(recipe="lm_only"), train_dataset=rows(4), data_collator=collate)
    for call in (trainer.train, lambda: trainer.evaluate(rows(4))):
        with pytest.raises(ValueError, match=r"^the batch has a column 'kd_weight'"):
            call()


def test_a_column_that_is_to_stay_is_not_swallowed(tiny, rows, config):
    data = [{**row, "difficulty": torch.tensor(0.7)} for row in rows(4)]
    KDTrainer(tiny(), config(recipe="lm_only", max_steps=1), train_dataset=data).train()  # left out, as Trainer does
    args = config(recipe="lm_only", remove_unused_columns=False)
    with pytest.raises(ValueError, match="the student does not read difficulty"):
        KDTrainer(tiny(), args, train_dataset=data).train()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("compute_loss_func", "override compute_loss"),
        ("preprocess_logits_for_metrics", "logits are never made. compute_metrics is given"),
        ("optimizer_cls_and_kwargs", r"pass optimizers=\(optimizer, scheduler\)"),
        ("teacher_model", "it is teacher here"),
        ("tokenizer", "it is processing_class here"),
        ("train_datset", "KDTrainer takes no train_datset; did you mean 'train_dataset'"),
        ("formatting_func", "KDTrainer takes no formatting_func$"),
    ],
)
def test_arguments_of_other_trainers_are_answered(tiny, config, name, said):
    with pytest.raises(TypeError, match=said):
        KDTrainer(tiny(), config(recipe="lm_only"), **{name: object()})


def test_arguments_that_say_nothing_are_no_matter(tiny, config, rows):
    KDTrainer(tiny(), config(recipe="lm_only"), train_dataset=rows(4), compute_metrics=None, model_init=None)
    with pytest.raises(TypeError, match="model is None; expected the student"):
        KDTrainer(args=config(recipe="lm_only"))
    with pytest.raises(TypeError, match="args is NoneType; expected a KDConfig"):
        KDTrainer(tiny())


def test_classes_are_no_labels(tiny, rows, config):
    data = [{"input_ids": row["input_ids"], "label": 1} for row in rows(4)]
    with pytest.raises(ValueError, match=r"labels is \(2,\); expected \(B, T\)"):
        KDTrainer(tiny(), config(recipe="lm_only"), train_dataset=data).train()


@pytest.mark.parametrize("as_tensors", [True, False])
def test_rows_of_unlike_length_are_answered(tiny, rows, config, as_tensors):
    data = [{name: x[: 5 + i] for name, x in row.items()} for i, row in enumerate(rows(4))]
    if not as_tensors:
        data = Dataset.from_list([{name: x.tolist() for name, x in row.items()} for row in data])
    args = config(recipe="lm_only", per_device_train_batch_size=4)
    KDTrainer(tiny(), args, train_dataset=data).train()  # its own collator pads
    trainer = KDTrainer(tiny(), args, train_dataset=data, data_collator=default_data_collator)
    expected = r"rows have 5 to 8 ids, and data_collator \(default_data_collator\).*DataCollatorForSeq2Seq"
    with pytest.raises(ValueError, match=expected):
        trainer.train()


@pytest.mark.parametrize("collator", [None, default_data_collator])
def test_rows_without_labels_are_refused(tiny, config, collator):
    """Tokenized, and collated for a model that makes its labels of the ids: the first step said KeyError."""
    data = Dataset.from_dict({"input_ids": [list(range(8))] * 4})
    args = config(recipe="compressed_head")  # the starts are solved from the text
    trainer = KDTrainer(tiny(), args, teacher=tiny(seed=1), train_dataset=data, data_collator=collator)
    name = "PaddingCollator" if collator is None else "default_data_collator"
    with pytest.raises(ValueError, match=rf"the batch that data_collator \({name}\) makes has no labels; expected"):
        trainer.train()


def test_all_of_trainers_arguments_are_taken_or_answered():
    theirs = inspect.signature(Trainer).parameters.keys()
    assert theirs <= inspect.signature(KDTrainer).parameters.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_says_that_its_weights_round_updates_away(tiny, rows, config, capsys, dtype):
    """transformers loads a checkpoint in its own dtype: of most, bfloat16."""
    KDTrainer(tiny().to(dtype), config(recipe="lm_only", max_steps=1), train_dataset=rows(4)).train()
    assert ("the trained weights are bfloat16, which" in capsys.readouterr().out) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("until", [1.0, 0.5])
def test_a_run_says_where_its_kd_term_ends(tiny, rows, config, capsys, until):
    args = config(recipe="teacher_head", kd_until=until, max_steps=1)
    KDTrainer(tiny(), args, teacher=tiny(), train_dataset=rows(4)).train()
    assert ("the KD term ends after 50% of the run (kd_until)" in capsys.readouterr().out) == (until < 1)


@pytest.mark.parametrize("recipe", ["auto", "lm_only", "teacher_head"])
def test_a_name_in_a_models_place(tiny, rows, config, recipe):
    with pytest.raises(TypeError, match="student is str; expected a transformers PreTrainedModel"):
        KDTrainer("gpt2", config(recipe=recipe), teacher=tiny(), train_dataset=rows(4))
    with pytest.raises(ValueError, match=r"teacher='org/gpt2'; expected a model, as load_teacher\('org/gpt2'\) gives"):
        KDTrainer(tiny(), config(recipe=recipe), teacher="org/gpt2", train_dataset=rows(4))
