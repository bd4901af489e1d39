"""The price of a token, held against the operations that torch counts in one step of training."""

from dataclasses import replace

import pytest
import torch
from tiny_models import TINY_MOE, tiny, tiny_moe
from torch.utils.flop_counter import FlopCounterMode

from kdfast.engines import operators
from kdfast.plan.price import Price, Size, price_per_token, size_of
from kdfast.training import RECIPES, DistillationModel
from kdfast.training.data.shared_vocabulary import SharedVocabulary
from kdfast.training.recipes import Recipe

FAMILIES = ("gpt2", "llama", "qwen2")
RECIPE_CASES = [
    *(one for one in RECIPES.values() if one.name not in ("cached", "svd_init", "svd_blocks", "projector_refit")),
    Recipe("svd_init at rank 8", teacher="compressed_head", compressed_rank=8, student_init="svd"),
    Recipe("projector's gradient", teacher="projected", teacher_grad="projector"),
    Recipe("no gradient", teacher="projected", teacher_grad="none"),
    Recipe("no gradient, anchor", teacher="projected", teacher_grad="none", anchor_weight=0.5),
    Recipe("solved again", teacher="projected", teacher_grad="none", projector_init="svd", projector_resolve_steps=4),
    Recipe("hidden states", teacher="none", kd_weight=0.0, hidden_weight=1.0),
]


@pytest.fixture
def counted(monkeypatch):
    """Return the matrix operations of what is called, those within an engine, where no mode looks, too."""

    def product(out, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    def count(work):
        within = []
        counting = {"custom_mapping": {torch.ops.aten.addmm_: product}, "display": False}
        solve = operators._solve

        def watched(*args):
            with FlopCounterMode(**counting) as inside:
                result = solve(*args)
            within.append(inside.get_total_flops())
            return result

        monkeypatch.setattr(operators, "_solve", watched)
        with FlopCounterMode(**counting) as outside:
            work()
        by_operator = outside.get_flop_counts()["Global"]
        return sum(within) + sum(n for op, n in by_operator.items() if "bmm" not in str(op))  # attention's products

    return count


@pytest.mark.parametrize("recipe", RECIPE_CASES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_torch_counts(family, recipe, counted, monkeypatch):
    # a target for every token: the engine leaves out rows without one
    monkeypatch.setattr("kdfast.training.model.shift_labels", lambda labels, *_: labels.roll(-1, 1))
    student, teacher = tiny(family, width=16, layers=2), tiny(family, width=24, layers=3, seed=1)
    for one in (student, teacher):
        one.set_attn_implementation("eager")
    given = None if recipe.name == "lm_only" else teacher
    batch = {"input_ids": torch.randint(3, 67, (8, 16), generator=torch.Generator().manual_seed(0))}
    batch["labels"] = batch["input_ids"]
    shared = None
    if recipe.teacher == "shared_head":
        shared = SharedVocabulary(torch.arange(60), torch.arange(60), share=60 / 67, lines=[])
        batch |= {"teacher_input_ids": batch["input_ids"], "teacher_positions": torch.arange(16).expand(8, 16)}
    options = {"engine": "torch", "check_heads": False, "shared_vocabulary": shared}
    model = DistillationModel(student, given, recipe=recipe, **options)
    model.solve([batch])
    operations = counted(lambda: model(**batch).loss.backward())
    rank = None if model.compressed_head is None else model.compressed_head.rank
    throughout = replace(recipe, kd_until=1.0)
    price = price_per_token(throughout, size_of(student), given and size_of(teacher), rank=rank)
    assert operations == batch["input_ids"].numel() * (price.lm_only + price.teacher)


@pytest.mark.parametrize("recipe", ["lm_only", "teacher_head", "compressed_head", "projector", "projector_fixed"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_of_what_an_adapter_freezes_no_gradient_is_computed(family, recipe, head, counted, monkeypatch):
    """Nor of the head: its gradient's product is the one that a frozen head has less."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("kdfast.training.model.shift_labels", lambda labels, *_: labels.roll(-1, 1))
    student, teacher = tiny(family, width=16, layers=2), tiny(family, width=24, layers=3, seed=1)
    for one in (student, teacher):
        one.set_attn_implementation("eager")
    student.enable_input_require_grads()  # so that the first layer is like the others
    given, whole = None if recipe == "lm_only" else teacher, ["lm_head"] if head == "trained" else None
    config = peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"])
    config.modules_to_save = whole
    model = DistillationModel(student, given, recipe=recipe, engine="torch", check_heads=False, peft_config=config)
    batch = {"input_ids": torch.randint(3, 67, (8, 16), generator=torch.Generator().manual_seed(0))}
    batch["labels"] = batch["input_ids"]
    model.solve([batch])
    operations = counted(lambda: model(**batch).loss.backward())
    rank = None if model.compressed_head is None else model.compressed_head.rank
    size = size_of(model.student)
    throughout = replace(model.recipe, kd_until=1.0)
    price = price_per_token(throughout, size, given and size_of(teacher), rank=rank)
    assert operations == batch["input_ids"].numel() * (price.lm_only + price.teacher)
    assert size.frozen_head is (head == "frozen")
    plain = size_of(tiny(family, width=16, layers=2))
    assert size.frozen == plain.parameters


# not those with biases of experts, and a convolution
@pytest.mark.parametrize("family", [name for name in TINY_MOE if name not in ("gpt_oss", "jamba")])
def test_experts_count_as_often_as_they_are_taken(family, counted):
    model = tiny_moe(family, V=128)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 67, (2, 8))
    size = size_of(model)
    assert counted(lambda: model(ids, use_cache=False)) == ids.numel() * 2 * (size.parameters + 128 * 16)


def test_entries_that_were_kept_cost_nothing_and_it_says_what_it_is():
    student, teacher = Size(1000, 100, 10, 2), Size(5000, 100, 20, 4)
    lm_only = 6 * 1000 + 3 * 2 * 100 * 10
    assert price_per_token(RECIPES["cached"], student, None) == Price(lm_only, 0)
    assert price_per_token(RECIPES["cached"], student, teacher).ratio == 1
    whole = 2 * 5000 + 2 * 100 * 20
    assert price_per_token(RECIPES["cached"], student, teacher, passes=4) == Price(lm_only, whole // 4)
    live = price_per_token(RECIPES["teacher_head"], student, teacher)
    assert live == Price(lm_only, whole)
    half = replace(RECIPES["teacher_head"], kd_until=0.5)
    assert price_per_token(half, student, teacher) == Price(lm_only, whole // 2)
    assert price_per_token(replace(half, hidden_weight=1.0), student, teacher).teacher > whole  # throughout
    assert str(live) == "2.6e+04 operations per token, 2.17 times LM only's"
