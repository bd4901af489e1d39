"""Who takes part: name → the keys of `kdfast distill` that make it, beside text, models and budget.

τ = 2 and CE weight 1 throughout, KD weight 0.7 unless the name says otherwise. "run4", "run5" and "true_head" are the
library's recipes `projector`, `projector_fixed` and `teacher_head` under the names that the recorded runs have; the
others are put together from single choices.
"""

from __future__ import annotations

from typing import Any

Keys = dict[str, Any]

WIDTH = "width"  # a value: the student's width

RUN4: Keys = {"recipe": "projector"}
# the projector learns from its anchor alone, at five times the student's rate, and the KD gradient leaves it alone
ANCHORED: Keys = {
    "recipe": "projector",
    "projector_init": "normal",
    "projector_lr_multiplier": 5.0,
    "teacher_grad": "none",
    "anchor_weight": 1.0,
}
# the teacher's head at the student's width, KD weight as everywhere
COMPRESSED: Keys = {"recipe": "compressed_head", "compressed_rank": WIDTH, "kd_weight": 0.7}
SVD: Keys = {"student_init": "svd", "projector_init": "svd"}
PROBE: Keys = {"recipe": "probe"}
LSTSQ: Keys = {"projector_init": "lstsq"}
RAMP: Keys = {"kd_ramp": 0.5, "kd_ramp_start": 0.0}

# variant → the contender whose learning rate it takes; who is not here is tuned itself
TUNED_AS = {
    "run5": "run4",
    "run4 + normal start": "run4",
    "run4 + ramp": "run4",
    "run4 + projector 5×": "run4",
    "true head, KD 2": "true_head",
    "compressed head": "true_head",
    "svd, true head": "svd, compressed head",
    "svd, compressed head, KD 2": "svd, compressed head",
    "svd, compressed head, KD 4": "svd, compressed head",
    "svd, head at KL 0.01, KD 2": "svd, compressed head",
    "head at KL 0.01, KD 2": "true_head",
    "true head, KD 4": "true_head",
    "svd, projector, KD gradient": "svd, compressed head",
    "svd, projector not trained": "svd, compressed head",
    "svd, projector, re-solved": "svd, compressed head",
    "anchor labels": "run4",
    "probe 5×": "probe",
    "probe, ramp": "probe",
    "probe, ramp, hidden states 4": "probe",
    "hidden states 4": "hidden states",
    "probe 5×, KD 2": "probe",
    "lstsq, KD gradient": "run4",
    "lstsq, not trained": "lstsq, re-solved",
}

BASELINES: dict[str, Keys] = {
    "lm_only": {"recipe": "lm_only"},
    "run4": RUN4,
    "run5": {"recipe": "projector_fixed"},
    "true_head": {"recipe": "teacher_head"},
}

FRESH: dict[str, Keys] = {
    **BASELINES,
    "svd, LM only": {"recipe": "lm_only", "student_init": "svd"},
    "svd, true head": {"recipe": "teacher_head", "student_init": "svd"},
    "svd, compressed head": {**COMPRESSED, "student_init": "svd"},
    "svd, compressed head, KD 2": {**COMPRESSED, "student_init": "svd", "kd_weight": 2.0},
    "svd, compressed head, KD 4": {**COMPRESSED, "student_init": "svd", "kd_weight": 4.0},
    "svd, head at KL 0.01, KD 2": {"recipe": "svd_init", "kd_until": 1.0},
    "svd, projector, KD gradient": {**RUN4, **SVD},
    "svd, projector not trained": {**RUN4, **SVD, "teacher_grad": "none", "projector_lr": 0.0},
    "svd, projector, re-solved": {**RUN4, **SVD, "teacher_grad": "none", "projector_resolve_steps": 16},
    "probe": PROBE,
    "probe 5×": {**PROBE, "projector_lr_multiplier": 5.0},
    "probe 5×, KD 2": {**PROBE, "projector_lr_multiplier": 5.0, "kd_weight": 2.0},
    "probe, ramp": {**PROBE, **RAMP},
    "probe, ramp, hidden states 4": {**PROBE, **RAMP, "hidden_weight": 4.0},
    "hidden states": {"recipe": "lm_only", "hidden_weight": 1.0},
    "hidden states 4": {"recipe": "lm_only", "hidden_weight": 4.0},
    "anchor labels": ANCHORED,
    "compressed head": COMPRESSED,
    "true head, KD 2": {"recipe": "teacher_head", "kd_weight": 2.0},
    "true head, KD 4": {"recipe": "teacher_head", "kd_weight": 4.0},
    "head at KL 0.01, KD 2": {"recipe": "compressed_head"},
    "run4 + normal start": {**RUN4, "projector_init": "normal"},
    "run4 + ramp": {**RUN4, "kd_ramp": 0.2},
    "run4 + projector 5×": {**RUN4, "projector_lr_multiplier": 5.0},
}  # fmt: skip

PRETRAINED: dict[str, Keys] = {
    **BASELINES,
    "compressed head": COMPRESSED,
    "true head, KD 2": {"recipe": "teacher_head", "kd_weight": 2.0},
    "true head, KD 4": {"recipe": "teacher_head", "kd_weight": 4.0},
    "head at KL 0.01, KD 2": {"recipe": "compressed_head"},
    "lstsq, KD gradient": {**RUN4, **LSTSQ},
    "lstsq, not trained": {**RUN4, **LSTSQ, "teacher_grad": "none", "projector_lr": 0.0},
    "lstsq, re-solved": {**RUN4, **LSTSQ, "teacher_grad": "none", "projector_resolve_steps": 16},
    "hidden states": {"recipe": "lm_only", "hidden_weight": 1.0},
    "hidden states 4": {"recipe": "lm_only", "hidden_weight": 4.0},
}  # fmt: skip
