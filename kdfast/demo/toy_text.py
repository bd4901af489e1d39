"""Real text on every machine: Python's own library, a tokenizer trained on it, and a cache that is never half made.

Tests, character tables and duplicates are left out; one file in twenty is held out.
"""

from __future__ import annotations

import bisect
import itertools
import os
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from kdfast.training.data.text import DataError
from kdfast.training.durable import atomic_io

HELD_OUT = 20  # every twentieth file is for evaluation
END = "<|endoftext|>"
PREPARED = {"tokenizer_name": "tokenizer", "train_file": "train", "eval_file": "eval"}  # setting: place in a folder


def library_text(characters: int, excerpt: int) -> tuple[list[str], list[str]]:
    """Return (training texts, excerpts of held-out ones, each of about `excerpt` characters).

    There are enough training texts for `characters`, or as many as exist. Raises DataError if there are too few.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
    paths = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    read = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    texts = list(dict.fromkeys(text for text in read if text.strip()))  # so that none is on both sides of the split
    random.Random(0).shuffle(texts)  # small samples then cover the whole library
    held_out = [middle(text, excerpt) for text in texts[::HELD_OUT]]
    train = [text for i, text in enumerate(texts) if i % HELD_OUT]
    if len(train) < 50:
        raise DataError(f"the text here is Python's own library, and {str(root)!r} holds {len(train)} files of it")
    ends = list(itertools.accumulate(map(len, train)))
    return train[: bisect.bisect_left(ends, characters) + 1], held_out


def middle(text: str, length: int) -> str:
    """Return whole lines from the middle, where a module has code rather than its license and imports."""
    start = max(0, (len(text) - length) // 2)
    start = text.rfind("\n", 0, start) + 1
    return text[start : text.rfind("\n", 0, start + length) + 1]


def cache_root(cache_dir: str | Path | None, name: str) -> Path:
    """Return `cache_dir`, or this user's cache folder of that name."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdfast" / name


def once(path: Path, make: Callable[[Path], None]) -> None:
    """Call `make(path)` unless `path` exists. It never exists half made, and a second caller waits for the first."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            staged = atomic_io.staging(path)
            atomic_io.discard(staged)
            staged.mkdir()
            make(staged)
            atomic_io.publish(staged, path, replace=False)


def prepare(folder: Path, train: list[str], evaluation: list[str], vocabulary: int) -> None:
    """Write each text to a file in folder/train or folder/eval, and train folder/tokenizer, unless they exist."""

    def write(path: Path, texts: list[str]) -> None:
        for i, text in enumerate(texts):
            (path / f"{i:05}.py").write_text(text, encoding="utf-8")

    once(folder / "train", lambda path: write(path, train))
    once(folder / "eval", lambda path: write(path, evaluation))
    once(folder / "tokenizer", lambda path: train_tokenizer(path, train, vocabulary))


def train_tokenizer(path: Path, texts: list[str], vocabulary: int) -> None:
    """Train a byte-level BPE of `vocabulary` tokens and save it for `AutoTokenizer`."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocabulary, min_frequency=0, show_progress=False, special_tokens=[END])
    # transformers loads the tokenizer that this wraps
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END).save_pretrained(path)
