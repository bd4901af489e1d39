"""Distillation runs on transformers and accelerate: `KDTrainer`, `KDConfig`, and their parts.

    student, teacher = load_student("gpt2"), load_teacher("gpt2-medium")
    args = KDConfig(output_dir="out", max_steps=1000)
    KDTrainer(student, args, teacher=teacher, train_dataset=blocks).train()

config.py    KDConfig                      recipes.py      named choices, and what "auto" picks
model.py     the loss, in one forward      teachers/       what KD learns from, and its fidelity
trainer.py   KDTrainer                     prepare.py      its arguments to rows and a wrapped student
hf.py        backbone, head, labels        loading.py      load_student, load_teacher
adapters.py  LoRA and the like             initialization/ solved starts
metrics.py   means for logs, memory        callbacks.py    health in words, the progress bar
fsdp.py      sharding                      diagnostics.py  what a log shows
durable/     runs that survive kills, and stop at NaN
cache/       a teacher that runs once
on_policy/   text that the student or the teacher writes
data/        text, completions and chats to rows and batches, tokenizers
"""

import importlib
from typing import Any

try:
    import accelerate as _accelerate  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"kdfast.training needs {error.name}: pip install 'kdfast[train]'") from error

from kdfast.training.cache import (
    CachedBlocks,
    CacheError,
    TeacherCache,
    cache_from_server,
    cache_teacher,
    import_log_probs,
)
from kdfast.training.callbacks import Finding, HealthCallback
from kdfast.training.config import KDConfig
from kdfast.training.data.alignment import OtherTokenizer
from kdfast.training.data.chat import tokenize_dataset
from kdfast.training.diagnostics import HealthThresholds
from kdfast.training.durable.errors import (
    CheckpointWriteError,
    DamagedCheckpointError,
    LostProcessError,
    TerminatedError,
)
from kdfast.training.durable.nan_guard import NonFiniteLossError
from kdfast.training.hf import backbone, head, shift_labels
from kdfast.training.loading import load_student, load_teacher
from kdfast.training.metrics import EvalLogProbs
from kdfast.training.model import DistillationModel
from kdfast.training.recipes import RECIPES, Recipe, choose_recipe
from kdfast.training.teachers.entries import CachedEntries
from kdfast.training.trainer import KDTrainer

__all__ = [
    "RECIPES",
    "CacheError",
    "CachedBlocks",
    "CachedEntries",
    "CheckpointWriteError",
    "DamagedCheckpointError",
    "DistillationModel",
    "EvalLogProbs",
    "Finding",
    "HealthCallback",
    "HealthThresholds",
    "KDConfig",
    "KDTrainer",
    "LostProcessError",
    "NonFiniteLossError",
    "OtherTokenizer",
    "Recipe",
    "SmallModels",
    "TeacherCache",
    "TerminatedError",
    "backbone",
    "cache_from_server",
    "cache_teacher",
    "choose_recipe",
    "head",
    "import_log_probs",
    "load_student",
    "load_teacher",
    "shift_labels",
    "small_models",
    "tokenize_dataset",
]


def __getattr__(name: str) -> Any:
    if name in ("SmallModels", "small_models"):  # of the demo, which trains with what is here
        return getattr(importlib.import_module("kdfast.demo.toy_models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
