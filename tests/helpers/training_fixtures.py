"""Tiny data, and models that refuse to make logits."""

import pytest
import torch
from tiny_models import tiny


@pytest.fixture(name="tiny")
def _tiny():
    return tiny


@pytest.fixture
def batch():
    """3 rows of 9: one whole, one padded at the right, one at the left; −100 here and there."""
    input_ids = torch.randint(3, 67, (3, 9), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    attention_mask[2, :2] = 0
    labels = input_ids.clone()
    labels[0, :4] = -100
    labels[2, 5] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.fixture
def rows():
    """n rows of T ids as a data set, with labels that leave a different number of targets in every row."""

    def make(n, T=12, V=67, seed=5):
        generator = torch.Generator().manual_seed(seed)
        made = []
        for i in range(n):
            ids = torch.randint(3, V, (T,), generator=generator)
            labels = ids.clone()
            labels[: (3 * i) % T] = -100
            made.append({"input_ids": ids, "labels": labels})
        return made

    return make


@pytest.fixture
def no_logits():
    """Call it with models: from then on, whoever runs their head fails."""

    def forbid(*models):
        def fail(module, args):
            raise AssertionError("logits were made")

        for model in models:
            model.get_output_embeddings().register_forward_pre_hook(fail)

    return forbid


@pytest.fixture
def config(tmp_path):
    """KDConfig with what every test run wants."""
    from kdfast.training import KDConfig

    def make(**given):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "recipe": "projector_fixed",
            "precompute_teacher_log_probs": False,  # whatever the number of epochs
            "use_cpu": True,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "save_strategy": "no",
            "logging_steps": 1,
        }
        return KDConfig(**{**defaults, **given})

    return make
