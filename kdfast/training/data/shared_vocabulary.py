"""Two tokenizers' tokens as bytes, and the ids that stand for the same bytes in both.

A token's bytes are the text it is written as: Ġ is a blank in byte-level BPE, ▁ in sentencepiece, <0xE4> one byte
there; an added token is its own text. End and start of a text (eos, bos) match by role, whatever their names. Other
special tokens are never shared, since the same name may mean something else.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
ROLES = ("eos", "bos")
# kinds of strings → their pattern; the first match counts
CLASSES = {
    "digits": r" ?\d",
    "numbers of several digits": r" ?\d+",
    "whitespace runs": r"\s\s+",
    "Chinese, Japanese and Korean": r"\s?[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+",
    "words": r"[^\W\d]+|\s[^\W\d]+",
}


class TokenTable:
    """The bytes that a tokenizer's ids stand for.

    Attributes:
        bytes: by id; None for special tokens with a role, and unk, which have no bytes of their own.
        roles: ids of "eos" and "bos", if there are any.
        start: the id that it puts before a text, or None.
        prefixed: whether it inserts a blank before a text; `spares`: but not before one that begins with a blank.

    Raises ValueError for a tokenizer that hides its tokens' bytes: WordPiece, one id per word, no fast backend.
    """

    def __init__(self, argument: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        described: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
        model = described.get("model") or {}
        steps = json.dumps(
            [described.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False
        )
        kind, suffix = model.get("type"), model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")
        if kind not in ("BPE", "Unigram") or suffix:
            what = "no backend of the tokenizers library" if backend is None else f"{suffix or kind} tokens"
            raise ValueError(
                f"{argument}: the tokenizer {str(tokenizer.name_or_path)!r} has {what}, of which the bytes are not "
                "known; expected byte-level BPE, or BPE or Unigram as sentencepiece has them, from tokenizer.json"
            )
        self.roles: dict[str, int] = {}
        for role in ROLES:
            token = getattr(tokenizer, f"{role}_token_id")
            if token is not None and token not in self.roles.values():
                self.roles[role] = token
        self.bytes: list[bytes | None] = [None] * (max(tokenizer.get_vocab().values(), default=-1) + 1)
        alphabet = {char: byte for byte, char in bytes_to_unicode().items()}
        byte_level, falls_back = '"ByteLevel"' in steps, bool(model.get("byte_fallback"))
        self.fallback = set()  # ids of single bytes, used where no token fits
        added = tokenizer.added_tokens_decoder
        hidden = {*self.roles.values(), tokenizer.unk_token_id, tokenizer.pad_token_id}
        for token, i in tokenizer.get_vocab().items():
            if falls_back and (byte := BYTE_TOKEN.fullmatch(token)):
                self.bytes[i] = bytes.fromhex(byte[1])
                self.fallback.add(i)
            elif i in hidden:
                continue
            elif byte_level and i not in added:
                self.bytes[i] = bytes(alphabet[c] for c in token) if {*token} <= alphabet.keys() else None
            else:
                self.bytes[i] = (token.replace("▁", " ") if "▁" in steps else token).encode()
        self.special = {i for i, one in added.items() if one.special} | {*self.roles.values()}
        self.special -= self.fallback
        first = next(iter(tokenizer("a")["input_ids"]), None)
        self.start = first if first in self.roles.values() else None
        plain, blank = (b"".join(self.pieces(ids)) for ids in self.encode(["a", " a"]))
        self.prefixed, self.spares = plain == b" a", blank == b" a"

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts, without special tokens; text that looks like one stays text."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """Return the bytes of each id, up to the first that has none."""
        return [one for one in takewhile(lambda one: one is not None, map(self.__getitem__, ids)) if one is not None]

    def has_put(self, text: bytes) -> bool:
        """Return whether the blank at a text's start was inserted; if it may be either, assume that it was."""
        return self.prefixed and text.startswith(b" ") and not (self.spares and text.startswith(b"  "))

    def offsets(self, ids: Iterable[int], text: str) -> list[int]:
        """Return the offset in `text`, in bytes, after each id, special ones as written, as far as they agree."""
        expected, at, marked, found = text.encode(), 0, True, []
        for i in ids:
            one = self[i] if i not in self.special else str(self.tokenizer.convert_ids_to_tokens(i)).encode()
            if one is None:
                break
            if marked and self.prefixed and not expected.startswith(one, at):
                one = one.removeprefix(b" ")  # the tokenizer inserted it
            if not expected.startswith(one, at):
                break
            at, marked = at + len(one), i in self.special
            found.append(at)
        return found

    def __getitem__(self, i: int) -> bytes | None:
        return self.bytes[i] if 0 <= i < len(self.bytes) else None

    def by_bytes(self) -> dict[bytes, int]:
        """Return an id for each string of bytes: of several the one that encoding produces, then the lowest.

        So an ordinary token comes before an added one, and <0x61> after the token a.
        """
        added = self.tokenizer.added_tokens_decoder
        order = sorted(range(len(self.bytes)), key=lambda i: (i in self.fallback, i in added, i))
        found: dict[bytes, int] = {}
        for i in order:
            if (one := self.bytes[i]) and i not in self.special:
                found.setdefault(one, i)
        return found


def token_lengths(tokenizer: PreTrainedTokenizerBase, rows: int) -> Tensor | None:
    """Return the bytes of text per id, (rows,) int64, 0 for special ones; None if they are unknown."""
    with suppress(ValueError):
        table = TokenTable("tokenizer", tokenizer)
        found = torch.zeros(rows, dtype=torch.int64)
        for i, one in enumerate(table.bytes[:rows]):
            found[i] = 0 if one is None or i in table.special else len(one)
        return found
    return None


@dataclass(frozen=True)
class SharedVocabulary:
    """The ids of two tokenizers that stand for the same bytes.

    student, teacher: (S,) int64, the student's ids, ascending, and the teacher's.
    """

    student: Tensor
    teacher: Tensor
    share: float  # of the student's ids that are shared
    lines: list[str]  # lines for a run to print

    def mask(self, rows: int) -> Tensor:
        """Return which of the student's ids are shared, (rows,) bool, for a head with that many rows."""
        return torch.zeros(rows, dtype=torch.bool).index_fill_(0, self.student, True)

    def index(self, rows: int) -> Tensor:
        """Return the teacher's id for each of the student's, (rows,) int64, 0 where there is none."""
        return torch.zeros(rows, dtype=torch.int64).index_copy_(0, self.student, self.teacher)


def share_vocabulary(student: TokenTable, teacher: TokenTable) -> SharedVocabulary:
    """Return the ids that two tokenizers share. Raise ValueError if they share only roles."""
    ours, theirs = student.by_bytes(), teacher.by_bytes()
    pairs = {i: theirs[one] for one, i in ours.items() if one in theirs}
    if not pairs:
        raise ValueError("teacher_tokenizer_name_or_path: the two tokenizers have no string in common")
    pairs |= {i: teacher.roles[role] for role, i in student.roles.items() if role in teacher.roles}
    shared = torch.tensor(sorted(pairs.items()), dtype=torch.int64)
    lines = [
        f"shared strings: {len(pairs):,} of the student's {len(student.bytes):,} ids and of the teacher's "
        f"{len(teacher.bytes):,}; {_classes(ours, theirs)}"
    ]
    for name, table, other, another in (("student", ours, theirs, "teacher"), ("teacher", theirs, ours, "student")):
        for what in ("digits", "numbers of several digits"):
            of_class = [one for one in table if _class(one) == what]
            lost = [one for one in of_class if one not in other]
            if of_class and len(lost) > len(of_class) / 2:
                lines.append(
                    f"warning: {len(lost)} of the {len(of_class)} {what} that are one token of the {name}'s are none "
                    f"of the {another}'s, and KD leaves them out: where arithmetic counts, compare with lm_only"
                )
    return SharedVocabulary(shared[:, 0], shared[:, 1], len(pairs) / len(student.bytes), lines)


def _classes(ours: dict[bytes, int], theirs: dict[bytes, int]) -> str:
    """Return, in words, the shared part of each class of the student's strings."""
    every, shared = Counter(map(_class, ours)), Counter(_class(one) for one in ours if one in theirs)
    return ", ".join(f"{name} {shared[name] / every[name]:.0%}" for name in (*CLASSES, "others") if every[name])


def _class(one: bytes) -> str:
    text = one.decode(errors="replace")
    return next((name for name, pattern in CLASSES.items() if re.fullmatch(pattern, text)), "others")
