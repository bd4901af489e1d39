"""The host's counter of memory. What it counts is for no test."""

from collections import namedtuple

import psutil
import torch

from kdfast.training.metrics import memory_bytes

CPU = torch.device("cpu")


def test_what_the_process_holds_now(monkeypatch):
    assert memory_bytes(CPU) > 0
    info = namedtuple("info", "rss")(12345)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: info)
    assert memory_bytes(CPU) == 12345
