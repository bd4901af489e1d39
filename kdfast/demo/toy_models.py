"""`small_models`: a teacher worth learning from, a fresh student and text, made on this machine and kept.

For examples, tests and first tries without a hub. The text is Python's own library, the tokenizer a byte-level BPE
trained on it. Teacher and student are GPT-2 models with tied embeddings, and the teacher is trained for so long that a
student gains from it within a minute. All are folders and files that `AutoModelForCausalLM.from_pretrained`,
`AutoTokenizer.from_pretrained` and `open` read.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kdfast.demo.toy_text import END, cache_root, library_text, once, train_tokenizer
from kdfast.inputs import Head
from kdfast.loss import fused_kd_loss
from kdfast.training.hf import shift_labels

CONTENT = 1  # increase it if the same sizes give other files


@dataclass(frozen=True)
class SmallSizes:
    """Sizes of the models from `small_models`, of their text and training; `kdfast demo` has its own.

    The defaults take 71 seconds of one CPU core, most of it for training the teacher.
    """

    characters: int = 2_000_000  # of training text, and up to a file more
    excerpt: int = 2000  # characters from each held-out file
    vocabulary: int = 2048
    context: int = 128
    batch: int = 4  # blocks per step
    teacher_layers: int = 2
    teacher_width: int = 192
    teacher_steps: int = 800
    student_layers: int = 2
    student_width: int = 96
    learning_rate: float = 3e-3


class SmallModels(NamedTuple):
    """The paths that `small_models` returns.

    Args:
        teacher: folder of a trained model and its tokenizer.
        student: folder of a fresh model and the same tokenizer.
        text: file of training text, with <|endoftext|> between documents.
        eval_text: file of held-out text.
    """

    teacher: str
    student: str
    text: str
    eval_text: str


def small_models(folder: str | Path | None = None, *, sizes: SmallSizes | None = None) -> SmallModels:
    """Return paths to a small teacher, a fresh student and text; the first call takes about a minute to make them.

    Args:
        folder: where they are kept; None = $XDG_CACHE_HOME/kdfast/small, in ~/.cache if that is not set.
        sizes: of models, text and training; each choice has its own subfolder.

    Raises DataError, a ValueError, if Python's library does not exist as text.
    """
    sizes = sizes or SmallSizes()
    # the text is this Python's library, which differs between versions
    key = hashlib.sha256(repr((CONTENT, astuple(sizes), platform.python_version())).encode()).hexdigest()[:12]
    place = cache_root(folder, "small") / key
    once(place, lambda path: _make(path, place, sizes))
    return SmallModels(*(str(place / name) for name in ("teacher", "student", "train.txt", "eval.txt")))


def _make(path: Path, place: Path, sizes: SmallSizes) -> None:
    print(f"Making a small teacher, once, about a minute; it is kept in {place}", flush=True)
    train, evaluation = library_text(sizes.characters, sizes.excerpt)
    for name, texts in (("train.txt", train), ("eval.txt", evaluation)):
        (path / name).write_text(END.join(texts), encoding="utf-8")
    for name in ("teacher", "student"):
        train_tokenizer(path / name, train, sizes.vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(path / "teacher")
    ids = torch.tensor(tokenizer((path / "train.txt").read_text(encoding="utf-8"))["input_ids"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = _gpt2(sizes.student_layers, sizes.student_width, sizes, tokenizer.eos_token_id)
        student.save_pretrained(path / "student")
        teacher = _gpt2(sizes.teacher_layers, sizes.teacher_width, sizes, tokenizer.eos_token_id)
        _learn(teacher, ids, sizes)
        teacher.save_pretrained(path / "teacher")


def small_gpt2(layers: int, width: int, context: int) -> dict[str, Any]:
    """Return a GPT2Config's settings, without dropout, which only costs in so short a training."""
    heads = max(1, width // 64)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": context, **dropout}


def _gpt2(layers: int, width: int, sizes: SmallSizes, end: int) -> GPT2LMHeadModel:
    settings = {**small_gpt2(layers, width, sizes.context), "bos_token_id": end, "eos_token_id": end}
    # GPT-2's own initializer_range, 0.02, is for wider models and trains slowly here
    return GPT2LMHeadModel(GPT2Config(**settings, vocab_size=sizes.vocabulary, initializer_range=width**-0.5))


def _learn(model: GPT2LMHeadModel, ids: torch.Tensor, sizes: SmallSizes) -> None:
    """Train by plain language modeling on random windows of `ids` (n,)."""
    steps = sizes.teacher_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, sizes.learning_rate, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="small teacher", mininterval=1.0)
    for _ in bar:
        starts = torch.randint(len(ids) - sizes.context, (sizes.batch,)).tolist()
        blocks = torch.stack([ids[start : start + sizes.context] for start in starts])
        hidden = model.transformer(blocks, use_cache=False).last_hidden_state
        loss = fused_kd_loss(Head(hidden, model.lm_head.weight), None, shift_labels(blocks), ce_weight=1.0)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(ce=f"{loss.item():.2f}", refresh=False)
