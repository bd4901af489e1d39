"""TRL's SFTTrainer on the same rows: the same ids and the same labels, in its data set and in its batches."""

import pytest
import torch
from chats import CHATML, KINDS, VOCAB, chat_tokenizer, raw
from tiny_models import tiny
from tokenizers.processors import TemplateProcessing

from kdfast.training import tokenize_dataset
from kdfast.training.data.packing import PaddingCollator

pytest.importorskip("trl", minversion="1.16")
from trl import SFTConfig, SFTTrainer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rows_and_batches_of_sft(kind, max_length, mode, begins, tmp_path):
    tokenizer, options = chat_tokenizer(CHATML), {**KINDS[kind][1]}
    if begins:  # with a token, as Llama's
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<end> $A", None, [("<end>", 256)])
    tokenizer.pad_token = tokenizer.eos_token
    options = {"max_length": max_length, "truncation_mode": mode, "packing": False, **options}
    args = SFTConfig(
        str(tmp_path), use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=4, **options,
    )  # fmt: skip
    trainer = SFTTrainer(tiny(V=VOCAB), args, train_dataset=raw(kind), processing_class=tokenizer)
    ours, _ = tokenize_dataset(raw(kind), tokenizer, **options)
    theirs = trainer.train_dataset
    assert ours["input_ids"] == theirs["input_ids"]
    assert ours["labels"] == theirs["labels"]
    batch, other = PaddingCollator(tokenizer)(list(ours)), trainer.data_collator(list(theirs))
    assert torch.equal(batch["labels"], other["labels"])
    assert torch.equal(batch["input_ids"], other["input_ids"])
    if "attention_mask" in batch:  # rows of one length have none
        assert torch.equal(batch["attention_mask"], other["attention_mask"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_of_sft(kind, tmp_path):
    """The same documents with the same positions and targets; which share a row is each library's own."""
    tokenizer, options = chat_tokenizer(CHATML), {**KINDS[kind][1], "packing": True, "max_length": 256}
    tokenizer.pad_token = tokenizer.eos_token
    args = SFTConfig(str(tmp_path), use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False, **options)
    trainer = SFTTrainer(tiny(V=VOCAB), args, train_dataset=raw(kind), processing_class=tokenizer)
    ours, _ = tokenize_dataset(raw(kind), tokenizer, **options)

    def documents(batch):
        found = []
        names = ("input_ids", "labels", "position_ids")
        for row in zip(*(batch[name].tolist() for name in names), strict=True):
            for token in zip(*row, strict=True):
                if token[2] == 0:
                    found.append([])
                found[-1].append(token)
        return sorted(document for document in found if len(document) > 1)  # padding is none

    assert documents(PaddingCollator(tokenizer)(list(ours))) == documents(
        trainer.data_collator(list(trainer.train_dataset))
    )
