"""Commands in the documents: subcommands, options and keys exist, and so do targets of make, scripts and files."""

import importlib
import re
import shlex

import documents
import pytest

from kdfast.cli import arguments, main
from kdfast.cli.errors import UserError

BASE = {
    "student_config": "config.json",
    "teacher_model_name_or_path": "teacher",
    "train_file": "text",
    "output_dir": "o",
}
COMMANDS = [(page, line, text) for page in documents.pages() for line, text in documents.commands(page)]
KNOWN = (
    "kdfast",
    "make",
    "python",
    "python3",
    "pip",
    "pytest",
    "torchrun",
    "accelerate",
    "git",
    "cd",
    "source",
    ".",
    "sha256sum",
)


def _targets():
    return set(re.findall(r"^([a-z-]+):.*##", (documents.ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize(("page", "line", "text"), COMMANDS, ids=[f"{p}:{n}" for p, n, _ in COMMANDS])
def test_command(page, line, text, monkeypatch):
    words = [word for word in shlex.split(text) if word != "…"]
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)] if words[0] != "make" else words
    if "&&" in words:
        words = words[words.index("&&") + 1 :]
    assert words[0] in KNOWN or words[0].startswith(".venv/bin/"), text
    if words[0] == "make":
        named = [word for word in words[1:] if "=" not in word]
        assert set(named) <= _targets(), text
    elif words[0] in ("python", "python3") and words[1].endswith(".py"):
        assert (documents.ROOT / words[1]).is_file() or "/" not in words[1], text
    elif words[0] == "pytest" and len(words) > 1 and not words[1].startswith("-"):
        assert (documents.ROOT / words[1]).exists(), text
    if "--config_file" in words:
        assert (documents.ROOT / words[words.index("--config_file") + 1]).is_file(), text
    if "kdfast" in words:
        check_kdfast(words[words.index("kdfast") + 1 :], monkeypatch)


def check_kdfast(argv, monkeypatch):
    """Parses as the command line does; what it would then do is not done."""
    if argv[-1] in ("--help", "--version"):
        with pytest.raises(SystemExit) as done:
            main.main(argv)
        assert done.value.code == 0
        return
    reached = []

    def stop(*args, **options):
        reached.append((args, options))
        return 0

    for name in ("cache", "data", "demo", "distill", "doctor", "merge", "plan", "report"):
        monkeypatch.setattr(importlib.import_module(f"kdfast.cli.{name}"), name, stop)
    assert main.main(argv) == 0
    assert reached, argv
    if argv[0] in ("distill", "cache", "data"):
        config, *overrides = argv[3:] if argv[1] == "import" else argv[1:]
        path = documents.ROOT / config
        overrides += ["--bf16", "false"]  # which would need a GPU
        arguments.parse(str(path), overrides) if path.is_file() else arguments.parse_mapping("page", BASE, overrides)


@pytest.mark.parametrize("argv", [["distil", "a"], ["plan", "--widths", "3"], ["doctor", "--token", "3", "4"]])
def test_a_wrong_command_is_found(argv, monkeypatch):
    with pytest.raises(SystemExit):
        check_kdfast(argv, monkeypatch)


def test_a_wrong_key_is_found(monkeypatch):
    with pytest.raises(UserError, match="temprature"):
        check_kdfast(["distill", "CONFIG.yaml", "--temprature", "2"], monkeypatch)


@pytest.mark.parametrize("page", documents.pages())
def test_keys_of_yaml(page):
    """Every ```yaml block is a CONFIG.yaml, or part of one."""
    import yaml

    for block in documents.blocks(page):
        if block.language == "yaml":
            content = yaml.safe_load(block.text)
            base = {k: v for k, v in BASE.items() if not ({k, *content} >= {"student_config", "model_name_or_path"})}
            arguments.parse_mapping(f"{page}:{block.line}", {**base, **content})
