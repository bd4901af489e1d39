"""Vision-language students and teachers: an image changes the loss, the tower learns, and no image is lost unsaid."""

import datasets
import numpy as np
import oracle
import pytest
import torch
from tiny_models import IMAGE, VISION, image_batch, tiny_vision
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, default_data_collator

from kdfast.training import CacheError, DistillationModel, KDTrainer, TeacherCache, cache_teacher
from kdfast.training.data.text import DataError, load_blocks
from kdfast.training.hf import backbone, check_model, may_skip_parameters

FAMILIES = [family for family in VISION if family != "llama4"]  # whose images are merged outside of its backbone


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family):
    student, teacher = (tiny_vision(family, seed).double() for seed in (1, 2))
    batch = image_batch(family)
    batch["pixel_values"] = batch["pixel_values"].double()
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    z_s, z_t = (model(**inputs).logits[:, :-1] for model in (student, teacher.eval()))
    targets = batch["labels"][:, 1:]
    counts = targets != -100
    kl = oracle.kl((z_t.detach() / 2).log_softmax(-1), (z_s / 2).log_softmax(-1))[counts].mean()
    ce = torch.nn.functional.cross_entropy(z_s[counts], targets[counts])
    (ce + 3 * 4 * kl).backward()
    expected = gradients(student)
    student.zero_grad()

    model = DistillationModel(student, teacher, recipe="teacher_head")
    loss = model(**batch, temperature=2.0, kd_weight=3.0).loss
    torch.testing.assert_close(loss, ce + 12 * kl, rtol=1e-10, atol=1e-12)
    loss.backward()
    found = gradients(student)
    assert found.keys() == expected.keys()
    assert any("vis" in name and gradient.abs().max() > 1e-6 for name, gradient in found.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", VISION)
def test_text_alone_is_taken_too(family):
    student = tiny_vision(family, 1)
    check_model(student, "student")
    text = {name: image_batch(family)[name] for name in ("input_ids", "labels")}
    text["input_ids"] = text["labels"] = text["input_ids"].clamp(max=60)
    loss = DistillationModel(student, tiny_vision(family, 2), recipe="lm_only")(**text).loss
    torch.testing.assert_close(loss, student(**text).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("blind", "named"), [("student", "LlamaModel of LlamaForCausalLM"), ("teacher", "LlamaModel")])
def test_who_cannot_see_is_named(tiny, blind, named):
    models = {"student": tiny_vision(seed=1), "teacher": tiny_vision(seed=2), blind: tiny("llama")}
    model = DistillationModel(**models, recipe="teacher_head")
    with pytest.raises(ValueError, match=f"the {blind} does not read pixel_values: its backbone, {named}"):
        model(**image_batch())


def test_other_inputs_that_a_backbone_would_swallow_are_named(tiny):
    ids = torch.randint(3, 60, (2, 8))
    model = DistillationModel(tiny_vision(), recipe="lm_only")
    for name in ("pixel_valeus", "logits_to_keep", "output_router_logits"):
        with pytest.raises(ValueError, match=f"the student does not read {name}: its backbone, LlavaModel"):
            model(ids, labels=ids, **{name: torch.ones(2)})
    model(ids, labels=ids, pixel_values=None)  # not given
    with pytest.raises(ValueError, match="backbone, Llama4TextModel of Llama4ForConditionalGeneration, has no such"):
        DistillationModel(tiny_vision("llama4"), recipe="lm_only")(**image_batch("llama4"))
    state = MambaForCausalLM(MambaConfig(vocab_size=67, hidden_size=16, num_hidden_layers=1, state_size=4))
    model = DistillationModel(state, recipe="lm_only")
    model(ids, torch.ones_like(ids), ids)
    with pytest.raises(ValueError, match="the student does not read position_ids"):  # as packed rows have them
        model(ids, labels=ids, position_ids=torch.arange(8).expand(2, 8))


def test_the_trainer_keeps_what_the_models_read(config):
    batch = image_batch("gemma3", rows=4)
    rows = datasets.Dataset.from_dict({name: x.tolist() for name, x in batch.items()} | {"source": ["web"] * 4})
    student = tiny_vision("gemma3", 1)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    args = config(recipe="teacher_head", max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = KDTrainer(student, args, teacher=tiny_vision("gemma3", 2), train_dataset=rows, eval_dataset=rows)
    whole = trainer.model(**batch, kd_weight=0.0).metrics.ce.item()
    assert trainer.evaluate()["eval_ce"] == pytest.approx(whole, rel=1e-5)
    trainer.train()
    moved = [name for name, p in student.named_parameters() if not torch.equal(p, before[name])]
    assert any("vision_tower" in name for name in moved)


@pytest.mark.parametrize("as_list", [True, False])
def test_images_for_nobody_are_refused(tiny, config, as_list):
    rows = [{name: x[0].tolist() for name, x in image_batch().items()}] * 4
    data = rows if as_list else datasets.Dataset.from_list(rows)
    trainer = KDTrainer(tiny(), config(recipe="lm_only"), train_dataset=data)
    with pytest.raises(ValueError, match="the student does not read pixel_values"):
        trainer.train()


PICTURES = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
PICTURES_OF_IDS = datasets.Features({"input_ids": datasets.List(datasets.Value("int64")), "picture": datasets.Image()})


def test_pictures_that_no_collator_would_see_are_refused(tiny, config, tmp_path):
    pytest.importorskip("PIL")
    rows = {"input_ids": [[3, 4]], "labels": [[3, 4]], "images": [[[0.0]]]}
    with pytest.raises(ValueError, match=r"train_dataset has a column 'images' of images.*which nobody reads"):
        KDTrainer(tiny(), config(recipe="lm_only"), train_dataset=datasets.Dataset.from_dict(rows))
    pictures = [np.zeros((2, 2, 3), dtype=np.uint8)]
    data = datasets.Dataset.from_dict({"text": ["a"], "picture": pictures}, features=PICTURES)
    with pytest.raises(ValueError, match=r"eval_dataset\['web'\] has a column 'picture' of images"):
        KDTrainer(tiny(), config(recipe="lm_only"), eval_dataset={"web": data})
    with pytest.raises(DataError, match="train_file 'x' has the column 'picture', which holds more than text"):
        load_blocks("train_file 'x'", data, None, 8)
    rows = [{name: x[0] for name, x in image_batch().items()}] * 2
    with pytest.raises(ValueError, match=r"splits\['train'\] has pixel_values, and a cache is of text alone"):
        cache_teacher(tiny_vision(), {"train": rows}, tmp_path / "cache", k=4)
    raw = datasets.Dataset.from_dict({"input_ids": [[3, 4]], "picture": pictures}, features=PICTURES_OF_IDS)
    with pytest.raises(ValueError, match=r"splits\['train'\] has picture, and a cache is of text alone"):
        cache_teacher(tiny(), {"train": raw}, tmp_path / "cache", k=4)
    texts = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    cache_teacher(tiny_vision(), {"train": texts}, tmp_path / "cache", k=4)
    TeacherCache(tmp_path / "cache").dataset("train", texts)
    with pytest.raises(CacheError, match="the data has a column 'pixel_values', which the teacher was not shown"):
        TeacherCache(tmp_path / "cache").dataset("train", rows)


@pytest.mark.parametrize("column", ["images", "picture"])
def test_a_collator_makes_pixels_of_pictures(config, column):
    """As a processor does: it asks each row for its picture, which no model reads. One that does not is found out."""
    image = pytest.importorskip("PIL.Image")
    batch = image_batch(rows=4)
    pictures = [image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)) for i in range(4)]
    texts = [{"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100)} for ids in batch["input_ids"]]
    rows = [{**text, column: picture, "source": "web"} for text, picture in zip(texts, pictures, strict=True)]
    bare = [{**text, "images": []} for text in texts]  # rows of a data set that has pictures elsewhere
    KDTrainer(
        tiny_vision(), config(recipe="lm_only", max_steps=1), train_dataset=bare, data_collator=default_data_collator
    ).train()

    def see(rows):
        pixels = [torch.from_numpy(np.asarray(row[column], dtype=np.float32)).permute(2, 0, 1) for row in rows]
        return {**default_data_collator(rows), "pixel_values": torch.stack(pixels)}

    args = config(recipe="lm_only", max_steps=1)
    student, before = tiny_vision(), tiny_vision().state_dict()
    KDTrainer(student, args, train_dataset=rows, data_collator=see).train()
    assert any("vision_tower" in name and not torch.equal(p, before[name]) for name, p in student.state_dict().items())
    with pytest.raises(ValueError, match=f"the data set has a column '{column}' of images.*nobody reads"):
        KDTrainer(tiny_vision(), args, train_dataset=rows, data_collator=default_data_collator).train()


def test_who_may_leave_parameters_without_a_gradient(tiny):
    assert all(may_skip_parameters(tiny_vision(family)) for family in VISION)
    assert not any(may_skip_parameters(tiny(family)) for family in ("gpt2", "llama", "opt"))
    frozen = tiny_vision()
    frozen.model.vision_tower.requires_grad_(False)
    assert may_skip_parameters(frozen)
    frozen.model.multi_modal_projector.requires_grad_(False)
    assert not may_skip_parameters(frozen)
    crossed = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=67, add_cross_attention=True))
    assert may_skip_parameters(crossed)


def test_the_backbone_is_what_the_head_multiplies(tiny):
    for family in VISION:
        model = tiny_vision(family).eval()
        whole = model.language_model if family == "llama4" else model
        assert backbone(model) is whole.model
    text = tiny_vision("llama4").language_model
    check_model(text, "student")
    assert backbone(text) is text.model
