"""What one process does for all, and all do together; alone and in two processes."""

import os

import pytest
import server
from torch import distributed

from kdfast.training.durable import processes


def fail_on(rank):
    if processes.index() == rank:
        raise OSError(28, f"full, said by {rank}")
    return f"{processes.index()} of {processes.count()}"


def told():
    """'what came of it' of each in turn, of errors their text."""
    found = []
    for act in (
        lambda: processes.by_first(lambda: fail_on(7)),
        lambda: processes.by_first(lambda: fail_on(0)),
        lambda: processes.by_all(lambda: fail_on(7)),
        lambda: processes.by_all(lambda: fail_on(1)),
        lambda: processes.by_all(lambda: fail_on(processes.index())),
    ):
        try:
            found.append(str(act()))
        except OSError as error:
            found.append(f"{error.errno} {error.strerror}")
    return found


def in_two(folder):
    distributed.init_process_group("gloo")
    (folder / f"{os.environ['RANK']}.txt").write_text("\n".join(told()))
    processes.leave()
    assert not distributed.is_initialized()


def test_alone():
    processes.leave()
    assert told() == ["0 of 1", "28 full, said by 0", "['0 of 1']", "['0 of 1']", "28 full, said by 0"]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_raises_all_raise(tmp_path_factory, rank):
    folder = tmp_path_factory.getbasetemp() / "in two"
    if not folder.exists():
        folder.mkdir()
        assert server.join(server.start(folder / "said", 2, in_two, folder)) == [0, 0]
    assert (folder / f"{rank}.txt").read_text().splitlines() == [
        "0 of 2",
        "28 full, said by 0",
        "['0 of 2', '1 of 2']",
        "28 full, said by 1",
        f"28 full, said by {rank}",  # its own, where it has one
    ]
