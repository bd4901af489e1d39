import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kdfast.training import load_student, load_teacher

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


@pytest.fixture
def tokenizer():
    words = {f"w{i}": i for i in range(50)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w2"
    )


def test_a_fresh_student_from_a_dict_takes_the_tokenizers_vocabulary(tokenizer):
    student = load_student(student_config=GPT2, tokenizer=tokenizer)
    assert student.get_output_embeddings().weight.shape == (50, 16)
    config = student.config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id, config.bos_token_id) == (50, 1, 2, None)
    assert student.dtype == torch.float32


def test_a_dict_can_ask_for_padding_rows(tokenizer):
    student = load_student(student_config={**GPT2, "vocab_size": 64}, tokenizer=tokenizer)
    assert student.config.vocab_size == 64


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_fresh_student_from_a_file(tokenizer, tmp_path, as_folder):
    (tmp_path / "config.json").write_text(json.dumps({**GPT2, "vocab_size": 50257}))
    source = tmp_path if as_folder else tmp_path / "config.json"
    student = load_student(student_config=str(source), tokenizer=tokenizer)
    assert (student.config.n_embd, student.config.vocab_size) == (16, 50)


def test_a_fresh_student_is_drawn_from_the_seed():
    def weight(seed):
        torch.manual_seed(seed)
        return load_student(student_config={**GPT2, "vocab_size": 50}).transformer.wte.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_student_and_teacher_from_a_folder(tiny, tmp_path):
    saved = tiny("llama").to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    student, teacher = load_student(tmp_path), load_teacher(str(tmp_path))
    assert (student.dtype, teacher.dtype) == (torch.float32, torch.bfloat16), "a student trains in fp32"
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert torch.equal(teacher.lm_head.weight, saved.lm_head.weight)


def test_a_tokenizer_that_does_not_fit(tiny, tokenizer, tmp_path):
    tiny("llama", V=40).save_pretrained(tmp_path)
    for load, argument in ((load_student, "model_name_or_path"), (load_teacher, "teacher_model_name_or_path")):
        with pytest.raises(ValueError, match=f"^{argument}: the model has 40 token embeddings and the tokenizer 50"):
            load(tmp_path, tokenizer=tokenizer)


def test_a_tokenizer_with_an_id_beyond_its_count(tiny, tokenizer, tmp_path, monkeypatch):
    """Which would be an index out of range in a batch, and two thousand million turns of a loop where it is saved."""
    tiny("llama", V=60).save_pretrained(tmp_path)
    load_teacher(tmp_path, tokenizer=tokenizer)
    vocabulary = {**tokenizer.get_vocab(), ")": 2**31}
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: vocabulary)
    with pytest.raises(ValueError, match="60 token embeddings and the tokenizer 50 tokens with ids up to 2147483648"):
        load_teacher(tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder(name):
    with pytest.raises(ValueError, match=r"^model_name_or_path=.*there is no such folder"):
        load_student(name)
    with pytest.raises(ValueError, match=r"^teacher_model_name_or_path=.*there is no such folder"):
        load_teacher(name)


def test_a_name_that_is_not_in_the_cache():
    # HF_HUB_OFFLINE=1 in tests: nothing may reach for the network, and nothing may hang
    with pytest.raises(ValueError, match=r"^model_name_or_path='nobody/nothing' could not be loaded"):
        load_student("nobody/nothing")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="could not be loaded in that folder"):
        load_student(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"n_embd": 16}, "has no model_type"),
        ({"model_type": "gpt9"}, "model_type='gpt9' is unknown"),
        ({**GPT2, "n_layers": 2}, "'n_layers' is not a setting of model_type 'gpt2'; did you mean 'n_layer'"),
        ({**GPT2, "n_embd": "wide"}, "student_config of model_type 'gpt2'"),
        ({**GPT2, "n_layer": 2**31}, "student_config: 2147483648 layers; expected 10000 at most"),
        ("nowhere.json", "student_config='nowhere.json': there is no such file"),
    ],
)
def test_bad_configs(source, message):
    with pytest.raises(ValueError, match=message):
        load_student(student_config=source)


def test_exactly_one_source(tmp_path):
    with pytest.raises(ValueError, match="expected one of the two"):
        load_student()
    with pytest.raises(ValueError, match="expected one of the two"):
        load_student(tmp_path, student_config=GPT2)


def test_code_in_a_repository_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(ValueError, match="could not be loaded"):
        load_student(tmp_path)
    with pytest.raises(ValueError, match="could not be read"):
        load_student(student_config=tmp_path)
    assert not (tmp_path / "ran").exists()
