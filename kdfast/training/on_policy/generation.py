"""Generated completions of prompts, as rows to train on.

Prompts are padded on the left, as `generate` needs them; the rows made from them are padded on the right, like all
other batches. A row ends with its first end-of-text token, or without one if it was cut at `max_new_tokens`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from kdfast.training.data.chat import PROBE
from kdfast.training.hf import IGNORE_INDEX, embedding_rows, input_device, shift_labels


class Sampling(NamedTuple):
    """How text is sampled: settings of `KDConfig`, and ids of tokenizer and models."""

    max_new_tokens: int
    temperature: float  # 0: always the most likely token
    top_p: float
    top_k: int
    end_ids: tuple[int, ...]
    pad_id: int
    n_ids: int  # ids from here on are never drawn


class Written(NamedTuple):
    """Rows to train on, padded on the right."""

    input_ids: Tensor  # (B, T) int64: prompts with their completions
    attention_mask: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, −100 except for completions and the token that ends them
    ended: Tensor  # (B,) bool: whether there is such a token


def find_end_of_turn(tokenizer: Any) -> int | None:
    """Return the token with which a chat template closes an answer, if any; it may not be the end of text."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        chat = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
        after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(PROBE)[2]
    except Exception:  # the template needs other messages, or raises an error of its own
        return None
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((one for one in ids if one in tokenizer.added_tokens_decoder), None)


@contextmanager
def _ready(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put a model into eval mode, without generation defaults of its own, and restore it afterwards."""
    modes, own = [(module, module.training) for module in model.modules()], model.generation_config
    try:
        model.eval()
        model.generation_config = config
        yield
    finally:
        model.generation_config = own
        for module, training in modes:
            module.training = training


@torch.compiler.disable
@torch.no_grad()
def write(model: PreTrainedModel, prompts: Tensor, mask: Tensor, sampling: Sampling, seed: Sequence[int]) -> Written:
    """Return the completions that `model` writes to prompts (B, T) int64 with mask (B, T), padded on the left.

    The same `seed` gives the same text. The process's random state does not change.
    """
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    unknown = list(range(sampling.n_ids, embedding_rows(model)))
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        use_cache=True,
        do_sample=sampling.temperature > 0,
        eos_token_id=list(sampling.end_ids),
        pad_token_id=sampling.pad_id,
        suppress_tokens=unknown or None,
        **(drawn if sampling.temperature > 0 else {}),
    )
    device = input_device(model)
    devices = [device] if device.type not in ("cpu", "meta") else []
    with _ready(model, config), torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(random.Random(repr(tuple(seed))).getrandbits(63))
        given = {"input_ids": prompts.to(device), "attention_mask": mask.to(device)}
        ids: Any = model.generate(**given, generation_config=config)  # type: ignore[operator]
    return as_rows(ids.to(prompts.device), mask, sampling.end_ids)


def behind(written: Written, prompts: Tensor, mask: Tensor) -> Written:
    """Return rows with the same completions after other prompts (B, Tp), whose mask is (B, Tp)."""
    completions = [ids[of] for ids, of in zip(written.input_ids, written.labels != IGNORE_INDEX, strict=True)]
    before = [ids[real != 0] for ids, real in zip(prompts, mask, strict=True)]
    ids = [torch.cat(pair) for pair in zip(before, completions, strict=True)]
    labels = [torch.cat([torch.full_like(p, IGNORE_INDEX), c]) for p, c in zip(before, completions, strict=True)]
    return Written(
        pad_sequence(ids, batch_first=True),
        pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        written.ended,
    )


def positions_in(theirs: Written, ours: Written) -> Tensor:
    """Return where `theirs`, with the same completions, predicts the token after each of `ours` (B, T); else −1."""
    start, own = ((rows.labels != IGNORE_INDEX).int().argmax(1, keepdim=True) for rows in (theirs, ours))
    places = torch.arange(ours.labels.shape[1], device=own.device) + start - own
    return places.where(shift_labels(ours.labels) != IGNORE_INDEX, -1)


def as_rows(ids: Tensor, prompt_mask: Tensor, end_ids: Sequence[int]) -> Written:
    """Return rows made from `generate`'s ids (B, Tp + N), whose prompts have the mask (B, Tp)."""
    written = ids[:, prompt_mask.shape[1] :]
    ends = torch.isin(written, torch.tensor(list(end_ids), device=ids.device))
    kept = ends.cumsum(1) - ends.long() == 0  # everything up to and including the first end
    mask = torch.cat([prompt_mask, kept.to(prompt_mask)], 1)
    labels = torch.cat([torch.full_like(prompt_mask, IGNORE_INDEX), written.masked_fill(~kept, IGNORE_INDEX)], 1)
    order = mask.argsort(stable=True, dim=1, descending=True)[:, : int(mask.sum(1).max())]  # real tokens first
    mask = mask.gather(1, order)
    return Written(
        ids.gather(1, order).masked_fill(mask == 0, int(end_ids[0]) if len(end_ids) else 0),
        mask,
        labels.gather(1, order),
        ends.any(1),
    )
