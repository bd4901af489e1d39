"""Live bytes of other libraries' losses, phase by phase, above the inputs; gradients that stay included.

As `kdfast.plan.memory`. None: not for such a teacher, or such a device. Derived from reading TRL 1.16.0, Liger 0.8.5,
torchtune 0.6.1, fla-core 0.6.0, cut-cross-entropy 25.1.1 and PyTorch 2.13, and held against what they allocate where
that can be seen (docs/performance.md).
"""

from __future__ import annotations

from math import ceil

import torch

from kdfast.plan import Shape
from kdfast.plan.memory import Phases

TRL_TOKENS, TRL_VOCAB = 4096, 32768  # its tiles of logits
LIGER_TOKENS = 1024
TORCHTUNE_CHUNKS = 8
FLA_CHUNKS = 8


def trl(x: Shape) -> Phases | None:
    if x.teacher != "head":
        return None
    s, n, Hs = x.dtype.itemsize, min(x.tokens, TRL_TOKENS), x.student_width
    buffers = 2 * n * TRL_VOCAB * 4  # fp32 logits of a tile, two sides, of full width whatever V is
    gradients = (x.tokens + x.vocab) * Hs * 4  # in fp32
    width = min(x.vocab, TRL_VOCAB)
    rounded = x.hidden + x.weight if s != 4 else 0
    if x.device == "cpu":
        plain = 9 * n * width * 4  # the tile's logits, log-probabilities, gradient in plain torch
        return {
            "tile": buffers + gradients + plain,
            # 16-bit operands are widened: W's block, the gradient's tile, in 16 bits and in fp32
            "products": buffers + gradients + (s != 4) * (width * Hs * 4 + n * width * (s + 4)),
            "finish": buffers + gradients + rounded,
        }
    tiles = ceil(x.vocab / TRL_VOCAB)
    last = x.vocab - (tiles - 1) * TRL_VOCAB
    # the gradient's tile in 16 bits, and the one before it, which still has its name
    pair = {1: (x.tokens > TRL_TOKENS) * last + last, 2: TRL_VOCAB + last}.get(tiles, 2 * TRL_VOCAB)
    tile = n * pair * s if s != 4 else 0
    return {
        "products": buffers + gradients + tile,
        "finish": buffers + gradients + rounded + (n * last * s if s != 4 else 0),
    }


def liger_chunked(x: Shape) -> Phases | None:
    if x.teacher != "head":
        return None
    chunks = max(1, x.tokens // LIGER_TOKENS)
    L = ceil(x.tokens / chunks) * x.vocab * x.dtype.itemsize  # of a chunk
    return {
        "logits": 7 * L + x.weight + x.hidden * (chunks - 1) // chunks,  # as eager, beside dW
        "products": 5 * L + 2 * x.weight + x.hidden,  # a chunk's dW beside the sum
        "finish": x.weight + 2 * x.hidden,  # its dX are put together
    }


def torchtune(x: Shape) -> Phases | None:
    if x.teacher != "head":
        return None
    chunk = ceil(x.tokens / TORCHTUNE_CHUNKS)
    L, entries = x.logits, x.tokens * x.vocab
    return {
        # both logits whole; fp32 probabilities of one, log-probabilities of the other, a mask; two products of a chunk;
        # hidden states divided by τ, of which it knows nothing
        "logits": 2 * L + entries * (2 * 4 + 1) + 2 * chunk * x.vocab * 4 + x.hidden,
        # the gradients of all chunks' logits are there first; the first two chunks' dX and dW, and the sum of these
        "products": L * (TORCHTUNE_CHUNKS - 2) // TORCHTUNE_CHUNKS + 3 * x.weight + x.hidden + x.hidden // 4,
    }


def liger_triton_jsd(x: Shape) -> Phases | None:
    """Count on anything before Blackwell; there its chunks are 8 to 16 times as large."""
    if x.teacher != "head" or x.device == "cpu":
        return None
    chunk = min(x.tokens, _power_of_two(ceil(x.tokens / ceil(x.vocab / x.student_width))))
    L = chunk * x.vocab * 4
    # fp32 logits, divided, log-probabilities of two sides, softmax, loss; with more chunks the names of the last one
    live = 9 if chunk < x.tokens else 8
    return {"logits": live * L + x.hidden + x.weight}


def fla(x: Shape) -> Phases | None:
    if x.teacher != "head" or x.device == "cpu":
        return None
    s = x.dtype.itemsize
    chunk = _power_of_two(ceil(x.tokens / min(FLA_CHUNKS, ceil(x.vocab / x.student_width))))
    chunk = min(chunk, x.tokens)
    L = chunk * x.vocab * s
    divided = x.hidden + x.tokens * x.teacher_width * s  # by τ, of which it knows nothing
    accumulated = divided + x.hidden + x.vocab * x.student_width * 4  # dW in fp32
    kept = (s != 4) * chunk * x.student_width * 4  # hidden states of a chunk, widened
    several = chunk < x.tokens
    return {
        "logits": accumulated + (3 if several else 2) * L + kept,
        "products": accumulated + 2 * L + kept + (s != 4) * chunk * x.vocab * 4,  # the gradient widened for dW
        "finish": accumulated + 2 * L + kept + (s != 4) * x.weight,
    }


def linear_cross_entropy(x: Shape) -> Phases | None:
    """Count torch.nn.functional's, in chunks: options=LinearCrossEntropyOptions()."""
    if x.teacher != "none":
        return None
    cpu, s, Hs = x.device == "cpu", x.dtype.itemsize, x.student_width
    chunk = _power_of_two(ceil(x.tokens / ceil(x.vocab / Hs)))
    accurate = cpu and s == 2
    chunk = max(1, min(x.tokens, chunk if accurate else chunk // 2))
    wide = 4 if s == 2 and (cpu or x.dtype == torch.bfloat16) else s
    L = chunk * x.vocab * wide
    phases = {
        "logits": x.gradients + L + chunk * x.vocab * (s if wide != s else 0) + 3 * chunk * Hs * wide,
        "finish": 2 * x.gradients,  # autograd copies what the operator returned
    }
    if accurate:  # W in fp32, dW of a chunk in fp32; a CPU subtracts it from 16-bit dW through two temporaries
        fp32 = x.vocab * Hs * 4
        phases["logits"] = x.weight + x.tokens * Hs * 4 + 4 * fp32 + L + 2 * chunk * Hs * 4
    return phases


def cce(x: Shape) -> Phases | None:
    """Count apple/ml-cross-entropy's: 16-bit hidden states, a GPU."""
    if x.teacher != "none" or x.device == "cpu" or x.dtype.itemsize != 2:
        return None
    # log-sum-exp, loss and locks a token; mean logits, their order (sorted as int64 first) and locks a vocabulary entry
    return {"kernel": x.gradients + 12 * x.tokens + 12 * x.vocab, "order": x.hidden + 8 * x.tokens + 24 * x.vocab}


def _power_of_two(number: int) -> int:
    """Return the smallest one that is no smaller."""
    return 1 << (number - 1).bit_length()
