"""The loss on hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.training.hf import IGNORE_INDEX


class HiddenStateLoss(nn.Module):
    """An optional loss that draws the student's layers to the teacher's.

        mean over layers and targets of ½·‖n(A_l h_s) − n(h_t)‖² / Ht,    n(x) = (x − mean x) / std x,  A_l trained

    This is 1 − the correlation of the two: between 0 and 2 whatever a layer's scale, so one weight serves all models.
    Student layer l of Ls is compared with teacher layer round(l·Lt/Ls). Source: Jiao et al. 2020, arXiv:1909.10351
    (TinyBERT), with the normalization of patient KD, Sun et al. 2019, arXiv:1908.09355.

    Args:
        student_layers, teacher_layers: Ls, Lt.
        student_width, teacher_width: Hs, Ht. Equal widths still get a map per layer.
    """

    def __init__(self, student_layers: int, teacher_layers: int, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.pairs = [(i, round(i * teacher_layers / student_layers)) for i in range(1, student_layers + 1)]
        self.maps = nn.ModuleList(nn.Linear(student_width, teacher_width) for _ in self.pairs)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], targets: Tensor, items: int | Tensor | None = None
    ) -> Tensor:
        """Return the loss, ().

        Args:
            student, teacher: hidden states (B, T, H) as transformers returns them: embeddings, then every layer's.
            targets: (B, T); rows that are −100 are ignored.
            items: the divisor; None = the number of targets.
        """
        counted = targets != IGNORE_INDEX
        total = torch.zeros((), device=targets.device)
        for (i, j), linear in zip(self.pairs, self.maps, strict=True):
            ours, theirs = _standardized(linear(student[i])), _standardized(teacher[j].detach().to(targets.device))
            total = total + ((ours - theirs).square().mean(-1) / 2 * counted).sum()
        rows = counted.sum()
        divisor = rows if items is None else items
        return total / ((divisor + (rows == 0)) * len(self.pairs))  # 0 without rows, whatever the divisor


def make_hidden_loss(
    student: PreTrainedModel, teacher: PreTrainedModel | None, weight: float
) -> HiddenStateLoss | None:
    """Return the loss for two models, on the device of the student's head; None without weight or teacher."""
    if weight == 0 or teacher is None:
        return None
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    loss = HiddenStateLoss(ours.num_hidden_layers, theirs.num_hidden_layers, ours.hidden_size, theirs.hidden_size)
    return loss.to(student.get_output_embeddings().weight.device)


def _standardized(x: Tensor) -> Tensor:
    """Return `x` with mean 0 and variance 1 per row, in fp32, or in float64 if it is."""
    return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:])
