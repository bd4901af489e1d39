"""What a cache keeps of a teacher's hidden states: r coordinates per token, and one head that they go through.

The coordinates are those of `compress_head`: an error in any one of them costs about the same. At full rank, in a float
dtype, they are the hidden states themselves, and the head is the teacher's own. On disk:

factor/factor.safetensors   weight (V, r), bias (V,) if the head has one, projector (r, Ht) and its bias (r,) if there
                            is one; as metadata the head's scale and cap, and the measured fidelity
coordinates (T·r)           of a row, float16, float32 or int8; int8 has scales (T,) float16, a step size per token
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdfast.inputs import Head
from kdfast.low_rank_head import (
    CompressedHead,
    FidelityNotReached,
    HeadFidelity,
    compress_head,
    held_out_rows,
    kl_and_agreement,
)
from kdfast.training.cache.description import Description

FILE = "factor.safetensors"
TOKENS_PER_WIDTH = 16  # tokens, per unit of the teacher's width, that the head is solved and measured on
STEPS = 127  # int8 steps on either side of zero


class CachedHead:
    """The head of a cache's coordinates (*, r); call it with them to get a `Head` for `fused_kd_loss`.

    Attributes:
        weight: (V, r); bias: (V,) or None.
        projector: (r, Ht), and projector_bias (r,) or None: make the coordinates. None: these are the hidden states.
        fidelity: rank, KL(teacher ‖ what is kept) in nats and agreement at τ = 1, rounding included.
    """

    def __init__(
        self, tensors: dict[str, Tensor | None], logit_scale: float, softcap: float | None, fidelity: HeadFidelity
    ) -> None:
        self._place(tensors)
        self.logit_scale, self.softcap, self.fidelity = logit_scale, softcap, fidelity

    def _place(self, tensors: dict[str, Tensor | None]) -> None:
        weight = tensors["weight"]
        assert weight is not None
        self.weight, self.bias = weight, tensors.get("bias")
        self.projector, self.projector_bias = tensors.get("projector"), tensors.get("projector_bias")

    def _tensors(self) -> dict[str, Tensor]:
        names = ("weight", "bias", "projector", "projector_bias")
        return {name: x.detach() for name in names if (x := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> CachedHead:
        """Move the head to a device, as a module's `to` does."""
        if self.weight.device != torch.device(device):
            self._place({name: tensor.to(device) for name, tensor in self._tensors().items()})
        return self

    @property
    def rank(self) -> int:
        return self.weight.shape[1]

    def coordinates(self, hidden: Tensor) -> Tensor:
        """Return the coordinates (*, r) of the teacher's hidden states (*, Ht)."""
        if self.projector is None:
            return hidden
        return F.linear(hidden.to(self.projector.dtype), self.projector, self.projector_bias)

    def __call__(self, coordinates: Tensor) -> Head:
        hidden = coordinates.to(self.weight.dtype)
        return Head(hidden, self.weight, self.bias, logit_scale=self.logit_scale, softcap=self.softcap)

    def __str__(self) -> str:
        rank, kl, agreement = self.fidelity
        return f"rank {rank} of the teacher's head: KL(teacher ‖ what is kept) {kl:.2g}, agreement {agreement:.0%}"

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"logit_scale": self.logit_scale, "softcap": self.softcap, "fidelity": self.fidelity}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, folder / FILE, {"head": json.dumps(kept)})

    @classmethod
    def load(cls, folder: Path) -> CachedHead:
        """Return what `save` wrote. Raise OSError, ValueError or the like if it is something else."""
        with safe_open(folder / FILE, "pt") as file:
            kept = json.loads(file.metadata()["head"])
            tensors: dict[str, Tensor | None] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping; mapped)
        return cls(tensors, kept["logit_scale"], kept["softcap"], HeadFidelity(*kept["fidelity"]))


@torch.no_grad()
def solve_head(whole: Head, description: Description) -> CachedHead:
    """Return the head for `description`, solved from hidden states (n, Ht) of the text, an eighth of them held out.

    Raises FidelityNotReached, a ValueError, if int8 misses the requested KL even at full rank.
    """
    width, valid, dtype = whole.hidden.shape[1], description.valid_vocab, description.dtype
    full = description.max_kl is None and description.k >= width
    if not full or dtype == "int8":
        rank = None if description.max_kl is not None else description.k
        through = partial(_kept, dtype=dtype)
        try:
            found = compress_head(whole, rank, max_kl=description.max_kl, valid_vocab=valid, rounded=through)
        except FidelityNotReached as error:
            if dtype == "int8":
                raise FidelityNotReached(f"{error}. Or keep float16 in place of int8 (cache_dtype)") from error
        else:
            if found.rank < width or dtype == "int8":
                return _of(found)
    true = replace(whole, hidden=whole.hidden[held_out_rows(whole.hidden)])
    measured = kl_and_agreement(replace(true, hidden=_kept(true.hidden, dtype)), true, valid_vocab=valid)
    own = {"weight": whole.weight, "bias": whole.bias}
    return CachedHead(own, whole.logit_scale, whole.softcap, HeadFidelity(width, *measured))


def _of(found: CompressedHead) -> CachedHead:
    assert found.fidelity is not None
    tensors = {"weight": found.weight, "projector": found.projector, "projector_bias": found.bias}
    return CachedHead(tensors, found.logit_scale, found.softcap, found.fidelity)


def _kept(coordinates: Tensor, dtype: str) -> Tensor:
    """Return coordinates after a round trip through `dtype`."""
    return restore(*keep(coordinates, dtype)).to(coordinates)


def keep(coordinates: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Return coordinates (N, r) as kept, and for int8 each token's scale (N,). Raise ValueError if they do not fit."""
    coordinates = coordinates.float()
    if not coordinates.isfinite().all():
        raise ValueError("the teacher's hidden states hold NaN or infinity on this text; expected finite ones")
    if dtype != "int8":
        kept = coordinates.to(getattr(torch, dtype))
        if not kept.isfinite().all():
            raise ValueError(
                f"dtype={dtype!r}: the teacher's hidden states reach {coordinates.abs().max():.3g}; expected "
                "'float32', or a rank below the teacher's width"
            )
        return kept, None
    scales = (coordinates.abs().amax(-1) / STEPS).half()
    steps = scales.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return (coordinates / steps).round().clamp(-STEPS, STEPS).to(torch.int8), scales


def restore(kept: Tensor, scales: Tensor | None) -> Tensor:
    """Return kept coordinates (N, r); int8 ones in float16, which rounds by a thirtieth of a step."""
    return kept if scales is None else (kept.float() * scales.float()[:, None]).half()
