"""What is planned is what runs outside tests: no deterministic mode, whose operators take other memory."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _as_users_run_it(_seeded_and_poisoned, monkeypatch):
    torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("KDFAST_SCRATCH_BYTES", raising=False)
