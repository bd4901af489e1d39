"""Models loaded with arguments of `from_pretrained`: quantized, in another dtype, placed, offloaded, of a revision."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import loss_by_hand
from transformers import AutoConfig, AutoModelForCausalLM, default_data_collator

from kdfast.cli.arguments import ModelArguments
from kdfast.cli.data import load_tokenizer
from kdfast.training import DistillationModel, KDTrainer, backbone, load_student, load_teacher

PARTS = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
IN_PARTS = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk", "lm_head": "disk"}
# how people keep a teacher → the arguments, and the package that they need
WAYS = {
    "as saved": ({}, None),
    "8 bits": ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
    "4 bits": ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "bitsandbytes"),
    "8 bits, placed": ({"quantization_config": {"load_in_8bit": True}, "device_map": "auto"}, "bitsandbytes"),
    "placed by itself": ({"device_map": "auto"}, None),
    "on one device": ({"device_map": "cpu"}, None),
    "by a mapping": ({"device_map": {"": "cpu"}}, None),
    "half on the disk": ({"device_map": IN_PARTS, "offload_folder": "OFFLOAD"}, None),
    "on the disk": ({"device_map": {"": "disk"}, "offload_folder": "OFFLOAD"}, None),
    "eager attention": ({"attn_implementation": "eager"}, None),
    "bfloat16": ({"dtype": "bfloat16"}, None),
    "float16": ({"dtype": "float16"}, None),
    "float64": ({"dtype": "float64"}, None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with two layers, of widths that 4 bits go into, on the disk."""
    path = tmp_path_factory.mktemp("teacher")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", vocab_size=67, initializer_range=0.1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture
def kept(folder, tmp_path):
    """The teacher, loaded in one of the WAYS."""

    def load(way):
        kwargs, package = WAYS[way]
        if package is not None:
            pytest.importorskip(package)
        return load_teacher(folder, model_init_kwargs=json.dumps(kwargs).replace("OFFLOAD", str(tmp_path / "off")))

    return load


@pytest.fixture
def ids():
    return torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))


def whole_logits(model):
    """`model` with logits in float32, of its own hidden states and head: 16 bits would round them to 3 digits."""

    def logits(ids):
        hidden, weight = backbone(model)(ids).last_hidden_state, model.get_output_embeddings().weight
        return type("Output", (), {"logits": F.linear(hidden.float(), weight.float())})

    return logits if model.dtype in (torch.bfloat16, torch.float16) else model


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_those_of_whole_logits(tiny, kept, ids, way):
    student, teacher = tiny("llama"), kept(way)
    trained = list(student.parameters())
    truth = loss_by_hand(student, whole_logits(teacher), ids, ids)
    expected = torch.autograd.grad(truth, trained)
    loss = DistillationModel(student, teacher, recipe="teacher_head")(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(loss, trained), expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("way", ["bfloat16", "float16"])
def test_logits_that_the_teacher_itself_rounds_are_near(tiny, kept, ids, way):
    """Eager logits of 16 bits are off by half of their last digit, each: the KD term by as much of their size."""
    student, teacher = tiny("llama"), kept(way)
    truth = loss_by_hand(student, teacher, ids, ids).item()
    loss = DistillationModel(student, teacher, recipe="teacher_head")(input_ids=ids, labels=ids).loss.item()
    largest = teacher(ids).logits.abs().max().item()
    assert loss == pytest.approx(truth, abs=largest * torch.finfo(teacher.dtype).eps)


@pytest.mark.parametrize("way", ["8 bits", "4 bits", "on one device", "half on the disk", "bfloat16"])
def test_the_trainer_learns_from_them(tiny, kept, config, ids, way):
    student, teacher = tiny("llama"), kept(way)
    truth = loss_by_hand(student, whole_logits(teacher), ids, ids).item()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = KDTrainer(
        student,
        config(recipe="teacher_head", max_steps=2, save_strategy="steps", save_steps=1),
        teacher=teacher,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
    )
    dtype = teacher.dtype
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(truth, rel=1e-5)
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].log_softmax(-1) for model in (whole_logits(teacher), student))
    assert trainer.evaluate()["eval_kl_teacher_student"] == pytest.approx(
        (p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5
    )
    assert teacher.dtype == dtype
    assert trainer.state.global_step == 2
    assert math.isfinite(trainer.state.log_history[-1]["eval_ce"])


def test_a_placed_teacher_is_moved_by_nobody(tiny, kept):
    for way in ("on one device", "placed by itself"):
        model = DistillationModel(tiny("llama"), kept(way), recipe="teacher_head")
        assert "teacher" not in dict(model.named_children()), "what .to() would move"


def test_a_student_takes_them_too(folder):
    student = load_student(folder, model_init_kwargs={"attn_implementation": "eager", "attention_dropout": 0.25})
    assert (student.config._attn_implementation, student.config.attention_dropout) == ("eager", 0.25)
    assert student.dtype == torch.float32
    assert load_student(folder, model_init_kwargs={"dtype": "bfloat16"}).dtype == torch.bfloat16


def test_a_head_of_bits_is_refused(tiny, folder):
    pytest.importorskip("bitsandbytes")
    config = {"load_in_8bit": True, "llm_int8_skip_modules": ["embed_tokens"]}
    teacher = load_teacher(folder, model_init_kwargs={"quantization_config": config})
    with pytest.raises(
        TypeError, match=r"teacher \(LlamaForCausalLM\) has Linear8bitLt as its head.*llm_int8_skip_mod"
    ):
        DistillationModel(tiny("llama"), teacher, recipe="teacher_head")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype='float16', and KEY has dtype='bfloat16'; expected one of them"),
        ({"torch_dtype": "bfloat16"}, "KEY has torch_dtype; expected dtype in its place"),
        ({"load_in_4bit": True}, r"KEY has load_in_4bit; expected quantization_config={'load_in_4bit': True}"),
        ({"devise_map": "auto"}, "could not be loaded.*with .*'devise_map'.*unexpected keyword argument 'devise_map'"),
        ({"weights_only": False}, "could not be loaded.*multiple values for keyword argument 'weights_only'"),
        ({"device_map": "nowhere"}, "could not be loaded.*with .*'nowhere'"),
        ({"quantization_config": {"load_in_5bit": True}}, "could not be loaded.*quant_method"),
        ("{dtype", "KEY: '{dtype' is not valid JSON"),
        ("[1]", r"KEY='\[1\]'; expected a mapping"),
        (3, "KEY=3; expected a mapping"),
    ],
)
@pytest.mark.parametrize("load", [load_student, load_teacher])
def test_what_is_wrong_with_them_is_named(folder, load, given, message):
    key = "teacher_model_init_kwargs" if load is load_teacher else "model_init_kwargs"
    with pytest.raises(ValueError, match=message.replace("KEY", key)):
        load(folder, dtype="float16", model_init_kwargs=given)


def test_a_fresh_student_has_its_settings_in_its_config():
    with pytest.raises(ValueError, match=r"model_init_kwargs=.* with student_config, a fresh model"):
        load_student(student_config={"model_type": "gpt2"}, model_init_kwargs={"attn_implementation": "eager"})


def test_a_revision(tiny, tmp_path, monkeypatch):
    """A repository with two commits in the hub's cache: weights and tokenizer are those of the one that is named."""
    from byte_tokenizer import make_tokenizer

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, models = tmp_path / "models--someone--something", {}
    (repository / "refs").mkdir(parents=True)
    for seed, (name, words) in enumerate({"main": [], "later": ["<tool>"]}.items()):
        commit = f"{seed}" * 40
        (repository / "refs" / name).write_text(commit)
        models[name] = tiny("llama", V=258, seed=seed)
        models[name].save_pretrained(repository / "snapshots" / commit)
        make_tokenizer(words).save_pretrained(repository / "snapshots" / commit)
    given = {"revision": "later", "cache_dir": str(tmp_path)}
    teacher = load_teacher("someone/something", tokenizer=make_tokenizer(["<tool>"]), model_init_kwargs=given)
    assert torch.equal(teacher.lm_head.weight, models["later"].lm_head.weight)
    with pytest.raises(ValueError, match="could not be loaded"):
        load_teacher("someone/something", model_init_kwargs={**given, "revision": "latest"})
    arguments = ModelArguments(
        teacher_model_name_or_path="someone/something", teacher_model_init_kwargs=json.dumps(given)
    )
    assert "<tool>" in load_tokenizer(arguments).get_vocab()


def test_code_of_a_repository_is_run_where_that_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    path = tmp_path / "own"
    load_student(folder).save_pretrained(path)
    (path / "theirs.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'theirs'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    settings = json.loads((path / "config.json").read_text())
    auto = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (path / "config.json").write_text(json.dumps({**settings, "model_type": "theirs", "auto_map": auto}))
    with pytest.raises(ValueError, match="could not be loaded"):
        load_teacher(path)
    assert not (tmp_path / "modules").exists()
    teacher = load_teacher(path, model_init_kwargs={"trust_remote_code": True})
    assert type(teacher).__name__ == "Model"
