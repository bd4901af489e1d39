"""A teacher that is run once, before the first step, because the text comes round again."""

from types import SimpleNamespace

import pytest
import torch
from byte_tokenizer import make_tokenizer
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithPadding

from kdfast.plan.price import size_of
from kdfast.training import DistillationModel, KDConfig, KDTrainer
from kdfast.training.cache import CachedBlocks, write
from kdfast.training.diagnostics import HealthThresholds, Log

T, V, N = 12, 67, 64
SETTINGS = {"recipe": "teacher_head", "precompute_teacher_log_probs": None, "per_device_train_batch_size": 32}
SETTINGS |= {"max_steps": 4, "save_strategy": "no"}  # two epochs
EXACT = {"cache_top_k": V, "cache_dtype": "float32"}  # all of the vocabulary


def blocks(n=N, seed=5):
    ids = torch.randint(3, V, (n, T), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.fixture
def make(tiny, config):
    def trainer(data=None, model=None, collator=None, **given):
        """Its teacher counts the rows it is shown."""
        teacher, data = tiny("gpt2", width=32, seed=1), blocks() if data is None else data
        shown = []

        def count(module, args, kwargs):
            ids = kwargs["input_ids"] if not args else args[0]
            shown.extend(ids.tolist() if ids.shape[1] == T else ())  # not the four tokens that heads are compared on

        teacher.transformer.register_forward_pre_hook(count, with_kwargs=True)
        if model is not None:
            model = DistillationModel(tiny("gpt2"), teacher, recipe=model)
        made = KDTrainer(
            model or tiny("gpt2"), config(**SETTINGS | given), teacher=None if model else teacher, train_dataset=data,
            eval_dataset=blocks(8, seed=6), data_collator=collator,
        )  # fmt: skip
        made.shown = shown
        shown.clear()  # the comparison of heads
        return made

    return trainer


def test_kept_entries_are_learned_from_throughout_unless_asked_otherwise(make):
    run = make(recipe="svd_init")
    assert run.model.recipe.kd_until == 1
    assert run.kd_weight_schedule(0.9) == 2.0
    assert make(recipe="svd_init", kd_until=0.25).kd_weight_schedule(0.9) == 0
    live = make(recipe="svd_init", precompute_teacher_log_probs=False)
    assert (live.kd_weight_schedule(0.4), live.kd_weight_schedule(0.9)) == (2.0, 0.0)


def figures(trainer, *names):
    return [line[name] for line in trainer.state.log_history for name in names if name in line]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.arrow")}


def test_a_text_that_comes_round_again_is_shown_to_the_teacher_once(make, capsys, tmp_path):
    trainer = make()
    teacher = size_of(trainer.model.teacher)
    assert trainer.price.teacher == (2 * teacher.parameters + 2 * V * 32) // 2  # four steps go over the text twice
    trainer.train()
    assert len(trainer.shown) == N  # four steps of 32
    assert isinstance(trainer.train_dataset, CachedBlocks)
    description = trainer.train_dataset.description
    assert (description.method, description.k, description.temperatures) == ("sample", 32, (2.0,))
    out = capsys.readouterr().out
    assert "the text comes round 2 times: the teacher runs over it once" in out
    assert "its KL and loss are higher than in evaluation" in out
    assert f"{tmp_path / 'run' / 'teacher_cache'}: {N * T} tokens, at most 98 bytes each" in out
    trainer.train()  # from there on
    assert len(trainer.shown) == N
    evaluated = trainer.evaluate()
    assert evaluated["eval_kl_teacher_student"] > 0  # to the live teacher
    assert len(trainer.shown) == N + 8
    assert figures(trainer, "kd")[-1] > evaluated["eval_kd"]


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        ("teacher_head", {"kd_weight": 0.7, "student_init": "own"}),
        ("compressed_head", {"kd_weight": 2.0, "student_init": "own"}),
        ("svd_init", {"kd_weight": 2.0, "student_init": "svd"}),
    ],
)
def test_the_rest_of_a_recipe_stays(make, recipe, kept):
    now = make(recipe=recipe, ce_weight=0.5).model.recipe
    expected = {"name": recipe, "teacher": "cached", "ce_weight": 0.5, "compressed_kl": None, **kept}
    assert {name: getattr(now, name) for name in expected} == expected


@pytest.mark.parametrize("start", ["own", "svd"])
def test_with_the_whole_distribution_it_is_the_run_with_the_live_teacher(make, tmp_path, start):
    """Losses, KL, evaluation and what was solved, with the same rows in the same order."""
    runs = {}
    for once in (True, False):
        runs[once] = make(
            precompute_teacher_log_probs=once, student_init=start, eval_strategy="steps", eval_steps=2,
            output_dir=str(tmp_path / str(once)), cache_temperatures=[2.0], **EXACT,
        )  # fmt: skip
        runs[once].train()
    assert runs[True].starts == runs[False].starts
    for name in ("loss", "kd", "eval_loss", "eval_kd", "eval_kl_teacher_student", "eval_teacher_entropy"):
        assert figures(runs[True], name) == pytest.approx(figures(runs[False], name), rel=1e-5), name


def test_a_further_student_pays_nothing(make, tmp_path):
    kept = {"teacher_cache": str(tmp_path / "kept")}
    make(**kept).train()
    before = contents(tmp_path / "kept")
    second = make(**kept, output_dir=str(tmp_path / "second"), seed=3, max_steps=1)  # one epoch: the folder is named
    second.train()
    assert second.shown == []
    assert contents(tmp_path / "kept") == before != {}
    with pytest.raises(ValueError, match=r"kept' is of something else \(train: then .*Name another, or remove it"):
        make(blocks(seed=9), **kept)
    for name, value, changed in (("cache_samples", 4, "k: then 32, now 4"), ("cache_method", "top_k", "method: then")):
        with pytest.raises(ValueError, match=changed):
            make(**kept, **{name: value})


@pytest.mark.parametrize(
    ("method", "run", "what"),
    [
        ("top_k", {"temperature_steps": [3.0, 2.0]}, r"temperature: then \(1.0, 2.0, 3.0\), now \(3.0, 2.0\)"),
        ("sample", {"divergence": "jsd"}, "divergence: then forward_kl, now jsd"),
        ("hidden", {"cache_dtype": "float32"}, "dtype: then int8, now float32"),
    ],
)
def test_entries_that_are_there_and_do_not_fit_the_run(make, tiny, tmp_path, method, run, what):
    """Without cache_method, what a run would make is another kind than what is there."""
    kept = {"teacher_cache": str(tmp_path / "kept")}
    make(**kept, cache_method=method, cache_temperatures=[2.0, 3.0] if method == "top_k" else None).train()
    with pytest.raises(ValueError, match=f"kept' is of something else \\({what}"):
        make(**kept, output_dir=str(tmp_path / "second"), **run)
    if method == "hidden":
        make(**kept, output_dir=str(tmp_path / "second"), temperature_steps=[3.0, 2.0], divergence="jsd").train()


def test_an_interrupted_one_is_completed_to_the_same_bytes(make, tmp_path, monkeypatch):
    given = {"cache_shard_tokens": 20 * T}
    make(teacher_cache=str(tmp_path / "whole"), **given).train()
    whole, kept = write._write_shard, []

    def full(shard, *args):
        if kept:
            raise OSError("the disk is full")
        kept.append(shard)
        whole(shard, *args)

    monkeypatch.setattr(write, "_write_shard", full)
    with pytest.raises(OSError, match="disk is full"):
        make(**given).train()
    monkeypatch.undo()
    resumed = make(**given)
    resumed.train()
    assert len(resumed.shown) == N - 20
    assert contents(tmp_path / "run" / "teacher_cache") == contents(tmp_path / "whole") != {}


def test_a_resumed_run_learns_from_the_same_entries(make, tmp_path):
    given = {"recipe": "svd_init", "save_strategy": "steps", "save_steps": 2}
    whole = make(**given, output_dir=str(tmp_path / "whole"))
    whole.train()
    make(**given).train()
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "later")
    resumed = make(**given)
    resumed.train(resume_from_checkpoint=True)
    assert figures(resumed, "loss")[-2:] == figures(whole, "loss")[-2:]


def test_with_the_collator_that_a_tokenizer_brings(make):
    """transformers' DataCollatorWithPadding, which makes no batch of tensors with an axis more."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    losses = []
    for collator in (None, DataCollatorWithPadding(tokenizer)):
        trainer = make(collator=collator)
        trainer.train()
        losses.append(figures(trainer, "loss"))
    assert losses[0] == losses[1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(blocks())


def shifted(rows):
    """A collator that changes what the models see."""
    ids = torch.tensor([row["input_ids"] for row in rows]).roll(1, dims=1)
    return {"input_ids": ids, "labels": ids}


STAYS_LIVE = {
    "one temperature|entries are of one": {"temperature_steps": [2.0, 1.0], "cache_top_k": 8},
    "drawn ids are no estimate": {"divergence": "reverse_kl", "cache_samples": 32},
    "other inputs of the rows": {"collator": shifted},
    "lacks the run's, 2": {"cache_temperatures": [1.0]},
}


@pytest.mark.parametrize("why", STAYS_LIVE)
def test_what_keeps_the_teacher_live(make, capsys, why):
    assert make(**STAYS_LIVE[why]).model.recipe.teacher == "own_head"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "the text comes round" in line)
    assert why.split("|")[-1] in line
    with pytest.raises(ValueError, match=why.split("|")[-1]):
        make(**STAYS_LIVE[why], precompute_teacher_log_probs=True)


@pytest.mark.parametrize("given", [{"temperature_steps": [2.0, 1.0]}, {"divergence": "reverse_kl"}])
def test_hidden_states_are_kept_where_drawn_ids_say_nothing(make, given):
    runs = [make(**given, precompute_teacher_log_probs=once, eval_strategy="epoch") for once in (None, False)]
    for run in runs:
        run.train()
    assert runs[0].train_dataset.description.method == "hidden"
    for name in ("eval_loss", "eval_kd"):
        assert figures(runs[0], name) == pytest.approx(figures(runs[1], name), rel=1e-2)


@pytest.mark.parametrize("given", [{"cache_method": "hidden"}, {"cache_samples": 32}, {}])
def test_a_method_that_a_single_pass_has_no_use_for_is_said(make, capsys, given):
    assert make(**given, max_steps=1).model.recipe.teacher == "own_head"
    assert ("nothing is kept of it" in capsys.readouterr().out) == bool(given)


def test_a_disk_without_room(make, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**30))
    assert make().model.recipe.teacher == "own_head"
    assert "entries take up to 0.0 GB, and the disk of" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Make room, name another folder"):
        make(teacher_cache="kept")


def test_what_is_done_unasked(make, capsys):
    """Nothing where the text is seen once, the caller says no or made the model, or the text's rows may change."""
    changing = blocks().with_transform(lambda rows: rows)
    left = [{"max_steps": 2}, {"kd_until": 0.5}]  # by then KD has seen it once
    left += [{"precompute_teacher_log_probs": False}, {"recipe": "projector"}, {"recipe": "lm_only"}]
    for given in (*left, {"model": "teacher_head"}, {"data": changing}, {"data": Stream()}):
        teacher = make(**given).model.recipe.teacher
        assert teacher == {"projector": "projected", "lm_only": "none"}.get(given.get("recipe"), "own_head")
    said = capsys.readouterr().out
    assert [said.count(why) for why in ("is your own", "rows may change")] == [1, 1]
    assert make(model="teacher_head", precompute_teacher_log_probs=True).model.recipe.teacher == "cached"
    assert make(data=changing, precompute_teacher_log_probs=True).model.recipe.teacher == "cached"
    with pytest.raises(ValueError, match=r"a recipe that learns from its own head alone, .* this is 'projector'"):
        make(recipe="projector", precompute_teacher_log_probs=True)
    with pytest.raises(ValueError, match="the training text is a stream"):
        make(data=Stream(), precompute_teacher_log_probs=True)
    with pytest.raises(ValueError, match="precompute_teacher_log_probs=False and teacher_cache='kept'"):
        make(precompute_teacher_log_probs=False, teacher_cache="kept")
    with pytest.raises(ValueError, match="teacher_cache='kept', of which recipe 'projector' would learn nothing"):
        make(recipe="projector", teacher_cache="kept")


def test_an_unasked_one_leaves_a_folder_of_something_else_alone(make, capsys):
    make().train()
    capsys.readouterr()
    other = make(blocks(seed=9))
    assert other.model.recipe.teacher == "own_head"
    assert "teacher_cache' is of something else (train: then" in capsys.readouterr().out


def test_a_solved_start_without_a_teacher(tiny):
    recipe = KDConfig(recipe="cached", student_init="svd").resolved()
    with pytest.raises(ValueError, match="teacher is None; student_init='svd' needs one"):
        DistillationModel(tiny("gpt2"), recipe=recipe)


@pytest.mark.parametrize(
    "given", [{"cache_samples": 4, "cache_top_k": 4}, {"cache_method": "top_k", "cache_samples": 4}]
)
def test_one_way_of_keeping(given):
    with pytest.raises(ValueError, match="expected cache_samples for 'sample', or cache_top_k for 'top_k'"):
        KDConfig(**given)


def test_a_kl_to_drawn_ids_is_not_judged():
    """Its value has in it what drawing took from the teacher's entropy."""
    line = {"loss": 40.0, "ce": 4.0, "kd": 9.0, "kd_weight": 2.0, "temperature": 2.0}
    assert "above 5" in Log(HealthThresholds(), 50257).read(line, 0.5)["kl"]
    assert "kl" not in Log(HealthThresholds(), 50257, drawn=True).read(line, 0.5)


def test_health_of_a_run_with_drawn_ids(make):
    trainer = make()
    trainer.train()
    assert trainer.health.drawn
