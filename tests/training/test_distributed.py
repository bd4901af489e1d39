"""Two processes do what one does with the whole batch: the same gradient, and the same evaluation.

5 samples on 2 processes with batches of 2: the last global batch is filled up with samples already seen, which must
not be counted twice. The evaluation comes before the training, after which accelerate alone would leave out DDP.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdfast.training import KDTrainer

HERE = Path(__file__).parent


def run(output_dir, batch_size):
    """One step and one evaluation; (logs, the gradient the optimizer saw)."""
    from conftest import tiny  # in the child this folder is on the path

    from kdfast.training import KDConfig

    data = make_rows(5)
    args = KDConfig(
        output_dir=output_dir, use_cpu=True, disable_tqdm=True, max_steps=1, logging_steps=1, max_grad_norm=0.0,
        per_device_train_batch_size=batch_size, per_device_eval_batch_size=2, save_strategy="steps", save_steps=1,
        train_sampling_strategy="sequential", recipe="run5", ddp_backend="gloo" if "RANK" in os.environ else None,
    )  # fmt: skip
    trainer = KDTrainer(tiny("gpt2"), args, teacher=tiny(width=24, seed=1), train_dataset=data[:4], eval_dataset=data)
    gradient = {}

    def keep(*_):
        gradient.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(keep)
    metrics = trainer.evaluate()
    trainer.train()
    logs = {**trainer.state.log_history[0], **metrics}
    return trainer, logs, gradient


def make_rows(n):
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 67, (12,), generator=generator) for _ in range(n)]
    return [{"input_ids": r, "labels": torch.where(torch.arange(12) < 3 * i % 12, -100, r)} for i, r in enumerate(rows)]


def test_two_processes_are_one_with_the_whole_batch(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, tmp_path]
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    # not the exit code: after the work, gloo's own teardown aborts now and then ("terminate called …")
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}, done.stderr[-3000:]
    logs = json.loads((tmp_path / "logs.json").read_text())
    gradient = torch.load(tmp_path / "gradient.pt", weights_only=True)

    monkeypatch.syspath_prepend(HERE)
    _, alone_logs, alone_gradient = run(str(tmp_path / "alone"), batch_size=4)
    assert gradient.keys() == alone_gradient.keys()
    for name, expected in alone_gradient.items():
        torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    trained = ["loss", "ce", "kd", "ce_projected", "tokens_seen"]
    evaluated = [
        "loss",
        "ce",
        "kd",
        "ce_projected",
        "tokens",
        "agreement",
        "kl_teacher_student",
        "kl_teacher_projected",
    ]
    for key in trained + [f"eval_{name}" for name in evaluated]:
        assert logs[key] == pytest.approx(alone_logs[key], rel=1e-4), key
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-1"]
    saved = {path.name for path in (tmp_path / "run" / "checkpoint-1").iterdir()}
    assert saved >= {"model.safetensors", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"}
    # a loss that is not finite on the second process alone: both leave the step out
    told = [json.loads((tmp_path / f"skipped-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["changed"] for each in told] == [[1, 3], [1, 3]]
    assert told[0]["weights"] == told[1]["weights"]
    assert told[0]["skipped"] == [0, 1, 0]
    assert ["another process" in each["finding"] for each in told] == [True, False]


def skip(folder):
    """Three steps; in the second, one process has an infinite loss, whose gradient is finite."""
    from conftest import tiny
    from transformers import TrainerCallback

    from kdfast.training import KDConfig

    args = KDConfig(
        output_dir=folder, use_cpu=True, disable_tqdm=True, max_steps=3, logging_steps=1, non_finite="skip",
        per_device_train_batch_size=1, save_strategy="no", recipe="run5", ddp_backend="gloo",
    )  # fmt: skip
    trainer = KDTrainer(tiny("gpt2"), args, teacher=tiny(width=24, seed=1), train_dataset=make_rows(6))
    weights = []

    def one_is_infinite(module, inputs, output):
        bad = args.process_index == 1 and trainer.state.global_step == 1
        return output._replace(loss=output.loss + torch.inf) if bad else output

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            weights.append([p.detach().double().sum().item() for p in trainer.model.parameters()])

        on_train_end = on_step_begin

    trainer.model.register_forward_hook(one_is_infinite)
    trainer.add_callback(Keep())
    trainer.train()
    (finding,) = [finding for finding in trainer.health.findings if finding.kind == "non_finite"]
    return {
        "changed": [step for step in (1, 2, 3) if weights[step] != weights[step - 1]],
        "weights": weights,
        "skipped": [line["skipped_steps"] for line in trainer.state.log_history if "skipped_steps" in line],
        "finding": finding.message,
    }


def child(folder):
    trainer, logs, gradient = run(str(folder / "run"), batch_size=2)
    (folder / f"skipped-{trainer.args.process_index}.json").write_text(json.dumps(skip(str(folder / "skip"))))
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps(logs))
        torch.save(gradient, folder / "gradient.pt")
    (folder / f"done-{trainer.args.process_index}").touch()
    torch.distributed.barrier()  # gloo's threads abort where one process goes while the other still talks to it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    child(Path(sys.argv[1]))
