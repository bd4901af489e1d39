"""One run that is killed -9 again and again, half of the time while a checkpoint is written, and goes on each time.

What must hold: every checkpoint in sight is complete, none is lost but by rotation, each start goes on from the newest,
and the end is that of an unbroken run, bit for bit.
"""

import random
import secrets
import signal
import time

import fault_runs
import pytest
from fault_runs import join, output, same_end, start

from kdfast.training.durable.resume import checkpoints, find_problem

LIMIT = 3  # save_total_limit


def steps_in_sight(run):
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints(run)]


def hidden(run):
    """What is being written, replaced or deleted."""
    return [path.name for path in run.glob(".checkpoint-*")]


def wait_for(condition, processes, seconds=600):
    """Until it holds or a process has ended."""
    end = time.monotonic() + seconds
    while not condition() and all(process.is_alive() for process in processes):
        assert time.monotonic() < end, f"nothing has come of it in {seconds} s"
        time.sleep(0.001)


def unhurried(trainer):
    """Before every step, so that no machine is fast enough to end the run before its last kill."""
    time.sleep(0.05)


def started(folder, starts):
    return output(folder).count("FROM ") == starts if (folder / "output-0.txt").exists() else False


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "kills", "steps"), [(1, 40, 300), (2, 16, 150)])
def test_killed_at_random_moments(tmp_path, capsys, ranks, kills, steps):
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    settings = {"max_steps": steps, "save_steps": 2, "save_total_limit": LIMIT, "ranks": ranks}
    unbroken, folder = tmp_path / "unbroken", tmp_path / "killed"
    run = folder / "run"
    assert join(start(unbroken, fault_runs.train, **settings)) == [0] * ranks
    begin, during_a_write, seen = time.monotonic(), 0, []

    for kill in range(1, kills + 1):
        newest = max(steps_in_sight(run), default=None)
        processes = start(folder, fault_runs.train, True, unhurried, **settings)
        wait_for(lambda kill=kill: started(folder, kill), processes)
        further = (newest or 0) + chance.choice((0, 2, 2, 4, 8))
        wait_for(lambda further=further: max(steps_in_sight(run), default=0) >= further, processes)
        time.sleep(chance.uniform(0, 0.15))
        if kill % 2 == 0:
            wait_for(lambda: hidden(run), processes)
            time.sleep(chance.uniform(0, 0.03))
        victims = chance.sample(processes, chance.randint(1, ranks))
        assert all(process.is_alive() for process in victims), f"seed {seed}: over before kill {kill}: more steps"
        for process in victims:
            process.kill()
        codes = join(processes)
        assert {code for process, code in zip(processes, codes, strict=True) if process in victims} == {-signal.SIGKILL}
        assert {*codes} <= {-signal.SIGKILL, 3}, output(folder)

        said = output(folder).rpartition("FROM ")[2].splitlines()[0]
        assert said == (f"{run}/checkpoint-{newest}" if newest else "None"), f"seed {seed}, kill {kill}"
        during_a_write += bool(hidden(run))
        found = checkpoints(run)
        assert [problem for path in found if (problem := find_problem(path))] == [], f"seed {seed}, kill {kill}"
        now = steps_in_sight(run)
        assert max(now, default=0) >= (newest or 0)
        assert now == [max(now) - 2 * i for i in range(len(now))] if now else True, "none is missing between"
        assert len(now) >= min(LIMIT, max(now, default=0) // 2), f"seed {seed}, kill {kill}: {now}"
        seen.append(max(now, default=0))

    assert join(start(folder, fault_runs.train, True, **settings)) == [0] * ranks, output(folder)
    assert same_end(folder, unbroken), f"seed {seed}"
    assert len(fault_runs.losses(folder)) == steps
    assert steps_in_sight(run) == [steps, steps - 2, steps - 4]
    assert hidden(run) == []
    with capsys.disabled():
        print(
            f"\n{ranks} process(es), {steps} steps: {kills} kills, {during_a_write} while a checkpoint was written or "
            f"deleted, at steps {seen}; {time.monotonic() - begin:.0f} s, seed {seed}"
        )
