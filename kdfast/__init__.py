"""kdfast: distill large-vocabulary language models without holding the full logits in memory.

    from kdfast import Head, Projected, fused_kd_loss

    loss = fused_kd_loss(
        Head(student_hidden, student.lm_head.weight),            # (*, Hs), (V, Hs)
        Projected(teacher_hidden, projector.weight),             # (*, Ht), (Hs, Ht)
        labels, temperature=2.0, kd_weight=0.7, ce_weight=1.0,
    )

Importing kdfast needs torch and numpy only. The trainer (`KDTrainer`, `KDConfig`, `DistillationModel`) needs
`pip install kdfast[train]` and is loaded on first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdfast._version import __version__
from kdfast.divergences import (
    JSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)
from kdfast.inputs import Head, Logits, Projected, SparseLogits
from kdfast.loss import FusedKDLoss, KDMetrics, fused_kd_loss
from kdfast.low_rank_head import CompressedHead, HeadFidelity, compress_head
from kdfast.param_groups import distillation_param_groups
from kdfast.projector import LogitProjector

if TYPE_CHECKING:
    from kdfast.training import DistillationModel as DistillationModel
    from kdfast.training import KDConfig as KDConfig
    from kdfast.training import KDTrainer as KDTrainer

# In a checkout, `kdfast.kernels` is the top-level folder `kernels/`.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "kernels").is_dir() and (_ROOT / "setup.py").is_file():
    __path__.append(str(_ROOT))

_TRAINING = ("DistillationModel", "KDConfig", "KDTrainer")

__all__ = [
    "JSD",
    "AlphaBeta",
    "CompressedHead",
    "Divergence",
    "ForwardKL",
    "FusedKDLoss",
    "Head",
    "HeadFidelity",
    "KDMetrics",
    "LogitProjector",
    "Logits",
    "Projected",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SparseLogits",
    "SymmetricKL",
    "TotalVariation",
    "__version__",
    "compress_head",
    "distillation_param_groups",
    "fused_kd_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _TRAINING:
        raise AttributeError(f"module 'kdfast' has no attribute {name!r}")
    from kdfast import training

    return getattr(training, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRAINING})
