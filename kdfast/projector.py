"""`LogitProjector`: the trained linear map from the teacher's width to the student's.

    h_p = h_t Pᵀ + p          (*, Ht) → (*, Hs);    projected teacher logits = h_p Wᵀ, W the student's own head

Pass its weight and bias to the loss, which does the product itself:

    projector = LogitProjector(teacher_width=1024, student_width=768, init="normal")
    loss = fused_kd_loss(Head(h_s, W), Projected(h_t, projector.weight, projector.bias), labels)

`distillation_param_groups` finds it if it is registered under the name `logit_projector`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.ops.transforms import ordinary

ProjectorInit = Literal["default", "normal"]


class LogitProjector(nn.Module):
    """`nn.Linear(teacher_width, student_width)` with a choice of initialization.

    Args:
        teacher_width: Ht, the width of the teacher's hidden states.
        student_width: Hs, the width of the student's.
        bias: whether to have a bias.
        init: "default", as nn.Linear (weight and bias uniform in ±1/√Ht), or "normal" (weight N(0, std²), bias zero),
            which starts the projected teacher near the uniform distribution.
        std: standard deviation for "normal".
        device, dtype: as in nn.Linear.

    Attributes: `weight` (Hs, Ht), `bias` (Hs,) or None.

    Raises ValueError for a width below 1, an unknown init or a negative std.
    """

    def __init__(
        self,
        teacher_width: int,
        student_width: int,
        *,
        bias: bool = True,
        init: ProjectorInit = "default",
        std: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, width in (("teacher_width", teacher_width), ("student_width", student_width)):
            if width < 1:
                raise ValueError(f"{name}={width!r}; expected the width of hidden states, an int ≥ 1")
        if init not in get_args(ProjectorInit):
            names = ", ".join(map(repr, get_args(ProjectorInit)))
            raise ValueError(f"init={init!r} is unknown; expected one of {names}")
        if not std >= 0:
            raise ValueError(f"std={std!r}; expected a standard deviation ≥ 0")
        self.teacher_width = teacher_width
        self.student_width = student_width
        self.init = init
        self.std = std
        self.weight = nn.Parameter(torch.empty(student_width, teacher_width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(student_width, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the parameters again, from the global random state."""
        if self.init == "normal":
            nn.init.normal_(self.weight, std=self.std)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            return
        bound = self.teacher_width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (*, Ht) to (*, Hs)."""
        return F.linear(ordinary(hidden), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.teacher_width} → {self.student_width}, bias={self.bias is not None}, init={self.init!r}"
