import math
import time

import pytest
import torch

from kdfast.loss import KDMetrics
from kdfast.training.metrics import TokenMeans, TrainingMeter

CPU = torch.device("cpu")
NAN = torch.tensor(float("nan"))


def same(sums):
    return sums


def test_means_are_weighted_by_tokens():
    means = TokenMeans(["a", "b"], CPU)
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(4.0)}, torch.tensor(10))
    means.add({"a": torch.tensor(2.0), "b": NAN}, torch.tensor(30))
    assert means.read(same) == ({"a": 1.75, "b": 4.0}, 40)
    assert means.read(same) == ({}, 0), "reading starts afresh"


def test_what_is_missing_is_absent():
    means = TokenMeans(["a", "b"], CPU)
    means.add({"a": NAN, "b": None}, torch.tensor(10))
    assert means.read(same)[0] == {}


def test_a_batch_without_tokens_is_nothing_even_if_infinite():
    means = TokenMeans(["a"], CPU)
    means.add({"a": torch.tensor(math.inf)}, torch.tensor(0))
    means.add({"a": torch.tensor(3.0)}, torch.tensor(2))
    assert means.read(same)[0] == {"a": 3.0}


def test_tokens_beyond_float32():
    means = TokenMeans(["a"], CPU)
    means.add({"a": torch.tensor(1.0)}, torch.tensor(2**24))
    means.add({"a": torch.tensor(1.0)}, torch.tensor(1))
    assert means.read(same)[1] == 2**24 + 1


def test_sums_of_several_processes_are_read_as_one():
    means = TokenMeans(["a"], CPU)
    means.add({"a": torch.tensor(1.0)}, torch.tensor(1))
    other = torch.tensor([[9.0], [3.0]])  # a mean of 3 over 3 tokens
    assert means.read(lambda sums: sums + other) == ({"a": 2.5}, 4)


def test_speed_leaves_pauses_out(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = TrainingMeter(CPU)
    meter.start()
    values = [torch.tensor(1.0)] * (len(KDMetrics._fields) - 1)
    meter.add(KDMetrics(*values, tokens=torch.tensor(100.0)))
    clock[0] += 2
    with meter.paused():
        clock[0] += 30
    assert meter.read(same)["tokens_per_second"] == pytest.approx(50.0)
    assert meter.count_tokens(same) == 100
    assert meter.count_tokens(same) == 0
    assert meter.read(same)["tokens_per_second"] == pytest.approx(0.0)
