"""Which recipe for which case: what `recipe="auto"` means.

The choice rests on the experiment of `bench/recipes/`, whose figures are in docs/recipes.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from kdfast.frontend.checks import same_vocabulary
from kdfast.training.hf import head_shape
from kdfast.training.recipes import CACHED


class Choice(NamedTuple):
    recipe: str
    why: str


FROM_CACHE = Choice(CACHED, "the data set brings a teacher's cached entries")


def choose_recipe(student: PreTrainedModel, teacher: PreTrainedModel | None, valid_vocab: int | None = None) -> Choice:
    """The best measured recipe for these two models, and the reason in words: what recipe="auto" takes.

    Args:
        student, teacher: causal models; a teacher of None is `lm_only`'s.
        valid_vocab: as in `fused_kd_loss`: heads that differ by padding rows alone count as equal.
    """
    if teacher is None:
        return Choice("lm_only", "there is no teacher")
    ours, theirs = head_shape(student)[0], head_shape(teacher)[0]
    if not same_vocabulary(ours, theirs, valid_vocab):
        return Choice(
            "lm_only",
            f"the teacher's head has {theirs} tokens and the student's {ours}, and without that head nothing measured "
            "was reliably better than no teacher; recipe='probe' is there to try",
        )
    if is_fresh(student):
        why = "the student is fresh and has the teacher's vocabulary: its embedding is solved from it"
        return Choice("svd_init", why)
    return Choice("compressed_head", "the student is pretrained and has the teacher's vocabulary")


@torch.no_grad()
def is_fresh(student: PreTrainedModel) -> bool:
    """Whether the student's embedding is as it was drawn: rows of independent normal numbers of one size.

    Row norms of such an embedding of width H vary by 1/√(2H); training moves rows by how often their tokens occur.
    """
    weight = student.get_output_embeddings().weight
    norms = weight.float().norm(dim=1)
    norms = norms[norms > 0]  # a padding token's row is drawn as zeros
    return len(norms) > 1 and (norms.std() / norms.mean()).item() < 1.5 * (2 * weight.shape[1]) ** -0.5
