"""`use_peft: true` and `kdfast merge`: an adapter from the command line, and the whole model made of it."""

import json
import warnings

import pytest
import torch
import yaml
from command_line import CONFIG
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from kdfast.cli.arguments import parse_mapping
from kdfast.cli.errors import UserError
from kdfast.training.adapters import NOTHING_TO_DO

peft = pytest.importorskip("peft")
LEAST = {"model_name_or_path": "m", "train_file": "t", "recipe": "lm_only", "output_dir": "o", "use_cpu": True}
IDS = torch.arange(40, 60)[None]


@pytest.fixture
def lora(place, teacher):
    """lora(**settings): write config.yaml of a LoRA on a copy of the teacher, with its tokenizer, under base/."""

    def write(**settings):
        base = place / "base"
        if not base.exists():
            AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(base)
            AutoTokenizer.from_pretrained(teacher).save_pretrained(base)
        given = {name: value for name, value in CONFIG.items() if name != "student_config"}
        given |= {"model_name_or_path": "base", "use_peft": True, "lora_r": 4, "recipe": "auto", **settings}
        (place / "config.yaml").write_text(yaml.safe_dump(given))
        return place

    return write


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_run_leaves_an_adapter_and_is_merged(lora, kdfast):
    place = lora(lora_target_modules="all-linear", peft_config={"rank_pattern": {"c_fc": 2}}, dtype="float32")
    code, out, _ = kdfast("distill", "config.yaml")
    assert code == 0
    assert "recipe compressed_head" in out
    saved = json.loads((place / "out/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"], saved["rank_pattern"]) == (4, 32, 0.05, {"c_fc": 2})
    weights = load_file(place / "out/adapter_model.safetensors")
    assert {len(tensor) for name, tensor in weights.items() if "lora_A" in name} == {2, 4}
    found = json.loads((place / "out/summary.json").read_text())
    assert found["student_trained_parameters"] < found["student_parameters"] / 2
    adapted = logits(peft.AutoPeftModelForCausalLM.from_pretrained(place / "out"))
    assert not torch.equal(adapted, logits(AutoModelForCausalLM.from_pretrained(place / "base")))
    assert kdfast("distill", "config.yaml")[1].startswith("out: finished already")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        code, out, err = kdfast("merge", "out")
    assert (code, err) == (0, "")
    assert not any(str(one.message).startswith(NOTHING_TO_DO) for one in said)
    assert "merged into base: out/merged, in float32, with its tokenizer" in out
    merged = AutoModelForCausalLM.from_pretrained(place / "out/merged")
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-6, atol=1e-6)
    tokenizers = [AutoTokenizer.from_pretrained(place / name) for name in ("out/merged", "base")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    code, _, err = kdfast("merge", "out")
    assert (code, "'out/merged' exists" in err) == (2, True)
    code, out, _ = kdfast("merge", "out/checkpoint-4", "--output", "half", "--dtype", "bfloat16")
    assert (code, "in bfloat16" in out) == (0, True)
    assert AutoModelForCausalLM.from_pretrained(place / "half").dtype == torch.bfloat16


def test_an_interrupted_run_is_gone_on_from(lora, kdfast):
    place = lora(lora_dropout=0.1)
    assert kdfast("distill", "config.yaml")[0] == 0
    whole = load_file(place / "out/adapter_model.safetensors")
    for name in ("summary.json", "adapter_model.safetensors", "adapter_config.json"):
        (place / "out" / name).unlink()
    for path in (place / "out/checkpoint-4").iterdir():
        path.unlink()
    (place / "out/checkpoint-4").rmdir()
    code, out, _ = kdfast("distill", "config.yaml")
    assert code == 0
    assert "going on from out/checkpoint-2" in out
    again = load_file(place / "out/adapter_model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    code, _, err = kdfast("distill", "config.yaml", "--lora_alpha", "8")
    assert (code, "lora_alpha: then default, now 8" in err) == (2, True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lora_target_modules": ["q_proj"]}, "q_proj"),
        ({"peft_config": {"rank_patern": {}}}, "'rank_patern' is no field of PEFT's LoraConfig; did you mean 'rank_pa"),
        ({"peft_config": "{"}, "peft_config: '{' is not valid JSON"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit, and model_init"),
        ({"load_in_8bit": True, "model_init_kwargs": {"quantization_config": {}}}, "expected one way to quantize"),
        ({"lora_r": 0}, "`r` should be a positive integer"),
    ],
)
def test_what_peft_does_not_take(lora, kdfast, settings, told):
    lora(**settings)
    code, _, err = kdfast("distill", "config.yaml")
    assert code == 2
    assert told in err
    assert "unforeseen" not in err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lora_r": 8}, "lora_r=8 without use_peft: true"),
        ({"load_in_4bit": True}, "load_in_4bit=True without use_peft: true"),
        ({"peft_config": {"rank_pattern": {}}}, "without use_peft: true, and there is no adapter"),
        ({"use_peft": True, "student_config": "c", "model_name_or_path": None}, "use_peft: true and a student_config"),
    ],
)
def test_what_does_not_go_together(settings, told):
    with pytest.raises(UserError, match=told):
        parse_mapping("here", {**LEAST, **settings})


def test_four_bits(lora, kdfast):
    pytest.importorskip("bitsandbytes")
    place = lora(load_in_4bit=True, use_bnb_nested_quant=True)
    code, _, err = kdfast("distill", "config.yaml")
    assert code == 0, err
    assert kdfast("merge", "out")[0] == 0
    assert logits(AutoModelForCausalLM.from_pretrained(place / "out/merged")).isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": "all-linear", "use_dora": True},
    ],
)
def test_a_tied_base_is_merged_as_it_was_trained(place, kdfast, settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=67, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3, **sizes)
    Qwen2ForCausalLM(config).save_pretrained("base")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained("base"), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.1, 0.1)
    adapted.save_pretrained("adapter")
    code, out, err = kdfast("merge", "adapter")
    assert (code, err) == (0, "")
    assert "without a tokenizer" in out
    merged = AutoModelForCausalLM.from_pretrained("adapter/merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-5)
    apart = settings["target_modules"] == ["embed_tokens"] or settings.get("modules_to_save") == ["lm_head"]
    assert merged.config.tie_word_embeddings is not apart


def test_what_is_no_adapter_is_not_merged(place, kdfast):
    code, _, err = kdfast("merge", "teacher")
    assert (code, "'teacher' has no adapter_config.json that names its base" in err) == (2, True)
    (place / "adapter").mkdir()
    (place / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "./nowhere", "peft_type": "LORA"}')
    code, _, err = kdfast("merge", "adapter")
    assert (code, "'./nowhere'" in err, "no such folder" in err) == (2, True, True)
