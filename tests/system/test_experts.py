"""A mixture of experts in two processes, some of whose experts no token takes: as in one process."""

import os

import pytest
import server
import torch
from tiny_models import RECOMPUTE, tiny, tiny_moe

STEPS = 2


def train(folder, processes, more):
    from kdfast.training import KDConfig, KDTrainer

    ids = torch.randint(3, 67, (2 * STEPS, 6), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "labels": row.masked_fill(torch.arange(6) < i, -100)} for i, row in enumerate(ids)]
    args = KDConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, report_to=[], recipe="teacher_head", max_steps=STEPS,
        per_device_train_batch_size=1, gradient_accumulation_steps=2 // processes, save_strategy="no", logging_steps=1,
        train_sampling_strategy="sequential", learning_rate=1e-3, adam_epsilon=1e-4, router_lr_multiplier=2.0, **more,
    )  # fmt: skip
    student = tiny_moe("mixtral", num_local_experts=32).double()
    student.set_experts_implementation("eager")  # grouped_mm has no float64
    trainer = KDTrainer(student, args, teacher=tiny("llama", seed=2).double(), train_dataset=rows)
    trainer.train()
    if more.get("fsdp"):
        trainer.save_model(str(folder / "saved"))
        student = type(student).from_pretrained(folder / "saved") if os.environ["RANK"] == "0" else None
    if os.environ.get("RANK", "0") == "0":
        log = [(line["loss"], line["aux_loss"]) for line in trainer.state.log_history if "loss" in line]
        torch.save((log, student.state_dict()), folder / f"{processes}.pt")


@pytest.mark.parametrize("more", [{}, {RECOMPUTE: True}, {"fsdp": True, "fsdp_config": {}}], ids=["", "again", "fsdp"])
def test_two_processes_do_what_one_does(tmp_path, more):
    train(tmp_path, 1, {})
    codes = server.join(server.start(tmp_path / "said", 2, train, tmp_path, 2, {**more, "ddp_backend": "gloo"}))
    assert codes == [0, 0], [path.read_text()[-2000:] for path in (tmp_path / "said").iterdir()]
    (alone, expected), (log, found) = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    for line, ours in zip(alone, log, strict=True):
        assert ours == pytest.approx(line, rel=1e-6)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
