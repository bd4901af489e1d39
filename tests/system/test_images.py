"""A vision-language student in two processes, where a batch may have an image or be text alone: as in one process."""

import os

import pytest
import server
import torch
from tiny_models import RECOMPUTE, image_batch, tiny_vision

STEPS = 2


def rows(images, family):
    """A row for each process and step; `images` of them, process by process, have one."""
    batch = image_batch(family, rows=2 * STEPS)
    made = [{name: x[i] for name, x in batch.items()} for i in range(2 * STEPS)]
    for row, has in zip(made, images, strict=True):
        if not has:
            row["input_ids"] = row["labels"] = row["input_ids"].clamp(max=60)
            del row["pixel_values"]
            if "token_type_ids" in row:
                row["token_type_ids"] = torch.zeros_like(row["input_ids"])
    return made


def train(folder, processes, images, more, family="llava"):
    from kdfast.training import KDConfig, KDTrainer

    args = KDConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, report_to=[], recipe="teacher_head", max_steps=STEPS,
        per_device_train_batch_size=1, gradient_accumulation_steps=2 // processes, save_strategy="no", logging_steps=1,
        train_sampling_strategy="sequential", learning_rate=1e-3, adam_epsilon=1e-4, **more,
    )  # fmt: skip
    student, teacher = (tiny_vision(family, seed).double() for seed in (1, 2))
    trainer = KDTrainer(student, args, teacher=teacher, train_dataset=[as_double(row) for row in rows(images, family)])
    trainer.train()
    if os.environ.get("RANK", "0") == "0":
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        torch.save((losses, student.state_dict()), folder / f"{processes}.pt")


def as_double(row):
    return {name: x.double() if x.is_floating_point() else x for name, x in row.items()}


# the last: what DDP finds unused, with layers that are recomputed
@pytest.mark.parametrize(
    ("images", "recompute", "family"),
    [((0, 0, 0, 0), False, "llava"), ((1, 1, 0, 1), False, "gemma3"), ((1, 0, 0, 0), True, "llava")],
    ids=str,
)
def test_two_processes_do_what_one_does(tmp_path, images, recompute, family):
    more = {RECOMPUTE: recompute}
    train(tmp_path, 1, images, more, family)
    given = images, {**more, "ddp_backend": "gloo"}, family
    codes = server.join(server.start(tmp_path / "said", 2, train, tmp_path, 2, *given))
    assert codes == [0, 0], [path.read_text()[-2000:] for path in (tmp_path / "said").iterdir()]
    (alone, expected), (losses, found) = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert losses == pytest.approx(alone, rel=1e-6)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    start = tiny_vision(family, 1).double().state_dict()
    moved = any("vision_tower" in name and not torch.equal(found[name], start[name]) for name in found)
    assert moved == any(images)


def test_images_for_some_processes_are_refused_under_fsdp(tmp_path):
    """They would gather shards of the vision tower that the others do not: a hang, or an abort of gloo."""
    more = {"fsdp": True, "fsdp_config": {}, "ddp_backend": "gloo"}
    assert server.join(server.start(tmp_path / "said", 2, train, tmp_path, 2, (1, 1, 1, 0), more)) == [1, 1]
    for rank in (0, 1):
        said = (tmp_path / "said" / f"output-{rank}.txt").read_text()
        assert "'loss'" in said or rank  # the first step, whose processes had an image each
        assert "ValueError: a micro-batch has images in some processes and none in others" in said
