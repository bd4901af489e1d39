"""Every kernel compiles for chips that are not there, without spills and onto their tensor cores: tests/kernels/aot.py.

It runs in a process of its own, because here the kernels are the interpreter's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {
    "row_kernel", "states_kernel", "terms_kernel", "row_gradients_kernel", "column_sums_kernel",
    "statistics_kernel", "combine_kernel", "gradients_kernel", "projection_kernel",
    "bits_kernel", "support_logits_kernel", "write_kernel",
}  # fmt: skip


def compile_for(tmp_path, *arguments):
    """What the check printed, and its results."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests/kernels/aot.py", "--json", tmp_path / "aot.json", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout, json.loads((tmp_path / "aot.json").read_text())


def test_one_chip_of_each_kind(tmp_path):
    """One that has wgmma, and one of the other vendor."""
    table, results = compile_for(tmp_path, "--quick", "--arch", "sm_90", "gfx942")
    assert {(r["arch"], r["kernel"]) for r in results} == {(a, k) for a in ("sm_90", "gfx942") for k in KERNELS}
    assert "0 wrong" in table
    for r in results:
        multiplies = r["kernel"] in ("statistics_kernel", "gradients_kernel", "projection_kernel")
        assert (r["tensor"] > 0) == multiplies


@pytest.mark.long
def test_every_row_of_the_table(tmp_path, capsys):
    table, _ = compile_for(tmp_path)
    with capsys.disabled():
        print(table)
