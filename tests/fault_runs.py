"""Runs in processes of their own, which may be killed: what test_faults.py and the long run start.

A server process has torch and transformers imported and forks each run off, which takes milliseconds. A run writes
what it says and how it ended into a folder of its own.
"""

import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch

from kdfast.training import KDConfig, KDTrainer
from kdfast.training.faults import RunStoppedError

HERE = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent)))}


def start(folder, action, *arguments, ranks=1, **settings):
    """`action(trainer, *arguments)` with a trainer of these settings, in `ranks` processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    os.environ |= ENVIRONMENT  # the server's, which starts with the first run
    context.set_forkserver_preload(["fault_runs", "training.conftest"])
    folder.mkdir(exist_ok=True)
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in place.items()} if ranks > 1 else {}
        process = context.Process(target=_child, args=(folder, rank, environment, action, arguments, settings))
        process.start()
        processes.append(process)
    return processes


def _child(folder, rank, environment, action, arguments, settings):
    os.environ.update(environment)
    log = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    logging.basicConfig(format="%(levelname)s %(message)s")
    code = 1
    try:
        action(make(folder, **settings), *arguments)
        code = 0
    except RunStoppedError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = 3
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # gloo's own teardown aborts now and then


def make(folder, timeout=None, **given):
    """A trainer of the same tiny models and data every time; dropout on, so that random states count."""
    from training.conftest import tiny

    if timeout is not None:  # with use_cpu, TrainingArguments forgets its ddp_timeout
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    defaults = {
        "output_dir": str(folder / "run"), "recipe": "run5", "use_cpu": True, "disable_tqdm": True, "max_steps": 6,
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "steps",
        "save_steps": 2, "report_to": "none", "kd_ramp": 1.0, "ddp_backend": "gloo" if "RANK" in os.environ else None,
    }  # fmt: skip
    args = KDConfig(**{**defaults, **given})
    return KDTrainer(tiny("gpt2", dropout=0.2), args, teacher=tiny(width=24, seed=1), train_dataset=rows(20))


def rows(n):
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 67, (n, 12), generator=generator)]


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
    return {e["step"]: (e["loss"], e["ce"], e["kd"], e["grad_norm"], e["tokens_seen"]) for e in log if "loss" in e}


def same_end(one, other):
    """Whether two runs logged the same and ended with the same weights, bit for bit."""
    ours, theirs = (torch.load(folder / "final.pt", weights_only=True) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return losses(one) == losses(other) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def join(processes, seconds=60):
    """Their exit codes, as soon as all have ended."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(end - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def output(folder, rank=0):
    return (folder / f"output-{rank}.txt").read_text()


# what happens before a step


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
