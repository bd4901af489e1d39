"""Distillation runs on transformers and accelerate: `KDTrainer`, `KDConfig`, and what they are made of.

    student, teacher = load_student("gpt2"), load_teacher("gpt2-medium")
    args = KDConfig(output_dir="out", max_steps=1000)
    KDTrainer(student, args, teacher=teacher, train_dataset=blocks).train()

recipes.py  named choices        config.py   KDConfig            loading.py     students and teachers
heads.py    backbone and head    labels.py   the shift           model.py       the loss, under one forward
fidelity.py KL to the teacher    meter.py    means for logs      guard.py       stop at NaN
checkpoint.py  what is saved     trainer.py  KDTrainer           data.py        text to blocks
signs.py    what a log tells     health.py   says it, once       case.py        recipe="auto"
starts.py   solved starts        teachers.py what KD learns from, and the anchors
faults.py   what stops a run     resume.py   the checkpoint to go on from     termination.py  SIGTERM
manifest.py checksums            pickles.py  no code is loaded                files.py        durable writes
folders.py  complete or not there     resumable_trainer.py  goes on after all that
processes.py  one for all, all together
cache/      a teacher run once        cached.py   its entries, in a batch
small.py    a teacher and text for first tries
"""

try:
    import accelerate as _accelerate  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"kdfast.training needs {error.name}: pip install 'kdfast[train]'") from error

from kdfast.demo.toy_models import SmallModels, small_models
from kdfast.training.cache import CachedBlocks, CacheError, TeacherCache, cache_teacher
from kdfast.training.cached import CachedEntries
from kdfast.training.callbacks import Finding, HealthCallback
from kdfast.training.case import choose_recipe
from kdfast.training.config import KDConfig
from kdfast.training.diagnostics import HealthThresholds
from kdfast.training.durable.errors import (
    CheckpointWriteError,
    DamagedCheckpointError,
    LostProcessError,
    TerminatedError,
)
from kdfast.training.labels import shift_labels
from kdfast.training.loading import load_student, load_teacher
from kdfast.training.model import DistillationModel
from kdfast.training.nan_guard import NonFiniteLossError
from kdfast.training.recipes import RECIPES, Recipe
from kdfast.training.trainer import KDTrainer

__all__ = [
    "RECIPES",
    "CacheError",
    "CachedBlocks",
    "CachedEntries",
    "CheckpointWriteError",
    "DamagedCheckpointError",
    "DistillationModel",
    "Finding",
    "HealthCallback",
    "HealthThresholds",
    "KDConfig",
    "KDTrainer",
    "LostProcessError",
    "NonFiniteLossError",
    "Recipe",
    "SmallModels",
    "TeacherCache",
    "TerminatedError",
    "cache_teacher",
    "choose_recipe",
    "load_student",
    "load_teacher",
    "shift_labels",
    "small_models",
]
