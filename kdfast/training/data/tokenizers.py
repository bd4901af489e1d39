"""Comparison of tokenizers token by token, and the ids that two models share.

Student and teacher read the same ids, unless the teacher is known to have another tokenizer, and reads its own
(alignment.py). Heads of different sizes over one tokenizer differ by padding rows; `valid_vocab` is its highest id + 1.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import has_file

from kdfast.training.durable.processes import print_once, say_once

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def own_tokenizer(source: PreTrainedModel | str, *, local: bool = True) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer saved with a model's weights, by folder or hub name; None if there is none.

    local: look only on this disk. (From a folder without TOKENIZER_FILES transformers makes an empty tokenizer.)
    """
    where: dict[str, Any] = {"local_files_only": local}
    name = source if isinstance(source, str) else str(source.name_or_path)
    if not isinstance(source, str):
        where["revision"] = getattr(source.config, "_commit_hash", None)
    with suppress(Exception):  # of many classes: no such name, no network, a tokenizer with its own code
        if any(has_file(name, file, **where) for file in TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
    return None


def text_tokenizer(processor: Any, student: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Return `processor` if it is a tokenizer, else the tokenizer in it, else the student's own."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else own_tokenizer(student)


def tokenizer_of(student: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer saved with the student's weights; None for a fresh student."""
    loaded = hasattr(student, "_weight_conversions")  # set by from_pretrained, but not by from_config
    return own_tokenizer(student) if loaded else None


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the highest id + 1, which exceeds len(tokenizer) if ids are skipped."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_tokens(
    argument: str,
    tokenizer: PreTrainedTokenizerBase,
    own: PreTrainedTokenizerBase | None,
    valid_vocab: int | None = None,
) -> None:
    """Raise if an id below `valid_vocab` is one token in `tokenizer`, the text's, and another in the model's own.

    Ids that only one of them has do not matter, nor do templates, merges and other settings: only one makes the text.
    Special tokens under another name, as Llama-3's reserved ones in Llama-3.1, pass, and a line names some. These are
    ids that both have added to their words, at least one as special; text contains them only on purpose.
    """
    if own is None:
        return
    ours, theirs = _tokens(tokenizer), _tokens(own)
    others, renamed = _differences(tokenizer, own, valid_vocab)
    some = ", ".join(f"{i} is {ours[i]!r} in the text's and {theirs[i]!r} there" for i in (others or renamed)[:3])
    if others:
        rest = f". If the text has no id from {others[0]} on, valid_vocab={others[0]} leaves those out"
        raise ValueError(
            f"{argument}: the tokenizer of {str(own.name_or_path)!r} has other tokens than the text's, of "
            f"{len(others)} ids: {some}. The model would read other words than are there. A teacher reads its own "
            "under recipe='shared_tokens' or 'projector' of KDTrainer, where bytes of tokens are known; else take one "
            "tokenizer for student, teacher and text: another teacher, or a fresh student (student_config) with its: "
            f"processing_class= tells KDTrainer the text's{rest if others[0] > len(theirs) // 2 else ''}"
        )
    if renamed:
        say_once(
            f"{argument}: the tokenizer of {str(own.name_or_path)!r} has other names for {len(renamed)} special tokens "
            f"than the text's: {some}. They are taken for the same"
        )


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _differences(
    tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, valid_vocab: int | None
) -> tuple[list[int], list[int]]:
    """Return the ids that are different tokens in two tokenizers, and special ones under different names."""
    ours, theirs = _tokens(tokenizer), _tokens(own)
    others = sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i] and i < (valid_vocab or i + 1))
    added = [one.added_tokens_decoder for one in (tokenizer, own)]
    renamed = [i for i in others if all(i in one for one in added) and any(one[i].special for one in added)]
    return sorted({*others}.difference(renamed)), renamed


def other_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, teacher: Any, given: str | None = None, valid_vocab: int | None = None
) -> PreTrainedTokenizerBase | None:
    """Return the teacher's tokenizer if its tokens differ from the text's; None if they do not, or are unknown.

    teacher: a model, or its name. given: `teacher_tokenizer_name_or_path`, instead of the one saved with the teacher.
    Raises ValueError if there is none of that name.
    """
    own = own_tokenizer(teacher if given is None else given, local=given is None and not isinstance(teacher, str))
    if own is None and given is not None:
        raise ValueError(f"teacher_tokenizer_name_or_path={given!r}: no tokenizer could be loaded from there")
    if tokenizer is None or own is None or not _differences(tokenizer, own, valid_vocab)[0]:
        return None
    return own


def shared_ids(
    argument: str,
    tokenizer: PreTrainedTokenizerBase | None,
    own: PreTrainedTokenizerBase | None,
    rows: int,
    valid_vocab: int | None = None,
) -> int | None:
    """Return how many ids two tokenizers have, if they are the same ones and two heads have rows for them.

    None if not, or if a tokenizer is unknown (None). rows: the smaller head's. Raises as `check_tokens` does.
    """
    if tokenizer is None or own is None:
        return None
    check_tokens(argument, tokenizer, own, valid_vocab)
    ids, theirs = ({*one.get_vocab().values()} for one in (tokenizer, own))
    return count_ids(tokenizer) if ids == theirs and count_ids(tokenizer) <= rows else None


def find_valid_vocab(student: Any, teacher: Any, processor: Any = None, valid_vocab: int | None = None) -> int | None:
    """Return `valid_vocab`, or by default the number of ids of one tokenizer that two heads pad differently.

    processor: the text's tokenizer, or a processor that contains it; None = the student's own.
    Raises ValueError if the student's or the teacher's own tokenizer has other tokens.
    """
    if not isinstance(student, PreTrainedModel) or (processor is None and teacher is None):
        return valid_vocab  # anything but models is refused later, with a better message
    ours, models = text_tokenizer(processor, student), (student, teacher)
    if processor is not None and ours is not None:
        check_tokens("student", ours, tokenizer_of(student), valid_vocab)
    if not all(isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None for model in models):
        return valid_vocab
    theirs = own_tokenizer(teacher)
    rows = [_rows(model) for model in models]
    ids = shared_ids("teacher", ours, theirs, min(rows), valid_vocab)
    if valid_vocab is not None or rows[0] == rows[1] or ids is None:
        return valid_vocab
    print_once(f"valid_vocab={ids}: the student's head has {rows[0]} rows, the teacher's {rows[1]}, of one tokenizer")
    return ids


def other_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> str:
    """Return the error message for heads of different sizes: what is wrong, and what to do."""
    ours, theirs = _rows(student), _rows(teacher)
    smaller = "teacher" if theirs < ours else "student"
    return (
        f"the teacher's head has {theirs} rows and the student's {ours}. If both have one tokenizer and only padding "
        "rows differ, pass valid_vocab, its highest id + 1. Tokens that were added to one of them need rows in the "
        f"other, {smaller}.resize_token_embeddings({max(ours, theirs)}), or valid_vocab={min(ours, theirs)} where the "
        "text has none of them but at padding; with vocab='truncate' KD is on the first ids, which both have. A "
        "teacher with another tokenizer would read the student's ids as other words; recipe='shared_tokens' has it "
        "read its own, if that tokenizer lies beside its weights or is named (teacher_tokenizer_name_or_path)"
    )


def _rows(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[0]
