"""A teacher with another tokenizer: KD over shared strings at aligned positions, in model, trainer and command line."""

import json
import math

import pytest
import torch
import yaml
from chats import CHATML, QUESTIONS, assistant, user
from datasets import Dataset
from tiny_models import tiny
from training_fixtures import config, no_logits  # noqa: F401
from two_tokenizers import CODE, ENGLISH, byte_level, sentencepiece

from kdfast.cli.main import main
from kdfast.training import DistillationModel, KDTrainer, load_student, load_teacher
from kdfast.training.data.alignment import OtherTokenizer
from kdfast.training.data.text import DataError

TEXTS = [
    f"the words of {i}: \u4e2d\u6587 \U0001f44d\U0001f3fd\r\n\tdef words(x):\n        return x{i}" for i in range(12)
]
SIZES = {"bytes": (lambda: byte_level(400), 408), "pieces": (lambda: sentencepiece(500), 512)}


def pair(ours="bytes", theirs="pieces", family="llama"):
    """Student, teacher, their tokenizers, and what they share."""
    tokenizers = [SIZES[name][0]() for name in (ours, theirs)]
    student = tiny(family, V=SIZES[ours][1], seed=0)
    teacher = tiny(family, V=SIZES[theirs][1], width=24, seed=1)
    return student, teacher, *tokenizers, OtherTokenizer(*tokenizers)


def batch_of(rows, *names):
    """Rows padded by hand, at the right."""
    fill = {"labels": -100, "teacher_positions": -1}
    given = {name: [torch.tensor(row[name]) for row in rows] for name in names}
    return {
        name: torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=fill.get(name, 0))
        for name, x in given.items()
    }


def aligned(other, tokenizer, texts=TEXTS):
    ids = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in texts]
    return other.align("rows", [{"input_ids": one, "labels": [-100, *one[1:]]} for one in ids])


def by_hand(student, teacher, rows, other, tau, kd_weight):
    """CE over all ids, and the KL of the two over the shared ones, from whole logits in float64, row by row."""
    ce, kd, n_ce, n_kd = 0.0, 0.0, 0, 0
    ours, theirs = other.vocabulary.student, other.vocabulary.teacher
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        z = student(ids).logits[0]
        with torch.no_grad():
            y = teacher(torch.tensor([row["teacher_input_ids"]])).logits[0]
        for t in range(len(labels) - 1):
            if labels[t + 1] == -100:
                continue
            ce, n_ce = ce - z[t].log_softmax(-1)[labels[t + 1]], n_ce + 1
            if (u := row["teacher_positions"][t]) >= 0:
                p, q = ((x / tau).log_softmax(-1) for x in (y[u, theirs], z[t, ours]))
                kd, n_kd = kd + (p.exp() * (p - q)).sum(), n_kd + 1
    assert 0 < n_kd < n_ce
    return ce / n_ce + kd_weight * tau**2 * kd / n_kd


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize(
    ("ours", "theirs", "family"),
    [
        ("bytes", "pieces", "gpt2"),
        ("pieces", "bytes", "gpt2"),
        ("bytes", "pieces", "gemma2"),
        ("pieces", "bytes", "cohere"),
    ],
)
def test_against_float64(ours, theirs, family, engine, no_logits):  # noqa: F811
    student, teacher, tokenizer, _, other = pair(ours, theirs, family)
    student, teacher = student.double(), teacher.double()
    rows = aligned(other, tokenizer)
    expected = by_hand(student, teacher, rows, other, tau=1.5, kd_weight=0.6)
    at_one = by_hand(student, teacher, rows, other, tau=1.0, kd_weight=1.0) - by_hand(
        student, teacher, rows, other, tau=1.0, kd_weight=0.0
    )
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    model = DistillationModel(
        student, teacher, shared_vocabulary=other.vocabulary, engine=engine, tokenizer=tokenizer,
        scratch_bytes=None if engine == "reference" else 200_000,
    )  # fmt: skip
    assert model.recipe.name == "shared_tokens"
    assert not any("shared_head" in name or "teacher" in name for name in model.state_dict())
    no_logits(student, teacher)
    batch = batch_of(rows, "input_ids", "labels", "teacher_input_ids", "teacher_positions")
    batch["attention_mask"] = batch_of([{"m": [1] * len(row["input_ids"])} for row in rows], "m")["m"]
    output = model(**batch, temperature=1.5, kd_weight=0.6, with_fidelity=True)
    output.loss.backward()
    near = 1e-9 if family == "gpt2" else 1e-5  # the others' norms and angles are float32, in batches of other shapes
    assert output.loss.item() == pytest.approx(expected.item(), rel=near)
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=near, atol=near * gradients[name].abs().max().item())
    assert output.fidelity.kl_teacher_student.item() == pytest.approx(at_one.item(), rel=near)


@pytest.fixture
def saved(tmp_path):
    """A teacher in a folder with its tokenizer."""

    def make(theirs="pieces", template=None):
        _, teacher, _, tokenizer, _ = pair("bytes" if theirs == "pieces" else "pieces", theirs)
        tokenizer.chat_template = template
        teacher.save_pretrained(tmp_path / "teacher")
        tokenizer.save_pretrained(tmp_path / "teacher")
        return load_teacher(tmp_path / "teacher")

    return make


def texts():
    return Dataset.from_list([{"text": text} for text in TEXTS])


@pytest.mark.parametrize("ours", ["bytes", "pieces"])
def test_auto_takes_what_both_have(saved, config, capsys, ours):  # noqa: F811
    teacher, tokenizer = saved("pieces" if ours == "bytes" else "bytes"), SIZES[ours][0]()
    student = tiny(V=SIZES[ours][1])
    trainer = KDTrainer(
        student, config(recipe="auto", max_length=48, precompute_teacher_log_probs=None, max_steps=12),
        teacher=teacher, train_dataset=texts(), eval_dataset=texts(), processing_class=tokenizer,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "shared strings: " in said
    assert "train_dataset: aligned with the teacher's tokens at " in said
    assert "recipe shared_tokens: the teacher has another tokenizer" in said
    assert trainer.model.shared_head.weight.shape == (SIZES[ours][1], 24)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl_teacher_student"] < before["eval_kl_teacher_student"]
    assert after["eval_ce"] < before["eval_ce"]
    assert {"eval_kd", "eval_kl_teacher_student", "eval_bits_per_byte"} <= after.keys()
    assert "precompute" not in capsys.readouterr().out


def test_auto_leaves_a_teacher_with_few_shared_strings(saved, config, capsys):  # noqa: F811
    tokenizer = byte_level(1000, [" ".join(f"{i}th{i * i}" for i in range(900))] * 2)
    options = {"teacher": saved(), "train_dataset": texts(), "eval_dataset": texts(), "processing_class": tokenizer}
    trainer = KDTrainer(tiny(V=1000), config(recipe="auto", max_length=16), **options)
    share = trainer._preparation.other.vocabulary.share
    assert share < 0.5
    assert f"recipe lm_only: the teacher has another tokenizer, with {share:.0%} of" in capsys.readouterr().out
    assert "eval_kl_teacher_student" in trainer.evaluate()
    trainer = KDTrainer(tiny(V=1000), config(recipe="shared_tokens", max_length=16), **options)
    assert trainer.model.recipe.teacher == "shared_head"


def test_rows_of_ids_and_of_lists(saved, config):  # noqa: F811
    """The same losses however the rows come, and as the model gives by itself; micro-batches and padding included."""
    teacher, tokenizer = saved(), SIZES["bytes"][0]()
    ids = [tokenizer(text + "<end>")["input_ids"] for text in TEXTS]
    rows = [{"input_ids": one, "labels": one} for one in ids]
    losses = []
    for data in (rows, Dataset.from_list(rows)):
        trainer = KDTrainer(
            tiny(V=408), config(recipe="shared_tokens", gradient_accumulation_steps=3), teacher=teacher,
            train_dataset=data, eval_dataset=data, processing_class=tokenizer,
        )  # fmt: skip
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[2] != losses[1] == losses[3]
    bits = trainer.evaluate()
    n_bytes = sum(
        len(text.encode()) - len(tokenizer.decode(one[:1]).encode()) for text, one in zip(TEXTS, ids, strict=True)
    )
    assert bits["eval_bits_per_byte"] == pytest.approx(
        bits["eval_ce"] * bits["eval_tokens"] / n_bytes / math.log(2), rel=1e-6
    )


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_padding_of_the_student_s_is_not_read(kind):
    tokenizer = SIZES["bytes"][0]()
    ids = tokenizer(TEXTS[0])["input_ids"]
    other = OtherTokenizer(tokenizer, SIZES["pieces"][0]())
    [row] = other.align("rows", kind([{"input_ids": ids, "labels": ids}]))
    end, n = tokenizer.eos_token_id, len(ids)
    padded = {"input_ids": [end] * 3 + ids + [end], "attention_mask": [0] * 3 + [1] * n + [0], "labels": [-100] * 3}
    padded["labels"] += [*ids, -100]
    [found] = other.align("rows", kind([padded]))
    assert found["teacher_input_ids"] == row["teacher_input_ids"]
    assert found["teacher_positions"] == [-1] * 3 + row["teacher_positions"] + [-1]


@pytest.mark.parametrize("recipe", ["projector", "projector_fixed", "probe", "lm_only"])
def test_recipes_that_need_no_shared_string(saved, config, recipe):  # noqa: F811
    trainer = KDTrainer(
        tiny(V=408), config(recipe=recipe, max_length=32), teacher=saved(), train_dataset=texts(), eval_dataset=texts(),
        processing_class=SIZES["bytes"][0](),
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    assert math.isfinite(found["eval_kl_teacher_student"])
    assert ("eval_kl_teacher_projected" in found) == (recipe != "lm_only")


@pytest.mark.parametrize(
    "recipe", ["teacher_head", "compressed_head", "svd_init", "svd_blocks", "projector_refit", "cached"]
)
def test_recipes_that_compare_ids(saved, config, recipe):  # noqa: F811
    with pytest.raises(ValueError, match=f"recipe '{recipe}' compares two heads id by id.*shared_tokens"):
        KDTrainer(
            tiny(V=408), config(recipe=recipe, max_length=32), teacher=saved(), train_dataset=texts(),
            processing_class=SIZES["bytes"][0](),
        )  # fmt: skip


def test_what_is_refused(saved, config, tmp_path):  # noqa: F811
    teacher, tokenizer = saved(), SIZES["bytes"][0]()
    options = {"teacher": teacher, "train_dataset": texts(), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="packing=True with a teacher that has another tokenizer"):
        KDTrainer(tiny(V=408), config(packing=True, recipe="auto"), **options)
    with pytest.raises(ValueError, match=r"precompute_teacher_log_probs=True; expected a teacher, and a recipe"):
        KDTrainer(tiny(V=408), config(precompute_teacher_log_probs=True, recipe="auto", max_length=32), **options)
    with pytest.raises(ValueError, match=r"teacher_tokenizer_name_or_path='.*nothing': no tokenizer could be loaded"):
        KDTrainer(tiny(V=408), config(teacher_tokenizer_name_or_path=str(tmp_path / "nothing")), **options)
    with pytest.raises(ValueError, match=r"in a Generator, and .* expected a list or a datasets.Dataset"):
        OtherTokenizer(tokenizer, SIZES["pieces"][0]()).align("rows", torch.Generator())
    unknown = tiny(V=512, width=24)
    with pytest.raises(ValueError, match="'shared_tokens' is for a teacher whose tokenizer is known and another"):
        KDTrainer(tiny(V=408), config(recipe="shared_tokens", max_length=32), **{**options, "teacher": unknown})
    trainer = KDTrainer(
        tiny(V=408), config(recipe="auto", teacher_tokenizer_name_or_path=str(tmp_path / "teacher"), max_length=32),
        **{**options, "teacher": unknown},
    )  # fmt: skip
    assert trainer.model.recipe.name == "shared_tokens"
    ids = torch.tensor([tokenizer("the words of the story")["input_ids"]])
    with pytest.raises(ValueError, match="the batch has no teacher_input_ids, and the teacher's tokenizer is another"):
        trainer.model(input_ids=ids, labels=ids)
    small = tiny(V=300, width=24)
    shared = OtherTokenizer(tokenizer, SIZES["pieces"][0]()).vocabulary
    with pytest.raises(ValueError, match="the teacher's head has 300 rows, and its tokenizer ids up to"):
        DistillationModel(tiny(V=408), small, shared_vocabulary=shared)
    numbers = byte_level(300, ["1 2 3"])
    changed = [{"input_ids": [numbers.eos_token_id] * 4, "labels": [-100] * 4}]
    with pytest.raises(DataError, match="nothing to learn from this teacher"):
        OtherTokenizer(numbers, SIZES["pieces"][0]()).align("rows", changed)


BRACKETS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"


@pytest.mark.parametrize("kind", ["messages", "completion"])
def test_chats_by_two_templates(saved, config, tmp_path, kind):  # noqa: F811
    tokenizer = byte_level(400)
    tokenizer.chat_template = CHATML
    rows = [{"messages": [user(q), assistant(a), user("a"), assistant(q)]} for q, a in QUESTIONS]
    if kind == "completion":
        rows = [{"prompt": [user(q)], "completion": [assistant(a)]} for q, a in QUESTIONS]
    options = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    student, teacher = tiny("gemma2", V=408), saved(template=BRACKETS)
    for model in (student, teacher):
        model.config.max_position_embeddings = 256  # as far as Gemma's angles go, 64 is no limit
    trainer = KDTrainer(student, config(recipe="auto"), teacher=teacher, **options)
    for row, (question, answer) in zip(trainer.train_dataset, QUESTIONS, strict=True):
        theirs = trainer._preparation.other.teacher.tokenizer
        read = [tokenizer.decode(row["input_ids"][: t + 1]) for t, at in enumerate(row["teacher_positions"]) if at >= 0]
        there = [theirs.decode(row["teacher_input_ids"][: at + 1]) for at in row["teacher_positions"] if at >= 0]
        assert read
        for one, other in zip(read, there, strict=True):
            said, same = one.rpartition("assistant\n")[2], other.rpartition("[assistant] ")[2]
            assert said == same
            assert (question if kind == "messages" and one.count("assistant\n") > 1 else answer).startswith(said)
    trainer.train()
    (tmp_path / "teacher" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"teacher has messages, and the tokenizer .* has no chat template"):
        KDTrainer(tiny(V=408), config(recipe="auto"), teacher=saved(), **options)


def test_on_the_command_line(saved, tmp_path, capsys):
    saved()
    tokenizer = byte_level(400)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("".join([*ENGLISH, *CODE]))
    keys = {
        "student_config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "max_position_embeddings": 64},
        "teacher_model_name_or_path": str(tmp_path / "teacher"), "tokenizer_name": str(tmp_path / "tokenizer"),
        "train_file": str(tmp_path / "text"), "output_dir": str(tmp_path / "run"), "max_length": 32, "max_steps": 2,
        "eval_fraction": 0.1, "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(keys))
    assert main(["distill", str(tmp_path / "a.yaml")]) == 0
    said = capsys.readouterr().out
    assert "shared strings: " in said
    assert "train_dataset: aligned with" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["recipe"] == "shared_tokens"
    assert summary["bits_per_byte"] > 0
    assert summary["kl_teacher_student"] > 0
    load_student(tmp_path / "run", tokenizer=tokenizer)


def test_a_stream(saved, config):  # noqa: F811
    trainer = KDTrainer(
        tiny(V=408), config(recipe="auto", max_length=32), teacher=saved(), train_dataset=texts().to_iterable_dataset(),
        processing_class=SIZES["bytes"][0](),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["kd"] > 0
