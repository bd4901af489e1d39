"""Several teachers in one model: the weighted sum of single ones, and rows that have a teacher each."""

import pytest
import server
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset, IterableDataset

from kdfast.training import DistillationModel, KDConfig, KDTrainer, TeacherCache, cache_teacher
from kdfast.training.durable import processes
from kdfast.training.metrics import evaluated
from kdfast.training.recipes import Recipe

KINDS = {
    "own_head": {"teacher": "own_head"},
    "compressed_head": {"teacher": "compressed_head", "compressed_rank": 8},
    "projected": {"teacher": "projected", "anchor_weight": 0.5},
    "probe": {"teacher": "probe", "anchor_weight": 0.5},
}
BY_NAME = ["math", "code"]
TIMES = {"eval_" + x for x in ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")}


def teachers(tiny, V=67):
    return {"math": tiny("qwen2", width=24, seed=1), "code": tiny("llama", V=V, width=32, seed=2)}


def make(tiny, batch, given, *, dtype=torch.float64, solve=True, **recipe):
    """A model of one or several teachers, whose projectors are the same whatever the others are."""
    weights = recipe.pop("teacher_weights", None)
    model = DistillationModel(tiny("gpt2"), given, teacher_weights=weights, recipe=Recipe("test", **recipe))
    generator = torch.Generator().manual_seed(9)
    for side in model.sides.values():
        for p in [] if side.projector is None else side.projector.parameters():
            p.data.normal_(std=0.2, generator=generator.manual_seed(p.shape[-1]))
    model.to(dtype)
    if solve:
        model.solve([batch])
    return model


def gradients(model, loss):
    """By name, a projector's by its place among them."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named, found, strict=True)}


def own_names(of_one, number):
    """Names of the gradients of a model of one teacher as they are in a model of several."""
    return {name.replace("logit_projector.", f"logit_projector.{number}."): g for name, g in of_one.items()}


def assert_close(ours, theirs, tolerance=1e-9):
    assert ours.keys() == theirs.keys()
    for name, g in ours.items():
        assert torch.allclose(g, theirs[name], rtol=1e-6, atol=tolerance), name


def summed(several):
    names = {name for one in several for name in one}
    return {name: sum(one[name] for one in several if name in one) for name in names}


@pytest.mark.parametrize("kd_on", ["completion", "all"])
@pytest.mark.parametrize("weights", [None, [0.7, 0.3], [2.0, 1.0]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_the_sum_of_single_ones(tiny, batch, kind, weights, kd_on):
    recipe = {**KINDS[kind], "kd_on": kd_on}
    given = teachers(tiny)
    model = make(tiny, batch, given, teacher_weights=weights, **recipe)
    output = model(**batch)
    ours = gradients(model, output.loss)

    parts, loss, kd = [], 0.0, 0.0
    for number, (name, weight) in enumerate(zip(given, weights or [0.5, 0.5], strict=True)):
        alone = make(tiny, batch, {name: teachers(tiny)[name]}, **{**recipe, "ce_weight": float(number == 0)})
        one = alone(**batch, kd_weight=0.7 * weight)
        parts.append(own_names(gradients(alone, one.loss), number))
        loss, kd = loss + one.loss.item(), kd + weight * one.metrics.kd.item()
        assert output.by_teacher[name].metrics.kd.item() == pytest.approx(one.metrics.kd.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(loss, rel=1e-9)
    assert output.metrics.kd.item() == pytest.approx(kd, rel=1e-6), "as it stands in the loss"
    assert_close(ours, summed(parts))


def test_in_single_precision_too(tiny, batch):
    given = teachers(tiny)
    model = make(tiny, batch, list(given.values()), dtype=torch.float32, teacher="own_head")
    ours = gradients(model, model(**batch).loss)
    parts = []
    for number, one in enumerate(teachers(tiny).values()):
        alone = make(tiny, batch, one, dtype=torch.float32, teacher="own_head", ce_weight=float(number == 0))
        parts.append(gradients(alone, alone(**batch, kd_weight=0.35).loss))
    assert_close(ours, summed(parts), 1e-6)


@pytest.mark.parametrize("kd_on", ["completion", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routes", [[0, 1, 0], [1, 1, 0], [1, 1, 1]])
def test_a_row_learns_from_its_own_teacher_alone(tiny, batch, kind, routes, kd_on):
    recipe = {**KINDS[kind], "kd_on": kd_on}
    model = make(tiny, batch, teachers(tiny), solve=False, **recipe)
    routed = {**batch, "teacher_id": torch.tensor(routes)}
    if model.recipe.solves:
        model.solve([batch])
    output = model(**routed, with_fidelity=True)
    ours = gradients(model, output.loss)

    items = output.targets
    kd_items = (model.every_target(batch["input_ids"], batch["attention_mask"], None) != -100).sum()
    losses, parts, kd = 0.0, [], 0.0
    for number, name in enumerate(BY_NAME):
        alone = make(tiny, batch, {name: teachers(tiny)[name]}, **recipe)
        for row in [i for i, route in enumerate(routes) if route == number]:
            one = alone(
                **{key: x[row : row + 1] for key, x in batch.items()},
                num_items_in_batch=items,
                kd_items_in_batch=kd_items,
                with_fidelity=True,
            )
            losses = losses + one.loss.item()
            parts.append(own_names(gradients(alone, one.loss), number))
            kd = kd + (one.metrics.kd * one.metrics.tokens).item()
    assert output.loss.item() == pytest.approx(losses, rel=1e-7), "a share of the KD term's rows is in fp32"
    assert output.metrics.kd.item() == pytest.approx(kd / output.metrics.tokens.item(), rel=1e-5)
    assert output.metrics.tokens == (items if kd_on == "completion" else kd_items)
    nothing = {name: torch.zeros_like(g) for name, g in ours.items()}  # of a teacher that has no row
    assert_close(ours, summed([nothing, *parts]), 1e-7)
    assert [*output.by_teacher] == [name for i, name in enumerate(BY_NAME) if i in routes]


def test_a_teacher_runs_over_its_own_rows_alone(tiny, batch):
    model = make(tiny, batch, teachers(tiny), teacher="own_head")
    seen = {}
    for name, teacher in model.teachers.items():
        teacher.base_model.register_forward_hook(
            lambda _, args, kwargs, out, name=name: seen.update({name: kwargs["input_ids"]}), with_kwargs=True
        )
    students = []
    model.student.base_model.register_forward_hook(lambda *_: students.append(1))
    model(**batch, teacher_id=["code", "math", 1])
    assert torch.equal(seen["math"], batch["input_ids"][1:2])
    assert torch.equal(seen["code"], batch["input_ids"][[0, 2]])
    assert students == [1]


def test_micro_batches_give_the_gradient_of_the_whole(tiny, batch):
    model = make(tiny, batch, teachers(tiny), teacher="own_head")
    whole = gradients(model, model(**batch, teacher_id=[0, 1, 0]).loss)
    items = (model.targets(batch["labels"], batch["attention_mask"]) != -100).sum()
    parts = []
    for rows, routes in (([0], [0]), ([1, 2], [1, 0])):
        some = {key: x[rows] for key, x in batch.items()}
        parts.append(gradients(model, model(**some, teacher_id=routes, num_items_in_batch=items).loss))
    assert_close(whole, summed(parts))


@pytest.mark.parametrize("value", ["physics", 2, -1, "2", None, 1.0, True])
def test_a_value_that_names_no_teacher(tiny, batch, value):
    model = make(tiny, batch, teachers(tiny), teacher="own_head")
    with pytest.raises(ValueError, match="names no teacher; expected 'math', 'code', or a number from 0 to 1"):
        model(**batch, teacher_id=["math", value, "code"])


def test_as_many_routes_as_rows(tiny, batch):
    model = make(tiny, batch, teachers(tiny), teacher="own_head")
    with pytest.raises(ValueError, match="teacher_id has 2 values for 3 rows"):
        model(**batch, teacher_id=[0, 1])


def test_routes_and_weights_exclude_each_other(tiny, batch):
    model = make(tiny, batch, teachers(tiny), teacher="own_head", teacher_weights=[1, 1])
    with pytest.raises(ValueError, match=r"teacher_id, .* and teacher_weights; expected one"):
        model(**batch, teacher_id=[0, 1, 0])


@pytest.mark.parametrize("weights", [[1.0], [1, 2, 3], [-1, 2], [0, 0], [float("nan"), 1], ["a", 1]])
def test_weights_that_are_none(tiny, batch, weights):
    with pytest.raises(ValueError, match=r"teacher_weights=\[.*each of 2 teachers \(math, code\)"):
        make(tiny, batch, teachers(tiny), teacher="own_head", teacher_weights=weights)


def test_a_teacher_of_weight_zero_is_evaluated_and_not_run_in_training(tiny, batch):
    model = make(tiny, batch, teachers(tiny), teacher="own_head", teacher_weights=[1, 0])
    runs = []
    model.teachers["code"].base_model.register_forward_hook(lambda *_: runs.append(1))
    alone = make(tiny, batch, teachers(tiny)["math"], teacher="own_head")
    torch.testing.assert_close(model(**batch).loss, alone(**batch).loss)
    assert runs == []
    output = model(**batch, with_fidelity=True)
    assert output.by_teacher["code"].fidelity.kl_teacher_student > 0
    expected = alone(**batch, with_fidelity=True).fidelity.kl_teacher_student
    torch.testing.assert_close(output.fidelity.kl_teacher_student, expected)


def test_a_kd_weight_of_zero_runs_none(tiny, batch):
    model = make(tiny, batch, teachers(tiny), teacher="own_head")
    for one in model.teachers.values():
        one.base_model.register_forward_hook(lambda *_: pytest.fail("a teacher was run"))
    alone = DistillationModel(tiny("gpt2"), recipe="lm_only").double()
    torch.testing.assert_close(model(**batch, kd_weight=0.0).loss, alone(**batch).loss)


def test_one_in_a_list_is_that_teacher(tiny, batch):
    one, listed = (make(tiny, batch, given, teacher="projected") for given in (tiny("gpt2"), [tiny("gpt2")]))
    assert [*listed.state_dict()] == [*one.state_dict()]
    assert listed.teacher is not None
    assert torch.equal(one(**batch).loss, listed(**batch).loss)


def test_state_of_several(tiny, batch):
    model = make(tiny, batch, teachers(tiny), teacher="projected")
    state = model.state_dict()
    assert not [name for name in state if not name.startswith(("student.", "logit_projector."))]
    assert {name for name in state if name.startswith("logit")} == {
        f"logit_projector.{i}.{name}" for i in range(2) for name in ("weight", "bias")
    }
    other = make(tiny, batch, teachers(tiny), teacher="projected")
    other.load_state_dict(state)
    assert not any(module.training for one in model.train().teachers.values() for module in one.modules())
    assert not any(p.requires_grad for one in model.teachers.values() for p in one.parameters())


def test_names(tiny):
    def named(*names):
        several = [tiny(seed=i) for i in range(len(names))]
        for one, name in zip(several, names, strict=True):
            one.config._name_or_path = name
        return [*DistillationModel(tiny(), several, recipe="teacher_head").teachers]

    assert named("runs/gpt2-medium", "openai/gpt-neo") == ["gpt2-medium", "gpt-neo"]
    assert named("a/final", "b/final", "c") == ["final_0", "final_1", "c"], "two of one name"
    assert named("", "b") == ["teacher_0", "b"]


def test_a_teacher_given_twice(tiny):
    teacher = tiny(seed=1)
    with pytest.raises(ValueError, match="'teacher_1' and 'teacher_0' are the same model"):
        DistillationModel(tiny(), [teacher, teacher])


@pytest.mark.parametrize("given", [[], {}])
def test_an_empty_list(tiny, given):
    with pytest.raises(ValueError, match="teacher is empty"):
        DistillationModel(tiny(), given)


@pytest.mark.parametrize("recipe", ["teacher_head", "auto", "compressed_head"])
def test_a_teacher_with_another_vocabulary_is_named(tiny, recipe):
    with pytest.raises(ValueError, match=r"teacher 'code': .*the teacher's head has 70 rows and the student's 67"):
        DistillationModel(tiny(), teachers(tiny, V=70), recipe=recipe)


def test_what_one_teacher_alone_can_do(tiny):
    for recipe, what in (
        (Recipe("x", "own_head", hidden_weight=1.0), "hidden_weight=1"),
        ("projector_refit", "solves a projector"),
        ("cached", "recipe 'cached', of which 'math' is no cache"),
    ):
        with pytest.raises(ValueError, match=rf"2 teachers \(math, code\) and .*{what}"):
            DistillationModel(tiny(), teachers(tiny), recipe=recipe)


def test_a_start_is_solved_from_the_first(tiny, batch):
    recipe = Recipe("x", "compressed_head", student_init="svd")
    model = DistillationModel(tiny(), teachers(tiny), recipe=recipe)
    starts = model.solve([{**batch, "teacher_id": torch.tensor([0, 1, 0])}] * 4)
    assert [start.what for start in starts] == [
        "student_init='svd', the embedding alone",
        "teacher's head at rank 16, of math",
        "teacher's head at rank 16, of code",
    ]
    assert [head.rank for head in model.compressed_head] == [16, 16]
    alone = DistillationModel(tiny(), teachers(tiny)["math"], recipe=recipe)
    alone.solve([{key: x[[0, 2]] for key, x in batch.items()}] * 4)
    assert torch.equal(alone.student.get_output_embeddings().weight, model.student.get_output_embeddings().weight)
    for name, factor in alone.compressed_head.named_buffers():
        torch.testing.assert_close(model.compressed_head[0].get_buffer(name), factor, msg=name)


def test_too_few_rows_of_one_to_solve_from(tiny, batch):
    model = DistillationModel(tiny(), teachers(tiny), recipe="compressed_head")
    with pytest.raises(ValueError, match="teacher 'code': batches hold 0 targets"):
        model.solve([{**batch, "teacher_id": torch.zeros(3, dtype=torch.long)}] * 4)


# In the trainer


def named_rows(rows, n, names=("math", "code", "code"), **given):
    return [{**row, "teacher_id": names[i % len(names)]} for i, row in enumerate(rows(n, **given))]


@pytest.fixture
def trainer(tiny, rows, config):
    def make(data=None, *, given=None, recipe="teacher_head", **args):
        evaluated = args.pop("eval_dataset", data)
        return KDTrainer(
            tiny("gpt2"),
            config(recipe=recipe, **args),
            teacher=teachers(tiny) if given is None else given,
            train_dataset=rows(6) if data is None else data,
            eval_dataset=evaluated,
        )

    return make


def test_accumulated_steps_of_routed_rows_are_those_of_one_batch(trainer, rows):
    data = named_rows(rows, 8)
    weights = []
    for size, accumulated in ((4, 1), (1, 4)):
        run = trainer(
            data, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=2, optim="sgd"
        )
        run.train()
        weights.append(torch.cat([p.flatten() for p in run.model.student.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_evaluation_of_each_teacher_and_of_all(tiny, trainer, rows):
    data = named_rows(rows, 5)
    found = trainer(data).evaluate()
    for name in BY_NAME:
        own = [row for row in data if row["teacher_id"] == name]
        alone = trainer(own, given={name: teachers(tiny)[name]}).evaluate()
        for key in ("kd", "kl_teacher_student"):
            assert found[f"eval_{key}_{name}"] == pytest.approx(alone[f"eval_{key}"], rel=1e-5)
            assert f"eval_{key}_{name}" not in alone
    targets = [sum((row["labels"][1:] != -100).sum().item() for row in data if row["teacher_id"] == n) for n in BY_NAME]
    for key in ("kd", "kl_teacher_student"):
        each = [found[f"eval_{key}_{name}"] for name in BY_NAME]
        mean = sum(n * x for n, x in zip(targets, each, strict=True)) / sum(targets)
        assert found[f"eval_{key}"] == pytest.approx(mean, rel=1e-5)
    assert found["eval_loss"] == pytest.approx(found["eval_ce"] + 0.7 * 4 * found["eval_kd"], rel=1e-5)
    assert found["eval_tokens"] == sum(targets)


@pytest.mark.parametrize("recipe", ["teacher_head", "projector", "lm_only"])
def test_evaluation_under_weights(tiny, trainer, rows, recipe):
    data = rows(5)
    run = trainer(data, recipe=recipe, teacher_weights=[0.75, 0.25])
    found = run.evaluate()
    logged = evaluated(run.model, data)
    assert {f"eval_{name}" for name in logged} - found.keys() <= TIMES
    key = "kl_teacher_student"
    assert found[f"eval_{key}"] == pytest.approx(
        0.75 * found[f"eval_{key}_math"] + 0.25 * found[f"eval_{key}_code"], rel=1e-5
    )
    assert ("eval_kl_teacher_projected_math" in found) == (recipe == "projector")
    assert ("eval_kd_math" in found) == (recipe != "lm_only")


def test_training_logs_each_teacher(trainer, rows):
    run = trainer(named_rows(rows, 6), max_steps=3, per_device_train_batch_size=6)
    run.train()
    lines = [line for line in run.state.log_history if "loss" in line]
    assert all(line["kd_math"] > 0 and line["kd_code"] > 0 for line in lines)
    assert all(min(x["kd_math"], x["kd_code"]) <= x["kd"] <= max(x["kd_math"], x["kd_code"]) for x in lines)


def test_the_best_model_by_one_teacher(trainer, rows, config):
    args = config(metric_for_best_model="kl_teacher_student_math")
    assert args.greater_is_better is False
    with pytest.raises(ValueError, match=r"expected one of .*eval_kl_teacher_student_code"):
        trainer(rows(4), metric_for_best_model="kd_physics", eval_strategy="steps", greater_is_better=False)


def test_what_is_printed(trainer, rows, capsys):
    trainer(named_rows(rows, 4))
    assert "2 teachers, each of the rows whose 'teacher_id' names it: math, code" in capsys.readouterr().out
    trainer(rows(4))
    assert "2 teachers, each of every row, by their weights: math (0.5), code (0.5)" in capsys.readouterr().out
    trainer(named_rows(rows, 4), teacher_weights=[1, 3])
    assert "by their weights: math (1), code (3)" in capsys.readouterr().out, "over the column"


def test_weights_leave_the_column_alone(tiny, trainer, rows):
    data = named_rows(rows, 4)
    with_column = trainer(data, teacher_weights=[1, 3], max_steps=2)
    without = trainer(rows(4), teacher_weights=[1, 3], max_steps=2)
    losses = [run.train().training_loss for run in (with_column, without)]
    assert losses[0] == losses[1]


def test_a_column_of_another_name(trainer, rows):
    data = [{**row, "domain": i % 2} for i, row in enumerate(rows(4))]
    by_number, by_name = trainer(data, teacher_column="domain"), trainer(named_rows(rows, 4, BY_NAME))
    assert by_number.evaluate()["eval_loss"] == by_name.evaluate()["eval_loss"]
    assert by_number.train().training_loss == by_name.train().training_loss


def test_a_single_teacher_leaves_the_column_alone_and_says_so(tiny, trainer, rows, capsys):
    one = {"physics": tiny(seed=1)}
    processes.say_once.cache_clear()
    losses = [trainer(data, given=one, max_steps=1).train().training_loss for data in (named_rows(rows, 4), rows(4))]
    assert losses[0] == losses[1]
    assert capsys.readouterr().out.count("the column 'teacher_id' is not read") == 1
    with pytest.raises(ValueError, match=r"teacher_id='(math|code)' names no teacher; expected 'physics'"):
        trainer(named_rows(rows, 4), given=one, teacher_column="teacher_id").train()


def test_a_column_that_is_not_there(trainer, rows):
    with pytest.raises(ValueError, match=r"teacher_column='domain', and train_dataset has no such column"):
        trainer(named_rows(rows, 4), teacher_column="domain")
    with pytest.raises(ValueError, match=r"teacher_column='teacher_id', and eval_dataset has no such column"):
        trainer(named_rows(rows, 4), eval_dataset=rows(4))
    with pytest.raises(ValueError, match=r"teacher_column='teacher_id' and teacher_weights=\[1, 1\]; expected one"):
        trainer(named_rows(rows, 4), teacher_column="teacher_id", teacher_weights=[1, 1])


def test_a_row_that_names_none(trainer, rows):
    with pytest.raises(ValueError, match="teacher_id='physics' names no teacher; expected 'math', 'code'"):
        trainer(named_rows(rows, 4, ["physics"])).train()


def test_a_stream_of_unknown_columns(trainer, rows):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(named_rows(rows, 8))

    with pytest.raises(ValueError, match="train_dataset does not list its columns"):
        trainer(Stream(), eval_dataset=None)
    asked = trainer(Stream(), eval_dataset=None, teacher_column="teacher_id", max_steps=2)
    listed = trainer(named_rows(rows, 8), max_steps=2, train_sampling_strategy="sequential")
    assert asked.train().training_loss == listed.train().training_loss


def test_packed_rows_have_no_teacher_of_their_own(trainer, rows):
    data = [{**row, "seq_lengths": [6, 6]} for row in named_rows(rows, 4)]
    with pytest.raises(ValueError, match="teacher_column='teacher_id' and packing"):
        trainer(data)


def test_a_cache_is_not_made_of_several(trainer, rows, capsys):
    options = {"precompute_teacher_log_probs": None, "max_steps": 12}
    trainer(rows(4), **options)
    assert "the teacher runs at every step" in (said := capsys.readouterr().out)
    assert "entries are of one teacher, and there are 2" in said
    with pytest.raises(ValueError, match=r"cannot be run beforehand.* entries are of one teacher, and there are 2"):
        trainer(rows(4), precompute_teacher_log_probs=True)


def test_resumed_with_a_projector_each(tiny, trainer, rows, tmp_path):
    data = named_rows(rows, 8)

    def make(folder, **given):
        return trainer(data, recipe="projector", output_dir=str(tmp_path / folder), save_strategy="steps", **given)

    whole = make("whole", save_steps=4)
    whole.train()
    make("resumed", save_steps=2).train()
    resumed = make("resumed", save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_teachers_that_are_kept_on_the_cpu(tiny, trainer, rows):
    data = named_rows(rows, 6)
    losses = []
    for offloaded in (False, True):
        run = trainer(data, recipe="compressed_head", offload_teachers=offloaded, kd_until=1.0)
        losses.append(run.train().training_loss)
        on_meta = [all(p.is_meta for p in one.parameters()) for one in run.model.teachers.values()]
        assert on_meta == [offloaded] * 2, "between two batches no weight of a teacher is on the device"
    assert losses[0] == losses[1]


def test_auto_says_whose_start_it_is(tiny, rows, config, capsys):
    KDTrainer(tiny("llama"), config(recipe="auto"), teacher=teachers(tiny), train_dataset=rows(4))
    assert "(the first teacher is 'math'; 'code' only teach)" in capsys.readouterr().out


def test_the_price_is_of_all(tiny, trainer, rows):
    both, alone = (
        [trainer(rows(4), given={n: teachers(tiny)[n] for n in names}).price for names in some]
        for some in ([BY_NAME], [["math"], ["code"]])
    )
    again = 6 * 67 * 16
    assert both[0].teacher == sum(price.teacher for price in alone) + again
    routed = trainer(named_rows(rows, 4)).price
    assert routed.teacher == sum(price.teacher for price in alone) // 2


def test_rows_from_a_cache_of_each(tiny, config, tmp_path):
    """A row's entries are of the teacher that its cache was made of."""
    ids = torch.randint(3, 67, (6, 12), generator=torch.Generator().manual_seed(1)).tolist()
    parts, live = [], []
    for i, (name, teacher) in enumerate(teachers(tiny).items()):
        some = Dataset.from_dict({"input_ids": ids[3 * i : 3 * i + 3], "labels": ids[3 * i : 3 * i + 3]})
        cache_teacher(teacher, {"train": some}, tmp_path / name, method="top_k", k=67, dtype="float32")
        parts.append(TeacherCache(tmp_path / name).dataset("train", some))
        live += [{**row, "teacher_id": name} for row in some]
    options = {"per_device_train_batch_size": 6, "max_steps": 2}
    cached = KDTrainer(tiny("gpt2"), config(recipe="cached", **options), train_dataset=ConcatDataset(parts))
    direct = KDTrainer(
        tiny("gpt2"), config(recipe="teacher_head", **options), teacher=teachers(tiny), train_dataset=live
    )
    assert cached.train().training_loss == pytest.approx(direct.train().training_loss, rel=1e-5)


def train_one_row_each(folder, size):
    """Two processes, of which each has a row of another teacher; one with both."""
    from tiny_models import tiny

    ids = torch.randint(3, 67, (4, 12), generator=torch.Generator().manual_seed(1)).tolist()
    data = [{"input_ids": row, "labels": row, "teacher_id": i % 2} for i, row in enumerate(ids)]
    args = KDConfig(
        output_dir=str(folder / f"{size}"), recipe="projector", per_device_train_batch_size=2 // size, max_steps=2,
        use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", optim="sgd", learning_rate=0.1,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = KDTrainer(tiny("gpt2"), args, teacher=teachers(tiny), train_dataset=data)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / f"{size}.pt")
    processes.leave()


def test_two_processes_with_a_teacher_each_are_one_with_both(tmp_path):
    train_one_row_each(tmp_path, 1)
    assert server.join(server.start(tmp_path / "said", 2, train_one_row_each, tmp_path, 2)) == [0, 0]
    one, two = (torch.load(tmp_path / f"{size}.pt", weights_only=True) for size in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


METHODS = {
    "top_k": {"method": "top_k", "k": 67, "dtype": "float32"},
    "hidden": {"method": "hidden", "rank": 32, "dtype": "float32"},
    "sample": {"method": "sample", "k": 64},
}


@pytest.fixture
def kept(tiny, tmp_path):
    """Text, and what keeps a teacher's entries of it in a cache."""
    ids = torch.randint(3, 67, (6, 12), generator=torch.Generator().manual_seed(1)).tolist()
    text = Dataset.from_list([{"input_ids": row[: 7 + i], "labels": row[: 7 + i]} for i, row in enumerate(ids)])

    def make(name, method="top_k", splits=("train", "eval")):
        cache_teacher(teachers(tiny)[name], dict.fromkeys(splits, text), tmp_path / name, **METHODS[method])
        return TeacherCache(tmp_path / name)

    return text, make


def batch_of(text, **caches):
    """Rows of one length, with the columns of each cache under its name."""
    rows = [row[: len(text[0]["input_ids"])] for row in text["input_ids"]]
    batch = {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}
    for name, cache in caches.items():
        for column in cache.dataset("train", text)[0].keys() - batch.keys():
            some = [row[column][: len(rows[0])] for row in cache.dataset("train", text)]
            batch[f"{column}_{name}"] = torch.stack(some)
    return batch


def assert_same(ours, theirs):
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert ours.metrics.kd.item() == pytest.approx(theirs.metrics.kd.item(), rel=1e-5)
    for name, one in theirs.by_teacher.items():
        assert ours.by_teacher[name].metrics.kd.item() == pytest.approx(one.metrics.kd.item(), rel=1e-5)


@pytest.mark.parametrize("routes", [None, [0, 1, 0, 1, 1, 1]])
@pytest.mark.parametrize("method", ["top_k", "hidden"])
def test_a_live_teacher_beside_a_cache_is_two_live_ones(tiny, kept, method, routes):
    text, make_cache = kept
    cache = make_cache("code", method)
    weights = {"teacher_weights": [0.7, 0.3] if routes is None else None, "teacher": "own_head"}
    mixed = make(tiny, None, {**teachers(tiny), "code": cache}, dtype=torch.float32, solve=False, **weights)
    live = make(tiny, None, teachers(tiny), dtype=torch.float32, solve=False, **weights)
    ours = mixed(**batch_of(text, code=cache), teacher_id=routes)
    theirs = live(**batch_of(text), teacher_id=routes)
    assert_same(ours, theirs)
    assert_close(gradients(mixed, ours.loss), gradients(live, theirs.loss), 1e-5)


@pytest.mark.parametrize("methods", [("top_k", "hidden"), ("hidden", "hidden"), ("top_k", "top_k")])
def test_two_caches_are_two_live_teachers(tiny, kept, methods):
    text, make_cache = kept
    caches = {name: make_cache(name, method) for name, method in zip(BY_NAME, methods, strict=True)}
    cached = make(tiny, None, caches, dtype=torch.float32, teacher="cached")
    live = make(tiny, None, teachers(tiny), dtype=torch.float32, teacher="own_head")
    ours, theirs = cached(**batch_of(text, **caches)), live(**batch_of(text))
    assert_same(ours, theirs)
    assert_close(gradients(cached, ours.loss), gradients(live, theirs.loss), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_learned_from_directly_whatever_the_other_is(tiny, kept, kind):
    text, make_cache = kept
    cache, plain = make_cache("code"), batch_of(text)
    for given in ({"math": "live", "code": cache}, {"code": cache, "math": "live"}):
        given = {name: teachers(tiny)[name] if one == "live" else one for name, one in given.items()}
        model = make(tiny, plain, given, dtype=torch.float32, **KINDS[kind])
        alone = make(tiny, plain, teachers(tiny)["math"], dtype=torch.float32, **KINDS[kind])
        other = make(tiny, plain, teachers(tiny)["code"], dtype=torch.float32, teacher="own_head", ce_weight=0.0)
        loss = alone(**plain, kd_weight=0.35).loss.item() + other(**plain, kd_weight=0.35).loss.item()
        assert model(**batch_of(text, code=cache)).loss.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["mixed", "cached"])
def test_trained_and_evaluated_as_two_live_ones(tiny, kept, config, tmp_path, kind):
    text, make_cache = kept
    make_cache("code", "hidden")
    caches = {"code": str(tmp_path / "code")}
    if kind == "cached":
        caches = {"math": make_cache("math"), **caches}
    found = []
    for given in ({**teachers(tiny), **caches}, teachers(tiny)):
        recipe = "auto" if kind == "cached" and given["math"] is caches["math"] else "teacher_head"
        options = {
            "recipe": recipe,
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "kd_weight": 0.7,
            "kd_until": 1.0,
        }
        run = KDTrainer(
            tiny("gpt2"),
            config(**options, teacher_weights=[0.7, 0.3], logging_steps=1),
            teacher=given,
            train_dataset=text,
            eval_dataset=text,
        )
        losses = [run.train().training_loss, *(line["kd_code"] for line in run.state.log_history if "kd_code" in line)]
        found.append(torch.tensor([*losses, *(run.evaluate()[f"eval_{key}"] for key in OF_BOTH)]))
    assert len(found[0]) == len(found[1]) > 4
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


OF_BOTH = ("loss", "kd", "kd_code", "kd_math", "kl_teacher_student", "kl_teacher_student_code", "tokens")


@pytest.mark.parametrize("recipe", ["teacher_head", "projector", "lm_only"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_evaluated_beside_a_cache(tiny, kept, config, method, recipe):
    text, make_cache = kept
    run = KDTrainer(
        tiny("gpt2"),
        config(recipe=recipe),
        teacher={**teachers(tiny), "code": make_cache("code", method)},
        train_dataset=text,
        eval_dataset=text,
    )
    logged = {f"eval_{name}" for name in evaluated(run.model, run.eval_dataset)}
    found = run.evaluate()
    assert {name for name in found if name.startswith("eval_")} - TIMES == logged - TIMES
    assert ("eval_kl_teacher_student_code" in found) == (method != "sample")
    assert "eval_kl_teacher_student_math" in found


def test_a_cache_without_the_evaluated_text(tiny, kept, config, capsys):
    text, make_cache = kept
    data = {"train_dataset": text, "eval_dataset": text}
    cache = make_cache("code", splits=["train"])
    run = KDTrainer(tiny("gpt2"), config(recipe="teacher_head"), teacher={**teachers(tiny), "code": cache}, **data)
    found = run.evaluate()
    assert "eval_kd_math" in found
    assert "eval_kd_code" not in found
    assert {f"eval_{name}" for name in evaluated(run.model, run.eval_dataset)} <= found.keys() | TIMES
    assert "teacher 'code' has no entries of the evaluated text" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"eval_dataset: none of the teachers' caches has the split 'eval'"):
        KDTrainer(
            tiny("gpt2"),
            config(recipe="auto"),
            teacher={"code": cache, "math": make_cache("math", splits=["train"])},
            **data,
        )


def test_caches_that_do_not_fit(tiny, kept, config):
    text, make_cache = kept
    given = {**teachers(tiny), "code": make_cache("code")}
    model = make(tiny, None, given, dtype=torch.float32, solve=False, teacher="own_head")
    with pytest.raises(ValueError, match="teacher 'code' is a cache, and the batch has no entries of it"):
        model(**batch_of(text))

    def train(message, given=given, **args):
        with pytest.raises(ValueError, match=message):
            KDTrainer(tiny("gpt2"), config(**args), teacher=given, train_dataset=text)

    train("recipe 'cached', of which 'math' is no cache", recipe="cached")
    caches = {"code": make_cache("code"), "too": TeacherCache(make_cache("code").folder)}
    train("they are all caches; expected 'cached'", caches, recipe="teacher_head")
    train("teacher is a cache, alone", make_cache("code"))
    train("the run is at 2, 1", recipe="teacher_head", temperature_steps=[2, 1])
    drawn = {**teachers(tiny), "math": make_cache("math", "sample")}
    train("ids drawn at random", drawn, recipe="teacher_head", divergence="reverse_kl")
    train("text that is generated, and a teacher that is a cache", recipe="teacher_head", on_policy=0.5)


def test_a_student_made_anew_has_the_entries_too(tiny, kept, config):
    text, make_cache = kept
    given = {**teachers(tiny), "code": make_cache("code")}
    made = {"args": config(recipe="teacher_head", max_steps=2), "teacher": given, "train_dataset": text}
    losses = [
        KDTrainer(**made, **one).train().training_loss for one in ({"model_init": lambda: tiny()}, {"model": tiny()})
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
