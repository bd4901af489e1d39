"""Runs in processes of their own, which may be killed: what test_faults.py and the long run start.

A server process (server.py) forks each run off, which takes milliseconds. A run writes what it says and how it ended
into a folder of its own.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path

import server
import torch
from server import join  # noqa: F401  # for those who start runs

from kdfast.training import KDConfig, KDTrainer
from kdfast.training.durable.errors import RunStoppedError


def start(folder, action, *arguments, ranks=1, **settings):
    """`action(trainer, *arguments)` with a trainer of these settings, in `ranks` processes."""
    return server.start(folder, ranks, _run, folder, action, arguments, settings)


def _run(folder, action, arguments, settings):
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        action(make(folder, **settings), *arguments)
    except RunStoppedError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 3


def make(folder, **given):
    """A trainer of the same tiny models and data every time; dropout on, so that random states count."""
    from tiny_models import tiny

    defaults = {
        "output_dir": str(folder / "run"), "recipe": "projector_fixed", "use_cpu": True, "disable_tqdm": True,
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 2, "report_to": "none", "kd_ramp": 1.0,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
    }  # fmt: skip
    args = KDConfig(**{**defaults, **given})
    return KDTrainer(tiny("gpt2", dropout=0.2), args, teacher=tiny(width=24, seed=1), train_dataset=rows(20))


def rows(n):
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(3, 67, (n, 12), generator=generator)
    return [{"input_ids": ids, "labels": ids, "prompts": ids[:5].tolist()} for ids in drawn]  # for generated text alone


def train(trainer, resume=False, before_step=None):
    """Goes on from the last checkpoint, where it is told to. `before_step(trainer)` is called before every step."""
    if before_step is not None:
        compute_loss = trainer.compute_loss

        def hooked(*args, **kwargs):
            before_step(trainer)
            return compute_loss(*args, **kwargs)

        trainer.compute_loss = hooked
    found = trainer.find_checkpoint(True) if resume else None
    print(f"FROM {found}", flush=True)
    trainer.train(resume_from_checkpoint=found)
    finish(trainer)


def finish(trainer):
    """What a run came to."""
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir).parent
        torch.save(trainer.model.state_dict(), folder / "final.pt")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


def losses(folder):
    """step → loss, ce, kd, gradient norm: bit for bit what the run logged."""
    log = json.loads((folder / "log.json").read_text())
    return {
        e["step"]: (e["loss"], e.get("ce"), e["kd"], e["grad_norm"], e["tokens_seen"]) for e in log if "loss" in e
    }


def same_end(one, other):
    """Whether two runs logged the same and ended with the same weights, bit for bit."""
    ours, theirs = (torch.load(folder / "final.pt", weights_only=True) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return losses(one) == losses(other) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def output(folder, rank=0):
    return (folder / f"output-{rank}.txt").read_text()


# what happens before a step


def kill_at_3(trainer):
    if trainer.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def die_at_3(trainer):
    if trainer.state.global_step == 3 and trainer.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def terminate_at_3(trainer):
    """A notice to the last process alone."""
    if trainer.state.global_step == 3 and trainer.args.process_index == trainer.args.world_size - 1:
        os.kill(os.getpid(), signal.SIGTERM)


def damage(path, how="flip"):
    """One byte of a file changes, or its second half goes."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "flip":
        content[middle] ^= 0x10
    else:
        del content[middle:]
    path.write_bytes(content)


if __name__ == "__main__":  # under torchrun, as a script of a user's own
    train(make(Path(sys.argv[1])), False, die_at_3)
