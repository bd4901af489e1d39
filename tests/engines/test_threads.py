"""The `torch` engine's row work on several threads: the numbers of one, and nothing left over."""

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from kdfast import ForwardKL, Head, Logits, fused_kd_loss
from kdfast.engines import torch_rows
from kdfast.ops import threads
from kdfast.ops.threads import map_on_threads

N, V = 23, 64
SEEN: list[int] = []


@dataclass(frozen=True)
class Uneven(ForwardKL):
    """Forward KL that notes its threads and takes now long, now short; above `limit` blocks it fails."""

    limit: float = 1e9

    def terms(self, p, q, g):
        SEEN.append(torch.get_num_threads())
        if len(SEEN) > self.limit:
            raise IndexError("this row is one too many")
        time.sleep(random.random() / 500)
        return super().terms(p, q, g)


@pytest.fixture(autouse=True)
def _few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(torch_rows, "CPU_BLOCK", 2 * V)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    SEEN.clear()
    yield
    torch.set_num_threads(before)


def solve(divergence="forward_kl", **options):
    """(loss, metrics …, gradients); products with a unit matrix are exact on any number of threads."""
    generator = torch.Generator().manual_seed(0)
    hidden, z_t = (3 * torch.randn(N, V, generator=generator) for _ in range(2))
    bias = torch.randn(V, generator=generator)
    leaves = [hidden.requires_grad_(), bias.requires_grad_()]
    labels = torch.randint(V, (N,), generator=generator)
    loss, metrics = fused_kd_loss(
        Head(hidden, torch.eye(V), bias), Logits(z_t), labels, ce_weight=0.3, divergence=divergence, engine="torch",
        return_metrics=True, **options,
    )  # fmt: skip
    numbers = [loss.detach(), *(value for value in metrics if value is not None)]
    return numbers + (list(torch.autograd.grad(loss, leaves)) if torch.is_grad_enabled() else [])


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_same_bits_on_any_number_of_threads():
    found = [solve(Uneven()) for _ in range(3)]
    torch.set_num_threads(1)
    for each in found:
        same(each, solve())


def test_each_operation_on_one_thread():
    solve(Uneven())
    assert set(SEEN) == {1}
    assert torch.get_num_threads() == 3


def test_what_a_thread_raises():
    with pytest.raises(IndexError, match="one too many"):
        solve(Uneven(limit=4))
    blocks = len(SEEN)
    time.sleep(0.05)
    assert len(SEEN) == blocks, "a thread goes on"
    same(solve(Uneven(limit=100)), solve())


def test_inference_mode():
    expected = solve()
    with torch.inference_mode():
        same(solve(), expected[:-2])


def test_two_losses_at_once():
    expected = solve()

    def once(_):
        torch.set_num_threads(2)
        return solve(Uneven())

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(once, range(4)):
            same(found, expected)


def test_no_thread_to_be_had(monkeypatch):
    expected = solve()
    with monkeypatch.context() as patched:
        patched.setattr(threads, "_pool", lambda threads: None)
        same(solve(), expected)
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    monkeypatch.setattr(threads, "_pool", lambda threads: pool)
    same(solve(), expected)


def test_rows_in_the_order_they_are_in():
    def late(i):
        time.sleep(random.random() / 500)
        return i

    assert map_on_threads(late, range(20)) == list(range(20))


FORKED = """
import os, sys, threading, torch
from kdfast.ops.threads import map_on_threads

def names(_):
    barrier.wait(timeout=60)  # three threads take one each
    return threading.get_ident()

torch.set_num_threads(3)
barrier = threading.Barrier(3)
assert len(set(map_on_threads(names, range(3)))) == 3
child = os.fork()
if child == 0:
    barrier = threading.Barrier(3)
    done = len(set(map_on_threads(names, range(3)))) == 3
    sys.exit(0 if done else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_threads_of_its_own_and_both_end():
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr
