"""What is planned is what runs outside tests: no deterministic mode, whose operators take other memory."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # planned, live_bytes, fake_gpu


@pytest.fixture(autouse=True)
def _as_users_run_it(_seeded_and_poisoned, monkeypatch):
    torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("KDFAST_SCRATCH_BYTES", raising=False)
