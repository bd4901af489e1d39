"""`teacher_model_init_kwargs` in a configuration: `kdfast distill` and `kdfast cache` learn from that teacher."""

import json

import pytest
import torch
import yaml
from byte_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from kdfast.cli.arguments import parse
from kdfast.cli.data import load_text
from kdfast.training import load_teacher

LAYERS = {"transformer.h.0": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
WAYS = {
    "8 bits": {"quantization_config": {"load_in_8bit": True}},
    "4 bits": {"quantization_config": {"load_in_4bit": True}, "device_map": "cpu"},
    "half on the disk": {
        "device_map": {**dict.fromkeys(["transformer.wte", "transformer.wpe", "transformer.drop"], "cpu"), **LAYERS},
        "offload_folder": "offloaded",
    },
    "bfloat16": {"dtype": "bfloat16", "attn_implementation": "eager"},
}


@pytest.fixture
def configured(place):
    """Write c.yaml with the arguments given, and a teacher of a width that 4 bits go into; return its name."""

    def write(kwargs, **more):
        torch.manual_seed(0)
        ends = {"bos_token_id": 256, "eos_token_id": 256}
        GPT2LMHeadModel(
            GPT2Config(n_layer=1, n_embd=64, n_head=2, n_positions=32, vocab_size=257, **ends)
        ).save_pretrained("wide")
        make_tokenizer().save_pretrained("wide")
        config = yaml.safe_load((place / "config.yaml").read_text())
        more |= {"teacher_model_name_or_path": "wide", "teacher_model_init_kwargs": kwargs, "max_steps": 2}
        (place / "c.yaml").write_text(yaml.safe_dump({**config, "recipe": "teacher_head", **more}))
        return "c.yaml"

    return write


@pytest.mark.parametrize("way", WAYS)
def test_the_teacher_is_the_one_that_was_asked_for(configured, place, kdfast, way):
    if "quantization_config" in WAYS[way]:
        pytest.importorskip("bitsandbytes")
    config = configured(WAYS[way])
    code, _, err = kdfast("distill", config)
    assert code == 0, err
    blocks = load_text(parse(config, [])).evaluation
    student = AutoModelForCausalLM.from_pretrained("out")
    teacher = load_teacher("wide", model_init_kwargs=WAYS[way])
    ids = torch.tensor(blocks["input_ids"])
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].float().log_softmax(-1) for model in (teacher, student))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    found = json.loads((place / "out/summary.json").read_text())["kl_teacher_student"]
    assert found == pytest.approx(kl, rel=1e-3 if way == "bfloat16" else 1e-5)  # eager rounds logits to 16 bits

    def losses(out):
        log = json.loads((place / out / "trainer_state.json").read_text())["log_history"]
        return [entry[key] for entry in log for key in ("loss", "eval_loss", "eval_kl_teacher_student") if key in entry]

    kept = ["--teacher_cache", "kept", "--cache_top_k", "257", "--cache_dtype", "float32"]
    code, _, err = kdfast("cache", config, *kept)
    assert code == 0, err
    code, _, err = kdfast("distill", config, *kept, "--recipe", "cached", "--output_dir", "from cache")
    assert code == 0, err
    assert losses("from cache") == pytest.approx(losses("out"), rel=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "more", "message"),
    [
        (
            {"dtype": "bfloat16"},
            {"teacher_dtype": "float32"},
            "teacher_dtype='float32', and teacher_model_init_kwargs ha",
        ),
        ("[1]", {}, "teacher_model_init_kwargs='[1]'; expected a mapping"),
        ({"load_in_8bit": True}, {}, "has load_in_8bit; expected quantization_config={'load_in_8bit': True}"),
        (None, {"model_init_kwargs": {"dtype": "float32"}}, "with student_config, a fresh model"),
    ],
)
def test_what_is_wrong_is_named(configured, kdfast, kwargs, more, message):
    code, _, err = kdfast("distill", configured(kwargs, **more))
    assert code == 2
    assert message in err.splitlines()[-1]
