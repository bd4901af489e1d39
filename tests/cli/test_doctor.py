"""`kdfast doctor`: runs anywhere, and sees through a package that hides another."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from kdfast.cli import doctor

ROOT = Path(__file__).parents[2]


def test_it_names_versions_engine_and_both_kernels(kdfast):
    code, out, _ = kdfast("doctor")
    assert code == 0
    assert version("torch") in out
    assert "engine auto is torch" in out
    assert f"kdfast.kernels  {ROOT / 'kernels'}\n" in out


@pytest.mark.slow
def test_a_package_that_shadows_kernels_is_found(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    code = f"import sys; sys.path.append({str(ROOT)!r}); from kdfast.cli.main import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"SHADOWED: {tmp_path}/kernels/__init__.py" in done.stdout


def test_a_plain_folder_and_nothing_at_all_are_fine(monkeypatch):
    def none_installed(name):
        raise doctor.PackageNotFoundError

    monkeypatch.setattr(doctor, "distribution", none_installed)
    for location, expected in (("/repo/kernels", "/repo/kernels"), (None, "not installed")):
        monkeypatch.setattr(doctor, "_location", {"kdfast.kernels": "/repo/kernels", "kernels": location}.get)
        ours, theirs = doctor._kernels()
        assert ours == "/repo/kernels"
        assert theirs.startswith(expected)


@pytest.mark.slow
def test_it_works_without_the_training_part():
    """With every import of the training part failing; `distill` says what to install."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'datasets', 'accelerate', 'tokenizers', 'yaml'): sys.modules[name] = None\n"
        "from kdfast.cli.main import main\n"
        "assert main(['doctor']) == 0\n"
        "sys.exit(main(['distill', 'config.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'kdfast[train]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_nobody_reads_on():
    """As in `kdfast doctor | head -1`: no traceback, and the exit code of other programs then."""
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "kdfast", "doctor"]
    done = subprocess.run(command, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")
