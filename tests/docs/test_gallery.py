"""Pictures of the documents: they are there, say in words what they show, load nothing, and a command makes them."""

import html
import importlib.util
import json
import re
import shutil

import documents
import pytest

GALLERY = documents.ROOT / "docs/gallery"
SHOWN = re.findall(r"!\[([^\]]+)\]\(gallery/([^)]+)\)", documents.prose("docs/README.md"))


def test_the_page_shows_every_picture_and_says_what_is_seen():
    assert sorted(name for _, name in SHOWN) == sorted(path.name for path in GALLERY.iterdir())
    assert [name for alt, name in SHOWN if len(alt.split()) < 8] == []
    for alt, name in SHOWN:
        if name.endswith(".svg"):  # numbers in the words are roundings of numbers in the picture
            seen = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", _text(GALLERY / name))]
            for number in re.findall(r"\d+(?:\.\d+)?", alt):
                digits = len(number.partition(".")[2])
                assert float(number) in [round(value, digits) for value in seen], f"{name}: {number}"


@pytest.mark.parametrize("path", sorted(GALLERY.glob("*.svg")), ids=lambda path: path.name)
def test_a_picture_loads_nothing(path):
    assert re.findall(r"url\((?!#)|href=|<script|@import", path.read_text(encoding="utf-8")) == []


def test_the_plan_is_as_it_is_printed_today(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(documents.ROOT / "docs")
    make_gallery = _module("docs/make_gallery.py")
    printed = make_gallery.run(make_gallery.COMMANDS["plan"])
    assert printed.split() == _text(GALLERY / "plan.svg").split("GiB", 1)[1].split(), "stale: make gallery"


@pytest.mark.slow
def test_the_command_makes_exactly_these_pictures(tmp_path, monkeypatch):
    for needed in ("rich", "peft"):
        pytest.importorskip(needed)
    from transformers import AutoTokenizer

    from kdfast.demo.toy_models import SmallSizes, small_models

    monkeypatch.syspath_prepend(documents.ROOT / "docs")  # for what it imports beside it
    make_gallery, example = (_module(path) for path in ("docs/make_gallery.py", "examples/lora_chat.py"))
    monkeypatch.chdir(tmp_path)
    sizes = SmallSizes(100_000, vocabulary=512, teacher_layers=1, teacher_width=64, teacher_steps=2, student_width=64)
    small = small_models("small", sizes=sizes)
    for folder in (small.teacher, small.student):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template, tokenizer.pad_token = example.TEMPLATE, tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        shutil.copytree(folder, make_gallery.MODELS / folder.rpartition("/")[2])
    rows = [[{"role": "user", "content": f"{i}²?"}, {"role": "assistant", "content": f"{i * i}"}] for i in range(40)]
    for name in ("chats.jsonl", "held_out.jsonl"):
        (make_gallery.MODELS / name).write_text("".join(f"{json.dumps({'messages': row})}\n" for row in rows))

    made = make_gallery.make(tmp_path / "out", steps=2)
    assert sorted(path.name for path in made) == sorted(name for _, name in SHOWN)
    assert all(path.stat().st_size > 2000 for path in made)
    assert "kdfast data examples/lora_chat.yaml" in _text(tmp_path / "out/data.svg")


def _text(svg):
    """Return the lines that a picture of a terminal shows."""
    lines = re.findall(r">([^<]+)</text>", svg.read_text(encoding="utf-8"))
    return html.unescape("\n".join(lines)).replace("\xa0", " ")


def _module(path):
    spec = importlib.util.spec_from_file_location(path.rpartition("/")[2].removesuffix(".py"), documents.ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
