"""Examples in docstrings of kdfast.training, the code under `Example:`, run with tiny models of the names in them."""

import inspect
import json
import re
import textwrap

import pytest
import torch
from byte_tokenizer import make_tokenizer
from datasets import Dataset
from tiny_models import tiny
from two_tokenizers import byte_level

import kdfast
from kdfast import training

NEEDS_A_SERVER = {"cache_from_server"}  # tests/training/test_servers.py has one
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}<end>{% endfor %}"
)
CODE = re.compile(r"^Example[^\n]*:\n((?: {4}[^\n]*\n)+)", re.M)
DOCS = {name: inspect.cleandoc(getattr(training, name).__doc__ or "") for name in training.__all__}
EXAMPLES = {name: textwrap.dedent(found[1]) for name, doc in DOCS.items() if (found := CODE.search(doc))}


def test_they_are_found():
    assert {"KDTrainer", "DistillationModel", "load_student", "cache_teacher"} <= {
        n for n, code in EXAMPLES.items() if code
    }


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - NEEDS_A_SERVER))
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for folder in ("gpt2", "gpt2-medium"):
        tiny("gpt2", V=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    text = tokenizer("a text of some words", return_tensors="pt").input_ids
    rows = [{"input_ids": text[0], "labels": text[0]}] * 4
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    names = {**vars(kdfast), **{n: getattr(training, n) for n in training.__all__}}
    names |= {"rows": rows, "train": rows, "held_out": rows, "dataset": Dataset.from_list([{"messages": messages}] * 4)}
    names |= {"tokenizer": tokenizer, "inputs": {"input_ids": text}, "labels": training.shift_labels(text)}
    names |= {"batch": {"input_ids": text, "labels": text}}
    student, teacher = (tiny("gpt2", V=len(tokenizer), seed=seed) for seed in (0, 1))
    if name == "OtherTokenizer":
        names |= {"student_tokenizer": tokenizer, "teacher_tokenizer": byte_level()}
        teacher = tiny("gpt2", V=len(names["teacher_tokenizer"]))
    names |= {"student": student, "teacher": teacher, "model": student}
    names["teacher_head"] = training.head(teacher.requires_grad_(False), torch.randn(*text.shape, 16))
    ids = text[0].tolist()
    entries = [{str(i): {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.decode(i)}} for i in ids]
    line = {"prompt_token_ids": ids, "prompt_logprobs": [None, *entries[1:]]}
    (tmp_path / "vllm.jsonl").write_text(json.dumps(line) + "\n")
    exec(EXAMPLES[name].replace("max_steps=1000, bf16=True", "max_steps=1, use_cpu=True"), names)
