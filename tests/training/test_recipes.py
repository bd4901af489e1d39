"""What recipe="auto" comes to, and that it says so."""

import pytest
import torch

from kdfast.training import RECIPES, DistillationModel, KDTrainer
from kdfast.training.recipes import choose_recipe, is_fresh

FRESH = [("gpt2", {}), ("llama", {}), ("qwen2", {}), ("gemma2", {}), ("cohere", {}), ("granite", {}), ("opt", {})]


def step(model):
    """What training does to an embedding, in one step: tokens move by how often they occur."""
    ids = torch.randint(0, 20, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.get_output_embeddings().weight[ids.flatten()] += 2.0
    return model


@pytest.mark.parametrize(("family", "settings"), FRESH)
def test_fresh_students_are_told_from_trained_ones(tiny, family, settings):
    student = tiny(family, V=2000, width=32, **settings)
    assert is_fresh(student)
    assert not is_fresh(step(student))


def test_by_case(tiny):
    fresh, trained = tiny(V=2000, width=32), step(tiny(V=2000, width=32))
    teacher = tiny(V=2000, width=48, seed=1)
    padded = tiny(V=2048, width=48, seed=1)
    found = {
        "no teacher": choose_recipe(fresh, None).recipe,
        "fresh": choose_recipe(fresh, teacher).recipe,
        "pretrained": choose_recipe(trained, teacher).recipe,
        "padding": choose_recipe(trained, padded, 2000).recipe,
    }
    assert found["no teacher"] == "lm_only"
    assert RECIPES[found["fresh"]].student_init == "svd"
    assert RECIPES[found["pretrained"]].student_init == "own", "a trained embedding is never written over"
    with pytest.raises(ValueError, match=r"auto.*2048 rows and the student's 2000.*pass valid_vocab.*other words"):
        choose_recipe(trained, padded)
    assert found["padding"] == found["pretrained"]


def test_the_trainer_prints_what_it_took_and_why(tiny, rows, config, capsys):
    args = config(recipe="auto")
    trainer = KDTrainer(tiny("gpt2"), args, teacher=tiny(width=24, seed=1), train_dataset=rows(30))
    printed = capsys.readouterr().out
    assert "recipe svd_init: the student is fresh" in printed
    assert "Expect it ahead of LM only at equal tokens" in printed
    assert trainer.model.recipe.student_init == "svd"
    trainer.train()
    assert trainer.price.ratio > 1
    said = f"svd_init: {trainer.price}; the KD term ends after 50% of the run (kd_until)\n"
    assert said in capsys.readouterr().out


def test_explicit_values_go_on_top(tiny, config):
    trainer = KDTrainer(tiny("gpt2"), config(recipe="auto", kd_weight=0.123), teacher=tiny(width=24, seed=1))
    assert trainer.model.recipe.kd_weight == 0.123


def test_a_model_that_was_not_solved_says_so(tiny, batch):
    model = DistillationModel(tiny(), tiny(width=24, seed=1))
    with pytest.raises(RuntimeError, match=r"recipe 'svd_init' starts from solved values: call model\.solve\("):
        model(**batch)
    model.solve([batch] * 4)
    model(**batch).loss.backward()
