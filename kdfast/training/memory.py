"""How much memory a run has in use: the most of it for the summary, and beside every line of the log."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch


def memory_bytes(device: torch.device) -> int:
    """The allocator's peak so far on a GPU, what the whole process holds now elsewhere.

    Reads counters of the host: nothing waits for the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class PeakMemory:
    """The most memory in use since this was made: the allocator's on a GPU, the whole process's elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.what = "device allocator"
            self.device_name = torch.cuda.get_device_name(device)
            torch.cuda.reset_peak_memory_stats(device)
            return
        self.what = "process"
        self.device_name = f"{device.type}, {torch.get_num_threads()} threads"
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak to what is in use now
        except OSError:
            self.what = "process, since its start"

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.what == "process":
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return _peak_since_start()


def _peak_since_start() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
