"""The small models of examples and first tries, in sizes smaller still."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdfast.demo.toy_models import SmallSizes
from kdfast.demo.toy_text import END
from kdfast.training import small_models

TINY = SmallSizes(
    characters=50_000, excerpt=50, vocabulary=300, context=16, batch=8, teacher_layers=1, teacher_width=32,
    teacher_steps=40, learning_rate=1e-2, student_layers=1, student_width=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    state = torch.random.get_rng_state()
    models = small_models(tmp_path_factory.mktemp("small"), sizes=TINY)
    assert torch.random.get_rng_state().equal(state)  # whoever asks for them goes on as before
    return models


def test_the_teacher_has_learned_and_the_student_has_not(made):
    tokenizer = AutoTokenizer.from_pretrained(made.teacher)
    ids = torch.tensor(tokenizer(Path(made.eval_text).read_text(encoding="utf-8"))["input_ids"])
    blocks = ids[: len(ids) // 16 * 16].view(-1, 16)[:200]

    def cross_entropy(folder):
        logits = AutoModelForCausalLM.from_pretrained(folder)(blocks).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()

    assert cross_entropy(made.student) > math.log(300) - 0.1
    assert cross_entropy(made.teacher) < math.log(300) - 0.5


def test_both_read_the_same_ids_and_documents_end(made):
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (made.student, made.teacher))
    assert len(ours) == 300
    assert ours.get_vocab() == theirs.get_vocab()
    text = Path(made.text).read_text(encoding="utf-8")
    assert 50_000 <= len(text.replace(END, "")) < 1_000_000
    assert ours(text)["input_ids"].count(ours.eos_token_id) == text.count(END) > 0


def test_they_are_made_once_for_each_choice_of_sizes(made, monkeypatch):
    place = Path(made.teacher).parent.parent
    monkeypatch.setattr("kdfast.demo.toy_models._make", lambda *_: pytest.fail("made again"))
    assert small_models(place, sizes=TINY) == made
    with pytest.raises(pytest.fail.Exception, match="made again"):
        small_models(place, sizes=SmallSizes())
