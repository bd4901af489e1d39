"""A teacher's entries in columns of one's own: what they are has to be said, and is what is learned from."""

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny
from torch.utils import data
from training_fixtures import config  # noqa: F401
from transformers import default_data_collator

from kdfast.training import DistillationModel, KDTrainer, TeacherCache, cache_teacher
from kdfast.training.cache.read import CacheError

K, V = 8, 67
TAILS = ("bucket", "renormalize", "renormalize_both", "none")


def ids():
    return torch.randint(3, V, (6, 12), generator=torch.Generator().manual_seed(0))


def make():
    """Rows with the k most likely ids of a teacher, as a server gives them."""
    with torch.no_grad():
        log_probs, indices = tiny(seed=2, width=24)(ids()).logits.log_softmax(-1).topk(K)
    given = {"input_ids": ids(), "labels": ids(), "teacher_indices": indices, "teacher_log_probs": log_probs}
    return Dataset.from_dict({name: value.tolist() for name, value in given.items()})


def kd_by_hand(student, tail, tau):
    """KL over what `tail` says, logits made whole."""
    given = make()
    p, i = (torch.tensor(given[f"teacher_{name}"][:])[:, :-1] for name in ("log_probs", "indices"))
    with torch.no_grad():
        z = student(ids()).logits[:, :-1]
    q, p = (z / tau).log_softmax(-1).gather(-1, i), p.float()
    if tail == "bucket":
        at_one = z.log_softmax(-1).gather(-1, i)
        both = [torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True))], -1) for x in (p, at_one)]
        p, q = ((x / tau).log_softmax(-1) for x in both)
    elif tail == "renormalize_both":
        p, q = (p / tau).log_softmax(-1), q.log_softmax(-1)
    elif tail == "renormalize":
        p = (p / tau).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


class Wrapped(data.Dataset):
    """Rows that do not tell their columns."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.mark.parametrize("kind", [lambda given: given, list, Wrapped])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("recipe", ["auto", "cached"])
def test_they_are_what_is_said(config, recipe, tail, tau, kind):  # noqa: F811
    student, dataset = tiny(seed=1), kind(make())
    args = config(recipe=recipe, teacher_tail=tail, temperature=tau, per_device_eval_batch_size=6)
    trainer = KDTrainer(student, args, train_dataset=dataset, eval_dataset=dataset, data_collator=default_data_collator)
    assert trainer.model.recipe.name == "cached"
    found = trainer.evaluate()
    assert found["eval_kd"] == pytest.approx(kd_by_hand(student, tail, tau), rel=1e-4)
    assert ("eval_kl_teacher_student" in found) == (tail == "bucket")
    if tail == "bucket":
        assert found["eval_kl_teacher_student"] == pytest.approx(kd_by_hand(student, tail, 1.0), rel=1e-4)
    trainer.train()


@pytest.mark.parametrize("kind", [lambda given: given, list, Wrapped])
@pytest.mark.parametrize("recipe", ["auto", "cached"])
def test_unsaid_they_are_refused(config, recipe, kind):  # noqa: F811
    said = r"train_dataset has teacher_log_probs of its own.*teacher_tail='bucket'.*'renormalize'.*'none'"
    with pytest.raises(ValueError, match=said):
        KDTrainer(tiny(seed=1), config(recipe=recipe), train_dataset=kind(make()))
    plain = make().remove_columns(["teacher_indices", "teacher_log_probs"])
    with pytest.raises(CacheError, match=r"eval_dataset\['a'\] has teacher_log_probs"):
        KDTrainer(tiny(seed=1), config(recipe="cached"), train_dataset=plain, eval_dataset={"a": kind(make())})


def test_a_stream_that_does_not_tell_its_columns_is_not_ignored(config):  # noqa: F811
    class Stream(data.IterableDataset):
        def __iter__(self):
            return iter(list(make()))

        def __len__(self):  # and no row by its number
            return 6

    given = {"train_dataset": Stream(), "data_collator": default_data_collator}
    with pytest.raises(ValueError, match="has teacher_indices, and recipe='auto' took 'lm_only'"):
        KDTrainer(tiny(seed=1), config(recipe="auto", max_steps=1), **given).train()
    with pytest.raises(ValueError, match="teacher_log_probs without teacher_log_tails: say what they are"):
        KDTrainer(tiny(seed=1), config(recipe="cached", max_steps=1), **given).train()
    trainer = KDTrainer(tiny(seed=1), config(recipe="cached", teacher_tail="bucket", max_steps=1), **given)
    trainer.train()
    KDTrainer(tiny(seed=1), config(recipe="lm_only", max_steps=1), **given).train()  # asked for
    teacher = tiny(seed=2, width=24)
    trainer = KDTrainer(tiny(seed=1), config(recipe="auto", max_steps=1), teacher=teacher, **given)
    with pytest.raises(ValueError, match=r"recipe='auto' took 'svd_init', which learns nothing of them.*'cached'"):
        trainer.train()
    KDTrainer(tiny(seed=1), config(recipe="teacher_head", max_steps=1), teacher=teacher, **given).train()


def test_a_live_teacher_besides_has_to_be_chosen(config, tmp_path):  # noqa: F811
    teacher = tiny(seed=2, width=24)
    plain = make().remove_columns(["teacher_indices", "teacher_log_probs"])
    cache_teacher(tiny(seed=3, width=24), {"train": plain}, tmp_path / "cache", k=4)
    blocks = TeacherCache(tmp_path / "cache").dataset("train", plain)
    for dataset, given in ((blocks, {}), (make(), {"teacher_tail": "bucket"})):
        with pytest.raises(ValueError, match=r"teacher_indices.*teacher is given too.*name the recipe"):
            KDTrainer(tiny(seed=1), config(recipe="auto", **given), teacher=teacher, train_dataset=dataset)
        both = {"train_dataset": dataset, "eval_dataset": dataset}
        for recipe in ("cached", "teacher_head"):
            trainer = KDTrainer(tiny(seed=1), config(recipe=recipe, **given), teacher=teacher, **both)
            assert trainer.evaluate()["eval_kl_teacher_student"] > 0


def with_tails(tau):
    """The same rows with the tails of `tau`."""
    given = make()
    with torch.no_grad():
        z = tiny(seed=2, width=24)(ids()).logits
    at = torch.tensor(given["teacher_indices"][:])
    tails = [torch.log1p(-(z / t).softmax(-1).gather(-1, at).sum(-1)) for t in (1.0, tau)]
    return given.add_column("teacher_log_tails", torch.stack(tails, -1).tolist())


@pytest.mark.parametrize("kind", ["drawn", "tails"])
def test_entries_of_one_temperature_at_several(config, kind):  # noqa: F811
    dataset = make() if kind == "drawn" else with_tails(2.0)
    tail = {"teacher_tail": "none"} if kind == "drawn" else {}
    steps = {"temperature_steps": [2.0, 1.0]}
    said = "train_dataset has a teacher's entries for one temperature.*run is at"
    with pytest.raises(CacheError, match=rf"{said} 2, 1; expected one throughout: leave out temperature_steps"):
        KDTrainer(tiny(seed=1), config(recipe="cached", **tail, **steps), train_dataset=dataset)
    args = config(recipe="cached", **tail)
    with pytest.raises(CacheError, match=rf"{said} a temperature_schedule"):
        KDTrainer(tiny(seed=1), args, train_dataset=dataset, temperature_schedule=lambda progress: 2.0 - progress)
    KDTrainer(tiny(seed=1), config(recipe="cached", teacher_tail="bucket", **steps), train_dataset=make()).train()


def test_tails_of_another_temperature(config):  # noqa: F811
    for tau in (1.0, 2.0):
        args = config(recipe="cached", temperature=tau, max_steps=1, per_device_eval_batch_size=6)
        trainer = KDTrainer(tiny(seed=1), args, train_dataset=with_tails(tau), eval_dataset=with_tails(tau))
        by_hand = kd_by_hand(tiny(seed=1), "bucket", 1.0)
        assert trainer.evaluate()["eval_kl_teacher_student"] == pytest.approx(by_hand, rel=1e-4)
        trainer.train()
    with pytest.raises(ValueError, match="teacher_log_tails is of another temperature: the run's is 1"):
        KDTrainer(tiny(seed=1), config(recipe="cached", temperature=1.0), train_dataset=with_tails(2.0)).train()


@pytest.mark.parametrize("tail", ["renormalize", "renormalize_both"])
def test_a_row_without_an_entry_to_normalize(config, tail):  # noqa: F811
    rows = list(make())
    rows[0]["teacher_log_probs"][3] = [-torch.inf] * K
    args = config(recipe="cached", teacher_tail=tail, per_device_train_batch_size=6, max_steps=1)
    with pytest.raises(ValueError, match="log_probs") as raised:
        KDTrainer(tiny(seed=1), args, train_dataset=rows, data_collator=default_data_collator).train()
    assert "learning_rate" not in str(raised.value)


def test_a_data_set_without_entries_beside_one_with(config):  # noqa: F811
    plain = make().remove_columns(["teacher_indices", "teacher_log_probs"])
    args = config(recipe="cached", teacher_tail="bucket")
    for given, argument in ((plain, "eval_dataset"), ({"a": make(), "b": plain}, r"eval_dataset\['b'\]")):
        with pytest.raises(CacheError, match=rf"{argument} has no teacher_indices, which train_dataset has"):
            KDTrainer(tiny(seed=1), args, train_dataset=make(), eval_dataset=given)


def test_in_a_loop_of_ones_own(tmp_path):
    batch = default_data_collator(list(make()))
    model = DistillationModel(tiny(seed=1), recipe="cached")
    with pytest.raises(ValueError, match="say what they are"):
        model(**batch)
    assert DistillationModel(tiny(seed=1), recipe="lm_only")(**batch).loss > 0
    with pytest.raises(ValueError, match="auto"):
        DistillationModel(tiny(seed=1))(**batch)
    with pytest.raises(ValueError, match="teacher_log_probs is None beside teacher_indices"):
        model(**{**batch, "teacher_log_probs": None})
    with pytest.raises(ValueError, match=r"teacher_log_tails is \(6, 12\).*expected"):
        model(**batch, teacher_log_tails=torch.zeros(6, 12))
    said = DistillationModel(tiny(seed=1), recipe="cached", teacher_tail="renormalize")
    with pytest.raises(ValueError, match=r"teacher_tail='renormalize'.*is 'bucket'; leave it out"):
        said(**batch, teacher_log_tails=torch.zeros(6, 12, 2))
    plain = make().remove_columns(["teacher_indices", "teacher_log_probs"])
    cache_teacher(tiny(seed=2, width=24), {"train": plain}, tmp_path / "cache", method="sample", k=16)
    drawn = default_data_collator(list(TeacherCache(tmp_path / "cache").dataset("train", plain)))
    assert drawn["teacher_log_tails"].shape == (6, 12, 0)  # by which it tells what it is
    found = model(**drawn)
    assert torch.equal(found.loss, DistillationModel(tiny(seed=1), recipe="cached", teacher_tail="none")(**drawn).loss)


def test_a_wrong_value_and_one_without_a_use(config, caplog):  # noqa: F811
    with pytest.raises(ValueError, match="teacher_tail='top_k'; expected one of bucket, renormalize"):
        config(teacher_tail="top_k")
    assert config(teacher_tail="bucket", recipe="teacher_head").resolved().name == "teacher_head"
    assert "has no use for teacher_tail" in caplog.text


def test_the_command_line_does_not_lose_them(tmp_path):
    from byte_tokenizer import make_tokenizer

    from kdfast.training.data.text import DataError, load_blocks

    documents = Dataset.from_dict({"text": ["abc"], "teacher_indices": [[[1]]]})
    with pytest.raises(DataError, match="file has a column 'teacher_indices', which is lost"):
        load_blocks("file", documents, make_tokenizer(), 2)
