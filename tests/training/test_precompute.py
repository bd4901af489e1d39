"""A teacher that is run once, before the first step, because the text comes round again."""

import pytest
import torch
from datasets import Dataset

from kdfast.plan.price import size_of
from kdfast.training import KDTrainer
from kdfast.training.cache import CachedBlocks

T, V = 12, 67
SETTINGS = {"recipe": "svd_init", "precompute_teacher_log_probs": None, "max_steps": 4}
SETTINGS |= {"per_device_train_batch_size": 32}


@pytest.fixture
def text():
    ids = torch.randint(3, V, (64, T), generator=torch.Generator().manual_seed(5)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.fixture
def trainer(tiny, text, config):
    def make(teacher=True, model=None, train_dataset=text, **given):
        args = config(**{**SETTINGS, **given})
        teacher = tiny("gpt2", width=32, seed=1) if teacher is True else teacher
        data = {"train_dataset": train_dataset, "eval_dataset": text.select(range(8))}
        return KDTrainer(model or tiny("gpt2"), args, teacher=teacher, **data)

    return make


def test_kept_entries_are_learned_from_throughout_unless_asked_otherwise(trainer):
    run = trainer()
    assert run.model.recipe.kd_until == 1
    assert run.kd_weight_schedule(0.9) == 2.0
    assert trainer(kd_until=0.25).kd_weight_schedule(0.9) == 0
    live = trainer(precompute_teacher_log_probs=False)
    assert (live.kd_weight_schedule(0.4), live.kd_weight_schedule(0.9)) == (2.0, 0.0)


def test_a_text_that_comes_round_again_is_shown_to_the_teacher_once(trainer, monkeypatch):
    run = trainer()
    recipe = run.model.recipe
    assert (recipe.name, recipe.teacher, recipe.student_init, recipe.kd_weight) == ("svd_init", "cached", "svd", 2.0)
    teacher = size_of(run.model.teacher)
    assert run.price.teacher == (2 * teacher.parameters + 2 * V * 32) // 2  # four steps go over the text twice
    run.train()
    assert isinstance(run.train_dataset, CachedBlocks)
    assert [start.what for start in run.starts] == ["student_init='svd'"]
    metrics = run.evaluate()
    assert metrics["eval_kl_teacher_student"] > 0
