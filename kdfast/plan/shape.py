"""What is planned: the sizes of one loss, and the bytes that its inputs and gradients take however it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Shape:
    """Describe one forward and backward of the loss. Raises ValueError naming the field.

    teacher: "projected", through the student's head: gradients to hidden states, W and the projector (no bias);
    "head", the teacher's own: gradients to the student's hidden states and W; "none": cross entropy alone.
    """

    tokens: int  # N
    vocab: int  # V
    student_width: int  # Hs
    teacher_width: int  # Ht; of no account where there is no teacher
    dtype: torch.dtype = torch.bfloat16  # of hidden states and weights, both models'
    device: Literal["cuda", "cpu"] = "cuda"
    teacher: Literal["projected", "head", "none"] = "projected"
    scratch_bytes: int = 0  # as in fused_kd_loss; 0 = KDFAST_SCRATCH_BYTES or the engine's default

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab", "student_width", "teacher_width"):
            if getattr(self, name) < 1 and not (name == "teacher_width" and self.teacher == "none"):
                raise ValueError(f"Shape: {name}={getattr(self, name)}; expected a positive number")
        if self.dtype not in DTYPES:
            raise ValueError(f"Shape: dtype={self.dtype}; expected one of {', '.join(map(str, DTYPES))}")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"Shape: device={self.device!r}; expected 'cuda' (any GPU) or 'cpu'")
        if self.teacher not in ("projected", "head", "none"):
            raise ValueError(f"Shape: teacher={self.teacher!r}; expected 'projected', 'head' or 'none'")
        if self.scratch_bytes < 0:
            raise ValueError(
                f"Shape: scratch_bytes={self.scratch_bytes}; expected bytes, or 0 for the engine's default"
            )

    @property
    def narrow(self) -> bool:
        """Whether inputs have 16 bits."""
        return self.dtype.itemsize == 2

    @property
    def sides(self) -> int:
        """How many sides have logits: 2, or 1 without a teacher."""
        return 1 if self.teacher == "none" else 2

    @property
    def wide(self) -> int:
        """Bytes of a number as our engines accumulate it: 4, or 8 for float64."""
        return max(4, self.dtype.itemsize)

    @property
    def logits(self) -> int:
        """Bytes of one side's logits (N, V) in the inputs' dtype."""
        return self.tokens * self.vocab * self.dtype.itemsize

    @property
    def hidden(self) -> int:
        """Bytes of (N, Hs), the student's hidden states."""
        return self.tokens * self.student_width * self.dtype.itemsize

    @property
    def weight(self) -> int:
        """Bytes of W (V, Hs)."""
        return self.vocab * self.student_width * self.dtype.itemsize

    @property
    def projector(self) -> int:
        """Bytes of P (Hs, Ht); 0 where there is none."""
        return self.student_width * self.teacher_width * self.dtype.itemsize if self.teacher == "projected" else 0

    @property
    def inputs(self) -> int:
        """Bytes of hidden states, W, P or the teacher's W, and labels."""
        rows = {"none": 0, "projected": self.tokens, "head": self.tokens + self.vocab}[self.teacher]
        teacher = rows * self.teacher_width * self.dtype.itemsize
        return self.gradients + teacher + 8 * self.tokens

    @property
    def gradients(self) -> int:
        """Bytes of the gradients that stay."""
        return self.hidden + self.weight + self.projector
