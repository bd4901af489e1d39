"""Columns on their way into a batch, and packed documents, held against the same documents one by one."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny_models import tiny
from torch.utils.data import default_collate
from training_fixtures import config, rows  # noqa: F401
from transformers import DataCollatorWithFlattening, default_data_collator

from kdfast.training import KDTrainer, TeacherCache, cache_teacher
from kdfast.training.data.rows import Collator, Row

LENGTHS = [[5, 4, 3], [8, 4], [12], [2, 2, 8]]  # of the documents of four rows


def documents():
    generator = torch.Generator().manual_seed(0)
    return [[torch.randint(3, 67, (n,), generator=generator) for n in row] for row in LENGTHS]


def packed(**columns):
    """Rows as TRL's pack_dataset makes them."""
    made = [torch.cat(row).tolist() for row in documents()]
    return Dataset.from_dict({"input_ids": made, "seq_lengths": LENGTHS, "text": ["…"] * 4, **columns})


def padding_free(rows):  # noqa: F811
    """What trl's DataCollatorForLanguageModeling(padding_free=True) does."""
    ids = torch.cat([torch.tensor(row["input_ids"]) for row in rows])
    packed = "seq_lengths" in rows[0]
    lengths = [row["seq_lengths"] if packed else [len(row["input_ids"])] for row in rows]
    positions = torch.cat([torch.arange(n) for row in lengths for n in row])
    labels = ids.masked_fill(positions == 0, -100)
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
    cu = torch.tensor(starts, dtype=torch.int32)
    return {
        "input_ids": ids[None], "labels": labels[None], "position_ids": positions[None], "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu, "max_length_q": int(cu.diff().max()), "max_length_k": int(cu.diff().max()),
        "seq_idx": torch.repeat_interleave(torch.arange(len(cu) - 1, dtype=torch.int32), cu.diff())[None],
    }  # fmt: skip


def stacked(rows):  # noqa: F811
    """Rows that stay rows, with positions of their own."""
    ids = torch.stack([torch.tensor(row["input_ids"]) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row["seq_lengths"]]) for row in rows])
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}


def beside_ones(rows):  # noqa: F811
    """With a mask of ones, as tokenizers make it."""
    made = stacked(rows)
    return {**made, "attention_mask": torch.ones_like(made["input_ids"])}


def masked(rows):  # noqa: F811
    """The same by a mask of one's own, (B, 1, T, T)."""
    made = stacked(rows)
    document = (made["position_ids"] == 0).cumsum(-1)
    apart = document[:, None, :, None] == document[:, None, None, :]
    return {**made, "attention_mask": apart & torch.ones(12, 12, dtype=torch.bool).tril()}


def expected(student, teacher, docs, tau=2.0):
    """Loss and gradients over documents alone, logits made whole."""
    kd = ce = 0
    n = sum(len(doc) - 1 for doc in docs)
    for doc in docs:
        z = student(doc[None]).logits[0, :-1]
        with torch.no_grad():
            y = teacher(doc[None]).logits[0, :-1]
        ce = ce + F.cross_entropy(z, doc[1:], reduction="sum") / n
        kl = F.kl_div((z / tau).log_softmax(-1), (y / tau).log_softmax(-1), reduction="sum", log_target=True)
        kd = kd + tau**2 * kl / n
    loss = ce + 0.7 * kd
    return loss, torch.autograd.grad(loss, list(student.parameters()))


def as_they_come(data):
    """No `datasets.Dataset`: rows of a list, of which Trainer takes the columns in the collator."""
    return [dict(row) for row in data]


@pytest.mark.parametrize("removes", [True, False])
@pytest.mark.parametrize("kind", [lambda data: data, as_they_come, lambda data: data.to_iterable_dataset()])
@pytest.mark.parametrize("collate", [padding_free, stacked, beside_ones, masked])
def test_gradients_of_packed_rows_are_those_of_their_documents(config, collate, kind, removes):  # noqa: F811
    student, teacher = tiny(seed=1).double(), tiny(seed=2, width=24).double()
    data = kind(packed())
    args = config(recipe="teacher_head", per_device_train_batch_size=2, remove_unused_columns=removes)
    trainer = KDTrainer(student, args, teacher=teacher, train_dataset=data, eval_dataset=data, data_collator=collate)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        for batch in loader:
            ids = batch["input_ids"].flatten()
            docs = [doc for row in documents() for doc in row if any(
                torch.equal(doc, ids[i : i + len(doc)]) for i in range(len(ids)))]  # fmt: skip
            assert sum(map(len, docs)) == len(ids) == 24
            loss = trainer.model(**batch).loss
            gradients = torch.autograd.grad(loss, list(student.parameters()))
            truth, right = expected(student, teacher, docs)
            assert loss.item() == pytest.approx(truth.item(), rel=1e-9)
            assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(gradients, right, strict=True))
    trainer.train()
    trainer.evaluate()


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2", "cohere"])
def test_other_families_and_solved_starts(config, family):  # noqa: F811
    # GPT-2 names none of what is for flash attention; position_ids say the same
    teacher = tiny(seed=2, width=24)
    args = config(recipe="svd_init", max_steps=2)
    trainer = KDTrainer(tiny(family, seed=1), args, teacher=teacher, train_dataset=packed(), data_collator=padding_free)
    trainer.train()
    model, batch = trainer.model.eval(), next(iter(trainer.get_train_dataloader()))
    starts = batch["cu_seq_lens_q"].tolist()
    parts = [batch["input_ids"][:, a:b] for a, b in itertools.pairwise(starts)]
    with torch.no_grad():
        z = torch.cat([model.student(part).logits[0, :-1] for part in parts])
        ce = F.cross_entropy(z, torch.cat([part[0, 1:] for part in parts]))
        assert model(**batch).metrics.ce.item() == pytest.approx(ce.item(), rel=1e-5)


def test_trl_packs_and_collates(config):  # noqa: F811
    trl = pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    docs = [doc for row in documents() for doc in row]
    data = trl.pack_dataset(Dataset.from_dict({"input_ids": [doc.tolist() for doc in docs]}), 12, strategy="bfd")
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    student, teacher = tiny(seed=1).double(), tiny(seed=2, width=24).double()
    args = config(recipe="teacher_head", per_device_train_batch_size=len(data))
    trainer = KDTrainer(student, args, teacher=teacher, train_dataset=data, data_collator=collate)
    batch = next(iter(trainer.get_train_dataloader()))
    gradients = torch.autograd.grad(trainer.model(**batch).loss, list(student.parameters()))
    right = expected(student, teacher, docs)[1]
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(gradients, right, strict=True))
    with pytest.raises(ValueError, match=r"seq_lengths.*DataCollatorForLanguageModeling.*do not keep them apart"):
        next(iter(KDTrainer(
            student, args, teacher=teacher, train_dataset=data, data_collator=DataCollatorForLanguageModeling(0)
        ).get_train_dataloader()))  # fmt: skip


def test_flattened_rows_of_one_document_each(config):  # noqa: F811
    docs = [doc for row in documents() for doc in row]
    data = Dataset.from_list([{"input_ids": doc.tolist(), "labels": doc.tolist(), "id": 3} for doc in docs])
    student, teacher = tiny(seed=1).double(), tiny(seed=2, width=24).double()
    args = config(recipe="teacher_head", per_device_train_batch_size=len(docs))
    for options in ({}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
        collate = DataCollatorWithFlattening(**options)
        trainer = KDTrainer(student, args, teacher=teacher, train_dataset=data, data_collator=collate)
        loss = trainer.model(**next(iter(trainer.get_train_dataloader()))).loss
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        right = expected(student, teacher, docs)[1]
        assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(gradients, right, strict=True))


def padded(rows):  # noqa: F811
    """Rows with padding, which a mask (B, T) has to tell, beside which transformers does not look at positions."""
    made = {name: F.pad(value, (0, 1)) for name, value in stacked(rows).items()}
    return {**made, "attention_mask": F.pad(torch.ones(len(rows), 12), (0, 1))}


@pytest.mark.parametrize("collate", [default_data_collator, DataCollatorWithFlattening(), padded])
@pytest.mark.parametrize("removes", [True, False])
def test_a_collator_that_loses_their_borders_is_refused(config, collate, removes):  # noqa: F811
    data = packed(labels=packed()["input_ids"])
    args = config(recipe="lm_only", remove_unused_columns=removes, max_steps=1)
    if not removes:  # transformers' default collator stacks what it can
        data = data.remove_columns("text").map(lambda row: {"seq_lengths": [6, 6]})
    trainer = KDTrainer(tiny(), args, train_dataset=data, data_collator=collate)
    with pytest.raises(ValueError, match=r"packed of several documents \(seq_lengths\).*do not keep them apart.*trl"):
        trainer.train()
    one = data.map(lambda row: {"seq_lengths": [12]})
    if removes:
        KDTrainer(tiny(), args, train_dataset=one, data_collator=collate).train()


def test_a_collator_finds_columns_that_no_model_takes_by_name(config):  # noqa: F811
    found = []

    def collate(rows):  # noqa: F811
        assert all("weight" in row and row.get("nothing") is None for row in rows)
        found.extend(row["weight"] for row in rows)
        return default_data_collator(rows)  # goes over the others alone

    data = packed(labels=packed()["input_ids"], weight=[1.0, 2.0, 3.0, 4.0]).remove_columns("seq_lengths")
    KDTrainer(tiny(), config(recipe="lm_only", max_steps=2), train_dataset=data, data_collator=collate).train()
    assert sorted(found) == [1, 2, 3, 4]


def _updated(batch, values):
    batch.update(values)
    return batch


@pytest.mark.parametrize(
    "make",
    [
        default_collate,
        lambda some: _updated(copy.deepcopy(some[0]), default_data_collator(some)),
        lambda some: type(some[0])(default_data_collator(some)),
        lambda some: type(some[0])(**default_data_collator(some)),
    ],
)
def test_a_collator_may_make_its_batch_of_a_rows_own_class(config, make):  # noqa: F811
    data = Dataset.from_dict({name: packed()["input_ids"] for name in ("input_ids", "labels")})
    data = data.add_column("text", ["…"] * 4).with_format("torch")
    batch = Collator(make, {"input_ids", "labels"})(list(data))
    assert type(batch) is dict
    assert batch.keys() == {"input_ids", "labels"}
    KDTrainer(tiny(), config(recipe="lm_only", max_steps=1), train_dataset=data, data_collator=make).train()


@pytest.mark.parametrize("column", [12, 1.5, [0.5, 0.5], "12", None])
def test_another_column_of_the_name_of_packed_lengths(config, tmp_path, column):  # noqa: F811
    plain = Dataset.from_dict({name: packed()["input_ids"] for name in ("input_ids", "labels")})
    data = plain.add_column("seq_lengths", [column] * 4)
    args = config(recipe="lm_only", max_steps=1)
    KDTrainer(tiny(), args, train_dataset=data, data_collator=default_data_collator).train()
    found = []
    for name, some in {"with": data, "without": plain}.items():
        cache_teacher(tiny(seed=2, width=24), {"train": some}, tmp_path / name, k=4, temperatures=(1.0,))
        found.append(TeacherCache(tmp_path / name).dataset("train", some, temperature=1.0)[3]["teacher_log_probs"])
    assert torch.equal(*found)


def test_a_row_is_a_dict_of_what_is_shown():
    row = Row({"input_ids": [1], "labels": [2], "text": "a"}, {"input_ids", "labels"})
    assert dict(row) == {**row} == {"input_ids": [1], "labels": [2]}
    assert list(row) == ["input_ids", "labels"]
    assert (len(row), row["text"], "text" in row, "none" in row) == (2, "a", True, False)
    row["labels"] = [3]
    assert row.get("labels") == row["labels"] == [3]
    assert (row.pop("text"), row.pop("labels"), row.pop("none", 7)) == ("a", [3], 7)
    assert list(row) == ["input_ids"]
    with pytest.raises(KeyError, match="none"):
        row["none"]
    assert Collator(list, None)([{"a": 1}]) == [{"a": 1}]


def test_a_teacher_cache_of_packed_rows(tmp_path):
    teacher, data = tiny(seed=2, width=24), packed(attention_mask=[[1] * 12] * 4)
    cache_teacher(teacher, {"train": data}, tmp_path / "cache", k=67, dtype="float32", temperatures=(1.0,))
    blocks = TeacherCache(tmp_path / "cache").dataset("train", data, temperature=1.0)
    for i, row in enumerate(documents()):
        with torch.no_grad():
            truth = torch.cat([teacher(doc[None]).logits[0].log_softmax(-1) for doc in row])
        found = torch.empty(12, 67).scatter(1, blocks[i]["teacher_indices"].long(), blocks[i]["teacher_log_probs"])
        assert torch.allclose(found, truth, atol=1e-4)
