"""What `kdfast distill` and `kdfast cache` read alike: the tokenizer, and blocks to train and to evaluate on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kdfast.cli.arguments import Arguments, DataArguments, ModelArguments
from kdfast.training.data.text import DataError, hold_out, load_blocks, read_dataset, read_files
from kdfast.training.durable.errors import first_line
from kdfast.training.hf import SOURCE, read_init_kwargs

if TYPE_CHECKING:
    from datasets import Dataset


def load_text(arguments: Arguments) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset]:
    """Return (tokenizer, blocks to train on, blocks to evaluate on); the first process tokenizes, the others read
    what it kept."""
    training = arguments.training
    if training.process_index > 0:
        transformers.utils.logging.disable_progress_bar()  # of loading: one is enough
    tokenizer = load_tokenizer(arguments.model)
    with training.main_process_first(desc="tokenizing"):
        train, evaluation = load_splits(arguments.data, tokenizer)
    return tokenizer, train, evaluation


def load_tokenizer(models: ModelArguments) -> PreTrainedTokenizerBase:
    """Return that of tokenizer_name, or the student's, or the teacher's: the first that is given."""
    for key in ("tokenizer_name", "model_name_or_path", "teacher_model_name_or_path"):
        if (name := getattr(models, key)) is not None:
            own = key.replace("name_or_path", "init_kwargs")
            kwargs = read_init_kwargs(own, getattr(models, own) if own != key else None)
            place = {key: kwargs[key] for key in (*SOURCE, "trust_remote_code") if key in kwargs}
            try:
                return AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **place})
            except Exception as error:  # of many classes; tokenizers' own is no other than Exception
                raise ValueError(f"{key}: no tokenizer could be loaded from {name!r}: {first_line(error)}") from error
    raise ValueError("tokenizer_name is missing; it is needed where neither student nor teacher brings a tokenizer")


def load_splits(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """Return (training, evaluation) blocks."""

    def blocks(key: str) -> Dataset:
        value = getattr(data, key)
        if key.endswith("file"):
            what, documents = f"{key} {value!r}", read_files(key, value)
        else:
            what = f"dataset_name {data.dataset_name!r}, split {value!r}"
            documents = read_dataset(key, data.dataset_name or "", data.dataset_config_name, value)
        return load_blocks(what, documents, tokenizer, data.max_length, data.text_column)

    train = blocks("train_file" if data.train_file is not None else "dataset_split")
    for key in ("eval_file", "eval_dataset_split"):
        if getattr(data, key) is not None:
            return train, blocks(key)
    return hold_out(train, data.eval_fraction)


def check_positions(which: str, model: PreTrainedModel, max_length: int) -> None:
    """Raise DataError where blocks have more tokens than the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise DataError(f"max_length={max_length} is more than the {limit} positions the {which} has; lower it")
