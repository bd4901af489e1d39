"""A few processes that talk through gloo and do what a test tells them: `Processes().run(2, function, …)`.

Started once for a file of tests, from a server that has imported what they need; each is a rank. `function` is a
module's own, its arguments and results are pickled. What one raises is raised in the test; one that does not answer in
time is an error, not a hang.
"""

import faulthandler
import importlib
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import own_warnings
import server

SECONDS = 600  # for an answer, which takes a few


class Processes:
    def __init__(self, most=4):
        self.most = most
        self._start()

    def _start(self):
        context = server.context()
        self._folder = tempfile.TemporaryDirectory()
        pairs = [context.Pipe() for _ in range(self.most)]
        self._pipes = [ours for ours, _ in pairs]
        self._ranks = [
            context.Process(target=_serve, args=(rank, self.most, f"{self._folder.name}/store", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for rank in self._ranks:
            rank.start()

    def run(self, size, function, *args, **kwargs):
        """Results of `function` on ranks 0 … size − 1, which it can ask for with `rank()` and `group()`."""
        pipes = self._pipes[:size]
        for pipe in pipes:
            pipe.send((function.__module__, function.__name__, size, args, kwargs))
        answers, seconds = {}, SECONDS
        while len(answers) < size:
            ready = wait([pipe for pipe in pipes if pipe not in answers], seconds)
            if not ready:
                break
            answers |= {pipe: _received(pipe) for pipe in ready}
            if any(wrong for wrong, _ in answers.values()):
                seconds = 5  # the others may wait for it
        silent = f"no answer after {seconds} s"
        told = [answers.get(pipe, (silent, None)) for pipe in pipes]
        wrong = [f"rank {rank}: {what}" for rank, (what, _) in enumerate(told) if what is not None]
        if len(answers) < size or any("has died" in what for what in wrong):
            self.close()
            self._start()
        if wrong:
            raise RuntimeError("\n".join(wrong))
        return [result for _, result in told]

    def close(self):
        for rank in self._ranks:
            rank.kill()
            rank.join()
        self._folder.cleanup()


def _received(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return "has died", None


_groups = {}
_size = 0


def group():
    """Of the ranks that were called."""
    return _groups[_size]


def rank():
    return _groups["rank"]


def _serve(number, most, store, pipe):
    faulthandler.enable()
    import interpreter  # noqa: F401
    import torch
    import torch.distributed as dist

    global _size
    own_warnings.are_errors()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    shared = dist.FileStore(store, most)
    dist.init_process_group("gloo", store=shared, rank=number, world_size=most, timeout=timedelta(seconds=SECONDS))
    _groups["rank"] = number
    for size in range(1, most + 1):
        _groups[size] = dist.new_group(list(range(size)))
    while True:
        try:
            module, name, _size, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, getattr(importlib.import_module(module), name)(*args, **kwargs)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
