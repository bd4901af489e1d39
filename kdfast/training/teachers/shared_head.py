"""The head of a teacher with another tokenizer, in the order of the student's ids."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.inputs import Head
from kdfast.training.data.shared_vocabulary import SharedVocabulary
from kdfast.training.hf import head, head_shape


class SharedHead(nn.Module):
    """The teacher's head rows for the strings that both tokenizers have, copied once: (V, Ht), by the student's ids.

    `mask` (V,) is True at those; the other rows mean nothing. It is neither trained nor saved.
    """

    weight: Tensor
    bias: Tensor | None
    mask: Tensor

    @torch.no_grad()
    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, shared: SharedVocabulary) -> None:
        """Copy the rows. Raise ValueError if a model's head has no row for one of its ids."""
        super().__init__()
        for role, model, ids in (("student", student, shared.student), ("teacher", teacher, shared.teacher)):
            if (largest := int(ids.max())) >= head_shape(model)[0]:
                raise ValueError(
                    f"the {role}'s head has {head_shape(model)[0]} rows, and its tokenizer ids up to {largest}; "
                    "they do not belong together. Expected the model's own tokenizer"
                )
        own = head(teacher, torch.empty(0))
        index, mask = shared.index(head_shape(student)[0]), shared.mask(head_shape(student)[0])
        index = index.to(own.weight.device)
        self.register_buffer("weight", own.weight.detach()[index], persistent=False)
        self.register_buffer("bias", None if own.bias is None else own.bias.detach()[index], persistent=False)
        self.register_buffer("mask", mask.to(own.weight.device), persistent=False)

    def forward(self, own: Head) -> Head:
        """Return the teacher's head over its hidden states with these rows, and its own scale and cap."""
        return replace(own, weight=self.weight, bias=self.bias)
