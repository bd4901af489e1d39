"""Turns masks, token weights, divisors and term weights into one coefficient per row and term.

A bad value that cannot be checked without a synchronization (a label out of range or a negative weight, on a GPU or in
a compiled graph) becomes a NaN coefficient: the row's loss is NaN and no bad address is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.frontend import checks
from kdfast.inputs import Options

NAN = float("nan")


class RowWeights(NamedTuple):
    coefficients: Tensor  # (3, N): factors of each row's KD, CE and anchor term in the loss
    weights: Tensor  # (3, N): the row's weight in each term's mean
    active: Tensor  # (N,) bool: the row has a weight in some term
    labels: Tensor | None  # (N,) int64; entries that are not ids are replaced by ids
    anchor_targets: Tensor | None  # as labels, and equal to them unless given
    has_anchor: bool  # there are targets for the anchor


def row_weights(
    labels: Tensor | None,
    options: Options,
    N: int,
    valid_vocab: int,
    temperature: Tensor,
    *,
    has_kd: bool,
    has_anchor: bool,
    bad_kd: Tensor | None,
) -> RowWeights:
    """Return one coefficient per row and term.

    labels, options.anchor_targets and both token weights  N elements each, or None
    temperature  (), with the device and dtype of the result
    bad_kd       (N,) bool or None: rows whose teacher cannot be used
    """
    dtype = temperature.dtype
    base = torch.ones(N, device=temperature.device, dtype=dtype)
    zeros = torch.zeros_like(base)
    if options.token_weights is not None:
        base = _non_negative(options.token_weights.reshape(-1).to(dtype))
    if labels is not None:
        labels, base = _targets(labels, base, options.ignore_index, valid_vocab)
    kd = base
    if options.kd_token_weights is not None:
        kd = _non_negative(options.kd_token_weights.reshape(-1).to(dtype))
    if bad_kd is not None:
        kd = kd.masked_fill(bad_kd & (kd != 0), NAN)
    anchor_targets, anchor = labels, base
    if options.anchor_targets is not None:
        anchor_targets, anchor = _targets(options.anchor_targets, base, options.ignore_index, valid_vocab)
    has_anchor = has_anchor and anchor_targets is not None

    weights = torch.stack(
        [
            kd if has_kd else zeros,
            base if labels is not None else zeros,
            anchor if has_anchor else zeros,
        ]
    )
    tau = temperature
    if isinstance(options.temperature, Tensor):  # a number has been checked already
        tau = tau.masked_fill(tau <= 0, NAN)
    kd_factor = tau * tau if options.temperature_squared else torch.ones_like(tau)
    factors = torch.stack(
        [
            _factor(options.kd_weight, tau) * kd_factor,
            _factor(options.ce_weight, tau),
            _factor(options.anchor_weight, tau),
        ]
    )
    if options.reduction == "mean":
        if options.num_items_in_batch is None:
            divisor = weights.sum(dim=1)  # if 0, so are all weights, and the factor does not matter
        else:
            divisor = _factor(options.num_items_in_batch, tau)
            divisor = divisor.masked_fill(divisor == 0, NAN)
            checks.check_divisor(options.num_items_in_batch, weights, factors)
        factors = (factors / divisor).masked_fill_(factors == 0, 0.0)
    coefficients = (weights * factors[:, None]).masked_fill_(weights == 0, 0.0)
    return RowWeights(coefficients, weights, weights.any(dim=0), labels, anchor_targets, has_anchor)


def _targets(targets: Tensor, weights: Tensor, ignore_index: int, valid_vocab: int) -> tuple[Tensor, Tensor]:
    """Return targets that are safe to gather with, and weights that are 0 in ignored rows and NaN in bad ones."""
    targets = targets.reshape(-1).long()
    safe = targets.clamp(0, valid_vocab - 1)
    weights = weights.masked_fill(targets != safe, NAN).masked_fill_(targets == ignore_index, 0.0)
    return safe, weights


def scalar(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a number or 0-d tensor as a 0-d tensor on the device, without a synchronization."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype, non_blocking=True)
    if torch.compiler.is_compiling():  # `full` would compile again for each value of a number that changes
        return torch.ones((), device=device, dtype=dtype) * value
    return torch.full((), float(value), device=device, dtype=dtype)


def _factor(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a term's weight or divisor as a 0-d tensor like τ."""
    x = scalar(value, like.device, like.dtype)
    return _non_negative(x) if isinstance(value, Tensor) else x


def _non_negative(x: Tensor) -> Tensor:
    return x.masked_fill(x < 0, NAN)
