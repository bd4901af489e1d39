"""Pictures and chats through the processors that models come with, as TRL's collator hands them over."""

import datasets
import numpy as np
import oracle
import pytest
import torch
from tiny_models import tiny
from tiny_processors import SPECIAL, tiny_processor, vision_model_for
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from kdfast.training import DistillationModel, KDTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*requires torchvision.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
]
FAMILIES = list(SPECIAL)


def rows(pictures=(1, 2, 1, 0)):
    """Chats of several lengths, each about so many pictures."""
    image = pytest.importorskip("PIL.Image")
    drawn = iter(np.random.default_rng(0).integers(0, 255, (sum(pictures), 9, 10, 3), dtype=np.uint8))
    return [
        {
            "images": [image.fromarray(next(drawn)) for _ in range(n)],
            "messages": [
                {"role": "user", "content": "What is that?"},
                {"role": "assistant", "content": "It is " + "b" * i},
            ],
        }
        for i, n in enumerate(pictures)
    ]


def collator(processor, **options):
    sft = pytest.importorskip("trl.trainer.sft_trainer", reason="pip install trl")
    return sft.DataCollatorForVisionLanguageModeling(processor, **options)


def places(processor):
    """Ids that are no text: all that were added to the tokenizer, but its end."""
    return torch.arange(257, len(processor.tokenizer))


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_counts_and_every_gradient_is_plain_torchs(family, assistant_only):
    processor = tiny_processor(family)
    batch = dict(collator(processor, assistant_only_loss=assistant_only)(rows()))
    student, teacher = (vision_model_for(family, processor, seed) for seed in (1, 2))
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    z_s, z_t = student(**inputs).logits[:, :-1], teacher.eval()(**inputs).logits[:, :-1].detach()
    targets = batch["labels"][:, 1:]
    counts = (targets != -100) & ~torch.isin(targets, places(processor))
    assert (counts.sum() < (targets != -100).sum()) == (not assistant_only)  # TRL leaves labels at pictures
    kl = oracle.kl((z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1))[counts].mean()
    ce = torch.nn.functional.cross_entropy(z_s[counts], targets[counts])
    (ce + 3 * 4 * kl).backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    model = DistillationModel(student, teacher, recipe="teacher_head")
    output = model(**batch, temperature=2.0, kd_weight=3.0)
    assert torch.equal(model.targets(batch["labels"], batch["attention_mask"])[:, :-1] != -100, counts)
    assert output.metrics.tokens == counts.sum()
    torch.testing.assert_close(output.loss, ce + 12 * kl, rtol=1e-6, atol=0)
    output.loss.backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    sees = any("vis" in name and gradient.any() for name, gradient in found.items())
    assert sees or (family == "gemma3" and assistant_only)  # whose window of 8 has no picture before the answer
    for name, gradient in expected.items():  # to the largest of each; a bias of keys has none but of rounding
        atol = max(1e-6 * gradient.abs().max().item(), 1e-8)
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_takes_trls_collator_as_it_is(family, config, capsys, tmp_path):
    processor = tiny_processor(family)
    data = datasets.Dataset.from_list(
        rows(), features=datasets.Features({
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        }),
    )  # fmt: skip
    student = vision_model_for(family, processor, 1)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    args = config(
        recipe="teacher_head", max_steps=2, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
        train_sampling_strategy="sequential", precompute_teacher_log_probs=None,
    )  # fmt: skip
    collate = collator(processor)
    trainer = KDTrainer(
        student, args, teacher=vision_model_for(family, processor, 2), train_dataset=data, eval_dataset=data,
        processing_class=processor, data_collator=collate,
    )  # fmt: skip
    texts = [row["input_ids"] for row in (collate([dict(row)]) for row in rows())]
    counted = sum(int((~torch.isin(ids[0, 1:], places(processor))).sum()) for ids in texts)
    assert trainer.evaluate()["eval_tokens"] == counted
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["tokens_seen"] == counted
    moved = [name for name, p in student.named_parameters() if not torch.equal(p, before[name])]
    assert any("vis" in name for name in moved)
    said = capsys.readouterr().out
    assert said.count("labels at the places of images, video and sound") <= 1  # once a process
    assert "the teacher runs at every step" in said  # the rows come again, and a cache has no pictures
    if family != "qwen2_5_vl":  # without torchvision there is no processor to be read again
        again = AutoProcessor.from_pretrained(tmp_path / "run" / "checkpoint-2")
        assert type(again) is type(processor)
        assert torch.equal(collator(again)(rows())["input_ids"], collate(rows())["input_ids"])


def test_images_under_a_cache_are_refused(config):
    processor = tiny_processor("llava")
    args = config(recipe="teacher_head", precompute_teacher_log_probs=True)
    with pytest.raises(ValueError, match=r"the teacher cannot be run beforehand.*images.*a cache is of text alone"):
        KDTrainer(
            vision_model_for("llava", processor, 1), args, teacher=vision_model_for("llava", processor, 2),
            train_dataset=rows(), processing_class=processor, data_collator=collator(processor),
        )  # fmt: skip


def test_a_teacher_that_sees_nothing_is_named(config):
    processor = tiny_processor("llava")
    model = DistillationModel(
        vision_model_for("llava", processor), tiny("llama", V=len(processor.tokenizer)), recipe="teacher_head"
    )
    batch = collator(processor)(rows())
    with pytest.raises(ValueError, match=r"the teacher does not read pixel_values.* or take a teacher that reads it"):
        model(**batch)
    model(**collator(processor)(rows()[3:]))  # text alone


def test_two_places_of_images_are_refused_where_there_are_images():
    processor = tiny_processor("llava")
    student, teacher = (vision_model_for("llava", processor, seed) for seed in (1, 2))
    teacher.config.image_token_id = 40
    model = DistillationModel(student, teacher, recipe="teacher_head")
    with pytest.raises(ValueError, match=r"image_token_id=258 for the student and 40 for the teacher\. Take two"):
        model(**collator(processor)(rows()))
    model(**collator(processor)(rows()[3:]))


def test_position_ids_along_three_axes_are_the_models_own():
    processor = tiny_processor("qwen2_5_vl")
    student = vision_model_for("qwen2_5_vl", processor)
    assert isinstance(student, Qwen2_5_VLForConditionalGeneration)
    batch = collator(processor)(rows())
    own = {name: batch[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
    positions, _ = student.model.get_rope_index(**own)
    assert positions.shape == (3, *batch["input_ids"].shape)
    model = DistillationModel(student, recipe="lm_only").eval()
    expected = model(**batch).loss
    torch.testing.assert_close(model(**batch, position_ids=positions).loss, expected, rtol=1e-6, atol=0)
    flat = positions[:1].expand(3, -1, -1)
    assert abs(model(**batch, position_ids=flat).loss - expected) > 1e-5
