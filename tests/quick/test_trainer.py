"""A run of two steps: the trainer's losses and gradients are those of plain torch on whole logits of both models."""

from copy import deepcopy

import oracle
import pytest
import torch
from torch.nn.functional import cross_entropy

from kdfast.training import KDTrainer


def test_two_steps(rows, config, tiny):
    student, teacher, data = tiny("gpt2"), tiny(width=24, seed=1), rows(4)
    ids, labels = (torch.stack([row[name] for row in data]) for name in ("input_ids", "labels"))
    whole, targets = deepcopy(student), labels[:, 1:].reshape(-1)
    kept = targets != -100
    z_s, z_t = (model(ids).logits[:, :-1].flatten(0, 1)[kept] for model in (whole, teacher.eval()))

    args = config(recipe="true_head", max_steps=2, max_grad_norm=0.0, per_device_train_batch_size=4)
    trainer = KDTrainer(student, args, teacher=teacher, train_dataset=data)
    seen = {}

    def keep(optimizer, args, kwargs):
        seen.update({name: p.grad.clone() for name, p in student.named_parameters() if name not in seen})

    trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()

    first, second = (line for line in trainer.state.log_history if "loss" in line)
    tau = first["temperature"]
    kd = oracle.kl((z_t / tau).log_softmax(-1), (z_s / tau).log_softmax(-1)).mean()
    loss = cross_entropy(z_s, targets[kept]) + first["kd_weight"] * tau**2 * kd
    loss.backward()
    assert first["kd"] == pytest.approx(kd.item(), rel=1e-4)
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert second["loss"] != first["loss"]
    for name, p in whole.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
