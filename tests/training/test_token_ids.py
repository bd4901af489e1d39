"""Ids that student or teacher has no row for: tokens added to one of the two, or text of another tokenizer."""

import pytest
import torch
from tiny_models import loss_by_hand
from transformers import default_data_collator

from kdfast.training import CacheError, DistillationModel, KDTrainer, TeacherCache, cache_teacher
from kdfast.training.hf import known_ids

ADDED = 67  # the id of a token that was added to the student: its vocabulary is one larger than the teacher's 67


@pytest.fixture
def student(tiny):
    model = tiny("llama")
    model.resize_token_embeddings(ADDED + 1, mean_resizing=False)
    return model


@pytest.fixture
def teacher(tiny):
    return tiny("llama", seed=1, width=32)


@pytest.fixture
def added(batch):
    """The batch with the added token in its text."""
    ids = batch["input_ids"].clone()
    ids[0, 5] = ADDED
    labels = torch.where(ids == ADDED, ADDED, batch["labels"])
    return {**batch, "input_ids": ids, "labels": labels}


@pytest.fixture
def padded(batch):
    """The batch with the added token as padding."""
    return {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, ADDED)}


def test_the_refusal_of_two_heads_says_what_then_works(student, teacher, added):
    with pytest.raises(
        ValueError, match=r"added .* rows in the other, teacher.resize_token_embeddings\(68\), or valid_v"
    ):
        DistillationModel(student, teacher, recipe="teacher_head")
    model = DistillationModel(student, teacher, recipe="teacher_head", valid_vocab=ADDED)
    with pytest.raises(
        ValueError, match=r"input_ids contains 67, and the teacher has 67 .*resize_token_embeddings\(68\)"
    ):
        model(**added)
    teacher.resize_token_embeddings(ADDED + 1)
    added = {"input_ids": added["input_ids"], "labels": added["input_ids"]}
    loss = DistillationModel(student, teacher, recipe="teacher_head")(**added).loss
    torch.testing.assert_close(loss, loss_by_hand(student, teacher, *added.values()))


@pytest.mark.parametrize("recipe", ["projector", "probe", "lm_only", "compressed_head"])
def test_whatever_the_teacher_is_run_for(student, teacher, added, recipe):
    model = DistillationModel(student, teacher, recipe=recipe, valid_vocab=ADDED)
    asked = {"compressed_head": lambda: model.solve([added] * 3, tokens=32)}
    with pytest.raises(ValueError, match="input_ids contains 67, and the teacher has 67 token embeddings"):
        asked.get(recipe, lambda: model(**added, with_fidelity=True))()


@pytest.mark.parametrize("recipe", ["teacher_head", "projector", "compressed_head"])
def test_an_added_token_as_padding_changes_nothing(student, teacher, batch, padded, recipe):
    losses = []
    for one in (batch, padded):
        torch.manual_seed(7)
        model = DistillationModel(student, teacher, recipe=recipe, valid_vocab=ADDED)
        model.solve([one] * 3, tokens=32)
        losses.append(model(**one, with_fidelity=True))
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert losses[0].fidelity == losses[1].fidelity
    without = {name: x for name, x in padded.items() if name != "attention_mask"}
    with pytest.raises(ValueError, match=r"input_ids contains 67.*attention_mask is 0"):
        model(**without)


@pytest.mark.parametrize("strange", [67, 1000, -100])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_ids_that_a_model_has_no_row_for_are_named(tiny, batch, role, strange):
    sizes = {"student": 70, "teacher": 70, role: 67}
    if strange == 1000:
        sizes = {"student": 67, "teacher": 67}
        role = "student"  # who reads first
    if strange < 0:
        role = "student"
    models = [tiny("llama", V=V, seed=i) for i, V in enumerate(sizes.values())]
    batch["input_ids"][0, 3] = strange
    with pytest.raises(ValueError, match=rf"input_ids contains {strange}, and the {role} has \d+ token embeddings"):
        DistillationModel(*models, recipe="teacher_head", valid_vocab=67)(**batch)


def test_the_place_of_an_image_is_the_models_own_affair(tiny, batch):
    model = tiny("llama")
    model.config.image_token_id, model.config.pad_token_id = 90, 91
    ids = batch["input_ids"]
    ids[0, 3] = 90
    assert known_ids(model, "student", ids, None)[0] is not ids
    assert torch.equal(known_ids(model, "student", ids, None)[0], ids)
    ids[0, 4] = 91
    with pytest.raises(ValueError, match="input_ids contains 91"):
        known_ids(model, "student", ids, None)


def test_labels_past_valid_vocab_say_so(tiny, batch):
    batch["labels"][0, 6] = 50
    with pytest.raises(ValueError, match=r"labels contains 50; expected ids from 0 to 39 \(valid_vocab=40\)"):
        DistillationModel(tiny("llama"), tiny("llama", seed=1), recipe="teacher_head", valid_vocab=40)(
            **{**batch, "labels": batch["labels"].where(batch["labels"] == 50, -100)}
        )


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_where_values_are_not_looked_at_the_loss_is_nan(tiny, batch, monkeypatch, role):
    """As on a GPU, where looking would wait for it: the first batch's alone are looked at."""
    monkeypatch.setattr("kdfast.training.model.can_read", lambda tensor: False)
    sizes = {"student": 70, "teacher": 70, role: 67}
    models = [tiny("llama", V=V, seed=i) for i, V in enumerate(sizes.values())]
    model = DistillationModel(*models, recipe="teacher_head", valid_vocab=67)
    good = model(**batch).loss
    strange = {**batch, "input_ids": batch["input_ids"].clone()}
    strange["input_ids"][0, 3] = 68
    loss = model(**strange).loss
    loss.backward()
    assert loss.isnan()
    assert model.student.lm_head.weight.grad.isnan().all()
    assert torch.equal(model(**batch).loss, good)
    padding = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 68)}
    assert torch.equal(model(**padding).loss, good)
    with pytest.raises(ValueError, match="input_ids contains 68"):
        DistillationModel(*models, recipe="teacher_head", valid_vocab=67)(**strange)


def test_the_trainer_stops_at_the_first_batch(student, teacher, config):
    ids = torch.randint(3, 67, (8, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 4] = ADDED
    rows = [{"input_ids": row, "labels": row} for row in ids]
    for recipe in ("teacher_head", "svd_init"):
        trainer = KDTrainer(
            student,
            config(recipe=recipe, valid_vocab=ADDED),
            teacher=teacher,
            train_dataset=rows,
            data_collator=default_data_collator,
        )
        with pytest.raises(ValueError, match="input_ids contains 67, and the teacher has 67 token embeddings"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_a_cache_is_refused_before_the_teacher_is_run(teacher, rows, tmp_path, monkeypatch):
    data = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows(4)]
    data[3]["input_ids"][2:] = ADDED
    monkeypatch.setattr("kdfast.training.cache.write.run_backbone", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(ValueError, match="input_ids contains 67, and the teacher has 67 token embeddings"):
        cache_teacher(teacher, {"train": data}, tmp_path / "cache", k=8)
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_text_with_an_added_token_as_padding(teacher, student, rows, tmp_path, config):
    data = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows(4)]
    data[3]["input_ids"][9:], data[3]["attention_mask"][9:] = ADDED, 0
    cache_teacher(teacher, {"train": data}, tmp_path / "cache", k=8)
    cached = TeacherCache(tmp_path / "cache").dataset("train", data)

    def trainer(**options):
        return KDTrainer(
            student, config(recipe="auto", **options), train_dataset=cached, data_collator=default_data_collator
        )

    with pytest.raises(CacheError, match="valid_vocab, the number of real tokens"):
        trainer()
    trainer(valid_vocab=ADDED).train()
