"""The host's counters: what is read where Linux's are, and where they are not."""

import sys
from collections import namedtuple

import numpy as np
import psutil
import torch

from kdfast.training import memory
from kdfast.training.memory import PeakMemory, memory_bytes

CPU = torch.device("cpu")


def test_a_peak_is_seen_after_it_is_over():
    before = memory_bytes(CPU)
    peak = PeakMemory(CPU)
    held = np.ones(2**27, dtype=np.uint8)  # 128 MiB, written
    assert memory_bytes(CPU) > before + 2**26
    del held
    assert peak.read() > before + 2**26


def test_without_linux_or_windows_counters(monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda _: namedtuple("Nowhere", "write_text")(_refuse))
    peak = PeakMemory(CPU)
    assert peak.what == "process, since its start"
    assert peak.read() > 2**24  # getrusage, as on macOS
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows, whose psutil has the peak
    info = namedtuple("info", "peak_wset")(12345)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: info)
    assert peak.read() == 12345


def _refuse(text):
    raise FileNotFoundError
