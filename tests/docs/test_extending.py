"""CONTRIBUTING.md is followed to the letter, in a copy of the sources: its diffs, its file, its check."""

import itertools
import os
import re
import shutil
import subprocess
import sys

import documents
import pytest

PAGE = "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    root = tmp_path_factory.mktemp("extended")
    for folder in ("kdfast", "kernels"):
        shutil.copytree(documents.ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(documents.ROOT / "setup.py", root)
    blocks = documents.blocks(PAGE)
    for mark, block in itertools.pairwise(blocks):
        if mark.language == "file":
            (root / mark.text.strip()).write_text(block.text)
    for block in blocks:
        if block.language == "diff":
            done = subprocess.run(
                ["git", "apply", "--verbose", "-"], cwd=root, input=block.text, text=True, capture_output=True
            )
            assert done.returncode == 0, f"{PAGE}:{block.line} does not apply: {done.stderr}"
    return root


def run(root, code):
    environment = os.environ | {"PYTHONPATH": str(root), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=root, env=environment, text=True, capture_output=True
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_the_worked_examples(extended):
    check = documents.blocks(PAGE)[-1].text
    assert {"squared_hellinger", "unchunked", "triton_tiled"} <= set(re.findall(r"\w+", check))
    code, said = run(extended, check)
    assert code == 0, said


@pytest.mark.slow
def test_the_check_finds_a_wrong_gradient(extended):
    file = extended / "kernels/divergences.py"
    right = "-0.5 * p * d, 0.5 * q * d"
    assert right in file.read_text()
    file.write_text(file.read_text().replace(right, "-0.5 * p * d, 0.4 * q * d"))
    code, said = run(extended, documents.blocks(PAGE)[-1].text)
    assert code != 0
    assert "not close" in said
