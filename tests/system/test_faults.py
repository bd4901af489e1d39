"""Runs that are killed, terminated, robbed of a process or of disk space, for real: how they stop, and that they go on
to the losses and weights of an unbroken run, bit for bit."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import fault_runs
import pytest
import server
import torch
from fault_runs import join, output, same_end, start
from safetensors.torch import save_file

from kdfast.training.durable import atomic_io, checksums, errors
from kdfast.training.durable.errors import CheckpointWriteError
from kdfast.training.durable.preemption import Termination
from kdfast.training.durable.resume import checkpoints, find_problem

STOPPED = 3  # exit code of a run that said why it stopped


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folders of an unbroken run, by the number of its processes."""
    made = {}

    def run(ranks):
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp("unbroken")
            processes = start(made[ranks], fault_runs.train, ranks=ranks)
            assert join(processes) == [0] * ranks, output(made[ranks])
        return made[ranks]

    return run


def go_on(folder, ranks=1, **settings):
    """Start again and go on to the end; the checkpoint it went on from."""
    assert join(start(folder, fault_runs.train, True, ranks=ranks, **settings)) == [0] * ranks, output(folder)
    return output(folder).rpartition("FROM ")[2].splitlines()[0]


def names(folder):
    return sorted(path.name for path in (folder / "run").iterdir())


def visible(folder):
    return [name for name in names(folder) if not name.startswith(".")]


def all_complete(folder):
    found = checkpoints(folder / "run")
    assert [problem for path in found if (problem := find_problem(path))] == []
    return len(found)


# SIGTERM


@pytest.mark.parametrize("ranks", [1, 2])  # of two processes the second alone gets the signal
def test_sigterm_saves_a_checkpoint_and_stops(tmp_path, unbroken, ranks):
    codes = join(start(tmp_path, fault_runs.train, False, fault_runs.terminate_at_3, ranks=ranks))
    assert codes == [STOPPED] * ranks, output(tmp_path)
    step = {1: 4, 2: 5}[ranks]  # two processes: one step to agree
    saved = tmp_path / "run" / f"checkpoint-{step}"
    for rank in range(ranks):
        assert f"TerminatedError: step {step}: SIGTERM was received and {saved} was saved" in output(tmp_path, rank)
    assert all_complete(tmp_path) == {1: 2, 2: 3}[ranks]
    assert go_on(tmp_path, ranks) == str(saved)
    assert same_end(tmp_path, unbroken(ranks))


def train_from_2(trainer, stopped_by):
    named = str(Path(trainer.args.output_dir) / "checkpoint-2")
    find, trainer.find_checkpoint = trainer.find_checkpoint, lambda given: find(named)
    how = {"SIGTERM": fault_runs.terminate_at_3, "full disk": lambda trainer: full_at_4(trainer, 0)}
    fault_runs.train(trainer, True, how[stopped_by])


@pytest.mark.parametrize(
    ("stopped_by", "said", "named"),
    [
        ("SIGTERM", "SIGTERM was received and {run}/checkpoint-4 was saved", "checkpoint-4"),
        ("full disk", "The last complete checkpoint is {run}/checkpoint-2", "checkpoint-2"),
    ],
)
def test_the_checkpoint_of_this_run_is_named_where_later_ones_are(tmp_path, unbroken, stopped_by, said, named):
    run = tmp_path / "run"
    shutil.copytree(unbroken(1) / "run", run)
    assert join(start(tmp_path, train_from_2, stopped_by)) == [STOPPED], output(tmp_path)
    assert said.format(run=run) in output(tmp_path)
    advice = "goes on from it; True and the same command would take checkpoint-6"
    assert f"resume_from_checkpoint='{run / named}' {advice}" in output(tmp_path)


def test_a_handler_of_the_users_own_stays():
    def own(*_):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, own)
    try:
        with Termination(torch.device("cpu")):
            assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def terminate_too_late(trainer):
    with Termination(trainer.args.device):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        print("still here", flush=True)


def test_a_signal_after_the_last_step_is_not_swallowed(tmp_path):
    assert join(start(tmp_path, terminate_too_late)) == [-signal.SIGTERM]
    assert output(tmp_path).endswith("still here\n")


def test_the_jit_checkpoints_of_transformers_are_refused(config):
    with pytest.raises(ValueError, match="enable_jit_checkpoint=True; KDTrainer saves a checkpoint on SIGTERM"):
        config(enable_jit_checkpoint=True)


# kill -9


def kill_in(trainer, where):
    """SIGKILL while checkpoint-4 is written, half of one file being there, or replaced, or while one is deleted."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def in_step_4(function):
        return lambda *args, **kwargs: die() if trainer.state.global_step == 4 else function(*args, **kwargs)

    def half(state, path):
        Path(path).write_bytes(b"half" * 99)
        die()

    def delete_half(folder, *_):
        next(Path(folder).iterdir()).unlink()
        die()

    if where == "optimizer.pt":
        save = trainer._save_optimizer_and_scheduler
        trainer._save_optimizer_and_scheduler = lambda folder: (
            half(None, f"{folder}/optimizer.pt") if trainer.state.global_step == 4 else save(folder)
        )
    elif where == "before its name":
        atomic_io.flush_all = in_step_4(atomic_io.flush_all)
    elif where == "between two names":
        rename = Path.rename
        Path.rename = lambda self, to: die() if to.name == "checkpoint-2" and to != self else rename(self, to)
    else:
        shutil.rmtree = delete_half
    fault_runs.train(trainer)


@pytest.mark.parametrize(
    ("where", "left", "goes_on_from"),
    [
        ("optimizer.pt", ["checkpoint-2"], "checkpoint-2"),
        ("before its name", ["checkpoint-2"], "checkpoint-2"),
        ("deleting", ["checkpoint-4"], "checkpoint-4"),  # save_total_limit=1: checkpoint-2 goes
    ],
)
def test_kill_9_leaves_complete_checkpoints_alone_in_sight(tmp_path, unbroken, where, left, goes_on_from):
    settings = {"save_total_limit": 1} if where == "deleting" else {}
    assert join(start(tmp_path, kill_in, where, **settings)) == [-signal.SIGKILL], output(tmp_path)
    assert visible(tmp_path) == left
    assert len(list((tmp_path / "run").iterdir())) == 2, "something half written or half deleted is there, hidden"
    assert all_complete(tmp_path) == 1
    assert Path(go_on(tmp_path, **settings)).name == goes_on_from
    assert same_end(tmp_path, unbroken(1))
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []


def test_text_that_is_generated_after_a_kill_is_that_of_an_unbroken_run(tmp_path):
    settings = {"recipe": "teacher_head", "kd_ramp": 0.0, "on_policy": 0.75, "on_policy_buffer": 2, "max_new_tokens": 6}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert join(start(whole, fault_runs.train, **settings)) == [0]
    assert join(start(killed, fault_runs.train, False, fault_runs.kill_at_3, **settings)) == [-signal.SIGKILL]
    assert join(start(killed, fault_runs.train, True, **settings)) == [0]
    assert f"FROM {killed}/run/checkpoint-2" in output(killed)
    assert same_end(whole, killed)


def test_kill_9_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path, unbroken):
    shutil.copytree(unbroken(1) / "run/checkpoint-2", tmp_path / "run/checkpoint-2")
    assert join(start(tmp_path, kill_in, "between two names")) == [-signal.SIGKILL]
    assert visible(tmp_path) == []
    assert Path(go_on(tmp_path)).name == "checkpoint-2"
    assert same_end(tmp_path, unbroken(1))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A killed process loses nothing that is written; a power cut loses what is not flushed."""
    staged, final = atomic_io.staging(tmp_path / "checkpoint-2"), tmp_path / "checkpoint-2"
    (staged / "shards").mkdir(parents=True)
    names = ["model.safetensors", "optimizer.pt", "shards/0.distcp"]
    for name in names:
        (staged / name).write_text(name)
    done = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append("rename"), rename(self, to)))
    checksums.write(staged)
    atomic_io.publish(staged, final, replace=True)
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    flushed = {str(staged / name) for name in (*names, checksums.NAME, "shards", ".")} - {str(staged / ".")}
    assert {*flushed, str(staged)} <= set(before)
    assert after == [str(tmp_path)]


# A process that dies


def test_a_process_that_dies_stops_the_other(tmp_path, unbroken):
    codes = join(start(tmp_path, fault_runs.train, False, fault_runs.die_at_3, ranks=2))
    assert codes == [STOPPED, -signal.SIGKILL], output(tmp_path)  # long before the group's half an hour is over
    said = output(tmp_path)
    assert "LostProcessError: after step 3: another process of this run has died or does not answer" in said
    assert f"The last complete checkpoint is {tmp_path}/run/checkpoint-2" in said
    assert Path(go_on(tmp_path, ranks=2)).name == "checkpoint-2"
    assert same_end(tmp_path, unbroken(2))


def die_while_solving(trainer):
    def die(*_):
        if trainer.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return []

    trainer.model.solve, trainer.model.solved = die, False
    trainer.train()


def test_a_process_that_dies_before_the_first_step(tmp_path):
    codes = join(start(tmp_path, die_while_solving, ranks=2))
    assert codes == [STOPPED, -signal.SIGKILL], output(tmp_path)
    assert "LostProcessError: after step 0: another process of this run has died" in output(tmp_path)
    assert "No checkpoint was saved yet" in output(tmp_path)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:12097", True),
        ("[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:4242: Connection reset by peer", True),
        ("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation to complete", True),
        ("[../gloo/transport/tcp/unbound_buffer.cc:134] Application timeout caused pair closure", True),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.27.5", True),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE)", True),
        ("NCCL communicator was aborted on rank 0.", True),
        ("ProcessGroupNCCL is only supported with GPUs, no GPUs found!", False),
        ("No backend type associated with device type cpu; NCCL takes CUDA tensors", False),
        ("gloo: invalid tensor type (expects dense tensors)", False),
        ("DataLoader timed out after 5 seconds", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
    ],
)
def test_which_errors_are_of_a_lost_process(text, lost, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError) as caught, errors.naming_lost_processes(lambda: 3, lambda: None):
        raise RuntimeError(text)
    assert isinstance(caught.value, errors.LostProcessError) is lost


def hang_at_3(trainer):
    """Two seconds' patience from then on: before, a busy machine may keep a process from answering for as long."""
    if trainer.state.global_step == 3:
        if trainer.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2))


def test_a_process_that_hangs_is_given_up(tmp_path):
    waiting, hanging = start(tmp_path, fault_runs.train, False, hang_at_3, ranks=2)
    codes = join([waiting])
    hanging.kill()
    hanging.join()
    assert codes == [STOPPED], output(tmp_path)
    assert "LostProcessError: after step 3: another process of this run has died or does not answer" in output(tmp_path)
    assert "Timed out waiting 2000ms" in output(tmp_path)


def test_a_process_that_is_lost_before_the_model_is_saved(tmp_path, monkeypatch):
    """Under FSDP the look at the weights is a communication too."""
    trainer = fault_runs.make(tmp_path)

    def lose(named, reduce):
        raise RuntimeError("[gloo] Connection closed by peer")

    monkeypatch.setattr(errors, "is_lost_peer", lambda error: True)  # as in a run of several
    monkeypatch.setattr(trainer._guard, "check_weights", lose)
    with pytest.raises(errors.LostProcessError, match="another process of this run has died"):
        trainer.save_model()


def test_under_torchrun_too(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, fault_runs.__file__, str(tmp_path)], env={**os.environ, **server.ENVIRONMENT},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode not in (0, None)
    assert "after step 3: another process of this run has died" in done.stderr, done.stderr[-3000:]
    assert visible(tmp_path) == ["checkpoint-2"]


# A full disk


def fill_the_disk(trainer, how):
    """Room for one checkpoint and a half; then more, and on to the end.

    "disk": a file system of its own, in a namespace of this process, which needs no privileges where the kernel allows
    namespaces to everyone. "quota": a limit on the size of a file, which a system's quota looks like.
    """
    run = Path(trainer.args.output_dir)
    if how == "disk" and not _mount(run, trainer):
        print("no namespaces")
        os._exit(77)
    if how == "quota":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = trainer._save_checkpoint

        def limited(*args):
            if trainer.state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            save(*args)

        trainer._save_checkpoint = limited
    with pytest.raises(CheckpointWriteError) as caught:
        trainer.train()
    print(caught.value, flush=True)
    assert caught.value.checkpoint == str(run / "checkpoint-2")
    assert [path.name for path in run.iterdir()] == ["checkpoint-2"], "no part of the other, which takes room"
    if how == "disk":
        assert ctypes.CDLL(None).mount(b"none", bytes(run), None, 32, b"size=50m") == 0  # MS_REMOUNT
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    fault_runs.train(fault_runs.make(run.parent), resume=True)


def _mount(run, trainer):
    size = sum(path.stat().st_size for path in (run.parent / "sized/checkpoint-2").iterdir())
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None)
    if libc.unshare(0x00020000 | 0x10000000) != 0:  # CLONE_NEWNS | CLONE_NEWUSER
        return False
    for name, value in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(value)
    return libc.mount(b"none", bytes(run), b"tmpfs", 0, f"size={int(size * 1.5) + 40_000}".encode()) == 0


def full_at_4(trainer, rank, room=20_000):
    if trainer.state.global_step == 3 and trainer.args.process_index == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def train_with_no_room(trainer, rank, room):
    fault_runs.train(trainer, before_step=lambda trainer: full_at_4(trainer, rank, room))


@pytest.mark.parametrize(("rank", "room"), [(0, 20_000), (1, 1000)])  # the second's random states are 15 KB
def test_a_disk_that_is_full_for_one_process_stops_all(tmp_path, rank, room):
    codes = join(start(tmp_path, train_with_no_room, rank, room, ranks=2))
    assert codes == [STOPPED, STOPPED], output(tmp_path, 1)
    assert "CheckpointWriteError: " in output(tmp_path, rank)
    assert "LostProcessError: after step 4" in output(tmp_path, 1 - rank)
    assert names(tmp_path) == ["checkpoint-2"]


def train_slowly_with_no_room(trainer):
    """The first process fails, and has cleared up before the second begins to write its random states."""
    save = trainer._save_rng_state

    def late(folder):
        if trainer.args.process_index == 1 and trainer.state.global_step == 4:
            time.sleep(1)
        save(folder)

    trainer._save_rng_state = late
    train_with_no_room(trainer, 0, 20_000)


def test_what_another_process_makes_anew_after_a_failure_goes_too(tmp_path):
    assert join(start(tmp_path, train_slowly_with_no_room, ranks=2)) == [STOPPED, STOPPED], output(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2"]


def train_until_the_folder_goes(trainer, write):
    """The second process is about to write when the first fails and clears up."""
    waits = Path(trainer.args.output_dir).parent / "waits"
    save_model = trainer.save_model

    def when_the_other_waits(*args, **kwargs):
        while trainer.state.global_step == 4 and not waits.exists():
            time.sleep(0.01)
        save_model(*args, **kwargs)

    def late(folder):
        if trainer.args.process_index == 1 and trainer.state.global_step == 4:
            os.makedirs(folder, exist_ok=True)
            waits.touch()
            while os.path.isdir(folder):
                time.sleep(0.01)
            write(os.path.join(folder, "rng_state_1.pth"))

    trainer._save_rng_state = late
    if trainer.args.process_index == 0:
        trainer.save_model = when_the_other_waits
    train_with_no_room(trainer, 0, 20_000)


def save_by_torch(path):
    torch.save({}, path)


def save_by_open(path):
    Path(path).write_bytes(b"")


def save_by_safetensors(path):
    save_file({"x": torch.zeros(1)}, path)


@pytest.mark.parametrize("write", [save_by_torch, save_by_open, save_by_safetensors])
def test_a_folder_that_another_process_cleared_is_no_full_disk(tmp_path, write):
    codes = join(start(tmp_path, train_until_the_folder_goes, write, ranks=2))
    assert codes == [STOPPED, STOPPED], output(tmp_path, 1)
    assert "CheckpointWriteError: " in output(tmp_path, 0)
    assert "LostProcessError: after step 4" in output(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_that_cannot_be_written(tmp_path, rank):
    sharded = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}, "save_steps": 4}
    action = train_with_no_room if rank else train_but_no_shard
    codes = join(start(tmp_path, action, rank, 3000, ranks=2, **sharded))
    assert codes == [STOPPED, STOPPED], output(tmp_path, 1)
    for each in (0, 1):
        said = output(tmp_path, each)
        assert f"'{tmp_path}/run/checkpoint-4' could not be written: process {rank}: [Errno" in said
        assert "make room" in said
    assert names(tmp_path) == []


def train_but_no_shard(trainer, rank, room):
    save = trainer._save_optimizer_and_scheduler

    def limited(folder):
        trainer.state.global_step -= 1
        full_at_4(trainer, rank, room)
        trainer.state.global_step += 1
        save(folder)

    trainer._save_optimizer_and_scheduler = limited
    fault_runs.train(trainer)


@pytest.mark.parametrize("how", ["disk", "quota"])
def test_a_full_disk(tmp_path, unbroken, how):
    shutil.copytree(unbroken(1) / "run", tmp_path / "sized")
    codes = join(start(tmp_path, fill_the_disk, how))
    if codes == [77]:
        pytest.skip("this system gives no user namespaces")
    said = output(tmp_path)
    assert codes == [0], said
    assert f"'{tmp_path}/run/checkpoint-4' could not be written: " in said
    assert "MB are free there; make room" in said
    assert f"The last complete checkpoint is {tmp_path}/run/checkpoint-2" in said
    assert same_end(tmp_path, unbroken(1))


def test_a_checkpoint_without_optimizer_is_not_said_to_be_gone_on_from(tmp_path):
    """Under save_only_model."""
    saved = tmp_path / "checkpoint-2"
    saved.mkdir()
    assert "cannot be gone on from" in errors.kept(str(saved))
    (saved / "optimizer.pt").touch()
    assert "The same command, or resume_from_checkpoint=True, goes on from it" in errors.kept(str(saved))
