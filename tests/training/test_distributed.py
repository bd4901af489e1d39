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


def child(folder):
    trainer, logs, gradient = run(str(folder / "run"), batch_size=2)
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps(logs))
        torch.save(gradient, folder / "gradient.pt")
    (folder / f"done-{trainer.args.process_index}").touch()
    torch.distributed.barrier()  # gloo's threads abort where one process goes while the other still talks to it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    child(Path(sys.argv[1]))
