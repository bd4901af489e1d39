"""The configuration table and its search, without a GPU: times are made up, the rules are not."""

from types import SimpleNamespace

import pytest
import torch

from kdfast.kernels import block_sizes
from kdfast.kernels.autotune import neighbours, search
from kdfast.kernels.block_sizes import ARCHITECTURES, TABLE, TileConfig, known_architecture, row_of, splits_of


def test_the_search_finds_the_minimum_and_skips_what_does_not_run(capsys):
    def time(run):
        config = run()
        if config.block_n == 256:
            raise RuntimeError("out of resource: shared memory")
        return abs(config.block_v - 256) / 64 + abs(config.stages - 4) + abs(config.warps - 4)

    found = search(TileConfig(128, 64, 32, 8, 2, 4), lambda config: config, time)
    assert (found.block_v, found.stages, found.warps) == (256, 4, 4)
    assert "no run" in capsys.readouterr().out


def test_a_gain_below_two_percent_is_noise():
    start = TileConfig(128, 64, 32, 8, 2, 4)
    assert search(start, lambda config: config, lambda run: 1.0 if run() == start else 0.99) == start


def test_neighbours_move_one_field_one_step():
    start = TileConfig(128, 128, 64, 8, 3, 4)
    for near in neighbours(start):
        moved = [name for name in vars(start) if getattr(start, name) != getattr(near, name)]
        assert len(moved) == 1


@pytest.mark.parametrize(("capability", "row"), [
    ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((8, 7), "sm_86"), ((12, 1), "sm_120"), ((7, 5), None), ((11, 0), None),
])  # fmt: skip
def test_a_newer_relative_uses_the_closest_older_row(monkeypatch, capability, row):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert known_architecture(torch.device("cuda")) == row


def test_every_architecture_has_every_row():
    assert set(ARCHITECTURES) == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert set(TABLE) == {(a, size, band) for a in ARCHITECTURES for size in (2, 4, 8) for band in ("few", "many")}
    assert all(row.why for row in TABLE.values())
    assert row_of(torch.device("cpu"), 2, 1) is block_sizes.INTERPRETER


# 64 row blocks on 132 multiprocessors: two splits are one wave of 128; one row block wants about one program each
@pytest.mark.parametrize(("row_blocks", "tiles", "expected"), [(64, 393, 2), (1, 393, 131), (1, 5, 5), (132, 393, 1)])
def test_splits_fill_the_chip(monkeypatch, row_blocks, tiles, expected):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert splits_of(row_blocks, tiles, torch.device("cuda")) == expected
