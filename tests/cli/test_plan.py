"""`kdfast plan`: its tables, its advice, and what it says where it cannot."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from kdfast.cli.main import main

WIDTHS = ["--student-width", "768", "--teacher-width", "1024", "--vocab", "50257"]


def test_widths_alone(kdfast):
    code, out, _ = kdfast("plan", *WIDTHS, "--memory", "24GiB")
    assert code == 0
    for text in ("8,192 tokens, a vocabulary of 50,257, a student 768 wide, a teacher 1,024 wide through a projector",
                 "triton_tiled", "most tokens in 24.00 GiB\n", "models' activations, which take far more",
                 "auto takes triton_chunked: 6 chunks", "It fits as it is", "measured on a GPU yet"):  # fmt: skip
        assert text in out
    assert "times LM only's" not in out
    table = out.split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1  # as wide as their header
    assert "a teacher 1,024 wide with its own head" in kdfast("plan", *WIDTHS, "--kind", "head")[1]
    assert "no teacher" in kdfast("plan", "--student-width", "768", "--vocab", "50257")[1]


def test_for_machines(kdfast):
    code, out, _ = kdfast("plan", *WIDTHS, "--json", "--memory", "2GB", "--tokens", "4096")
    found = json.loads(out)
    assert code == 0
    assert found["memory_bytes"] == 2 * 10**9
    assert not found["measured"]
    rows = {row["method"]: row for row in found["methods"]}
    assert rows["eager"]["largest_tokens"] < 4096 < rows["triton_chunked"]["largest_tokens"]
    assert rows["triton_tiled"]["total_bytes"] > rows["triton_tiled"]["peak_bytes"] > 0
    assert found["auto"] == found["portion"]["engine"] == "triton_chunked"


def test_what_does_not_fit(kdfast):
    out = kdfast("plan", *WIDTHS, "--memory", "700MiB")[1]
    assert "It does not fit. KDFAST_SCRATCH_BYTES=" in out
    out = kdfast("plan", *WIDTHS, "--memory", "8GiB", "--resident", "8GiB")[1]
    assert "8,192 tokens do not fit in the 0.0 MiB" in out


def test_models_by_folder(kdfast, tmp_path):
    sizes = {"n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 257}
    for name, width in (("student", 16), ("teacher", 32)):
        AutoConfig.for_model("gpt2", n_embd=width, **sizes).save_pretrained(tmp_path / name)
    models = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    code, out, _ = kdfast("plan", *models, "--memory", "1GiB", "--tokens", "64")
    assert code == 0
    sizes = "a vocabulary of 257, a student 16 wide, a teacher 32 wide"
    for text in (sizes, "optimizer state", "their gradients", "teacher's parameters"):
        assert text in out
    # student: 6·P + 3u with P = 2·12·16², u = 2·257·16; teacher: 2·P with P = 2·12·32²
    lm_only, teacher = 6 * 6144 + 3 * 8224, 2 * 24576
    kept = 2 * 16 * 257  # of hidden states, what `kdfast cache` keeps
    heads = {"cached": kept - teacher, "compressed_head": 2 * 16 * (257 + 32), "teacher_head": 2 * 257 * 32}
    heads["projector"] = 2 * 1024 + 3 * 8224
    shares = {"compressed_head": 0.5}  # KD in the first half of the run
    prices = ", ".join(
        f"{name} {1 + shares.get(name, 1) * (teacher + head) / lm_only:.2f}" for name, head in heads.items()
    )
    assert f"operations of training on a token, times LM only's: {prices} (compressed at rank 16)\n" in out


def test_a_cpu(kdfast):
    out = kdfast("plan", *WIDTHS, "--device", "cpu", "--dtype", "float32", "--tokens", "1024")[1]
    assert "auto takes torch: 4 chunks" in out
    assert "triton" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student-width", "768"], "--vocab None"),
        (["--student", "gpt2", "--vocab", "50257"], "one or the other"),
        ([*WIDTHS, "--teacher", "gpt2"], "--teacher-width"),
        ([*WIDTHS, "--tokens", "0"], "tokens=0"),
        ([*WIDTHS, "--memory", "lots"], "such as 24GiB"),
        ([*WIDTHS, "--memory", "1e400"], "such as 24GiB"),
        ([*WIDTHS, "--memory", "80"], "--memory '80'; expected a number and a unit"),
        ([*WIDTHS, "--resident", "0 parsec"], "--resident"),
        ([*WIDTHS, "--optimizer-bytes", "-1"], "--optimizer-bytes -1"),
        (["--student", "nobody/has-this"], "--student-width"),
    ],
)
def test_what_it_cannot_plan(kdfast, arguments, message):
    code, _, err = kdfast("plan", *arguments)
    assert code == 2
    assert message in err


@pytest.mark.slow
def test_it_works_without_the_training_part():
    code = (
        "import sys\n"
        "for name in ('transformers', 'datasets', 'accelerate', 'tokenizers', 'yaml'): sys.modules[name] = None\n"
        "from kdfast.cli.main import main\n"
        f"assert main(['plan', *{WIDTHS}]) == 0\n"
        "sys.exit(main(['plan', '--student', 'gpt2']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'kdfast[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_letters_that_a_terminal_does_not_have(monkeypatch):
    """A Windows console, or a file that output goes to there."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert main(["plan", "--student", "λ"]) == 2  # stderr has the name
    print("4 × 4, τ → 1")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().decode("cp1252").splitlines()[-1] == "4 × 4, ? ? 1"
