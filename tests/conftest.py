"""What every test gets: no network, a fixed seed, and NaN in memory nobody has written yet."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("KDFAST_COMPILE", "0")  # but in the tests of it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it on a GPU

import interpreter  # noqa: F401  # before any kernel
import pytest
import torch

pytest.register_assert_rewrite("definition", "autocast_checks", "gpu_checks")


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """torch.empty and its kin return NaN (the largest value, for integers), so that a read before the first
    write shows. PyTorch does that itself, below Python, but in deterministic mode only."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
