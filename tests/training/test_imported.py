"""Log-probabilities from files and data sets: what is trained on is the distribution that was printed, or an error."""

import copy
import gzip
import json
from dataclasses import replace

import pytest
import torch
from byte_tokenizer import make_tokenizer
from datasets import Dataset
from logprob_server import V, cached, dense, exact, log_probs, loss_and_gradient, sglang, vllm
from tiny_models import tiny

from kdfast import SparseLogits
from kdfast.training import (
    RECIPES,
    CachedEntries,
    CacheError,
    DistillationModel,
    KDConfig,
    KDTrainer,
    TeacherCache,
    import_log_probs,
)

T = 12
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def teacher():
    return tiny("gpt2", V=V, width=32, seed=1, spread=0.6).eval()


def texts(n=5, seed=5, labels=True):
    ids = torch.randint(3, 250, (n, T), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, **({"labels": ids} if labels else {})})


def likely(teacher, n=4):
    """Texts that the teacher would write: its tokens tell where entries belong."""
    rows = []
    for start in range(n):
        ids = [start + 40]
        for _ in range(T - 1):
            ids.append(int(log_probs(teacher, ids)[-1].argmax()))
        rows.append(ids)
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def in_vllm(teacher, ids, k):
    return {"prompt_token_ids": ids, "prompt_logprobs": vllm(teacher, TOKENIZER, ids, k)}


def in_sglang(teacher, ids, k):
    return {"text": "", "meta_info": sglang(teacher, TOKENIZER, ids, k, texts=True)}


def as_text(teacher, ids, k):
    """SGLang's lists as JSON in columns."""
    return {name: json.dumps(value) for name, value in in_sglang(teacher, ids, k)["meta_info"].items()}


def in_axolotl(teacher, ids, k):
    """Of the last tokens; here all but the first."""
    entries = [row.float().topk(k) for row in log_probs(teacher, ids)[:-1]]
    named = [
        [{"logprob": p, "token": f"token_id:{i}"} for p, i in zip(x.values.tolist(), x.indices.tolist(), strict=True)]
        for x in entries
    ]
    return {"input_ids": ids, "logprobs": named}


def in_axolotl_v2(teacher, ids, k):
    entries = [row.float().topk(k) for row in log_probs(teacher, ids)[:-1]]
    lists = {
        "logprobs": [x.values.tolist() for x in entries],
        "target_token_ids": [x.indices.tolist() for x in entries],
    }
    return {"input_ids": ids, **lists}


LAYOUTS = [in_vllm, in_sglang, in_axolotl, in_axolotl_v2]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(source, folder, data, temperature=1.0, **options):
    """The rows of `data` with what was imported for them."""
    options = {"tokenizer": TOKENIZER, "dtype": "float32", "shard_tokens": 3 * T, **options}
    import_log_probs(source, {"train": data}, folder, **options)
    return TeacherCache(folder).dataset("train", data, temperature=temperature)


class TestValues:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_all_of_the_vocabulary_is_the_dense_teacher(self, tmp_path, teacher, layout):
        data = texts()
        rows = imported(
            lines(tmp_path / "f.jsonl", [layout(teacher, ids, V) for ids in data["input_ids"]]), tmp_path / "c", data
        )
        loss, gradient = loss_and_gradient(rows, cached)
        true, true_gradient = loss_and_gradient(rows, dense(teacher))
        torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-5 * true_gradient.abs().max())

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_64_entries_are_those_and_the_exact_tail(self, tmp_path, teacher, layout):
        data = texts()
        rows = imported(
            lines(tmp_path / "f.jsonl", [layout(teacher, ids, 64) for ids in data["input_ids"]]), tmp_path / "c", data
        )
        loss, gradient = loss_and_gradient(rows, cached)
        own = layout in (in_vllm, in_sglang)
        true, true_gradient = loss_and_gradient(rows, exact(teacher, 64, own))
        assert rows[0]["teacher_indices"].shape == (T, 64 + own)
        torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-5 * true_gradient.abs().max())


def changed(teacher, change, layout=in_vllm, k=8):
    """Three printed rows, the second of them as `change` leaves it."""
    data = texts(3)
    rows = [layout(teacher, ids, k) for ids in data["input_ids"]]
    change(rows[1])
    return data, rows


def at(row, t=5):
    """vLLM's entries that predict token t."""
    return row["prompt_logprobs"][t]


def set_first(row, value, t=5):
    next(iter(at(row, t).values()))["logprob"] = value


def shift(row):
    row["prompt_logprobs"] = [*row["prompt_logprobs"][1:], None]


def swap(row):
    at(row)["260"] = at(row).pop(next(iter(at(row))))


REFUSED = {
    "nan": (lambda row: set_first(row, float("nan")), r"row 1 of .*, before token 5: id \d+ has nan, which is no"),
    "null": (lambda row: set_first(row, None), "an entry is no number"),
    "words": (lambda row: set_first(row, "much"), "an entry is no number"),
    "positive": (lambda row: set_first(row, 0.5), "has 0.5, which is no log-probability; logits, or probabilities"),
    "more than all": (lambda row: [set_first(row, -0.01), at(row).update({"5": {"logprob": -0.01}})], "sum to"),
    "an id of another vocabulary": (swap, "and the tokenizer 257 ids: another vocabulary"),
    "a negative id": (lambda row: at(row).update({"-1": {"logprob": -20.0}}), "and no tokenizer has such an id"),
    "an id that is none": (lambda row: at(row).update({"a": {"logprob": -20.0}}), "prompt_logprobs is not as expected"),
    "a null": (lambda row: row["prompt_logprobs"].__setitem__(4, None), "row 1: .* is null at token 4"),
    "one position too few": (lambda row: row["prompt_logprobs"].pop(), "has 11 positions for 12 tokens"),
    "one position too early": (shift, "row 1: prompt_logprobs is (shifted|null)"),
    "other tokens": (lambda row: row["prompt_token_ids"].__setitem__(5, 255), "token 5 is 255, and not among"),
    "no tokens": (lambda row: row.pop("prompt_token_ids"), "row 1: it has no tokens"),
    "no entries": (lambda row: row.pop("prompt_logprobs"), "row 1 has prompt_token_ids; expected one of"),
    "pairs": (lambda row: row.update(prompt_logprobs=[None, *[[3, -1.0]] * 11]), "is not as expected"),
}  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize("trap", REFUSED)
    def test_what_is_no_distribution_of_the_text(self, tmp_path, teacher, trap):
        change, message = REFUSED[trap]
        data, rows = changed(teacher, change)
        with pytest.raises(CacheError, match=message):
            imported(lines(tmp_path / "f.jsonl", rows), tmp_path / "c", data)
        assert not (tmp_path / "c" / "summary.json").exists()

    def test_entries_that_stand_one_token_early(self, tmp_path, teacher):
        """Each layout's own way of telling: vLLM's and SGLang's tokens are among them, of axolotl's lists many are."""
        data = likely(teacher)
        for layout, name in ((in_vllm, "prompt_logprobs"), (in_axolotl, "logprobs"), (in_axolotl_v2, "logprobs")):
            rows = [layout(teacher, ids, 4) for ids in data["input_ids"]]
            for row in rows:
                early = [None, *row[name][2:], row[name][-1]] if layout is in_vllm else [*row[name][1:], row[name][-1]]
                row[name] = early
                if layout is in_axolotl_v2:
                    row["target_token_ids"] = [*row["target_token_ids"][1:], row["target_token_ids"][-1]]
            with pytest.raises(CacheError, match=f"{name} is shifted"):
                imported(lines(tmp_path / "f.jsonl", rows), tmp_path / "c", data)

    def test_sglang_s_lists_of_two_positions(self, tmp_path, teacher):
        def early(row):
            top = row["meta_info"]["input_top_logprobs"]
            row["meta_info"]["input_top_logprobs"] = [None, *top[2:], top[-1]]

        data, rows = changed(teacher, early, in_sglang, k=64)
        with pytest.raises(
            CacheError, match="row 1: input_top_logprobs and input_token_logprobs are of other positions"
        ):
            imported(lines(tmp_path / "f.jsonl", rows), tmp_path / "c", data)

    def test_sglang_s_tokens_are_others(self, tmp_path, teacher):
        data, rows = changed(teacher, lambda row: row["meta_info"]["input_token_logprobs"].pop(3), in_sglang)
        with pytest.raises(CacheError, match="input_top_logprobs has 13 tokens and input_token_logprobs 12"):
            imported(lines(tmp_path / "f.jsonl", rows), tmp_path / "c", data)
        data, rows = changed(teacher, lambda row: row.update(input_ids=[5] * T), in_sglang)
        with pytest.raises(CacheError, match="input_ids are other tokens than those of input_token_logprobs"):
            imported(lines(tmp_path / "f.jsonl", rows), tmp_path / "c", data)

    def test_missing_rows(self, tmp_path, teacher):
        data = texts(5)
        path = lines(tmp_path / "f.jsonl", [in_vllm(teacher, ids, 4) for ids in data["input_ids"][:3]])
        message = r"has no entries for 2 of 5 rows of splits\['train'\], the first of them row 3"
        with pytest.raises(CacheError, match=message):
            imported(path, tmp_path / "c", data)

    def test_files_that_are_cut_off_or_no_rows_at_all(self, tmp_path, teacher):
        data = texts(2)
        whole = lines(tmp_path / "f.jsonl", [in_vllm(teacher, ids, 4) for ids in data["input_ids"]]).read_bytes()
        for name, content, message in (
            ("cut.jsonl", whole[:-40], r"cut.jsonl, row 1 is no JSON .*: truncated"),
            ("cut.jsonl.gz", gzip.compress(whole)[:-40], "cut.jsonl.gz' cannot be read"),
            ("list.jsonl", b"[1, 2]\n", "row 0 holds list; expected an object"),
            ("empty.jsonl", b"\n", "is empty"),
            ("no.jsonl", None, "cannot be read"),
        ):
            if content is not None:
                (tmp_path / name).write_bytes(content)
            with pytest.raises(CacheError, match=message):
                imported(tmp_path / name, tmp_path / "c", data)

    def test_rows_of_two_layouts(self, tmp_path, teacher):
        data = texts(2)
        path = lines(
            tmp_path / "f.jsonl",
            [in_vllm(teacher, data[0]["input_ids"], 4), in_sglang(teacher, data[1]["input_ids"], 4)],
        )
        with pytest.raises(CacheError, match="row 1 has input_top_logprobs, and earlier ones prompt_logprobs"):
            imported(path, tmp_path / "c", data)

    @pytest.mark.parametrize("layout", [in_vllm, in_sglang])
    def test_another_tokenizer_s_words(self, tmp_path, teacher, layout):
        data = texts(2)
        path = lines(tmp_path / "f.jsonl", [layout(teacher, ids, 16) for ids in data["input_ids"]])
        other = make_tokenizer()
        vocab = {token: (i + 7) % 256 if i < 256 else i for token, i in other.get_vocab().items()}
        state = json.loads(other.backend_tokenizer.to_str())
        state["model"]["vocab"] = vocab
        other._tokenizer = other.backend_tokenizer.from_str(json.dumps(state))
        with pytest.raises(CacheError, match="ids are other words than in the tokenizer"):
            imported(path, tmp_path / "c", data, tokenizer=other)

    def test_another_temperature_than_1(self, tmp_path, teacher):
        """Where all but k ids' mass is known at τ = 1 alone; with teacher_tail it is said what they are."""
        data = texts(3)
        path = lines(tmp_path / "f.jsonl", [in_vllm(teacher, ids, 8) for ids in data["input_ids"]])
        with pytest.raises(
            CacheError, match=r"was made for 1\. Train with one of those, or say what its entries leave"
        ):
            imported(path, tmp_path / "c", data, temperature=2.0)
        cache = TeacherCache(tmp_path / "c")
        rows = cache.dataset("train", data, temperature=2.0, tail="renormalize_both")
        assert rows[0].keys() == {"input_ids", "labels", "teacher_indices", "teacher_log_probs"}

        def both(batch):
            return SparseLogits(batch["teacher_indices"], batch["teacher_log_probs"], tail="renormalize_both")

        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        student = tiny("gpt2", V=V, width=16, seed=2, spread=0.4)
        recipe = replace(RECIPES["cached"], temperature=2.0, kd_weight=1.0, ce_weight=0.0, kd_until=1.0)
        model = DistillationModel(student, recipe=recipe, teacher_tail="renormalize_both")
        expected, _ = loss_and_gradient(rows, both, tau=2.0)
        torch.testing.assert_close(model(**batch).loss.detach(), expected, rtol=1e-5, atol=1e-6)
        args = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "report_to": "none", "use_cpu": True}
        trainer = KDTrainer(student, KDConfig(teacher_tail="renormalize_both", **args), train_dataset=rows)
        assert trainer.train().training_loss > 0


class TestTaken:
    def test_infinities_strings_and_order(self, tmp_path, teacher):
        """−inf however it is printed is no entry; ids are text or numbers, in any order."""
        data = texts(3)
        plain = [in_vllm(teacher, ids, 8) for ids in data["input_ids"]]
        odd = copy.deepcopy(plain)
        free = (str(i) for i in range(V))
        for row in odd:
            for t in range(1, T):
                entries = dict(reversed(at(row, t).items()))
                unused = (i for i in map(str, range(V)) if i not in at(row, t))
                for value in (float("-inf"), "-inf", "-Infinity", -9999.0, -1e9):
                    entries[next(unused)] = {"logprob": value, "rank": 9, "decoded_token": None}
                row["prompt_logprobs"][t] = {i: {**x, "logprob": str(x["logprob"])} for i, x in entries.items()}
        assert next(free) == "0"
        one = imported(lines(tmp_path / "a.jsonl", plain), tmp_path / "a", data)
        other = imported(lines(tmp_path / "b.jsonl", odd), tmp_path / "b", data)
        for row, like in zip(other, one, strict=True):
            known = like["teacher_log_probs"].shape[-1]
            assert torch.equal(row["teacher_log_probs"][:, :known], like["teacher_log_probs"])
            assert row["teacher_log_probs"][:, known:].eq(-torch.inf).all()
            kept = like["teacher_log_probs"] > -torch.inf
            assert torch.equal(row["teacher_indices"][:, :known][kept], like["teacher_indices"][kept])
            torch.testing.assert_close(row["teacher_log_tails"], like["teacher_log_tails"])

    def test_an_id_twice(self, tmp_path, teacher):
        data, rows = changed(
            teacher,
            lambda row: row["meta_info"]["input_top_logprobs"][5].append(row["meta_info"]["input_top_logprobs"][5][0]),
            in_sglang,
        )
        one = imported(lines(tmp_path / "a.jsonl", rows), tmp_path / "a", data)
        entries = one[1]["teacher_indices"][4][one[1]["teacher_log_probs"][4] > -torch.inf].tolist()
        assert len(entries) == len({*entries})
        twice = rows[1]["meta_info"]["input_top_logprobs"][5]
        twice[-1] = [twice[-1][0] - 1, *twice[-1][1:]]
        with pytest.raises(CacheError, match="and another log-probability there"):
            imported(lines(tmp_path / "b.jsonl", rows), tmp_path / "b", data)

    def test_rows_in_any_order_gzipped_in_several_files(self, tmp_path, teacher):
        data = texts(5)
        rows = [in_vllm(teacher, ids, 8) for ids in data["input_ids"]]
        expected = imported(lines(tmp_path / "f.jsonl", rows), tmp_path / "a", data)
        for name, part in (("x-1.jsonl.gz", rows[3:][::-1]), ("x-2.jsonl.gz", rows[:3])):
            (tmp_path / name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in part).encode()))
        found = imported(tmp_path / "x-*.jsonl.gz", tmp_path / "b", data)
        assert all(
            torch.equal(a[name], b[name])
            for a, b in zip(found, expected, strict=True)
            for name in a
            if name[:7] == "teacher"
        )

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_data_sets(self, tmp_path, teacher, layout):
        """Saved, as parquet and at hand: Arrow gives each of vLLM's positions every id, most of them null."""
        if layout is in_sglang:  # Arrow has no lists of numbers and words
            layout = as_text
        data = texts(3)
        rows = [layout(teacher, ids, 8) for ids in data["input_ids"]]
        expected = imported(lines(tmp_path / "f.jsonl", rows), tmp_path / "a", data)
        given = Dataset.from_list(rows)
        given.save_to_disk(tmp_path / "saved")
        given.to_parquet(tmp_path / "f.parquet")
        for n, source in enumerate((tmp_path / "saved", str(tmp_path / "f.parquet"), given, rows)):
            found = imported(source, tmp_path / f"{n}", data)
            assert all(
                torch.equal(a[x], b[x]) for a, b in zip(found, expected, strict=True) for x in a if x[:7] == "teacher"
            )

    def test_a_response_as_the_server_gives_it(self, tmp_path, teacher):
        data = texts(4)
        choices = [{"index": i, "text": "", **in_vllm(teacher, ids, 8)} for i, ids in enumerate(data["input_ids"])]
        path = lines(tmp_path / "f.jsonl", [{"id": "x", "choices": choices[:2]}, {"id": "y", "choices": choices[2:]}])
        assert len(imported(path, tmp_path / "c", data)) == 4

    def test_texts_are_tokenized_and_their_entries_tell_how(self, tmp_path, teacher):
        text = ["what is", "and what is not"]
        data = [{"input_ids": TOKENIZER(x)["input_ids"]} for x in text]
        rows = [
            {"text": x, "prompt_logprobs": vllm(teacher, TOKENIZER, row["input_ids"], 8)}
            for x, row in zip(text, data, strict=True)
        ]
        assert len(imported(lines(tmp_path / "f.jsonl", rows), tmp_path / "c", data)) == 2
        rows[1]["text"] = "and what it was"
        with pytest.raises(CacheError, match="not among the ids there: entries of another text, or tokenizer"):
            imported(lines(tmp_path / "g.jsonl", rows), tmp_path / "d", data)

    def test_a_completion_s_own_log_probs(self, tmp_path, teacher):
        """vLLM's of what was generated: prompts have none, and must not be trained on."""
        data = texts(3)
        rows = []
        for ids in data["input_ids"]:
            generated = vllm(teacher, TOKENIZER, ids, 8)[4:]
            rows.append(
                {"prompt_token_ids": ids[:4], "token_ids": ids[4:], "prompt_logprobs": None, "logprobs": generated}
            )
        path = lines(tmp_path / "f.jsonl", rows)
        with pytest.raises(
            CacheError, match=r"has no entries for token 1, which is trained on\. Expected labels of -100"
        ):
            imported(path, tmp_path / "c", data)
        completions = data.map(lambda row: {"labels": [-100] * 4 + row["input_ids"][4:]})
        found = imported(path, tmp_path / "d", completions)
        whole = imported(
            lines(tmp_path / "g.jsonl", [in_vllm(teacher, ids, 8) for ids in data["input_ids"]]),
            tmp_path / "e",
            completions,
        )
        for row, like in zip(found, whole, strict=True):
            assert torch.equal(row["teacher_log_probs"][3:], like["teacher_log_probs"][3:])
            assert row["teacher_log_probs"][:3].eq(-torch.inf).all()
        with pytest.raises(CacheError, match="no entries for token 1 of row 0, which is trained on"):
            found.cache.dataset("train", data, temperature=1.0)
        args = KDConfig(
            output_dir=str(tmp_path / "out"),
            report_to="none",
            use_cpu=True,
            recipe="cached",
            temperature=1.0,
            kd_on="all",
        )
        with pytest.raises(CacheError, match="kd_on='all', and train_dataset has entries of a file"):
            KDTrainer(tiny("gpt2", V=V), args, train_dataset=found).train()

    @pytest.mark.parametrize("ahead", [False, True])
    def test_what_axolotl_prepares(self, tmp_path, teacher, ahead):
        """Renormalized, of each token or of the one after it, as its versions differ; any temperature is served."""
        data, kd_temperature, rows = likely(teacher), 1.5, []
        for ids in data["input_ids"]:
            top = (log_probs(teacher, ids) / kd_temperature).topk(8)
            values, indices = top.values.log_softmax(-1).tolist(), top.indices.tolist()
            pad, mask = [[-1e9] * 8], [[1] * 8] * (T - 1)
            none = [[0] * 8]
            rows.append(
                {
                    "target_logprobs": values[:-1] + pad,
                    "target_token_ids": indices[:-1] + none,
                    "target_mask": mask + none,
                }
                if ahead
                else {
                    "target_logprobs": pad + values[:-1],
                    "target_token_ids": none + indices[:-1],
                    "target_mask": none + mask,
                }
            )
            rows[-1]["input_ids"] = ids
        path = lines(tmp_path / "f.jsonl", rows)
        options = {"logprobs_temperature": kd_temperature, "temperatures": (2.0,)}
        found = imported(path, tmp_path / "c", data, temperature=2.0, **options)

        def renormalized(batch):
            p = log_probs_of(teacher, batch["input_ids"]).topk(8)
            return SparseLogits(p.indices, p.values, tail="renormalize")

        def entries(batch):
            return CachedEntries(batch["teacher_indices"], batch["teacher_log_probs"], batch["teacher_log_tails"]).at(
                2.0
            )

        loss, gradient = loss_and_gradient(found, entries, tau=2.0)
        true, true_gradient = loss_and_gradient(found, renormalized, tau=2.0)
        torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-5 * true_gradient.abs().max())

    def test_what_axolotl_prepares_of_text_that_does_not_tell(self, tmp_path, teacher):
        data, rows = texts(3), []
        for ids in data["input_ids"]:
            top = log_probs(teacher, ids).topk(8)
            rows.append(
                {
                    "input_ids": ids,
                    "target_logprobs": top.values.log_softmax(-1).tolist(),
                    "target_token_ids": top.indices.tolist(),
                }
            )
        with pytest.raises(CacheError, match="its tokens do not tell whether target_logprobs are of each token"):
            imported(lines(tmp_path / "f.jsonl", rows), tmp_path / "c", data)

    def test_a_column_of_another_name_and_chats(self, tmp_path, teacher):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        chat = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "this"}]
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        printed = in_axolotl(teacher, ids, 8)["logprobs"]
        path = lines(tmp_path / "f.jsonl", [{"messages": chat, "llm_text_generation_vllm_logprobs": printed}])
        with pytest.raises(CacheError, match="or logprobs_field, the name that it has here"):
            imported(path, tmp_path / "c", [{"input_ids": ids}], tokenizer=tokenizer)
        options = {"tokenizer": tokenizer, "logprobs_field": "llm_text_generation_vllm_logprobs"}
        assert len(imported(path, tmp_path / "c", [{"input_ids": ids}], **options)) == 1
        options["logprobs_field"] = "llm"
        with pytest.raises(CacheError, match="has no 'llm'; it has messages, llm_text_generation_vllm_logprobs"):
            imported(path, tmp_path / "d", [{"input_ids": ids}], **options)

    def test_rows_that_are_cut_or_packed(self, tmp_path, teacher):
        """A document cut to max_length has the whole one's entries; a packed row those of each document."""
        data = texts(4)
        path = lines(tmp_path / "f.jsonl", [in_vllm(teacher, ids, 8) for ids in data["input_ids"]])
        whole = imported(path, tmp_path / "a", data)
        cut = [{"input_ids": row["input_ids"][: T - 4]} for row in data]
        found = imported(path, tmp_path / "b", cut)
        assert torch.equal(found[2]["teacher_log_probs"], whole[2]["teacher_log_probs"][: T - 4])
        packed = Dataset.from_list([
            {"input_ids": data[i]["input_ids"] + data[i + 1]["input_ids"], "seq_lengths": [T, T]} for i in (0, 2)
        ])  # fmt: skip
        found = imported(path, tmp_path / "d", packed)
        both = torch.cat([whole[2]["teacher_log_probs"], whole[3]["teacher_log_probs"]])
        assert torch.equal(found[1]["teacher_log_probs"], both)

    def test_padding_rows_of_the_served_head_are_in_the_tail(self, tmp_path, teacher):
        data, rows = changed(teacher, lambda row: at(row).update({"270": {"logprob": -12.0}}))
        rows = imported(lines(tmp_path / "f.jsonl", rows), tmp_path / "c", data)
        assert rows[1]["teacher_indices"].max() < V

    def test_fewer_entries_than_there_are(self, tmp_path, teacher):
        data = texts(3)
        path = lines(tmp_path / "f.jsonl", [in_axolotl(teacher, ids, 64) for ids in data["input_ids"]])
        rows = imported(path, tmp_path / "c", data, k=4)
        own = exact(teacher, 4, False)({"input_ids": torch.tensor(data["input_ids"])})
        found = torch.stack([row["teacher_log_tails"][:-1, 0] for row in rows])
        torch.testing.assert_close(found, own.log_tail[:, :-1].float(), rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="k=300; expected 1 to 257"):
            imported(path, tmp_path / "d", data, k=300)

    def test_an_interrupted_import_goes_on_and_another_file_is_refused(self, tmp_path, teacher):
        data = texts(6)
        rows = [in_vllm(teacher, ids, 4) for ids in data["input_ids"]]
        path = lines(tmp_path / "f.jsonl", rows)
        broken = copy.deepcopy(rows)
        set_first(broken[5], 1.0)
        with pytest.raises(CacheError, match="row 5 of the text"):
            imported(lines(tmp_path / "f.jsonl", broken), tmp_path / "c", data)
        assert [x.name for x in sorted((tmp_path / "c").glob("train-*"))] == ["train-00000"]
        with pytest.raises(CacheError, match=r"of something else \(source: then"):
            imported(lines(path, rows), tmp_path / "c", data)
        assert len(imported(path, tmp_path / "d", data)) == 6
        path.rename(tmp_path / "moved.jsonl")
        moved = {"name": str(path)}
        assert len(imported(tmp_path / "moved.jsonl", tmp_path / "d", data, **moved)) == 6


def log_probs_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.double().log_softmax(-1)
