"""Inputs for a teacher that reads other token ids than its student, and where its predictions match the student's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OwnInputs(NamedTuple):
    """The ids that a teacher reads instead of the student's."""

    input_ids: Tensor  # (B, Tt) int64
    attention_mask: Tensor | None  # (B, Tt), 0 at padding
    positions: Tensor  # (B, T) int64: index of the teacher's position with the student's prediction; −1: none

    @property
    def aligned(self) -> Tensor:
        """Return which of the student's positions have one of the teacher's, (B, T) bool."""
        return self.positions >= 0

    def strange(self, *, look: bool) -> Tensor:
        """Return whether a position is outside the teacher's row, (); with `look`, raise ValueError then."""
        length = self.input_ids.shape[1]
        bad = (self.positions < -1) | (self.positions >= length)
        if self.attention_mask is not None:
            bad |= self.aligned & (self.attention_mask.gather(1, self.positions.clamp(0, length - 1)) == 0)
        if look and bool(bad.any()):
            raise ValueError(
                f"teacher_positions has {int(self.positions[bad][0])}; expected places of teacher_input_ids, "
                f"{tuple(self.input_ids.shape)}, that are no padding, from 0 to {length - 1}, or -1 for none"
            )
        return bad.any()

    def align(self, states: Tensor) -> Tensor:
        """Return the teacher's hidden states (B, Tt, H) at the student's positions, (B, T, H); 0 without one."""
        at = self.positions.clamp(0, states.shape[1] - 1).to(states.device)[..., None]
        found = states.gather(1, at.expand(-1, -1, states.shape[-1]))
        return found.masked_fill_(~self.aligned.to(states.device)[..., None], 0.0)


NAMES = ("teacher_input_ids", "teacher_attention_mask", "teacher_positions")


def read_own_inputs(
    ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, *, shape: torch.Size
) -> OwnInputs | None:
    """Return the teacher's own inputs in a batch; None if it reads the student's ids, of `shape` (B, T).

    Raises ValueError if only one of teacher_input_ids and teacher_positions is given, or shapes differ.
    """
    given = {name: x for name, x in zip(NAMES, (ids, mask, positions), strict=True) if x is not None}
    if not given:
        return None
    if ids is None or positions is None:
        absent = NAMES[0] if ids is None else NAMES[2]
        raise ValueError(
            f"{absent} is None beside {next(iter(given))}; expected teacher_input_ids (B, Tt) with teacher_positions "
            "(B, T), or neither"
        )
    theirs = (shape[0], ids.shape[-1])
    for name, expected in zip(NAMES, (theirs, theirs, tuple(shape)), strict=True):
        if name in given and tuple(given[name].shape) != expected:
            raise ValueError(
                f"{name} is {tuple(given[name].shape)} beside input_ids {tuple(shape)}; expected {expected}: the "
                "teacher's rows have a length of their own, and teacher_positions the student's"
            )
    return OwnInputs(ids, mask, positions)
