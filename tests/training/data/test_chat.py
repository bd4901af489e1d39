"""Prompts with completions, chats and texts: ids, labels, batches, every gradient, and what is refused or skipped."""

import itertools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from cases import relative
from chats import CHATML, KINDS, UNMARKED, VOCAB, assistant, chat_tokenizer, raw, user
from datasets import Dataset
from tiny_models import tiny, tiny_moe
from tokenizers import processors
from training_fixtures import config  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM

from kdfast.training import DistillationModel, KDTrainer, TeacherCache, cache_teacher, tokenize_dataset
from kdfast.training.data.chat import is_raw_text
from kdfast.training.data.packing import PaddingCollator, best_fit_decreasing
from kdfast.training.data.text import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def learned(tokenizer, ids, labels):
    """The runs of tokens with labels, decoded."""
    runs = [list(group) for counts, group in itertools.groupby(zip(ids, labels, strict=True), lambda x: x[1] != -100)
            if counts]  # fmt: skip
    assert all(token == label for run in runs for token, label in run)
    return [tokenizer.decode([token for token, _ in run]) for run in runs]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_labels(kind, streams):
    tokenizer, (_, options, texts, parts) = chat_tokenizer(), KINDS[kind]
    data = raw(kind).to_iterable_dataset() if streams else raw(kind)
    rows, counts = tokenize_dataset(data, tokenizer, **options)
    rows = list(rows)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == texts
    assert [learned(tokenizer, row["input_ids"], row["labels"]) for row in rows] == parts
    assert all(row.keys() == {"input_ids", "labels"} for row in rows)
    assert (counts.rows, counts.skipped, counts.truncated) == (4, {}, 0)
    assert counts.tokens == sum(len(row["input_ids"]) for row in rows)
    assert counts.targets == sum(label != -100 for row in rows for label in row["labels"][1:])


def alone(student, teacher, rows, tau=2.0, kd_weight=0.7, kd_on="completion"):
    """Loss and gradients over the rows one by one, from whole logits, the labels as they are."""
    kd = ce = 0
    n = sum(label != -100 for row in rows for label in row["labels"][1:])
    kd_n = n if kd_on == "completion" else sum(len(row["labels"]) - 1 for row in rows)
    for row in rows:
        ids, targets = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        counted = targets != -100
        z = student(ids).logits[0, :-1]
        with torch.no_grad():
            y = teacher(ids).logits[0, :-1]
        ce = ce + F.cross_entropy(z[counted], targets[counted], reduction="sum") / n
        kl = F.kl_div((z / tau).log_softmax(-1), (y / tau).log_softmax(-1), reduction="none", log_target=True).sum(-1)
        kd = kd + tau**2 * (kl[counted] if kd_on == "completion" else kl).sum() / kd_n
    loss = ce + kd_weight * kd
    return loss, torch.autograd.grad(loss, list(student.parameters()))


def pair(family, attention="sdpa"):
    """A student and its teacher, of 512 positions."""
    models = [tiny(family, V=VOCAB, seed=i, width=16 * i, layers=2) for i in (1, 2)]
    for model in models:
        model.set_attn_implementation(attention)
        model.config.max_position_embeddings = 512
        if family == "gpt2":
            positions = torch.randn(512, model.config.n_embd) * 0.3
            model.transformer.wpe = torch.nn.Embedding.from_pretrained(positions, freeze=False)
    return models


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_documents_alone(config, kind, family, packing, attention):  # noqa: F811
    tokenizer, (_, options, _, _) = chat_tokenizer(), KINDS[kind]
    data = Dataset.from_list(KINDS[kind][0] + KINDS[kind][0][:2])
    student, teacher = pair(family, attention)
    rows = list(tokenize_dataset(data, tokenizer, max_length=256, **{**options, "packing": False})[0])
    args = config(
        recipe="teacher_head", per_device_train_batch_size=8, max_length=256, **{**options, "packing": packing}
    )
    trainer = KDTrainer(student, args, teacher=teacher, train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) < len(rows) if packing else len(trainer.train_dataset) == len(rows)
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.model(**batch).loss
    found = torch.autograd.grad(loss, list(student.parameters()))
    truth, right = alone(student, teacher, rows)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    assert max(map(relative, found, right)) <= 1e-6


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kd_on", ["completion", "all"])
def test_a_step_of_micro_batches_whatever_their_order(config, packing, cached, kd_on):  # noqa: F811
    """KD where labels count or on every token, from the live teacher or from what was kept of all its vocabulary."""
    tokenizer, (made, options, _, _) = chat_tokenizer(), KINDS["messages, the assistant's"]
    rows = list(tokenize_dataset(Dataset.from_list(made), tokenizer, **options)[0])
    found = []
    for order in (made, made[::-1]):
        student, teacher = pair("llama")
        args = config(
            recipe="teacher_head", per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1,
            packing=packing, max_length=256, kd_on=kd_on, max_grad_norm=0, optim="sgd", learning_rate=1.0,
            precompute_teacher_log_probs=cached, cache_top_k=VOCAB if cached else None, cache_dtype="float32",
            lr_scheduler_type="constant", **options,
        )  # fmt: skip
        before = [p.detach().clone() for p in student.parameters()]
        trainer = KDTrainer(
            student, args, teacher=teacher, train_dataset=Dataset.from_list(order), processing_class=tokenizer
        )
        trainer.train()
        assert trainer.state.num_input_tokens_seen == sum(label != -100 for row in rows for label in row["labels"][1:])
        found.append([(b - p.detach()) for b, p in zip(before, student.parameters(), strict=True)])
        shutil.rmtree(args.output_dir)
    student, teacher = pair("llama")
    right = alone(student, teacher, rows, kd_on=kd_on)[1]
    for gradients in found:
        assert max(map(relative, gradients, right)) <= 2e-6


@pytest.mark.parametrize("family", ["opt", "lfm2"])
def test_models_whose_documents_see_each_other_are_refused(config, family):  # noqa: F811
    if family == "opt":
        model = tiny("opt", V=VOCAB)
    else:  # convolutions
        settings = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
        settings |= {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
        made = AutoConfig.for_model("lfm2", vocab_size=VOCAB, **settings)
        model = AutoModelForCausalLM.from_config(made)
    given = {"train_dataset": raw("completion"), "processing_class": chat_tokenizer()}
    with pytest.raises(ValueError, match=r"packing: the student, .* lets a document see the one before it"):
        KDTrainer(model, config(recipe="lm_only", packing=True), **given)
    KDTrainer(model, config(recipe="lm_only"), **given)


def test_experts_are_balanced_over_tokens_that_are_no_padding():
    rows, _ = tokenize_dataset(raw("completion"), chat_tokenizer())
    packed, _ = tokenize_dataset(raw("completion"), chat_tokenizer(), packing=True, max_length=40)
    model, collate = DistillationModel(tiny_moe("mixtral", V=VOCAB), recipe="lm_only").eval(), PaddingCollator()
    assert len(packed) == 2
    outputs = [model(**collate(list(some))) for some in (rows, packed)]
    assert outputs[0].aux_loss.item() == pytest.approx(outputs[1].aux_loss.item(), rel=1e-6)
    assert outputs[0].loss.item() == pytest.approx(outputs[1].loss.item(), rel=1e-6)


def test_entries_of_other_packs_are_refused(tmp_path):
    teacher, rows = pair("llama")[1], {"input_ids": [[3, 4, 5, 6]], "labels": [[3, 4, 5, 6]]}
    one, other = (Dataset.from_dict({**rows, "seq_lengths": [lengths]}) for lengths in ([2, 2], [3, 1]))
    cache_teacher(teacher, {"train": one}, tmp_path / "cache", k=4)
    assert len(TeacherCache(tmp_path / "cache").dataset("train", one)) == 1
    with pytest.raises(ValueError, match="is of other data"):
        TeacherCache(tmp_path / "cache").dataset("train", other)


def test_positions_and_labels_of_packed_rows():
    rows = [{"input_ids": [1, 2, 3], "labels": [1, -100, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}] * 2
    packed, _ = tokenize_dataset(
        Dataset.from_list([{"text": text} for text in ("abc", "de", "fg", "hij", "k")]),
        chat_tokenizer(), packing=True, max_length=7,
    )  # fmt: skip
    assert packed["seq_lengths"] == [[4, 3], [3, 4], [2]]
    batch = PaddingCollator(chat_tokenizer())(list(packed))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 0, 0, 0, 0]]
    assert (batch["labels"] == -100).tolist() == [
        [True, False, False, False, True, False, False],
        [True, False, False, True, False, False, False],
        [True, False, True, True, True, True, True],
    ]
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    batch = PaddingCollator()(rows)
    assert batch["labels"].tolist() == [[1, -100, 3], [4, 5, -100]] * 2
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]] * 2


def test_padding_that_rows_have_counts_for_nothing():
    """Positions of 1 at padding, as many collators have them, are no documents to be learned."""
    row = {"input_ids": [5, 6, 7, 0, 0], "labels": [5, 6, 7, 0, 0], "position_ids": [0, 1, 2, 1, 1]}
    other = {name: x[:2] for name, x in row.items()}
    batch = PaddingCollator()([{**row, "attention_mask": [1, 1, 1, 0, 0]}, {**other, "attention_mask": [1, 1]}])
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100], [-100, 6, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 0, 0]]
    assert "attention_mask" not in batch


def test_best_fit_decreasing_fills_the_fullest_bin():
    assert best_fit_decreasing([5, 4, 3, 3, 2, 1], 8) == [[0, 2], [1, 3, 5], [4]]
    lengths = torch.randint(1, 65, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = best_fit_decreasing(lengths, 64)
    assert sorted(i for some in bins for i in some) == list(range(500))
    assert max(sum(lengths[i] for i in some) for some in bins) <= 64
    assert len(bins) <= -(-sum(lengths) // 64) * 1.03


MODES = [("keep_start", "2+2? 4<end>"[:6]), ("keep_end", "2+2? 4<end>"[2:])]


@pytest.mark.parametrize(("mode", "text"), MODES)
def test_truncation_keeps_the_side_that_is_asked_for(mode, text, capsys):
    tokenizer, data = chat_tokenizer(), raw("completion")
    rows, counts = tokenize_dataset(data, tokenizer, max_length=6 if mode == "keep_start" else 5, truncation_mode=mode)
    assert tokenizer.decode(rows[0]["input_ids"]) == text
    assert counts.truncated == len(rows)
    if mode == "keep_start":  # prompts that are as long leave nothing to learn
        assert counts.skipped == {"no target within max_length": 2}
        assert "\n    2 skipped (no target within max_length), 2 cut to max_length\n" in capsys.readouterr().out


BAD = {
    "no assistant turn": {"messages": [user("Hi")]},
    "empty completion": {"messages": [user("Hi"), assistant("")]},
}


@pytest.mark.parametrize("assistant_only_loss", [False, True])
def test_rows_that_teach_nothing_are_counted(assistant_only_loss, capsys):
    data = Dataset.from_list([*BAD.values(), *KINDS["messages"][0], {"messages": []}])
    rows, counts = tokenize_dataset(
        data, chat_tokenizer(), assistant_only_loss=assistant_only_loss, argument="train_file 'x'"
    )
    assert (len(rows), counts.rows, counts.skipped) == (4, 7, {"no assistant turn": 2, "empty completion": 1})
    said = capsys.readouterr().out
    assert "train_file 'x': 7 rows; " in said
    assert "\n    3 skipped (1 empty completion, 2 no assistant turn)\n" in said
    stream = tokenize_dataset(data.to_iterable_dataset(), chat_tokenizer(), argument="train_file 'x'")
    assert len(list(stream[0])) == 4
    assert stream[1].skipped == counts.skipped
    assert "train_file 'x': rows are skipped: empty completion" in capsys.readouterr().out


def test_empty_texts_and_completions_are_counted():
    for rows in (
        [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": None}, {"prompt": "", "completion": "b"}],
        [{"prompt": [user("a")], "completion": []}, {"prompt": [user("a")], "completion": [assistant("")]},
         {"prompt": [user("a")], "completion": [user("b")]}, *KINDS["chat completion"][0]],
    ):  # fmt: skip
        kept, counts = tokenize_dataset(Dataset.from_list(rows), chat_tokenizer())
        assert len(kept) + sum(counts.skipped.values()) == len(rows)
        assert counts.skipped["empty completion"] == 2
    kept, counts = tokenize_dataset(Dataset.from_list([{"text": ""}, {"text": "a"}]), chat_tokenizer(), packing=False)
    assert (len(kept), counts.skipped) == (1, {"empty text": 1})


STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
KNOWN = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'critic' %}")
OTHER = CHATML.replace("<|im_", "<|turn_")
MESSAGES = KINDS["messages"][0]
REFUSED = [
    ([{"text": "a", **MESSAGES[0]}], {}, "columns of two kinds, messages, and text; expected one"),
    ([{"prompt": "a", "completion": "b", "text": "c"}], {}, "columns of two kinds, prompt and completion, and text"),
    ([{"prompt": "a"}], {}, "no column 'text'; its columns are prompt. Expected messages, prompt and completion, or"),
    ([{"prompt": "a", "completion": [assistant("b")]}], {}, "row 0: prompt and completion are str and list"),
    ([{"messages": [{"from": "human", "value": "a"}]}], {}, "row 0: expected messages, a list of"),
    (MESSAGES, {"completion_only_loss": True}, "completion_only_loss=True, and x has no columns prompt and completion"),
    ([{"text": "a"}], {"assistant_only_loss": True}, "assistant_only_loss=True, and x has plain text"),
    ([{"prompt": "a", "completion": "b"}], {"assistant_only_loss": True}, "assistant_only_loss=True, and x has plain"),
    (MESSAGES, {"assistant_only_loss": True, "chat_template": UNMARKED}, "the chat template has no {% generation %}"),
    (MESSAGES, {"chat_template": OTHER}, r"<\|turn_end\|>, <\|turn_start\|> of the chat template are no tokens of"),
    (MESSAGES, {"chat_template": "none.jinja"}, "chat_template='none.jinja' is no Jinja template"),
    (MESSAGES, {"chat_template": "{% for %}"}, "x, row 0: the chat template refuses its messages, of user, assistant"),
    ([*MESSAGES, {"messages": [{"role": "system", "content": "b"}, *MESSAGES[0]["messages"]]}],
     {"chat_template": STRICT}, "x, row 4: the chat template refuses .*System role not supported"),
    ([{"messages": [*MESSAGES[0]["messages"], {"role": "critic", "content": "b"}]}], {"chat_template": KNOWN},
     "row 0: the chat template writes nothing of a message of the role 'critic'"),
    ([BAD["no assistant turn"]], {},
     r"x: 1 rows; 0 tokens, .*; 1 skipped \(no assistant turn\); nothing is left to train on"),
    (MESSAGES, {"packing": True, "max_length": None}, "packing=True and max_length=None"),
    ([{"text": "a"}], {"max_length": None}, "max_length=None; expected the number of tokens of a block"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "expected"), REFUSED)
def test_what_cannot_be_read_is_said(rows, options, expected):
    with pytest.raises(DataError, match=expected):
        tokenize_dataset(Dataset.from_list(rows), chat_tokenizer(), argument="x", **options)


def test_tokenizers_without_what_is_needed():
    bare = chat_tokenizer(None)
    with pytest.raises(DataError, match=r"x has messages.* the tokenizer '' has no chat template.*Set chat_template"):
        tokenize_dataset(raw("messages"), bare, argument="x")
    assert len(tokenize_dataset(raw("messages"), bare, chat_template=CHATML)[0]) == 4
    bare.eos_token = None
    with pytest.raises(DataError, match="has no end-of-text token"):
        tokenize_dataset(raw("completion"), bare)


def test_a_tokenizers_own_template_may_write_marks_as_text(capsys):
    tokenizer = chat_tokenizer(OTHER)
    rows, _ = tokenize_dataset(raw("messages"), tokenizer)
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("<|turn_start|>user")
    assert "<|turn_start|> of the chat template are no tokens" in capsys.readouterr().out
    tokenize_dataset(raw("messages"), tokenizer, chat_template=OTHER + " ")  # its own, changed


def test_tools_and_keywords_go_to_the_template():
    template = "{{ tools[0].name }}{{ shout }}" + CHATML
    data = Dataset.from_list([{**row, "tools": json.dumps([{"name": "f"}]), "chat_template_kwargs": {"shout": "!"}}
                              for row in MESSAGES])  # fmt: skip
    tokenizer = chat_tokenizer()
    rows, _ = tokenize_dataset(data, tokenizer, chat_template=template)
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("f!<|im_start|>user")


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 128}, {"assistant_only_loss": True}])
def test_what_was_tokenized_is_kept(tmp_path, options):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MESSAGES))
    found = []
    for template in (CHATML, CHATML, CHATML + " "):
        chat_tokenizer(template).save_pretrained(tmp_path / "tokenizer")
        tokenizer = chat_tokenizer().from_pretrained(tmp_path / "tokenizer")
        data = Dataset.from_json(str(tmp_path / "rows.jsonl"))
        found.append(tokenize_dataset(data, tokenizer, **options)[0].cache_files)
    assert found[0] == found[1] != found[2]


SPOKEN = (
    "{% for one in messages %}{% if one.role == 'user' %}[{{ one.content }}]{% else %}"
    "{% generation %}{{ ' ' + one.content }}{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["messages", "completion"])
@pytest.mark.parametrize("answer", ["yes", " yes", "yes. ", "\n", "yes\n"])
def test_blanks_at_the_edges_of_what_the_assistant_says(kind, answer):
    """GPT-2's and Llama-3's tokenizers leave blanks out of the places of tokens."""
    tokenizer = chat_tokenizer(SPOKEN)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    said = [user("a"), assistant(answer), user("b"), assistant(answer)]
    row = {"messages": said} if kind == "messages" else {"prompt": said[:1], "completion": said[1:]}
    (row,), _ = tokenize_dataset(Dataset.from_list([row]), tokenizer, assistant_only_loss=True)
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(row["input_ids"]) == f"[a] {answer}[b] {answer}"
    assert tokenizer.decode(learned) == f" {answer} {answer}"


def test_a_prompt_that_the_template_writes_otherwise_before_a_completion():
    """As Mistral-7B-Instruct-v0.3's, which puts the system's words into the last message if that is a user's."""
    system = {"role": "system", "content": "be kind"}
    rows = Dataset.from_list([{"prompt": [user("hi"), system, user("2+2?")], "completion": [assistant("4")]}])
    late = "{{ messages | length }} messages\n" + CHATML
    with pytest.raises(DataError, match=r"row 0: the chat template writes the prompt otherwise .*3 messages.* learned"):
        tokenize_dataset(rows, chat_tokenizer(late))
    drops = "{% for m in messages if m.role != 'system' or messages[-1].role == 'user' %}{{ m.content }}"
    with pytest.raises(DataError, match="writes nothing of a message of the role 'system'"):
        tokenize_dataset(rows, chat_tokenizer(drops + "{% endfor %}"))


def test_a_call_of_a_tool_may_have_empty_content():
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}{{ m.tool_calls[0].function.name }}()"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = Dataset.from_list([{"messages": [user("hi"), call, {"role": "tool", "content": "3"}, assistant("three")]}])
    tokenizer = chat_tokenizer(template)
    (row,), _ = tokenize_dataset(rows, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "user: hi;assistant: f();tool: 3;assistant: three;"


def test_the_trainer_takes_raw_rows(config):  # noqa: F811
    student, teacher = tiny("llama", V=VOCAB), tiny("llama", V=VOCAB, seed=1)
    tokenizer = chat_tokenizer(None)
    args = config(recipe="teacher_head", max_steps=2, chat_template=CHATML, assistant_only_loss=True, max_length=64)
    trainer = KDTrainer(
        student, args, teacher=teacher, train_dataset=raw("messages, the assistant's"), processing_class=tokenizer,
        eval_dataset={"a": raw("messages"), "b": raw("messages").to_iterable_dataset()},
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_a_ce"] == pytest.approx(found["eval_b_ce"])
    assert trainer.counts.keys() == {"train_dataset", "eval_dataset['a']", "eval_dataset['b']"}
    assert tokenizer.chat_template == CHATML
    long = Dataset.from_list([{"text": "word " * 100}])
    with pytest.raises(DataError, match=r"a row of \d+ tokens is more than the 64 positions the student has"):
        KDTrainer(
            student, config(recipe="teacher_head", packing=False), teacher=teacher, train_dataset=long,
            processing_class=tokenizer,
        )  # fmt: skip
    with pytest.raises(ValueError, match="train_dataset has text, and processing_class is None"):
        KDTrainer(student, args, teacher=teacher, train_dataset=raw("messages"))
    with pytest.raises(DataError, match=r"has no column 'text'; its columns are conversations\. Expected mes"):
        KDTrainer(
            student, args, teacher=teacher, train_dataset=Dataset.from_list([{"conversations": "hi"}]),
            processing_class=tokenizer,
        )  # fmt: skip
    made = Dataset.from_list([{"n": 3}]).with_transform(lambda batch: {"input_ids": [[n] * 4 for n in batch["n"]]})
    assert not is_raw_text(made)
