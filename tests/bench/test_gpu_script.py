"""bench/gpu.py where there is no GPU: what it makes of ncu's table, and that it says what it lacks."""

import json
import os
import subprocess
import sys

NCU = """#!/bin/sh
echo "==PROF== Connected to process 1"
echo '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","1","row_kernel","dram__bytes_read.sum","Mbyte","3,308.12"'
echo '"0","1","row_kernel","launch__registers_per_thread","register/thread","77"'
"""


def counters(out, path):
    command = [sys.executable, "bench/gpu.py", "--quick", "--part", "counters", "--out", out]
    return subprocess.run(command, env={**os.environ, "PATH": path}, check=True, capture_output=True, text=True)


def test_counters(tmp_path):
    ncu = tmp_path / "ncu"
    ncu.write_text(NCU)
    ncu.chmod(0o755)
    counters(tmp_path, os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    rows = json.loads((tmp_path / "gpu-counters-quick.json").read_text())["rows"]
    assert "original-projected-fp32, row kernel, jsd" in rows
    for row in rows.values():
        found = {"dram__bytes_read.sum": "3,308.12 Mbyte", "launch__registers_per_thread": "77 register/thread"}
        assert row["counters"] == {"row_kernel": found}
        assert "--clock-control none" in row["command"]


def test_without_ncu(tmp_path):
    assert "ncu is not installed" in counters(tmp_path, str(tmp_path)).stdout
    assert not list(tmp_path.iterdir())
