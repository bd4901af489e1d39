"""`kdfast data CONFIG.yaml`, and the tokenizer and rows that `kdfast distill` and `kdfast cache` share with it."""

from __future__ import annotations

import itertools
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kdfast.cli.arguments import SEVERAL, Arguments, ModelArguments, parse_argv
from kdfast.cli.errors import UserError
from kdfast.training.data.alignment import OtherTokenizer, find_other_tokenizer
from kdfast.training.data.chat import kind_of, read_template
from kdfast.training.data.counts import Counts
from kdfast.training.data.rows import lengths_of
from kdfast.training.data.text import columns_of, hold_out, read_dataset, read_files
from kdfast.training.durable.errors import first_line
from kdfast.training.durable.processes import print_once
from kdfast.training.hf import IGNORE_INDEX
from kdfast.training.loading import SOURCE, read_init_kwargs
from kdfast.training.prepare import tokenize
from kdfast.training.recipes import SELF

if TYPE_CHECKING:
    from datasets import Dataset


FEW_TARGETS = 1000  # their mean cross entropy is uncertain by about a tenth of a nat
GREEN, BRACKETS = ("\x1b[32m", "\x1b[0m"), ("[[", "]]")


class Text(NamedTuple):
    """What a run reads: tokenizer and rows."""

    tokenizer: PreTrainedTokenizerBase
    train: Any
    evaluation: Dataset
    counts: dict[str, Counts]  # of both data sets, by "train" and "eval"
    other: OtherTokenizer | None = None  # the teacher's, if it differs

    def describe(self, max_length: int | None) -> str:
        """Return the number of rows, in words."""
        many = f"{len(self.train)} rows" if hasattr(self.train, "__len__") else "a stream of rows"
        return f"{many} of at most {max_length} tokens to train on, {len(self.evaluation)} to evaluate on"


def data(argv: list[str]) -> int:
    """Print the first row with its targets, and the counts of rows; return the exit code."""
    arguments = parse_argv(argv, "data")
    try:
        text = load_text(arguments)
        row = next(iter(text.train))
    except (ValueError, StopIteration) as error:
        raise UserError(str(error) or "there is no row to train on") from error
    print(text.describe(arguments.training.max_length))
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(f"the first row; what is learned is {'green' if colored else 'in [[ ]]'}:\n")
    marks = GREEN if colored else BRACKETS
    print(preview(text.tokenizer, row, marks))
    if (ids := row.get("teacher_input_ids")) is not None:
        print("\nwhat the teacher reads in its place, with what is compared:\n")
        compared = {i + 1 for i in row["teacher_positions"]}
        labels = [token if i in compared else IGNORE_INDEX for i, token in enumerate(ids)]
        print(preview(text.tokenizer, {"input_ids": ids, "labels": labels}, marks))
    return 0


def preview(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], marks: tuple[str, str]) -> str:
    """Return a row's text (of its first document, if packed) with `marks` around its targets."""
    length = next(iter(lengths_of(row)), None)
    ids, labels = (list(row[name])[:length] for name in ("input_ids", "labels"))
    runs = itertools.groupby(range(len(ids)), lambda i: i > 0 and labels[i] != IGNORE_INDEX)
    text = ((learned, str(tokenizer.decode([ids[i] for i in run]))) for learned, run in runs)
    return "".join(f"{marks[0]}{part}{marks[1]}" if learned else part for learned, part in text)


def load_text(arguments: Arguments, teacher: str | None = None) -> Text:
    """Return tokenizer, training rows and evaluation rows. The first process tokenizes; the others read its results.

    teacher: the name of a teacher that reads the text, perhaps with its own tokenizer.
    """
    training = arguments.training
    if training.process_index > 0:
        transformers.utils.logging.disable_progress_bar()  # of loading, since one is enough
    tokenizer = load_tokenizer(arguments.model)
    other = None
    if teacher is not None:
        given = training.teacher_tokenizer_name_or_path
        other = find_other_tokenizer("teacher_model_name_or_path", tokenizer, teacher, given, training.valid_vocab)
    with training.main_process_first(desc="tokenizing"):
        text = Text(tokenizer, *load_splits(arguments, tokenizer, other), other)
    if (targets := text.counts["eval"].targets) < FEW_TARGETS:
        print_once(
            f"evaluation: {targets} targets are few to compare runs by; name a larger eval_file, or raise eval_fraction"
        )
    if training.chat_template is not None:
        tokenizer.chat_template = read_template(training.chat_template)  # saved with the student
    return text


def load_tokenizer(models: ModelArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer of tokenizer_name, the student or the teacher, the first that is given."""
    for key in ("tokenizer_name", "model_name_or_path", "teacher_model_name_or_path"):
        if (name := getattr(models, key)) not in (None, SELF):
            own = key.replace("name_or_path", "init_kwargs")
            kwargs = getattr(models, own) if own != key else None
            if key == SEVERAL and models.teachers:
                name, kwargs = next(iter(models.teachers.values())), models.kwargs_of_teachers[0]
            kwargs = read_init_kwargs(own, kwargs)
            place = {key: kwargs[key] for key in (*SOURCE, "trust_remote_code") if key in kwargs}
            try:
                return AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **place})
            except Exception as error:  # of many classes; tokenizers raises plain Exception
                raise ValueError(f"{key}: no tokenizer could be loaded from {name!r}: {first_line(error)}") from error
    raise ValueError("tokenizer_name is missing; it is needed where neither student nor teacher brings a tokenizer")


def load_splits(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, other: OtherTokenizer | None = None
) -> tuple[Any, Any, dict[str, Counts]]:
    """Return training rows, evaluation rows, and the counts of raw ones."""
    data, training = arguments.data, arguments.training

    def read(key: str, *, streaming: bool = False) -> tuple[str, Any]:
        value = getattr(data, key)
        if key.endswith("file"):
            return f"{key} {value!r}", read_files(key, value, streaming=streaming)
        documents = read_dataset(key, data.dataset_name or "", data.dataset_config_name, value, streaming=streaming)
        return f"dataset_name {data.dataset_name!r}, split {value!r}", documents

    def rows(what: str, documents: Any, prompts: str | None = None) -> tuple[Any, Counts]:
        several = len(arguments.model.teachers)
        return tokenize(what, documents, tokenizer, training, several, prompts, other)

    prompts = training.prompts  # only for training rows
    in_blocks = training.packing is None and prompts is None

    key = "train_file" if data.train_file is not None else "dataset_split"
    what, documents = read(key, streaming=data.streaming)
    named = next((key for key in ("eval_file", "eval_dataset_split") if getattr(data, key) is not None), None)
    if named is not None:
        (train, counts), (evaluation, others) = rows(what, documents, prompts), rows(*read(named))
    elif in_blocks and kind_of(what, columns_of(documents), training.text_column) == "text":
        train, counts = rows(what, documents, prompts)
        train, evaluation = hold_out(train, data.eval_fraction)
        counts = counts.of_blocks(train, training.max_length or 0)
        others = Counts(argument=f"{what}, held out").of_blocks(evaluation, training.max_length or 0)
    else:  # before packing: lengths of rows
        train, held_out = hold_out(documents, data.eval_fraction)
        (train, counts), (evaluation, others) = rows(what, train, prompts), rows(f"{what}, held out", held_out)
    return train, evaluation, {"train": counts, "eval": others}
