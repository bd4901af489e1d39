"""A teacher that reads another prompt than the student: its rows, where they meet the student's, what is refused."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from byte_tokenizer import make_tokenizer
from cases import relative
from chats import CHATML, QUESTIONS, VOCAB, assistant, chat_tokenizer, user
from datasets import Dataset
from tiny_models import tiny
from training_fixtures import config  # noqa: F401

from kdfast.training import KDTrainer, cache_teacher, tokenize_dataset
from kdfast.training.data.packing import PaddingCollator
from kdfast.training.data.text import DataError

HINT = "The answer is short."


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def chat(*messages, opened=False):
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + (
        "<|im_start|>assistant\n" if opened else ""
    )


def hinted(question):
    return user(f"{question}\n\n{HINT}")


# by name: a row of each question, options, what the teacher reads before the completion, and the completion
KINDS = {
    "text": (
        [{"prompt": q, "completion": a, "teacher_prompt": f"{HINT} {q}"} for q, a in QUESTIONS],
        {},
        [(f"{HINT} {q}", f"{a}<end>") for q, a in QUESTIONS],
    ),
    "messages": (
        [{"prompt": [user(q)], "completion": [assistant(a)], "teacher_prompt": [user(HINT), user(q)]}
         for q, a in QUESTIONS],
        {},
        [(chat(user(HINT), user(q), opened=True), f"{a}<|im_end|>\n") for q, a in QUESTIONS],
    ),
    "context": (
        [{"prompt": q, "completion": a, "privileged_context": HINT} for q, a in QUESTIONS],
        {},
        [(f"{q}\n\n{HINT}", f"{a}<end>") for q, a in QUESTIONS],
    ),
    "context of a chat": (
        [{"messages": [user("Hi"), assistant("Hi."), user(q), assistant(a)], "privileged_context": HINT}
         for q, a in QUESTIONS],
        {"assistant_only_loss": True},
        [(chat(user("Hi"), assistant("Hi."), hinted(q), opened=True), f"{a}<|im_end|>\n") for q, a in QUESTIONS],
    ),
    "template": (
        [{"prompt": [user(q)], "completion": [assistant(a)], "n": i} for i, (q, a) in enumerate(QUESTIONS)],
        {"teacher_prompt_template": "{n}: {prompt} ({completion})"},
        [(chat(user(f"{i}: {q} ({a})"), opened=True), f"{a}<|im_end|>\n") for i, (q, a) in enumerate(QUESTIONS)],
    ),
}  # fmt: skip


def compared(tokenizer, row):
    """The pairs that are compared, decoded: what the student has read up to there, and what the teacher has."""
    for at, theirs in enumerate(row["teacher_positions"]):
        if theirs >= 0:
            yield tuple(tokenizer.decode(ids[: i + 2]) for ids, i in
                        ((row["input_ids"], at), (row["teacher_input_ids"], theirs)))  # fmt: skip


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_completion_after_both_prompts(kind, streams):
    """Letter by letter: at each pair the two have read the same part of the completion, after prompts of their own."""
    rows, options, expected = KINDS[kind]
    tokenizer, data = chat_tokenizer(), Dataset.from_list(rows)
    made, counts = tokenize_dataset(data.to_iterable_dataset() if streams else data, tokenizer, **options)
    made = list(made)
    assert (counts.rows, counts.skipped, counts.truncated) == (4, {}, 0)
    assert counts.teacher_tokens == sum(len(row["teacher_input_ids"]) for row in made)
    plain = data.remove_columns([*{"teacher_prompt", "privileged_context"}.intersection(data.column_names)])
    students = tokenize_dataset(plain, tokenizer, **{k: v for k, v in options.items() if k == "assistant_only_loss"})[0]
    for row, student, (before, completion) in zip(made, students, expected, strict=True):
        assert {name: row[name] for name in student} == student
        assert tokenizer.decode(row["teacher_input_ids"]) == before + completion
        own = tokenizer.decode(row["input_ids"]).removesuffix(completion)
        parts = [completion[: len(text) - len(own)] for text, _ in compared(tokenizer, row)]
        assert list(compared(tokenizer, row)) == [(own + part, before + part) for part in parts]
        assert parts[-1] == completion
        assert len(parts) == len(tokenizer(completion)["input_ids"])


def test_an_empty_prompt_of_its_own_is_the_students():
    rows = [{"prompt": q, "completion": a, "teacher_prompt": HINT * (i % 2)} for i, (q, a) in enumerate(QUESTIONS)]
    made = tokenize_dataset(Dataset.from_list(rows), make_tokenizer())[0]
    assert [row["teacher_input_ids"] == row["input_ids"] for row in made] == [True, False, True, False]


@pytest.mark.parametrize(
    ("mode", "max_length", "expected"),
    [
        # "ab" + "xyz<end>" and "12345" + "xyz<end>"
        ("keep_start", 7, ("abxyz", "12345xy", [-1, 4, 5, 6, -1, -1])),
        ("keep_start", 4, "no completion within max_length of the teacher's row"),
        ("keep_end", 5, ("bxyz", "5xyz", [0, 1, 2, 3, -1])),
        ("keep_end", 3, ("yz", "yz", [0, 1, -1])),
    ],
)
def test_rows_that_are_cut(mode, max_length, expected):
    tokenizer = make_tokenizer()
    data = Dataset.from_list([{"prompt": "ab", "completion": "xyz", "teacher_prompt": "12345"}] * 2)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            tokenize_dataset(data, tokenizer, max_length=max_length, truncation_mode=mode)
        return
    rows, counts = tokenize_dataset(data, tokenizer, max_length=max_length, truncation_mode=mode)
    assert counts.truncated == 2
    (row, _), (own, theirs, positions) = rows, expected
    assert tokenizer.decode(row["input_ids"]).removesuffix("<end>") == own
    assert tokenizer.decode(row["teacher_input_ids"]).removesuffix("<end>") == theirs
    assert row["teacher_positions"] == positions


def test_a_completion_of_other_tokens_is_skipped():
    """A template that writes a thought back only into what is asked after a question mark."""
    template = CHATML.replace("{% generation %}", "{% generation %}{{ '+' if 'hint' in messages[0].content else '' }}")
    rows = [
        {"prompt": [user(q)], "completion": [assistant(a)], "teacher_prompt": [user(f"{'hint' * (i % 2)} {q}")]}
        for i, (q, a) in enumerate(QUESTIONS)
    ]
    rows, counts = tokenize_dataset(Dataset.from_list(rows), chat_tokenizer(template))
    assert len(rows) == 2
    assert counts.skipped == {"the completion's tokens are others after the teacher's prompt": 2}


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"text": "a", "teacher_prompt": "b"}, {}, "has text, and teacher_prompt is of rows with a prompt"),
        ({"text": "a"}, {"teacher_prompt_template": "{text}"}, "has text, and teacher_prompt_template is of rows"),
        ({"teacher_prompt": "b", "privileged_context": "c"}, {}, "teacher_prompt and privileged_context are given"),
        ({}, {"teacher_prompt_template": "{prompt}{hint}"}, "names 'hint', and dataset has no such column"),
        ({}, {"teacher_prompt_template": "{prompt"}, "braces of its own are doubled"),
        ({"teacher_prompt": [user("b")]}, {}, "row 0: teacher_prompt and prompt are list and str"),
        ({"teacher_prompt": "b"}, {"packing": True}, "packing=True, and the teacher reads prompts of its own"),
        (
            {"prompt": [assistant("a")], "completion": [assistant("b")], "privileged_context": "c"},
            {},
            "row 0: no user message, into which teacher_prompt_template",
        ),
    ],
)
def test_what_does_not_fit_is_said(row, options, expected):
    row = row if "text" in row else {"prompt": "a", "completion": "b", **row}
    with pytest.raises(DataError, match=expected):
        tokenize_dataset(Dataset.from_list([row]), chat_tokenizer(), **options)


def test_batches_are_padded_each_to_its_own_length():
    rows, _ = tokenize_dataset(Dataset.from_list(KINDS["text"][0]), make_tokenizer())
    batch = PaddingCollator(make_tokenizer())(list(rows))
    for i, row in enumerate(rows):
        for prefix in ("", "teacher_"):
            ids, mask = (batch[f"{prefix}{name}"][i] for name in ("input_ids", "attention_mask"))
            assert ids[mask == 1].tolist() == row[f"{prefix}input_ids"]
            assert mask.sum() == len(row[f"{prefix}input_ids"])
        positions = batch["teacher_positions"][i]
        assert positions[: len(row["input_ids"])].tolist() == row["teacher_positions"]
        assert (positions[len(row["input_ids"]) :] == -1).all()
    with pytest.raises(ValueError, match="a row of 2 input_ids has 0 teacher_positions"):
        PaddingCollator()([{"input_ids": [1, 2], "teacher_input_ids": [1], "labels": [1, 2]}])
    with pytest.raises(ValueError, match="packed of several documents and have teacher_input_ids"):
        PaddingCollator()([{"input_ids": [1, 2], "seq_lengths": [1, 1], "teacher_input_ids": [1], "labels": [1, 2]}])


def pair():
    models = [tiny("llama", V=VOCAB, seed=i, width=16 * i, layers=2) for i in (1, 2)]
    for model in models:
        model.config.max_position_embeddings = 512
    return models


def alone(student, teacher, rows, tau=2.0, kd_weight=0.7):
    """Loss, gradients and KL(teacher ‖ student) at τ = 1, from whole logits of the rows one by one."""
    ce = kd = kl = n = n_kd = 0
    for row in rows:
        z, y = (model(torch.tensor([ids])).logits[0] for model, ids in
                ((student, row["input_ids"]), (teacher, row["teacher_input_ids"])))  # fmt: skip
        targets, positions = torch.tensor(row["labels"][1:]), torch.tensor(row["teacher_positions"])[:-1]
        counted, z = targets != -100, z[:-1]
        both = counted & (positions >= 0)
        ce, n = ce + F.cross_entropy(z[counted], targets[counted], reduction="sum"), n + counted.sum()
        z, y, n_kd = z[both], y[positions[both]].detach(), n_kd + both.sum()
        kd, kl = (total + F.kl_div((z / t).log_softmax(-1), (y / t).log_softmax(-1), reduction="sum", log_target=True)
                  for total, t in ((kd, tau), (kl, 1)))  # fmt: skip
    loss = ce / n + kd_weight * tau**2 * kd / n_kd
    return loss, torch.autograd.grad(loss, list(student.parameters())), (kl / n_kd).item()


@pytest.mark.parametrize("kind", ["text", "messages", "context of a chat"])
def test_a_step_of_micro_batches_is_that_of_the_rows_alone(config, kind):  # noqa: F811
    """Of a chat, where turns before the last are learned from the text alone, the KD term has its own divisor."""
    rows, options, _ = KINDS[kind]
    student, teacher = pair()
    args = config(
        recipe="teacher_head", per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1, optim="sgd",
        max_grad_norm=0, learning_rate=1.0, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    data, tokenizer = Dataset.from_list(rows), chat_tokenizer()
    trainer = KDTrainer(
        student, args, teacher=teacher, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    made = list(tokenize_dataset(data, tokenizer, **options)[0])
    loss, right, kl = alone(student, teacher, made)
    evaluated = trainer.evaluate()
    assert evaluated["eval_kl_teacher_student"] == pytest.approx(kl, rel=1e-5)
    before = [p.detach().clone() for p in student.parameters()]
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    found = [b - p.detach() for b, p in zip(before, student.parameters(), strict=True)]
    assert max(map(relative, found, right)) <= 2e-6
    shutil.rmtree(args.output_dir)


def test_no_cache_is_made_of_it(config, tmp_path, capsys):  # noqa: F811
    student, teacher = pair()
    data, tokenizer = Dataset.from_list(KINDS["text"][0]), make_tokenizer()
    given = {"teacher": teacher, "train_dataset": data, "processing_class": tokenizer}
    unasked = config(recipe="teacher_head", precompute_teacher_log_probs=None, max_steps=8)
    trainer = KDTrainer(student, unasked, **given)
    assert trainer._precomputation is None
    assert "the teacher runs at every step" in capsys.readouterr().out
    trainer.train()
    with pytest.raises(ValueError, match=r"cannot be run beforehand.*has teacher_input_ids, and a cache is of text"):
        KDTrainer(student, config(recipe="teacher_head", precompute_teacher_log_probs=True), **given)
    rows, _ = tokenize_dataset(data, tokenizer)
    with pytest.raises(ValueError, match=r"splits\['train'\] has teacher_input_ids, and a cache is of text alone"):
        cache_teacher(teacher, {"train": rows}, tmp_path / "cache")
