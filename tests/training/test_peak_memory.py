"""The host's counters: what is read where Linux's are, and where they are not. What they count is for no test."""

import sys
from collections import namedtuple

import psutil
import pytest
import torch

from kdfast.training import metrics
from kdfast.training.metrics import PeakMemory, memory_bytes

CPU = torch.device("cpu")
STATUS = "VmPeak:\t  900 kB\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\n"


def test_what_the_process_holds_now(monkeypatch):
    info = namedtuple("info", "rss")(12345)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: info)
    assert memory_bytes(CPU) == 12345


def test_linux_has_a_peak_that_starts_anew(monkeypatch):
    """What was held before does not count, and what was given back does."""
    written = []

    class File(namedtuple("File", "name")):
        def write_text(self, text):
            written.append((self.name, text))

        def read_text(self):
            return {"/proc/self/status": STATUS}[self.name]

    monkeypatch.setattr(metrics, "Path", File)
    peak = PeakMemory(CPU)
    assert peak.what == "process"
    assert written == [("/proc/self/clear_refs", "5")]
    assert peak.read() == 300 * 1024


def test_without_linux_or_windows_counters(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(metrics, "Path", lambda _: namedtuple("Nowhere", "write_text")(_refuse))
    peak = PeakMemory(CPU)
    assert peak.what == "process, since its start"
    monkeypatch.setattr(resource, "getrusage", lambda who: namedtuple("usage", "ru_maxrss")(77))
    monkeypatch.setattr(sys, "platform", "darwin")  # which counts bytes
    assert peak.read() == 77
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak.read() == 77 * 1024
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows, whose psutil has the peak
    info = namedtuple("info", "peak_wset")(12345)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: info)
    assert peak.read() == 12345


def test_the_counters_of_this_machine_are_found():
    assert memory_bytes(CPU) > 0
    assert PeakMemory(CPU).read() > 0


def _refuse(text):
    raise FileNotFoundError
