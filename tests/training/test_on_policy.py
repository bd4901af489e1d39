"""On-policy distillation: what is generated, what is learned of it, and that a resumed run does both the same."""

import json
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from chats import KINDS, VOCAB, assistant, chat_tokenizer, raw, user
from datasets import Dataset
from tiny_models import RECOMPUTE, tiny
from tokenizers import processors

from kdfast.training import KDTrainer, tokenize_dataset
from kdfast.training.data.text import DataError
from kdfast.training.on_policy.buffer import Buffer
from kdfast.training.on_policy.generation import Sampling, as_rows, find_end_of_turn, write
from kdfast.training.on_policy.run import WRITER
from kdfast.training.on_policy.texts import count_repeated, read_texts

TOKENIZER = chat_tokenizer()
END = TOKENIZER.eos_token_id
QUESTIONS = Dataset.from_list(KINDS["messages"][0] * 4)


@pytest.fixture
def run(config):
    """A trainer on chats; `trained` has what every batch was."""

    def make(dataset=QUESTIONS, *, student=None, teacher=None, **settings):
        given = {"recipe": "teacher_head", "on_policy": 1.0, "max_new_tokens": 10, **settings}
        student = tiny("llama", V=VOCAB) if student is None else student
        teacher = tiny("llama", V=VOCAB, width=24, seed=1) if teacher is None else teacher
        args = config(**given)
        trainer = KDTrainer(student, args, teacher=teacher, train_dataset=dataset, processing_class=chat_tokenizer())
        trainer.trained, compute = [], trainer.compute_loss

        def watched(model, inputs, *args, **kwargs):
            trainer.trained.append(dict(inputs))
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = watched
        return trainer

    return make


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


# Rows


def test_rows_end_with_the_first_end_of_text_and_have_labels_on_the_completion_alone():
    prompts, written = ["2+2? ", "Name a color: "], ["4<end>", "red<end>b"]
    ids = [TOKENIZER(text)["input_ids"] for text in prompts]
    longest = max(map(len, ids))
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids])
    left = torch.tensor([[END] * (longest - len(one)) + one for one in ids])
    answers = [TOKENIZER(text)["input_ids"] for text in written]
    answers = torch.tensor([one + [END] * (max(map(len, answers)) - len(one)) for one in answers])
    rows = as_rows(torch.cat([left, answers], 1), mask, [END])

    def text(row, of):
        return TOKENIZER.decode(row[of])

    real = rows.attention_mask.bool()
    assert [text(*pair) for pair in zip(rows.input_ids, real, strict=True)] == ["2+2? 4<end>", "Name a color: red<end>"]
    assert [text(*pair) for pair in zip(rows.input_ids, rows.labels >= 0, strict=True)] == ["4<end>", "red<end>"]
    assert torch.equal(rows.labels[rows.labels >= 0], rows.input_ids[rows.labels >= 0])
    assert (real.int().diff() <= 0).all()  # padding is on the right
    assert rows.ended.tolist() == [True, True]


def test_a_row_that_is_cut_has_no_end_and_any_of_several_ends_one():
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 9, 0, 0], [1, 2, 8, 7, 9]])
    rows = as_rows(ids, torch.ones(3, 2, dtype=torch.long), [8, 9])
    assert rows.labels.tolist() == [[-100, -100, 3, 4, 5], [-100, -100, 9, -100, -100], [-100, -100, 8, -100, -100]]
    assert rows.ended.tolist() == [False, True, True]


def sampling(**given):
    return Sampling(**{
        "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "end_ids": (5,), "pad_id": 0, "n_ids": 67,
        **given,
    })  # fmt: skip


def test_greedy_text_is_each_models_likeliest_token_whatever_stands_to_the_left_of_the_prompt():
    model = tiny("llama", dropout=0.2)
    prompts, mask = torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    rows = write(model.train(), prompts, mask, sampling(temperature=0.0, end_ids=()), (1,))
    for prompt, made, real in zip([[7, 8], [9, 10, 11, 12]], rows.input_ids, rows.attention_mask, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        assert made[real.bool()].tolist() == ids


def test_a_seed_gives_a_text_and_leaves_the_model_and_the_random_state_as_they_were():
    model = tiny("gpt2", dropout=0.2).train()
    model.transformer.h[0].eval()
    before, own = [m.training for m in model.modules()], model.generation_config
    prompts = torch.tensor([[7, 8, 9]] * 4)
    state = torch.get_rng_state()
    one, same, other = (write(model, prompts, torch.ones_like(prompts), sampling(), seed).input_ids for seed in (
        (1, 2), (1, 2), (1, 3)
    ))  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)
    assert [m.training for m in model.modules()] == before
    assert model.generation_config is own


def test_ids_that_one_of_the_models_has_no_row_for_are_never_drawn():
    prompts = torch.full((64, 1), 7)
    rows = write(tiny("llama"), prompts, torch.ones_like(prompts), sampling(n_ids=9, end_ids=()), (1,))
    assert rows.input_ids.max() == 8


# Learning


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_reverse_kl"])
def test_the_gradient_on_generated_text_is_that_of_whole_logits(run, divergence):
    student = tiny("llama", V=VOCAB).double()
    teacher = tiny("llama", V=VOCAB, width=24, seed=1).double()
    trainer = run(
        student=student, teacher=teacher, divergence=divergence, kd_weight=0.5, temperature=1.5, max_steps=1,
        learning_rate=0.0,
    )  # fmt: skip
    grads = {}
    trainer.add_callback(_Gradients(student, grads))
    trainer.train()
    (batch,) = trainer.trained
    assert batch.pop(WRITER) == "student"
    student.zero_grad()
    where = batch["labels"][:, 1:] >= 0
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_q = F.log_softmax(student(**given).logits[:, :-1][where] / 1.5, -1)
    with torch.no_grad():
        log_p = F.log_softmax(teacher(**given).logits[:, :-1][where] / 1.5, -1)
    p, q = log_p.exp(), log_q.exp()
    kl = {
        "forward_kl": lambda: (p * (log_p - log_q)).sum(),
        "reverse_kl": lambda: (q * (log_q - log_p)).sum(),
        "skew_reverse_kl": lambda: (q * (log_q - (0.9 * p + 0.1 * q).log())).sum(),
    }[divergence]()
    loss = 0.5 * 1.5**2 * kl / where.sum()
    loss.backward()
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-6, atol=1e-9)


class _Gradients:
    """Take the gradients before the optimizer does."""

    def __new__(cls, model, into):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                into.update({name: p.grad.clone() for name, p in model.named_parameters()})

        return Callback()


@pytest.mark.parametrize("how", ["recomputed", "adapter"])
def test_text_is_the_same_where_layers_are_recomputed_and_of_the_adapter_where_there_is_one(run, how):
    plain = run(max_steps=2)
    plain.train()
    if how == "recomputed":
        other = run(max_steps=2, **{RECOMPUTE: True})
    else:
        peft = pytest.importorskip("peft")
        student = peft.get_peft_model(
            tiny("llama", V=VOCAB), peft.LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"])
        )
        other = run(student=student, max_steps=2)
    other.train()
    assert torch.equal(other.trained[0]["input_ids"], plain.trained[0]["input_ids"])
    if how == "recomputed":
        assert losses(other) == losses(plain)
        assert torch.equal(other.trained[1]["input_ids"], plain.trained[1]["input_ids"])


def test_the_share_of_generated_batches_is_exact_and_the_data_keeps_its_labels(run, capsys):
    trainer = run(on_policy=0.4, max_steps=10, learning_rate=1e-3)
    assert "the student writes the completions of 40% of the batches" in capsys.readouterr().out
    trainer.train()
    writers = [batch.get(WRITER) for batch in trainer.trained]
    assert Counter(writers) == {"student": 4, None: 6}
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for writer, line in zip(writers, lines, strict=True):
        assert ("ce" in line) == (writer is None)  # its own text is no label
        assert ("kd_on_policy" in line, "kd_data" in line) == (writer == "student", writer is None)
        assert line["kd"] == pytest.approx(line.get("kd_on_policy", line.get("kd_data")))
        if writer == "student":
            assert {"completion_length", "eos_share", "entropy_on_policy", "repetition"} <= line.keys()


@pytest.mark.parametrize("chat", [False, True])
def test_a_teacher_with_another_prompt_scores_the_same_completion(run, chat):
    """What privileged self-distillation is: the teacher's distribution after its own prompt, on the student's text."""
    texts = [("2+2?", "4", "2+2? It is 4."), ("Hi", "Hello", "Hi, greet back"), ("abc", "d", "alphabet: abc")]
    given = [
        {"prompt": [user(p)], "completion": [assistant(c)], "teacher_prompt": [user(t)]}
        if chat
        else {"prompt": p, "completion": c, "teacher_prompt": t}
        for p, c, t in texts
    ]
    student = tiny("llama", V=VOCAB).double()
    teacher = tiny("llama", V=VOCAB, width=24, seed=1).double()
    trainer = run(
        Dataset.from_list(given), student=student, teacher=teacher, divergence="reverse_kl", kd_weight=0.5,
        temperature=1.0, max_steps=1, learning_rate=0.0, per_device_train_batch_size=3, generations_per_prompt=2,
    )  # fmt: skip
    grads = {}
    trainer.add_callback(_Gradients(student, grads))
    trainer.train()
    (batch,) = trainer.trained
    student.zero_grad()
    asked = {}
    for prompt, _, own in texts:
        ids = [
            TOKENIZER.apply_chat_template([user(one)], add_generation_prompt=True, return_dict=True)["input_ids"]
            if chat
            else TOKENIZER(one)["input_ids"]
            for one in (prompt, own)
        ]
        asked[tuple(ids[0])] = ids[1]
    total, n = 0.0, 0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        completion = labels[labels != -100]
        k = len(completion)
        prompt = ids[mask.bool()][:-k]
        theirs = torch.cat([torch.tensor(asked[tuple(prompt.tolist())]), completion])
        log_q = F.log_softmax(student(torch.cat([prompt, completion])[None]).logits[0, -k - 1 : -1], -1)
        with torch.no_grad():
            log_p = F.log_softmax(teacher(theirs[None]).logits[0, -k - 1 : -1], -1)
        total, n = total + (log_q.exp() * (log_q - log_p)).sum(), n + k
    (0.5 * total / n).backward()
    assert losses(trainer)[0] == pytest.approx((0.5 * total / n).item(), rel=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-6, atol=1e-9)


def test_micro_batches_are_divided_by_the_targets_of_all(run):
    whole = run(on_policy=1.0, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    whole.train()
    targets = [(batch["labels"][:, 1:] != -100).sum() for batch in whole.trained]
    assert whole.state.log_history[-2]["tokens_seen"] == sum(map(int, targets))


def test_the_teacher_writes_what_the_student_does_not(run):
    trainer = run(on_policy=0.5, seq_kd=True, max_steps=4)
    trainer.train()
    assert [batch[WRITER] for batch in trainer.trained] == ["teacher", "student"] * 2
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert ["ce" in line for line in lines] == [True, False] * 2  # the teacher's text is worth learning from


def test_steps_without_a_kd_term_are_of_the_data(run):
    trainer = run(on_policy=1.0, kd_until=0.5, max_steps=4)
    trainer.train()
    assert [batch.get(WRITER) for batch in trainer.trained] == ["student"] * 2 + [None] * 2


def test_prompts_alone_do_where_all_is_generated(run):
    trainer = run(Dataset.from_list([{"prompt": [user(q)]} for q in ("2+2?", "Hi", "a b c", "Who?")]), max_steps=2)
    trainer.train()
    assert [batch[WRITER] for batch in trainer.trained] == ["student"] * 2


def test_prompts_alone_teach_nothing_once_the_teacher_is_gone(run):
    rows = Dataset.from_list([{"prompt": [user(q)]} for q in ("2+2?", "Hi", "a b c", "Who?")])
    with pytest.raises(ValueError, match=r"kd_until=0.5 and rows of prompts alone"):
        run(rows, kd_until=0.5)
    run(rows, kd_until=0.5, seq_kd=True)


HINTED = Dataset.from_list([{**row, "privileged_context": f"hint {i}"} for i, row in enumerate(QUESTIONS)])


def written(batch, prefix=""):
    """What a batch's rows are, decoded."""
    ids, mask = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask"))
    return [TOKENIZER.decode(one[real.bool()]) for one, real in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("settings", [{}, {"seq_kd": True, "on_policy": 0.0}, {"generations_per_prompt": 2}])
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_written_is_read_by_the_teacher_behind_its_own_prompt(run, settings, alone):
    """Its distribution behind its own prompt is learned behind the student's, on the completion's tokens alone."""
    rows = HINTED
    if alone:
        rows = [{"prompt": row["messages"][:1], "privileged_context": row["privileged_context"]} for row in HINTED]
        rows = Dataset.from_list(rows)
    student = tiny("llama", V=VOCAB).double()
    teacher = tiny("llama", V=VOCAB, width=24, seed=1).double()
    grads, writer = {}, "teacher" if "seq_kd" in settings else "student"
    trainer = run(
        rows, student=student, teacher=teacher, kd_weight=0.5, temperature=1.5, max_steps=1, learning_rate=0.0,
        sampling_temperature=0.0, divergence="forward_kl", max_grad_norm=0.0, **settings,
    )  # fmt: skip
    trainer.add_callback(_Gradients(student, grads))
    trainer.train()
    (batch,) = trainer.trained
    assert batch.pop(WRITER) == writer
    student.zero_grad()
    ce = kd = n = 0
    for i, (ours, theirs) in enumerate(zip(written(batch), written(batch, "teacher_"), strict=True)):
        prompt, _, completion = ours.partition("assistant\n")
        own, _, same = theirs.partition("assistant\n")
        assert same == completion
        asked, end = re.escape(prompt).split(re.escape("<|im_end|>"))
        assert re.fullmatch(rf"{asked}\n\nhint \d+<\|im_end\|>{end}", own)
        labels = batch["labels"][i]
        n_new = int((labels >= 0).sum())
        ids, own_ids = (batch[f"{p}input_ids"][i][batch[f"{p}attention_mask"][i].bool()] for p in ("", "teacher_"))
        by, read = (teacher, own_ids) if writer == "teacher" else (student, ids)
        assert by(read[None]).logits[0, -n_new - 1 : -1].argmax(-1).tolist() == ids[-n_new:].tolist()  # greedily
        z, y = (model(x[None]).logits[0, -n_new - 1 : -1] for model, x in ((student, ids), (teacher, own_ids)))
        ce, n = ce + F.cross_entropy(z, ids[-n_new:], reduction="sum"), n + n_new
        log_p, log_q = ((x / 1.5).log_softmax(-1) for x in (y.detach(), z))
        kd = kd + (log_p.exp() * (log_p - log_q)).sum()
    loss = 0.5 * 1.5**2 * kd / n + (ce / n if writer == "teacher" else 0)
    loss.backward()
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-6, atol=1e-8)


def test_a_start_is_solved_from_prompts_alone(run):
    """Which the teacher reads as the student does there: nothing is completed yet."""
    rows = [{"prompt": row["messages"][:1], "privileged_context": row["privileged_context"]} for row in HINTED]
    trainer = run(Dataset.from_list(rows), recipe="compressed_head", calibration_tokens=100, max_steps=1)
    trainer.train()
    assert trainer.starts


def test_several_completions_of_a_prompt_are_rows_of_one_batch(run):
    trainer = run(generations_per_prompt=3, max_steps=1)
    trainer.train()
    (batch,) = trainer.trained
    prompts = [tuple(ids[(labels == -100) & mask.bool()].tolist()) for ids, labels, mask in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    )]  # fmt: skip
    assert sorted(Counter(prompts).values()) in ([3, 3], [6])


def test_a_row_is_scored_by_the_teacher_of_its_prompt(run):
    rows = [{"prompt": f"{name}{i}", "completion": "x", "teacher_id": name} for name in "ab" for i in range(4)]
    teachers = {name: tiny("llama", V=VOCAB, width=24, seed=i) for i, name in enumerate("ab")}
    trainer = run(
        Dataset.from_list(rows), teacher=teachers, max_steps=1, per_device_train_batch_size=4, generations_per_prompt=2
    )
    trainer.train()
    (batch,) = trainer.trained
    assert ["ab"[number] for number in batch["teacher_id"]] == [TOKENIZER.decode(ids[:1]) for ids in batch["input_ids"]]


# The same once more


def test_a_buffer_uses_each_batch_as_often_as_it_keeps_batches():
    buffer, made = Buffer(3), 0
    served = Counter()
    for number in range(18):
        batch = buffer.find(number)
        if batch is None:
            batch, made = {"id": made}, made + 1
            buffer.keep(number, batch)
        served[batch["id"]] += 1
    assert made == 6
    assert set(served.values()) == {3}


@pytest.mark.parametrize("buffer", [1, 2])
def test_a_seed_gives_the_same_text_and_losses_and_a_resumed_run_too(run, buffer, tmp_path):
    given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "on_policy": 0.75, "on_policy_buffer": buffer}
    whole = run(output_dir=str(tmp_path / "whole"), **given)
    whole.train()
    again = run(output_dir=str(tmp_path / "again"), **given)
    again.train()
    resumed = run(output_dir=str(tmp_path / "whole"), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    texts = [[batch["input_ids"].tolist() for batch in one.trained] for one in (whole, again, resumed)]
    assert texts[0] == texts[1]
    assert texts[0][3:] == texts[2]
    assert losses(whole) == losses(again) == losses(resumed)
    for one, other in zip(whole.model.student.parameters(), resumed.model.student.parameters(), strict=True):
        assert torch.equal(one, other)
    assert read_texts(tmp_path / "whole") == read_texts(tmp_path / "again")  # none twice, none lost


# Data


@pytest.mark.parametrize("kind", ["completion", "chat completion", "messages", "messages, the assistant's"])
def test_prompts_are_what_stands_before_the_last_answer(kind):
    _, options, texts, learned = KINDS[kind]
    made, _ = tokenize_dataset(raw(kind), TOKENIZER, prompts="beside", **options)
    for row, text, parts in zip(made, texts, learned, strict=True):
        last = parts[-1] if kind != "messages" else text[text.index("<|im_start|>assistant\n") + 22 :]
        assert TOKENIZER.decode(row["prompts"]) == text[: text.rindex(last)]


def test_prompts_that_are_too_long_or_empty_are_skipped_and_counted():
    rows = Dataset.from_list([{"prompt": p, "completion": "x"} for p in ("a" * 30, "", "ab")])
    made, counts = tokenize_dataset(rows, TOKENIZER, prompts="beside", max_length=20)
    assert [TOKENIZER.decode(row["prompts"]) for row in made] == ["ab"]
    assert counts.skipped == {"prompt longer than max_length": 1, "empty prompt": 1}


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ([{"text": "a b c"}], {}, "has text, and on_policy and seq_kd write completions to prompts"),
        ([{"prompt": "a"}], {"on_policy": 0.5}, "on_policy=1"),
    ],
)
def test_rows_that_give_no_prompt_are_refused(run, rows, settings, says):
    with pytest.raises(DataError, match=says):
        run(Dataset.from_list(rows), **settings)


def test_rows_of_ids_without_prompts_are_refused(run, rows):
    with pytest.raises(ValueError, match=re.escape("no column prompts")):
        run(rows(4))


def test_rows_of_ids_with_prompts_are_taken(run, rows):
    given = [{**row, "prompts": row["input_ids"][: 2 + i].tolist()} for i, row in enumerate(rows(4))]
    trainer = run(given, max_steps=1)
    trainer.train()
    assert trainer.trained[0][WRITER] == "student"


def test_rows_of_ids_with_a_prompt_of_the_teachers_own_are_refused_without_it(run, rows):
    """It would be the student's prompt that the teacher reads."""
    own = {"teacher_input_ids": [9, 9, 9, 9], "teacher_positions": [-1] * 11 + [3]}
    given = [{**row, "prompts": row["input_ids"][:3].tolist(), **own} for row in rows(4)]
    with pytest.raises(ValueError, match="the batch has 'teacher_"):
        run(given, max_steps=1).train()


def test_an_answer_ends_where_the_chat_template_ends_it(run):
    """As the data's do, whose turns end with another token than texts."""
    close = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert close != END
    assert {close, END} <= set(run()._on_policy.samplings["student"].end_ids)
    assert find_end_of_turn(chat_tokenizer("{{ raise_exception('no') }}")) is None
    assert find_end_of_turn(chat_tokenizer("{% for m in messages %}{{ m.content }} {% endfor %}")) is None


def test_prompts_are_open_whatever_the_tokenizer_adds():
    tokenizer = chat_tokenizer()
    added = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", END)])
    tokenizer.backend_tokenizer.post_processor = added
    for rows, kind in (({"prompt": "ab", "completion": "c"}, "beside"), ({"prompt": "ab"}, "alone")):
        made, _ = tokenize_dataset(Dataset.from_list([rows]), tokenizer, prompts=kind)
        assert tokenizer.decode(made[0]["prompts"]) == "ab"


def test_prompts_with_their_completions_have_to_fit_the_models(run):
    with pytest.raises(DataError, match=r"a prompt and max_new_tokens=60, together \d\d tokens"):
        run(max_new_tokens=60)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"recipe": "projector_fixed"}, "expected one that learns from the teacher's head"),
        ({"recipe": "cached"}, "recipe='cached' and on_policy=1; a teacher's entries"),
        ({"teacher_cache": "x"}, "teacher_cache='x' and on_policy=1"),
        ({"precompute_teacher_log_probs": True}, "precompute_teacher_log_probs=True and on_policy=1"),
        ({"packing": True}, "packing=True and on_policy=1; expected rows that are padded"),
        ({"on_policy": 1.5}, "on_policy=1.5; expected a number in [0, 1]"),
        ({"top_p": 0.0}, "top_p=0.0; expected a number in (0, 1]"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; expected an int > 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(run, settings, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        run(**settings)


def test_repetition_counts_four_grams_that_came_before():
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1]])
    rows = as_rows(torch.cat([torch.tensor([[7]]), ids], 1), torch.ones(1, 1, dtype=torch.long), [])
    assert count_repeated(rows) == (2, 6)


def test_some_texts_are_kept_as_they_were_written(run, tmp_path):
    trainer = run(max_steps=2, output_dir=str(tmp_path))
    trainer.train()
    kept = read_texts(tmp_path)
    assert [text.step for text in kept] == [1, 1, 2, 2]
    for text, row, labels in zip(kept[:2], trainer.trained[0]["input_ids"], trainer.trained[0]["labels"], strict=True):
        assert text.completion == TOKENIZER.decode(row[labels >= 0])
        assert text.prompt.endswith("<|im_start|>assistant\n")
    assert json.loads((tmp_path / "completions.jsonl").read_text().splitlines()[0])["writer"] == "student"
