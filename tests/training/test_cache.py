"""Teacher caches: what is kept is the teacher's distribution, what is read is what was kept, and nothing else is taken
for it."""

import json
import math
import os
from typing import ClassVar

import numpy as np
import pytest
import server
import torch
from byte_tokenizer import make_tokenizer
from damaged import each_damage
from datasets import Dataset, load_from_disk
from tiny_models import tiny
from torch.nn.functional import kl_div
from torch.utils.data import ConcatDataset, Subset

from kdfast import Head, fused_kd_loss
from kdfast.schedules import Linear
from kdfast.training import DistillationModel, KDConfig, KDTrainer, TeacherCache, cache_teacher
from kdfast.training.cache import CachedBlocks, CacheError
from kdfast.training.cache import write as cache_write
from kdfast.training.cache.description import Description, Split
from kdfast.training.cache.entries import Drawn, TopK, decode, draw, encode, table, top_k
from kdfast.training.teachers.entries import CachedEntries

V, T = 67, 12


def blocks(n=7, seed=5):
    ids = torch.randint(3, V, (n, T), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def collate(dataset):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in dataset]) for key in dataset[0]}


def make(folder, data=None, *, family="gpt2", teacher=None, shard_tokens=3 * T, **options):
    """A cache of a tiny teacher over `data`, and its data set."""
    data = data or blocks()
    teacher = teacher or tiny(family, V=V, width=32, seed=1)
    cache_teacher(teacher, {"train": data}, folder, shard_tokens=shard_tokens, **{"k": 64, **options})
    tau = options.get("temperatures", (2.0,))[0]
    return teacher, TeacherCache(folder).dataset("train", data, temperature=tau)


def log_softmax(model, batch, tau=1.0):
    with torch.no_grad():
        return (model(input_ids=batch["input_ids"]).logits.double() / tau).log_softmax(-1)


def losses(model, batch):
    out = model(**batch, with_fidelity=True)
    out.loss.backward()
    gradient = model.student.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    return out.loss.detach(), gradient, out.fidelity.kl_teacher_student


class TestEntries:
    @pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
    def test_top_k_and_the_mass_of_the_others(self, tau):
        head = Head(torch.randn(9, 8), torch.randn(40, 8), torch.randn(40), logit_scale=0.7, softcap=5.0)
        z = 5.0 * torch.tanh(0.7 * (head.hidden @ head.weight.T + head.bias) / 5.0)
        found = top_k(head, 6, (tau,))
        expected, ids = z.log_softmax(-1).topk(6)
        assert torch.equal(found.indices, ids)
        torch.testing.assert_close(found.log_probs, expected)
        for at, which in ((0, 1.0), (1, tau)):
            p = (z / which).double().softmax(-1)
            tail = 1 - p.gather(-1, ids).sum(-1)
            torch.testing.assert_close(found.log_tails[:, at].double().exp(), tail, atol=1e-6, rtol=1e-5)

    def test_padding_rows_of_the_head_have_nothing(self):
        head = Head(torch.randn(5, 8), torch.randn(40, 8), torch.arange(40.0))
        found = top_k(head, 30, (2.0,), valid_vocab=30)
        assert found.indices.max() < 30
        torch.testing.assert_close(found.log_probs.exp().sum(-1), torch.ones(5))
        assert found.log_tails.eq(-torch.inf).all()
        drawn = draw(head, 50, 1.0, torch.Generator().manual_seed(0), valid_vocab=30)
        assert drawn.indices.max() < 30

    def test_drawn_ids_come_as_often_as_they_are_likely(self):
        """Whole times of n·p, the one below or the one above; over many draws n·p."""
        n, tau, times = 7, 2.0, 20_000
        head = Head(torch.randn(1, 8).expand(times, 8), torch.randn(11, 8))
        found = draw(head, n, tau, torch.Generator().manual_seed(1))
        expected = n * (head.hidden[0] @ head.weight.T / tau).softmax(-1)
        rows = torch.arange(times).repeat_interleave(found.distinct)
        counts = torch.zeros(times, 11).index_put((rows, found.indices), found.counts.float())
        assert (counts.sum(-1) == n).all()
        assert ((counts - expected).abs() < 1).all()
        left = expected - expected.floor()
        assert ((counts.mean(0) - expected).abs() < 5 * (left * (1 - left) / times).sqrt()).all()

    def test_nothing_is_drawn_from_what_is_not_finite(self):
        with pytest.raises(ValueError, match="the teacher's logits hold NaN or infinity"):
            draw(Head(torch.tensor([[1.0], [torch.nan]]), torch.ones(5, 1)), 4, 1.0, torch.Generator())

    def test_an_impossible_id_is_never_drawn(self):
        head = Head(torch.ones(100, 1), torch.ones(5, 1), torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]))
        found = draw(head, 64, 1.0, torch.Generator().manual_seed(0))
        assert set(found.indices.tolist()) == {1, 3}
        assert (found.counts == 32).all()

    def test_logits_of_16_bit_heads_are_not_rounded_to_16_bits(self):
        hidden, weight = torch.randn(4, 64).bfloat16(), torch.randn(30, 64).bfloat16()
        found = top_k(Head(hidden, weight), 30)
        exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, found.indices)
        assert (found.log_probs - exact).abs().max() < 1e-4  # bf16 logits of 20 would be 0.06 off


def describe(**changes):
    given = {
        "teacher": "t", "teacher_sha256": "", "teacher_dtype": "float32", "tokenizer": "", "tokenizer_sha256": "",
        "vocab": V, "valid_vocab": None, "method": "top_k", "k": 4, "temperatures": (2.0,), "dtype": "float16",
        "seed": 0, "shard_sequences": 1, "splits": {"train": Split(1, 1, "")},
    }  # fmt: skip
    return Description(**{**given, **changes})


def from_disk(row):
    """What reading gives back of a row that was written."""
    return Dataset(table([row])).with_format("numpy", dtype=None)[0]


class TestRows:
    @pytest.mark.parametrize(("vocab", "dtype"), [(2**16, "uint16"), (2**16 + 1, "int32"), (262_144, "int32")])
    def test_the_last_id_of_a_vocabulary(self, vocab, dtype):
        last = torch.tensor([[vocab - 1, 0, vocab - 2, 1]])
        entries = TopK(last, torch.zeros(1, 4), torch.zeros(1, 2))
        row = encode(entries, describe(vocab=vocab))
        assert row["indices"].dtype == dtype
        back = decode(from_disk(row), describe(vocab=vocab), 2.0)
        assert back["teacher_indices"].tolist() == last.tolist()

    @pytest.mark.parametrize("n", [255, 256, 1024])
    def test_an_id_that_came_every_time(self, n):
        """Counts up to n, where uint8 ends, and rows with different numbers of ids."""
        description = describe(method="sample", k=n)
        entries = Drawn(torch.tensor([5, 1, 2]), torch.tensor([n, n - 1, 1]), torch.tensor([1, 2]))
        back = decode(from_disk(encode(entries, description)), description, 2.0)
        assert back["teacher_indices"][:, :2].tolist() == [[5, 0], [1, 2]]
        expected = [[0.0, -math.inf], [math.log((n - 1) / n), -math.log(n)]]
        torch.testing.assert_close(back["teacher_log_probs"][:, :2], torch.tensor(expected))
        assert back["teacher_log_probs"].isfinite().sum() == 3


class TestLosses:
    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-4)])
    @pytest.mark.parametrize("tau", [1.0, 2.0])
    def test_all_of_the_vocabulary_is_the_live_teacher(self, tmp_path, dtype, tolerance, tau):
        """The loss, its gradient and the KL at τ = 1; at another temperature the first two."""
        teacher, data = make(tmp_path / "c", k=V, dtype=dtype, temperatures=(tau,))
        student, batch = tiny("gpt2", V=V), collate(data)
        tokens = {key: batch[key] for key in ("input_ids", "labels")}
        live = losses(DistillationModel(student, teacher, recipe="teacher_head"), {**tokens, "temperature": tau})
        ours = losses(DistillationModel(student, recipe="cached"), {**batch, "temperature": tau})
        for one, other in zip(ours, live, strict=True):
            assert float((one - other).norm() / other.norm()) < tolerance

    @pytest.mark.parametrize("family", ["gemma2", "cohere"])
    def test_heads_with_a_cap_or_a_scale(self, tmp_path, family):
        teacher, data = make(tmp_path / "c", family=family, k=5, dtype="float32")
        batch = collate(data)
        expected, ids = log_softmax(teacher, batch).topk(5)
        assert torch.equal(batch["teacher_indices"].long(), ids)
        torch.testing.assert_close(batch["teacher_log_probs"].double(), expected, atol=2e-5, rtol=1e-5)

    def test_a_bucket_at_the_temperature(self, tmp_path):
        """KL over k + 1 categories, written with whole logits; it grows with k, towards the whole KL."""
        tau, values = 2.0, []
        student = tiny("gpt2", V=V)
        for k in (1, 4, 20, V):
            teacher, data = make(tmp_path / str(k), k=k, dtype="float32")
            batch = collate(data)
            log_t, log_s = log_softmax(teacher, batch, tau), log_softmax(student, batch, tau)
            ids = log_t.topk(k).indices

            def categories(log_p, ids=ids):
                kept = log_p.gather(-1, ids)
                rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
                return torch.cat([kept, rest], -1) if ids.shape[-1] < V else kept

            expected = kl_div(categories(log_s), categories(log_t), log_target=True, reduction="none").sum(-1)[:, :-1]
            model = DistillationModel(student, recipe="cached")
            metrics = model(**batch).metrics  # fp32
            assert float(metrics.kd) == pytest.approx(float(expected.mean()), rel=1e-5)
            values.append(float(metrics.kd))
        assert values == sorted(values)
        assert values[0] < 0.9 * values[-1]

    def test_drawn_ids_at_the_temperature(self, tmp_path):
        """Weights counts/n: the cross entropy to them, up to what does not depend on the student."""
        tau = 2.0
        _, data = make(tmp_path / "c", method="sample", k=30, temperatures=(tau,))
        student, batch = tiny("gpt2", V=V), collate(data)
        weights = torch.zeros(len(data), T, V, dtype=torch.float64)
        p = batch["teacher_log_probs"].double().exp()
        weights.scatter_add_(-1, batch["teacher_indices"].long(), p)
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(data), T, dtype=torch.float64), atol=1e-6, rtol=0)
        expected = (torch.special.xlogy(weights, weights) - weights * log_softmax(student, batch, tau)).sum(-1)[:, :-1]
        out = DistillationModel(student, recipe="cached")(**batch, with_fidelity=True)
        assert float(out.metrics.kd) == pytest.approx(float(expected.mean()), rel=1e-5)
        assert out.fidelity is None  # nothing is known at τ = 1

    def test_what_rounding_takes_is_given_back(self):
        """Entries of rounded log-probabilities still have what the tail leaves: 1 in all."""
        log_p = torch.randn(50, 200).mul(3).log_softmax(-1)
        log_probs, indices = log_p.topk(20)
        tails = (1 - log_probs.double().exp().sum(-1)).log().float()
        teacher = CachedEntries(indices, log_probs.half(), tails[:, None].expand(-1, 2)).at(1.0)
        mass = teacher.log_probs.double().exp().sum(-1) + tails.double().exp()
        torch.testing.assert_close(mass, torch.ones(50, dtype=torch.float64), atol=3e-7, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_the_tail_of_a_confident_token(self, dtype):
        """It is kept as e⁻¹⁸ and stays that: reverse KL of a uniform student is 17.7039, not infinite."""
        z_t = torch.cat([torch.tensor([18 + math.log(100)]), torch.ones(7), torch.zeros(92)])[None]
        kept, h = top_k(Head(z_t, torch.eye(100)), 8), torch.zeros(1, 100, requires_grad=True)
        assert float(kept.log_tails) == pytest.approx(-18.0834, abs=1e-4)
        entries = CachedEntries(kept.indices, kept.log_probs.to(dtype), kept.log_tails[..., [0, 0]])
        for teacher in (entries.at(1.0), entries.at_one()):
            loss = fused_kd_loss(Head(h, torch.eye(100)), teacher, temperature=1.0, divergence="reverse_kl")
            assert float(loss.detach()) == pytest.approx(17.7039, rel=1e-5 if dtype == torch.float32 else 1e-3)
            assert torch.autograd.grad(loss, h)[0].isfinite().all()

    def test_a_loop_of_ones_own(self, tmp_path):
        """As docs/teachers.md has it."""
        teacher, data = make(tmp_path / "c", k=V, dtype="float32")
        batch, hidden = collate(data), torch.randn(len(data), T, 16, requires_grad=True)
        weight, tau = torch.randn(V, 16), 2.0
        entries = CachedEntries(*(batch[f"teacher_{name}"] for name in ("indices", "log_probs", "log_tails")))
        loss = fused_kd_loss(Head(hidden, weight), entries.at(tau), temperature=tau)
        log_s = (hidden @ weight.T / tau).log_softmax(-1)
        expected = tau**2 * kl_div(log_s, log_softmax(teacher, batch, tau).float(), log_target=True, reduction="none")
        torch.testing.assert_close(loss, expected.sum(-1).mean(), rtol=1e-5, atol=1e-6)


class TestWriting:
    def test_an_interrupted_cache_goes_on(self, tmp_path, monkeypatch):
        """What is complete is kept, and the result is the same bytes."""
        for name in ("whole", "broken"):
            folder = tmp_path / name
            if name == "broken":
                publish, calls = cache_write.atomic_io.publish, []

                def once(*args, publish=publish, calls=calls, **options):
                    calls.append(args)
                    if len(calls) == 2:
                        raise KeyboardInterrupt
                    publish(*args, **options)

                monkeypatch.setattr(cache_write.atomic_io, "publish", once)
                with pytest.raises(KeyboardInterrupt):
                    make(folder, method="sample", k=9)
                with pytest.raises(CacheError, match=r"not complete.*goes on"):
                    TeacherCache(folder)
                kept = (folder / "train-00000" / "SHA256SUMS").stat().st_mtime_ns
            make(folder, method="sample", k=9)
        assert (folder / "train-00000" / "SHA256SUMS").stat().st_mtime_ns == kept
        for shard in range(3):
            one, other = (load_from_disk(tmp_path / name / f"train-{shard:05d}") for name in ("whole", "broken"))
            assert one.with_format("arrow")[:].equals(other.with_format("arrow")[:])
        assert not list(folder.glob(".*"))

    def test_several_processes_write_what_one_does(self, tmp_path):
        """Two splits: shares are counted over all shards, and the last is not another process's alone to wait for."""
        splits = {"train": blocks(), "eval": blocks(4, seed=6)}
        write_both(tmp_path / "one")
        assert server.join(server.start(tmp_path / "said", 2, write_both, tmp_path / "two")) == [0, 0]
        for split, data in splits.items():
            one, two = (TeacherCache(tmp_path / name).dataset(split, data) for name in ("one", "two"))
            for key, value in collate(one).items():
                assert torch.equal(value, collate(two)[key])
        summary = TeacherCache(tmp_path / "two").summary
        assert summary.tokens_written == summary.tokens == 11 * T

    def test_another_call_at_work_on_the_folder(self, tmp_path, monkeypatch):
        """Neither touches what the other writes: the second is refused, before it reads its teacher."""

        def meanwhile(*args, write=cache_write._write_shard):
            with pytest.raises(CacheError, match=r"is being made by another process, which holds its \.lock; wait"):
                make(tmp_path, k=4)
            write(*args)

        monkeypatch.setattr(cache_write, "_write_shard", meanwhile)
        make(tmp_path, k=4)
        assert not (tmp_path / ".lock").exists()

    def test_one_that_was_killed_before_it_had_named_its_cache(self, tmp_path):
        for left in ("cache.json.tmp", ".lock"):
            (tmp_path / left).touch()
        make(tmp_path, k=4)

    @pytest.mark.parametrize(
        ("given", "message"),
        [({"batch_size": 0}, r"batch_size=0 \(int\); expected an int of at least 1"),
         ({"shard_tokens": 2.0}, r"shard_tokens=2.0 \(float\); expected an int"),
         ({"k": 4.0}, r"k=4.0; expected 1 to 67"),
         ({"splits": {}}, "splits is empty; expected {name: data set}"),
         ({"splits": {"train": []}}, r"splits\['train'\] is empty"),
         ({"splits": {"train": [{"text": "a"}]}}, r"splits\['train'\]: no input_ids; expected rows of token ids"),
         ({"splits": {"train": Dataset.from_dict({"text": ["a"]})}}, r"splits\['train'\]: no input_ids"),
         ({"splits": {"train": [{"input_ids": [1]}, {"input_ids": []}]}}, "has a row without tokens; expected")],
    )  # fmt: skip
    def test_arguments_that_do_not_fit(self, tmp_path, given, message):
        given = {"splits": {"train": blocks()}, "k": 4, **given}
        with pytest.raises(ValueError, match=message):
            cache_teacher(tiny("gpt2", V=V), given.pop("splits"), tmp_path / "c", **given)
        assert not (tmp_path / "c").exists()

    def test_a_file_in_the_folders_place(self, tmp_path):
        (tmp_path / "c").write_text("mine")
        with pytest.raises(CacheError, match="is a file; name a new folder"):
            make(tmp_path / "c", k=4)

    def test_another_version_of_transformers_goes_on(self, tmp_path):
        teacher, _ = make(tmp_path, k=4)
        teacher.config.transformers_version = "99.0"
        make(tmp_path, k=4, teacher=teacher)

    def test_size_and_speed_are_told(self, tmp_path):
        told, data = [], blocks(40)
        summary = cache_teacher(tiny("gpt2", V=V), {"train": data}, tmp_path / "c", k=16, tell=told.append)
        entries = 16 * (2 + 2) + 4 * 2
        assert f"{40 * T} tokens, {entries} bytes each" in told[0]
        assert summary.tokens == summary.tokens_written == 40 * T
        assert summary.bytes == sum(p.stat().st_size for p in (tmp_path / "c").rglob("*") if p.is_file()) - len(
            (tmp_path / "c" / "summary.json").read_bytes()
        )
        assert entries < summary.bytes_per_token < 1.3 * entries  # offsets and names around them: some 4 KB
        assert summary.tokens_per_second > 0

    def test_under_autocast_it_is_the_live_teacher_of_autocast(self, tmp_path):
        with torch.autocast("cpu", torch.bfloat16):
            teacher, data = make(tmp_path / "c", k=V, dtype="float32")
            batch = collate(data)
            tokens = {key: batch[key] for key in ("input_ids", "labels")}
            student = tiny("gpt2", V=V)
            live = DistillationModel(student, teacher, recipe="teacher_head")(**tokens)
            ours = DistillationModel(student, recipe="cached")(**batch)
        torch.testing.assert_close(ours.loss, live.loss, rtol=1e-5, atol=0)
        assert data.description.teacher_dtype == "bfloat16"

    WRONG: ClassVar = {
        "method": ({"method": "beam"}, "method='beam'; expected 'hidden', 'top_k' or 'sample'"),
        "k": ({"k": V + 1}, f"k={V + 1}; expected 1 to {V}"),
        "none": ({"k": 0}, "k=0; expected 1 to"),
        "many draws": ({"method": "sample", "k": 1025}, "k=1025; expected 1 to 1024"),
        "dtype": ({"dtype": "bfloat16"}, "dtype='bfloat16'; expected"),
        "temperature": ({"temperatures": (0.0,)}, "expected numbers > 0"),
        "temperatures": ({"method": "sample", "temperatures": (1.0, 2.0)}, "expected one for method='sample'"),
    }

    @pytest.mark.parametrize("name", WRONG)
    def test_wrong_arguments(self, tmp_path, name):
        options, message = self.WRONG[name]
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "c", **options)
        assert not (tmp_path / "c").exists()

    def test_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(CacheError, match=r"holds files and no cache.json; name an empty"):
            make(tmp_path)
        assert (tmp_path / "notes.txt").read_text() == "mine"
        make(tmp_path / "c", k=4)
        with pytest.raises(CacheError, match=r"something else \(k: then 4, now 5\)"):
            make(tmp_path / "c", k=5)
        text = rf"something else \(splits: then .*, now {{'train': 6 rows, {6 * T} tokens, sha256 \w{{8}}…}}\)\. Name"
        with pytest.raises(CacheError, match=text):  # and not the rows of a shard, which follow from the text
            make(tmp_path / "c", blocks(6), k=4, shard_tokens=2 * T)
        with pytest.raises(CacheError, match="teacher_sha256: then"):  # of the same name and sizes
            make(tmp_path / "c", k=4, teacher=tiny("gpt2", V=V, width=32, seed=2))


def write_both(folder):
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    teacher = tiny("gpt2", V=V, width=32, seed=1)
    cache_teacher(teacher, {"train": blocks(), "eval": blocks(4, seed=6)}, folder, k=4, shard_tokens=3 * T)


class TestReading:
    def test_every_damaged_file_is_named(self, tmp_path):
        """A bit flipped, the end cut off, the file gone: of each file of a shard."""
        make(tmp_path / "c", k=4)
        shard = tmp_path / "c" / "train-00001"
        for _ in each_damage(shard):
            with pytest.raises(CacheError, match=r"train-00001.* is damaged: .*[Rr]emove that folder"):
                TeacherCache(tmp_path / "c")
        TeacherCache(tmp_path / "c")

    def test_a_damaged_shard_is_made_again(self, tmp_path):
        _, data = make(tmp_path / "c", k=4)
        before = collate(data)
        shard = tmp_path / "c" / "train-00001"
        (shard / "data-00000-of-00001.arrow").write_bytes(b"")
        (tmp_path / "c" / "summary.json").unlink()
        _, data = make(tmp_path / "c", k=4)
        assert all(torch.equal(value, before[key]) for key, value in collate(data).items())

    @pytest.mark.parametrize("complete", [True, False])
    def test_shards_that_change_places_are_found(self, tmp_path, complete):
        """Each is whole by its own checksums."""
        data = blocks()
        make(tmp_path / "c", data)
        first, second, aside = (tmp_path / "c" / name for name in ("train-00000", "train-00001", "aside"))
        before = [(path / "data-00000-of-00001.arrow").read_bytes() for path in (first, second)]
        for one, other in ((first, aside), (second, first), (aside, second)):
            one.rename(other)
        if complete:
            with pytest.raises(CacheError, match=r"train-00000' is damaged: by its shard.json it is another shard"):
                TeacherCache(tmp_path / "c")
        (tmp_path / "c" / "summary.json").unlink()
        make(tmp_path / "c", data)  # makes both again
        TeacherCache(tmp_path / "c")
        assert [(path / "data-00000-of-00001.arrow").read_bytes() for path in (first, second)] == before

    @pytest.mark.parametrize("change", [{"k": 2}, {"temperatures": [3.0]}, {"seed": 4}, {"valid_vocab": 60}])
    def test_a_description_that_was_changed_is_found(self, tmp_path, change):
        make(tmp_path / "c", blocks())
        path = tmp_path / "c" / "cache.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(CacheError, match=r"or of a cache with another cache\.json than this folder's"):
            TeacherCache(tmp_path / "c")

    @pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', '{"format": 9, "version": "7.0"}', "\xff"])
    def test_a_description_that_cannot_be_read(self, tmp_path, damage):
        make(tmp_path / "c", k=4)
        (tmp_path / "c" / "cache.json").write_bytes(damage.encode("latin-1"))
        with pytest.raises(CacheError, match=r"cache.json' is damaged|format 9, written by kdfast 7.0"):
            TeacherCache(tmp_path / "c")

    def test_other_data(self, tmp_path):
        make(tmp_path / "c", k=4)
        cache = TeacherCache(tmp_path / "c")
        changed = blocks().to_list()
        changed[3]["input_ids"][5] += 1
        for other in (blocks(6), blocks(seed=6), changed, blocks().select([1, 0, 2, 3, 4, 5, 6])):
            with pytest.raises(CacheError, match="is of other data: then 7 sequences with 84 tokens"):
                cache.dataset("train", other)
        assert isinstance(cache.dataset("train", blocks().to_list()), CachedBlocks)  # the same rows, as a list
        with pytest.raises(CacheError, match="has no split 'test'; expected one of train"):
            cache.dataset("test", blocks())

    def test_another_temperature(self, tmp_path):
        make(tmp_path / "c", k=4, temperatures=(2.0, 3.0))
        cache = TeacherCache(tmp_path / "c")
        for tau in (1.0, 2.0, 3.0):
            cache.dataset("train", blocks(), temperature=tau)
        with pytest.raises(CacheError, match=r"=1.5; .* was made for 1, 2, 3. .*cache_temperatures: \[1.5\]"):
            cache.dataset("train", blocks(), temperature=1.5)
        make(tmp_path / "drawn", method="sample", k=4)
        with pytest.raises(CacheError, match=r"was made for 2\. "):
            TeacherCache(tmp_path / "drawn").dataset("train", blocks(), temperature=1.0)

    def test_another_tokenizer(self, tmp_path):
        tokenizer = make_tokenizer()
        make(tmp_path / "c", k=4, tokenizer=tokenizer)
        cache = TeacherCache(tmp_path / "c")
        cache.check_tokenizer(make_tokenizer())
        tokenizer.add_tokens(["<more>"])
        with pytest.raises(CacheError, match=r"was made with the tokenizer .* has other tokens"):
            cache.check_tokenizer(tokenizer)

    @pytest.mark.parametrize(
        ("vocab", "valid", "cached_valid", "fits"),
        [(V, None, None, True), (V + 5, None, None, False), (V + 5, V, None, True), (V - 3, V - 5, V - 5, True),
         (V, V - 5, None, False), (V, None, V - 5, True)],
    )  # fmt: skip
    def test_another_vocabulary(self, tmp_path, vocab, valid, cached_valid, fits):
        make(tmp_path / "c", k=4, valid_vocab=cached_valid)
        cache = TeacherCache(tmp_path / "c")
        if fits:
            cache.check_vocabulary(vocab, valid)
        else:
            with pytest.raises(CacheError, match=f"with {V} ids .* student has {vocab}"):
                cache.check_vocabulary(vocab, valid)


class TestTraining:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_trainer_takes_the_recipe_from_the_data(self, tmp_path, workers):
        teacher, data = make(tmp_path / "c", k=V, dtype="float32")
        log = {}
        for recipe, train in (("auto", data), ("teacher_head", blocks())):
            args = KDConfig(
                output_dir=str(tmp_path / recipe), recipe=recipe, max_steps=4, logging_steps=1, use_cpu=True,
                per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", disable_tqdm=True,
                dataloader_num_workers=workers, dataloader_pin_memory=False, save_strategy="no", eval_strategy="steps",
                eval_steps=2,
            )  # fmt: skip
            live = {"teacher": teacher} if recipe == "teacher_head" else {}
            trainer = KDTrainer(tiny("gpt2", V=V), args, train_dataset=train, eval_dataset=train, **live)
            trainer.train()
            log[recipe] = [
                entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_kl_teacher_student", "kd")
                if key in entry
            ]  # fmt: skip
        assert trainer.model.recipe.name == "teacher_head"
        np.testing.assert_allclose(log["auto"], log["teacher_head"], rtol=2e-5)
        assert len(log["auto"]) == 4 + 4 + 2

    def test_what_does_not_go_with_a_cache(self, tmp_path):
        _, data = make(tmp_path / "c", k=4)
        _, drawn = make(tmp_path / "d", method="sample", k=4)

        def trainer(dataset=data, student=None, temperature_schedule=None, **settings):
            settings = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none", **settings}
            return KDTrainer(
                student or tiny("gpt2", V=V), KDConfig(**settings), train_dataset=dataset,
                temperature_schedule=temperature_schedule,
            )  # fmt: skip

        for message, given in {
            "entries for temperature=2, and the run is at 3": {"temperature": 3.0},
            "the run is at 3, 2": {"temperature_steps": [3, 2]},
            "divergence='reverse_kl' and train_dataset has ids drawn": {"dataset": drawn, "divergence": "reverse_kl"},
            "divergence='jsd' and .* are no estimate": {"dataset": drawn, "beta": 0.5},
            "divergence='skew_kl' and .* are no estimate": {"dataset": drawn, "divergence": "skew_kl", "alpha": 0.1},
            "the student has 70": {"student": tiny("gpt2", V=70)},
        }.items():
            with pytest.raises(CacheError, match=message):
                trainer(**given)
        with pytest.raises(CacheError, match=r"eval_dataset\['a'\] has a teacher's entries for temperature=2"):
            KDTrainer(
                tiny("gpt2", V=V), KDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, temperature=1.0),
                train_dataset=TeacherCache(tmp_path / "c").dataset("train", blocks(), temperature=1.0),
                eval_dataset={"a": data},
            )  # fmt: skip
        with pytest.raises(
            CacheError, match=r"train_dataset has .* the run is at a temperature_schedule; expected the same"
        ):
            trainer(temperature_schedule=Linear(3.0, 2.0))
        with pytest.raises(CacheError, match="the student has 70"):  # whatever learns from it: evaluation reads it
            trainer(student=tiny("gpt2", V=70), recipe="lm_only")
        trainer(divergence="reverse_kl")
        trainer(dataset=drawn, beta=0.0)  # forward KL

    @pytest.mark.parametrize("recipe", ["teacher_head", "lm_only", "auto"])
    def test_beside_a_live_teacher(self, tmp_path, recipe):
        """A recipe that learns from it does; auto takes the cache."""
        teacher, data = make(tmp_path / "c", k=4)
        losses = {}
        for name, dataset in (("cache", data), ("live", blocks())):
            args = KDConfig(
                output_dir=str(tmp_path / name), use_cpu=True, report_to="none", recipe=recipe, max_steps=1,
                logging_steps=1, save_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            if recipe == "auto" and name == "live":
                continue
            trainer = KDTrainer(tiny("gpt2", V=V), args, teacher=teacher, train_dataset=dataset)
            trainer.train()
            losses[name] = trainer.state.log_history[0]["loss"]
        assert trainer.model.recipe.name == {"auto": "cached"}.get(recipe, recipe)
        assert recipe == "auto" or losses["cache"] == losses["live"]

    def test_a_part_of_the_blocks(self, tmp_path):
        """torch's own ways of putting data sets together do not hide what they are made of."""
        _, data = make(tmp_path / "c", k=4)
        for part in (Subset(data, [0, 3]), ConcatDataset([data, Subset(data, [1])])):
            args = KDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
            assert KDTrainer(tiny("gpt2", V=V), args, train_dataset=part).model.recipe.name == "cached"
            args = KDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", temperature=3.0)
            with pytest.raises(CacheError, match="entries for temperature=2, and the run is at 3"):
                KDTrainer(tiny("gpt2", V=V), args, train_dataset=part)

    def test_without_entries(self):
        ids = torch.tensor([[3, 4, 5]])
        with pytest.raises(ValueError, match="teacher_indices is None; recipe 'cached' learns from a teacher cache"):
            DistillationModel(tiny("gpt2", V=V), recipe="cached")(input_ids=ids, labels=ids)


def test_summaries_and_descriptions_are_json(tmp_path):
    make(tmp_path / "c", k=4)
    named = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert named["k"] == 4
    assert named["temperatures"] == [2.0]
    assert len(named["tokenizer_sha256"]) in (0, 64)
    assert json.loads((tmp_path / "c" / "summary.json").read_text())["tokens"] == 7 * T


def test_a_model_s_cache_is_described_as_before_there_were_other_sources(tmp_path):
    """Shards that were written then still carry the right sum, and a cache.json without a source is read."""
    mark = describe().mark("train", 0)
    assert json.loads(mark)["cache_sha256"] == "acaf1cdb2bd2646d03ea3c8fcf5cea027eb027a024deff21d3a3a5152c0eb7ac"
    describe().write(tmp_path)
    assert "source" not in json.loads((tmp_path / "cache.json").read_text())
    assert Description.read(tmp_path) == describe()
    describe(source={"kind": "vllm"}).write(tmp_path)
    assert Description.read(tmp_path).source == {"kind": "vllm"}
    assert Description.read(tmp_path).mark("train", 0) != mark
