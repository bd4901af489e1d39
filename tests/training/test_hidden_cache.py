"""A cache of the teacher's hidden states: what is kept, and that a student learns from it as from the teacher."""

import os

import pytest
import server
import torch
from damaged import each_damage
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch.utils.data import ConcatDataset

from kdfast import Head, fused_kd_loss
from kdfast.training import DistillationModel, KDTrainer, TeacherCache, cache_teacher
from kdfast.training.cache import CacheError
from kdfast.training.cache import write as cache_write
from kdfast.training.cache.hidden import STEPS, keep, restore
from kdfast.training.data.packing import PaddingCollator
from kdfast.training.durable import checksums

V, T, WIDTH = 67, 12, 32


def blocks(n=40, seed=5):
    ids = torch.randint(3, V, (n, T), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make(folder, data=None, teacher=None, **options):
    """A teacher, and a data set with its hidden states."""
    data, teacher = data or blocks(), teacher or tiny("gpt2", V=V, width=WIDTH, seed=1)
    cache_teacher(teacher, {"train": data}, folder, method="hidden", **{"shard_tokens": 16 * T, **options})
    return teacher, TeacherCache(folder).dataset("train", data)


def collate(dataset, n=4):
    return {key: torch.stack([torch.as_tensor(dataset[i][key]) for i in range(n)]) for key in dataset[0]}


def losses(model, batch, **options):
    out = model(**batch, with_fidelity=True, **options)
    out.loss.backward()
    gradient = model.student.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    return out.loss.detach(), gradient, out.fidelity.kl_teacher_student, out.metrics.teacher_entropy


class TestLosses:
    @pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere"])  # a bias, a cap, a scale
    @pytest.mark.parametrize(("divergence", "tau"), [("forward_kl", 1.0), ("reverse_kl", 3.0), ("jsd", 0.5)])
    def test_whole_states_are_the_live_teacher(self, tmp_path, family, divergence, tau):
        """At any temperature, of one cache: the loss, its gradient, the KL to the teacher and its entropy."""
        teacher = tiny(family, V=V, width=WIDTH, seed=1)
        if family == "gpt2":
            teacher.lm_head.bias = torch.nn.Parameter(torch.randn(V))
        teacher, data = make(tmp_path / "c", teacher=teacher, rank=WIDTH, dtype="float32")
        student, batch = tiny(family, V=V), collate(data)
        tokens = {key: batch[key] for key in ("input_ids", "labels")}
        live = DistillationModel(student, teacher, recipe="teacher_head")
        cached = DistillationModel(student, recipe="cached")
        cached.learn_from_entries(head=data.cache.head)
        for model in (live, cached):
            model.divergence = model.recipe.__class__("", "none", divergence=divergence).make_divergence()
        expected, found = losses(live, tokens, temperature=tau), losses(cached, batch, temperature=tau)
        for one, other in zip(found, expected, strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-5

    @pytest.mark.parametrize("dtype", ["int8", "float16"])
    def test_what_is_kept_is_as_near_as_was_measured(self, tmp_path, dtype):
        """The rank is the smallest multiple of 16 at hand, and the KL on other text about the one that is told."""
        said = []
        teacher, data = make(tmp_path / "c", blocks(400), max_kl=0.3, dtype=dtype, tell=said.append)
        head = data.cache.head
        assert head.rank == 16
        assert head.fidelity.kl <= 0.3
        assert any(f"rank {head.rank} of" in line and f"{head.fidelity.kl:.2g}" in line for line in said)
        batch = collate(data, 64)
        with torch.no_grad():
            hidden = teacher.transformer(batch["input_ids"]).last_hidden_state
            kl = fused_kd_loss(head(batch["teacher_hidden"]), Head(hidden, teacher.lm_head.weight), temperature=1.0)
        assert float(kl) == pytest.approx(head.fidelity.kl, rel=0.3)

    def test_no_rank_that_int8_keeps_from_the_fidelity(self, tmp_path):
        with pytest.raises(ValueError, match=r"max_kl=1e-12; at its full rank 32 .*float16 in place of int8"):
            make(tmp_path / "c", max_kl=1e-12)
        _, data = make(tmp_path / "d", max_kl=1e-12, dtype="float32")
        assert (data.cache.head.rank, data.cache.head.projector) == (WIDTH, None)

    def test_int8_errs_by_half_a_step(self):
        given = torch.randn(50, 24) * torch.logspace(-1, 3, 50)[:, None]
        given[7] = 0
        kept, scales = keep(given, "int8")
        assert kept.abs().max() == STEPS
        error = (restore(kept, scales).float() - given).abs()
        steps = given.abs().amax(-1, keepdim=True) / STEPS
        assert (error <= 0.55 * steps + 1e-7).all()
        assert not restore(kept, scales)[7].any()

    def test_what_float16_cannot_hold(self):
        with pytest.raises(ValueError, match=r"dtype='float16'.* reach 7e\+04; expected 'float32'"):
            keep(torch.full((2, 3), 7e4), "float16")
        with pytest.raises(ValueError, match="NaN or infinity"):
            keep(torch.full((2, 3), torch.nan), "int8")

    def test_states_that_do_not_fit_the_head(self, tmp_path):
        _, data = make(tmp_path / "c", rank=8)
        batch = collate(data)
        model = DistillationModel(tiny("gpt2", V=V), recipe="cached")
        with pytest.raises(ValueError, match=r"teacher_hidden, and the model no head for it; expected model\.learn"):
            model(**batch)
        model.learn_from_entries(head=data.cache.head)
        assert not [name for name in model.state_dict() if "head" in name and not name.startswith("student.")]
        model(**batch)
        for wrong in (batch["teacher_hidden"][..., :7], batch["teacher_hidden"][:, :-1]):
            with pytest.raises(ValueError, match=r"teacher_hidden is .*; expected \(4, 12, 8\)"):
                model(**{**batch, "teacher_hidden": wrong})


class TestWriting:
    @pytest.mark.parametrize("at", [1, 3])
    def test_an_interrupted_cache_goes_on(self, tmp_path, monkeypatch, at):
        """Killed before the factor is there, or after a shard: the result is the same bytes."""
        make(tmp_path / "whole", max_kl=0.3)
        publish, calls = cache_write.atomic_io.publish, []

        def interrupted(*args, **options):
            calls.append(args)
            if len(calls) == at:
                raise KeyboardInterrupt
            publish(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(cache_write.atomic_io, "publish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path / "broken", max_kl=0.3)
        make(tmp_path / "broken", max_kl=0.3)
        same_bytes(tmp_path / "whole", tmp_path / "broken")

    def test_several_processes_write_what_one_does(self, tmp_path):
        write_it(tmp_path / "one")
        assert server.join(server.start(tmp_path / "said", 2, write_it, tmp_path / "two")) == [0, 0]
        same_bytes(tmp_path / "one", tmp_path / "two")

    def test_a_full_disk_leaves_what_is_complete(self, tmp_path, monkeypatch):
        def full(*args, **options):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("kdfast.training.cache.hidden.save_file", full)
            with pytest.raises(OSError, match="No space"):
                make(tmp_path / "c", rank=8)
        assert not (tmp_path / "c" / "factor").exists()
        make(tmp_path / "c", rank=8)

    @pytest.mark.parametrize(
        ("given", "message"),
        [({"rank": 0}, "rank=0 and max_kl=None; expected an int ≥ 1, or max_kl"),
         ({"rank": 8, "max_kl": 0.1}, r"rank=8 and max_kl=0\.1"),
         ({"max_kl": 0.0}, "max_kl=0.0; expected a KL > 0"),
         ({"dtype": "int4"}, "dtype='int4'; expected 'int8', 'float16' or 'float32'")],
    )  # fmt: skip
    def test_arguments_that_do_not_fit(self, tmp_path, given, message):
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "c", **given)

    def test_what_is_asked_for_again_has_to_agree(self, tmp_path):
        make(tmp_path / "c", rank=8)
        make(tmp_path / "c", rank=8, seed=3, temperatures=(5.0,))  # of which nothing depends
        for other in ({"rank": 9}, {"rank": 8, "dtype": "float16"}, {"max_kl": 0.1}):
            with pytest.raises(CacheError, match="holds a teacher cache of something else"):
                make(tmp_path / "c", **other)


class TestReading:
    def test_every_damaged_file_of_the_factor_is_named(self, tmp_path):
        make(tmp_path / "c", rank=8)
        for _ in each_damage(tmp_path / "c" / "factor"):
            with pytest.raises(CacheError, match=r"factor' is damaged: .*[Rr]emove that folder"):
                TeacherCache(tmp_path / "c")
        TeacherCache(tmp_path / "c")

    def test_a_damaged_factor_is_made_again(self, tmp_path):
        _, data = make(tmp_path / "c", rank=8)
        before, weight = collate(data), data.cache.head.weight
        (tmp_path / "c" / "factor" / "factor.safetensors").write_bytes(b"")
        (tmp_path / "c" / "summary.json").unlink()
        _, data = make(tmp_path / "c", rank=8)
        assert torch.equal(data.cache.head.weight, weight)
        assert all(torch.equal(value, before[key]) for key, value in collate(data).items())

    def test_another_factor_in_its_place(self, tmp_path):
        """Whole by its own checksums: the shards, which were made with the first, are found, and made again."""
        make(tmp_path / "c", rank=8)
        folder = tmp_path / "c" / "factor"
        tensors = load_file(folder / "factor.safetensors")
        with_sum = cache_write.CachedHead.load(folder)
        with_sum.weight = -tensors["weight"]
        save_file(tensors, folder / "factor.safetensors")  # without its metadata
        with_sum.save(folder)
        checksums.write(folder)
        with pytest.raises(CacheError, match=r"train-00000' is damaged: .*another cache.json or factor than"):
            TeacherCache(tmp_path / "c")
        (tmp_path / "c" / "summary.json").unlink()
        make(tmp_path / "c", rank=8)
        TeacherCache(tmp_path / "c")


class TestTraining:
    def test_the_trainer_takes_what_is_kept(self, tmp_path, config):
        """With workers, rows of several lengths, a temperature that changes, another divergence."""
        rows = [{"input_ids": ids, "labels": ids} for ids in ([3 + i % 60] * (4 + i % 7) for i in range(24))]
        data = Dataset.from_list(rows)
        teacher, cached = make(tmp_path / "c", data, rank=WIDTH, dtype="float32")
        batch = PaddingCollator()([cached[0], cached[5]])
        assert batch["teacher_hidden"].shape == (2, 9, WIDTH)
        given = {"temperature_steps": [3, 1.5], "divergence": "jsd", "max_steps": 4, "dataloader_num_workers": 2}
        runs = []
        for recipe, source, live in (("teacher_head", data, teacher), ("auto", cached, None)):
            args = config(recipe=recipe, precompute_teacher_log_probs=False, logging_steps=1, **given)
            trainer = KDTrainer(
                tiny("gpt2", V=V), args, teacher=live, train_dataset=source, eval_dataset=source,
                data_collator=PaddingCollator(),
            )  # fmt: skip
            trainer.train()
            measured = trainer.evaluate()
            names = ("eval_ce", "eval_kl_teacher_student", "eval_teacher_entropy")
            runs.append(
                [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [measured[n] for n in names]
            )
        assert trainer.model.recipe.name == "cached"
        assert runs[0] == pytest.approx(runs[1], rel=1e-5)

    def test_the_text_comes_round_again(self, tmp_path, config):
        """Kept by the run itself, for any temperature; resumed, it is read."""
        given = {"recipe": "teacher_head", "precompute_teacher_log_probs": None, "cache_method": "hidden"}
        given |= {"per_device_train_batch_size": 20, "temperature_steps": [2, 1], "save_steps": 2, "max_steps": 4}
        given |= {"compressed_rank": WIDTH, "cache_dtype": "float32", "teacher_cache": str(tmp_path / "kept")}
        losses = []
        for kept in (True, False):
            changed = {} if kept else {"precompute_teacher_log_probs": False, "teacher_cache": None}
            trainer = KDTrainer(
                tiny("gpt2", V=V), config(**given | changed), teacher=tiny("gpt2", V=V, width=WIDTH, seed=1),
                train_dataset=blocks(),
            )  # fmt: skip
            losses.append(trainer.train().training_loss)
            assert ("teacher_hidden" in trainer.train_dataset[0]) is kept
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_evaluation_on_another_cache_s_states(self, tmp_path, config):
        """They are never put through the head of what is trained on."""
        (teacher, train), (_, other) = (make(tmp_path / name, blocks(seed=n), rank=8) for n, name in enumerate("ab"))
        train = KDTrainer(tiny("gpt2", V=V), config(recipe="cached"), train_dataset=train)
        with pytest.raises(CacheError, match="go through different heads"):
            train.evaluate(other)
        given = config(
            recipe="teacher_head", precompute_teacher_log_probs=True, cache_method="hidden", compressed_rank=8
        )
        live = KDTrainer(tiny("gpt2", V=V), given, teacher=teacher, train_dataset=blocks(), eval_dataset=other)
        live.train()
        with pytest.raises(CacheError, match="go through different heads"):
            live.evaluate()
        live.evaluate(blocks(seed=3))

    def test_states_of_two_caches(self, tmp_path, config):
        made = [make(tmp_path / name, blocks(seed=seed), rank=8)[1] for name, seed in (("a", 1), ("b", 2))]
        with pytest.raises(CacheError, match=r"'.*a' and '.*b' hold hidden states that go through different heads"):
            KDTrainer(tiny("gpt2", V=V), config(recipe="cached"), train_dataset=ConcatDataset(made))


def write_it(folder):
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    make(folder, max_kl=0.3)


def same_bytes(one, other):
    paths = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert paths == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for path in paths:
        if path.suffix == ".arrow":
            read = [load_from_disk(folder / path.parent).with_format("arrow")[:] for folder in (one, other)]
            assert read[0].equals(read[1])
        elif path.name in ("factor.safetensors", "shard.json", "cache.json"):
            assert (one / path).read_bytes() == (other / path).read_bytes(), path
