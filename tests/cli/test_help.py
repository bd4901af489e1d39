"""`kdfast --help` fits on one screen, and a command's own help begins with the same sentence."""

import pytest

from kdfast.cli import COMMANDS
from kdfast.cli.main import main


def printed_help(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        main([*argv, "--help"])
    assert done.value.code == 0
    return capsys.readouterr().out


def test_one_screen(capsys, monkeypatch):
    lines = printed_help([], capsys, monkeypatch).rstrip().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for name, what in COMMANDS.items():
        assert f"    {name:9} {what}" in lines  # whole, in one line


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_does(command, capsys, monkeypatch):
    usage, _, rest = printed_help([command], capsys, monkeypatch).partition("\n\n")
    assert usage.startswith(f"usage: kdfast {command} ")
    sentence = rest.partition("\n\n")[0]
    assert sentence.lower() == f"{COMMANDS[command]}.".lower()
