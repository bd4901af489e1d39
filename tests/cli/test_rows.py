"""`kdfast distill` on completions and chats."""

import json
import logging

import pytest
import transformers
import yaml
from transformers import AutoTokenizer

from kdfast.training import KDTrainer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
ROWS = {
    "completion": [{"prompt": f"{i} + 1 = ", "completion": str(i + 1) if i % 10 else ""} for i in range(40)],
    "messages": [
        {"messages": [{"role": role, "content": said} for role, said in turns[: i % 10 + 1]]}
        for i in range(40)
        for turns in [[("user", f"{i}+1?"), ("assistant", str(i + 1))]]
    ],
}
OPTIONS = {"completion": {}, "messages": {"assistant_only_loss": True, "chat_template": "template.jinja"}}


@pytest.fixture
def rows(place):
    """The current directory; c.yaml asks for a run on one of the files there, whose every tenth row teaches nothing."""
    (place / "template.jinja").write_text(TEMPLATE)

    def configure(kind, **options):
        (place / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
        config = yaml.safe_load((place / "config.yaml").read_text())
        options = {"recipe": "teacher_head", "train_file": f"{kind}.jsonl", "eval_fraction": 0.25, **options}
        (place / "c.yaml").write_text(yaml.safe_dump({**config, **OPTIONS[kind], **options}))
        return place

    return configure


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_a_run_on_rows_that_are_no_text(rows, kdfast, kind, packing):
    place = rows(kind, packing=packing)
    code, out, err = kdfast("distill", "c.yaml", "--precompute_teacher_log_probs", "false")
    assert code == 0, err
    reason = {"completion": "empty completion", "messages": "no assistant turn"}[kind]
    lines = out.splitlines()
    for said, skipped in (("': 30 rows; ", 3), ("', held out: 10 rows; ", 1)):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"train_file '{kind}.jsonl{said}"))
        assert lines[at + 1] == f"    {skipped} skipped ({reason})"
    summary = json.loads((place / "out/summary.json").read_text())
    answers = [str(i + 1) for i in range(30, 40) if i % 10]
    assert summary["eval_tokens"] == sum(len(answer) + 1 for answer in answers)  # what ends it is learned too
    assert summary["data"]["train"]["skipped"] == {reason: 3}
    saved = AutoTokenizer.from_pretrained(place / "out")
    assert saved.chat_template == (TEMPLATE if kind == "messages" else None)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("messages", {"chat_template": None, "assistant_only_loss": None}, "has no chat template"),
        ("messages", {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}, "no {% generation %}"),
        ("messages", {"chat_template": "none.jinja"}, "chat_template='none.jinja' is no Jinja template"),
        ("completion", {"max_length": 5}, "27 no target within max_length"),
        ("completion", {"truncation_mode": "left"}, "truncation_mode='left'; expected one of keep_start, keep_end"),
    ],
)
def test_what_does_not_work_is_said(rows, kdfast, monkeypatch, kind, options, expected):
    rows(kind, **options)
    monkeypatch.setattr(KDTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    code, _, err = kdfast("distill", "c.yaml")
    assert code == 2
    assert expected in err
    assert err.count("kdfast: ") == 1


@pytest.mark.parametrize("packing", [False, True])
def test_a_preview_of_the_rows(rows, kdfast, monkeypatch, packing):
    rows("messages", packing=packing, output_dir=None)
    code, out, err = kdfast("data", "c.yaml")
    assert code == 0, err
    counts = "685 tokens, 73 of them targets\n    3 skipped (no assistant turn)\n"  # 21 each, and the numbers
    assert f"train_file 'messages.jsonl': 30 rows; {counts}" in out
    assert out.endswith("what is learned is in [[ ]]:\n\nuser: 1+1?\nassistant: [[2\n]]\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert kdfast("data", "c.yaml")[1].endswith("is green:\n\nuser: 1+1?\nassistant: \x1b[32m2\n\x1b[0m\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert kdfast("data", "c.yaml")[1].endswith("assistant: [[2\n]]\n")


def test_a_preview_of_text(place, kdfast):
    code, out, err = kdfast("data", "config.yaml", "--max_length", "8")
    assert code == 0, err
    assert out.endswith("in [[ ]]:\n\n0[[: 0 is ]]\n")
    code, _, err = kdfast("data", "config.yaml", "--train_file", "none.txt")
    assert code == 2
    assert "none.txt" in err


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_rows_that_are_streamed(rows, kdfast, kind):
    """The run learns what it learns from the same rows in their order, and what it passed over is counted."""
    place = rows("messages", streaming=True, eval_file="messages.jsonl", packing=True)
    text = ["--train_file", "text.txt", "--eval_file", "text.txt", "--assistant_only_loss", "false"]
    given = [*text, "--packing", "false"] if kind == "text" else []
    code, out, err = kdfast("distill", "c.yaml", *given)
    assert code == 0, err
    assert "a stream of rows" in out
    summary = json.loads((place / "out/summary.json").read_text())
    assert summary["tokens"] > 0
    if kind == "messages":
        assert "train_file 'messages.jsonl': rows are skipped: no assistant turn" in out
        assert summary["data"]["train"]["skipped"]["no assistant turn"] >= 1
    code, out, err = kdfast("data", "c.yaml", *given)
    assert code == 0, err
    assert "[[" in out


@pytest.mark.parametrize(
    ("command", "change", "expected"),
    [
        ("distill", {"eval_file": None}, "streaming: true holds nothing out; expected an eval_file"),
        ("distill", {"max_steps": -1}, "streaming: true and max_steps=-1"),
        ("cache", {"teacher_cache": "kept"}, "streaming: true, and a cache is of rows by their number"),
        ("distill", {"precompute_teacher_log_probs": True}, "the training text is a stream"),
    ],
)
def test_what_a_stream_cannot_do(rows, kdfast, command, change, expected):
    rows("messages", streaming=True, **{"eval_file": "messages.jsonl", **change})
    code, _, err = kdfast(command, "c.yaml")
    assert code == 2
    assert expected in err


def test_a_run_on_text_that_the_student_writes_to_the_prompts_of_chats(rows, kdfast):
    place = rows("messages", on_policy=0.5, max_new_tokens=6, save_steps=4, logging_steps=1)
    code, _, err = kdfast("distill", "c.yaml")
    assert code == 0, err
    texts = [json.loads(line) for line in (place / "out/completions.jsonl").read_text().splitlines()]
    assert {text["step"] for text in texts} == {2, 4}
    assert all(text["prompt"].startswith("user: ") for text in texts)
    page = (place / "out/report.html").read_text()
    assert "Generated text" in page
    assert "KL on the student&#39;s own text" in page
    code, _, err = kdfast("distill", "c.yaml", "--lmbda", "0.5")
    assert code == 2
    assert "'lmbda'" in err
    assert "on_policy" in err


def test_few_targets_to_evaluate_on_are_said(rows, kdfast):
    rows("completion")
    few = "targets are few to compare runs by; name a larger eval_file, or raise eval_fraction"
    code, out, err = kdfast("data", "c.yaml")
    assert (code, f"evaluation: 27 {few}" in out) == (0, True), out
    code, out, err = kdfast("data", "c.yaml", "--train_file", "text.txt", "--eval_fraction", "0.5")
    assert (code, few in out) == (0, False), out + err


def test_rows_that_end_in_the_padding_token_are_no_warning(rows, kdfast, monkeypatch):
    """Batches of one have no padding, and every completion ends in the tokenizer's only special token."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "handlers", [handler])
    transformers.utils.logging.warning_once.cache_clear()
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
    rows("completion", student_config={"model_type": "gpt2", "pad_token_id": 256, **sizes})
    code, _, err = kdfast("distill", "c.yaml", "--recipe", "lm_only", "--per_device_eval_batch_size", "1")
    assert code == 0, err
    logger.warning("another warning")
    assert said == ["another warning"]
