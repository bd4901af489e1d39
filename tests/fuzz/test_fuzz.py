"""The fuzzer itself: what it calls a finding, and a small sample of each kind with fixed seeds.

`make fuzz` runs it for as long as one likes; tests/fuzz/README.md has what it found.
"""

# ruff: noqa: E501  (tables)

import random
import sys
import time
import warnings

import documents
import own_warnings
import pytest
import torch
from fuzz import child, command, counts, damage, interface
from fuzz.__main__ import KINDS, fuzz
from problems import F64

ENDED = {"code": 2, "out": "", "err": "kdfast: config.yaml: unknown key 'x'\n", "forbidden": [], "seconds": 1.0}


def ended(**changed):
    return child.Ended(**{**ENDED, **changed})


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"code": 0, "err": "a warning"}, None),
        ({"code": 1, "err": "Loading: 100%\nkdfast: the disk is full"}, None),
        ({"code": -1}, "no end"),
        ({"code": -11}, "exit code -11"),
        ({"code": 1, "err": "Killed"}, "without a word"),
        ({"err": "kdfast: one\nkdfast: two"}, "2 lines in place of one"),
        ({"err": 'Traceback (most recent call last):\n  File "/a/kdfast/cli/x.py", line 3, in f\nKeyError: 1'}, "cli/x.py:3 f: KeyError: 1"),
        ({"forbidden": ["os.remove '/etc/passwd'"]}, "it tried: os.remove"),
    ],
)  # fmt: skip
def test_how_a_command_may_end(changed, expected):
    found = command.wrong_end(ended(**changed))
    assert found is None if expected is None else expected in found


# In Python ≥ 3.12 a fork beside other threads is warned of; here the child only does what the test says
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda: print("out") or 3, (3, "out", "", [])),
        (lambda: sys.exit(2), (2, "", "", [])),
        (lambda: 1 / 0, (child.CRASHED, "", "ZeroDivisionError", [])),
        (lambda: time.sleep(60), (-1, "", "", [])),
        (lambda: open("/tmp/kdfast-fuzz-outside", "w").close(), (child.CRASHED, "", "forbids", ["open '/tmp/kdfast-fuzz-outside'"])),
        (lambda: open("inside", "w").close() or 0, (0, "", "", [])),
        (lambda: __import__("os").system("true"), (child.CRASHED, "", "forbids", ["os.system"])),
    ],
)  # fmt: skip
def test_a_child_is_watched(tmp_path, act, expected):
    found = child.run(act, tmp_path / "place", seconds=0.7 if expected[0] == -1 else 600)
    code, out, err, forbidden = expected
    assert found.code == code
    assert out in found.out
    assert err in found.err
    assert [line[: len(what)] for line, what in zip(found.forbidden, forbidden, strict=True)] == forbidden


def test_damage_is_done_and_is_repeatable(tmp_path):
    seen = set()
    for seed in range(60):
        contents = []
        for again in ("one", "two"):
            path = tmp_path / f"{seed}-{again}" / "state.json"
            path.parent.mkdir()
            path.write_text('{"a": [1, 2], "b": {"c": "d"}}')
            how = damage.file(random.Random(seed), path)
            seen.add(how.partition(" at ")[0])
            contents.append((how, path.read_bytes() if path.is_file() else None))
        assert contents[0] == contents[1]
    assert {
        "state.json: deleted",
        "state.json: folder",
        "state.json: fifo",
        "state.json: flip",
        "state.json: value",
    } <= seen


@pytest.fixture
def wrong_loss(monkeypatch):
    """An engine whose loss is off by a ten-thousandth."""
    import agree

    def broken(*arguments, engine, **options):
        found = real(*arguments, engine=engine, **options)
        wrong = (lambda loss: loss * 1.0001) if engine == "torch" else (lambda loss: loss)
        return (wrong(found[0]), found[1]) if isinstance(found, tuple) else wrong(found)

    real = agree.fused_kd_loss
    monkeypatch.setattr(agree, "fused_kd_loss", broken)


def test_a_wrong_number_is_found_and_simplified(wrong_loss):
    seeds = [seed for seed in range(300) if interface.draw(seed).dtype == F64 and interface.draw(seed).labels == "some"]
    found = next(outcome for seed in seeds if (outcome := interface._right(seed, "torch")).finding)
    assert found.came_to == "finding"
    assert "agree(Problem(" in found.finding.repeat
    simplest = found.finding.repeat.partition("leading=")[2]
    assert simplest.startswith("(2,)"), "the first choice"


def test_silent_acceptance_is_found(monkeypatch):
    monkeypatch.setattr(interface, "fused_kd_loss", lambda *_, **options: torch.zeros(()))
    outcomes = [interface.attempt(seed) for seed in range(40)]
    assert any("silently taken" in outcome.finding.what for outcome in outcomes if outcome.finding)


@pytest.fixture
def as_in_a_run():
    with warnings.catch_warnings():
        own_warnings.are_errors()
        yield


@pytest.mark.usefixtures("as_in_a_run")
def test_a_sample_of_the_interface():
    outcomes = [interface.attempt(seed) for seed in range(120)]
    assert [outcome.finding for outcome in outcomes if outcome.finding] == []
    assert {outcome.came_to for outcome in outcomes} >= {"agrees", "refused", "meant something"}


def test_a_sample_of_configs(capsys):
    found = fuzz("configs", seed=0, seconds=100, most=12)
    assert found["findings"] == []
    assert found["cases"] == 12, capsys.readouterr().out


def test_the_page_has_the_counts():
    """tests/fuzz/README.md: what came out, and of how many values cases are made."""
    page = documents.source("tests/fuzz/README.md")
    assert "\n".join(counts.rows()) in page
    for told in (f"({len(interface.JUNK)} values", f"({len(interface.SPOILED)} ways"):
        assert told in page


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_two_minutes_of_each_kind(kind, capsys):
    found = fuzz(kind, seed=int(time.time()), seconds=120)
    with capsys.disabled():
        print(f"\n{kind}: {found['cases']} cases from seed {found['seeds'][0]}")
    assert found["findings"] == []
