"""The server that every process of a test is forked from: it has imported what any of them needs, which takes seconds.

Python has one such server a process, and whoever starts it settles what it imports. So there is one list.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

HERE = Path(__file__).parent
IMPORTED = ["interpreter", "kdfast.kernels.row_kernel", "meshes", "sliced", "fault_runs", "tiny_models"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))}


def context():
    """A context of `multiprocessing` whose processes are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ |= ENVIRONMENT  # it finds modules by PYTHONPATH alone, and says nothing of those it does not find
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def start(folder, ranks, function, *arguments):
    """`function(*arguments)` in `ranks` processes, with what a launcher sets; it returns its exit code, None being 0.

    What each says goes on at the end of folder/output-RANK.txt.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in place.items()} if ranks > 1 else {}
        file = folder / f"output-{rank}.txt"
        process = context().Process(target=_child, args=(file, environment, function, arguments))
        process.start()
        processes.append(process)
    return processes


def _child(file, environment, function, arguments):
    import torch

    os.environ.update(environment)
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    try:
        code = function(*arguments) or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's own teardown aborts now and then


def join(processes, seconds=600):
    """Return their exit codes, as soon as all have ended. A hundred times what they take is a hang, and an error."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(end - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    if None in codes:
        raise TimeoutError(f"after {seconds} s not all processes have ended; exit codes by rank: {codes}")
    return codes


def run_file(path, *arguments):
    """A script that a launcher would run; it finds what lies beside it."""
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path), *map(str, arguments)]
    runpy.run_path(str(path), run_name="__main__")
