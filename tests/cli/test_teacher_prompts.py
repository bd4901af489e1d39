"""`kdfast distill` and `kdfast data` where the teacher reads its own prompts, and where it is the student itself."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ASKED = "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture
def configure(place):
    """The current directory; c.yaml asks for a run on prompts with a context that the teacher alone reads."""

    def configure(chat=False, **options):
        def said(role, text):
            return [{"role": role, "content": text}] if chat else text

        rows = [
            {"prompt": said("user", f"{i}+1"), "completion": said("assistant", str(i + 1)), "privileged_context": hint}
            for i, hint in enumerate(f"={i + 1}" for i in range(40))
        ]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = yaml.safe_load((place / "config.yaml").read_text())
        options = {"recipe": "auto", "train_file": "rows.jsonl", "eval_fraction": 0.25, **options}
        options |= {"chat_template": TEMPLATE + ASKED} if chat else {}
        (place / "c.yaml").write_text(yaml.safe_dump({**config, **options}))
        return place

    return configure


SELF = {"student_config": None, "model_name_or_path": "teacher", "teacher_model_name_or_path": "self"}


@pytest.mark.parametrize("chat", [False, True])
def test_a_preview_has_both_prompts(configure, kdfast, chat):
    configure(chat, output_dir=None, teacher_prompt_template="{prompt} ({privileged_context})")
    code, out, err = kdfast("data", "c.yaml")
    assert code == 0, err
    expected = ("user: 0+1\nassistant: [[1\n]]", "user: 0+1 (=1)\nassistant: [[1\n]]")
    assert out.endswith("\n\n{}\n\nwhat the teacher reads in its place, with what is compared:\n\n{}\n".format(
        *(expected if chat else ("0+1[[1<end>]]", "0+1 (=1)[[1<end>]]"))
    ))  # fmt: skip


@pytest.mark.parametrize("recipe", ["teacher_head", "auto"])
def test_a_run_whose_teacher_knows_more(configure, kdfast, recipe):
    place = configure(True, recipe=recipe, calibration_tokens=60, num_train_epochs=3, max_steps=-1)
    code, out, err = kdfast("distill", "c.yaml")
    assert code == 0, err
    assert "the teacher runs at every step, and the text comes round 3 times: splits['train'] has teacher_" in out
    assert not (place / "out/teacher_cache").exists()
    summary = json.loads((place / "out/summary.json").read_text())
    assert summary["data"]["train"]["teacher_tokens"] > summary["data"]["train"]["tokens"]
    student, teacher = (AutoModelForCausalLM.from_pretrained(name).eval() for name in ("out", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained("out")
    total = tokens = 0
    for i in range(30, 40):
        own, theirs = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}, {"role": "assistant", "content": str(i + 1)}], return_dict=True
            )["input_ids"]
            for text in (f"{i}+1", f"{i}+1\n\n={i + 1}")
        )
        n = len(str(i + 1)) + 1  # with the end of the line
        with torch.no_grad():
            z, y = (model(torch.tensor([ids])).logits[0, -n - 1 : -1].log_softmax(-1)
                    for model, ids in ((student, own), (teacher, theirs)))  # fmt: skip
        total, tokens = total + (y.exp() * (y - z)).sum().item(), tokens + n
    assert summary["kl_teacher_student"] == pytest.approx(total / tokens, rel=1e-4)


def test_a_run_whose_teacher_is_the_student(configure, kdfast):
    """Interrupted and resumed it ends where it would have."""
    losses = []
    for name, stops in (("whole", False), ("resumed", True)):
        place = configure(**SELF, teacher_update_rate=0.3, output_dir=name, logging_steps=1)
        if stops:
            code, _, err = kdfast("distill", "c.yaml", "--max_steps", "4", "--save_steps", "2")
            assert code == 0, err
            for path in (place / name).iterdir():
                if path.name not in ("checkpoint-2", "kdfast.json"):
                    path.unlink() if path.is_file() else shutil.rmtree(path)
        code, out, err = kdfast("distill", "c.yaml")
        assert code == 0, err
        assert f"going on from {name}/checkpoint-2" in out if stops else "recipe teacher_head: the teacher is" in out
        state = json.loads((place / name / "trainer_state.json").read_text())
        losses.append([line["loss"] for line in state["log_history"] if "loss" in line])
    assert losses[0] == losses[1]
    averages = [load_file(place / name / "teacher.safetensors") for name in ("whole", "resumed")]
    assert all(torch.equal(x, averages[1][key]) for key, x in averages[0].items())


def test_an_adapter_learns_from_its_base_with_the_context(configure, kdfast):
    pytest.importorskip("peft")
    place = configure(**SELF, use_peft=True, lora_target_modules=["all-linear"])
    code, _, err = kdfast("distill", "c.yaml")
    assert code == 0, err
    assert (place / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("distill", {**SELF, "teacher_dtype": "float32"}, "teacher_dtype='float32', and the teacher self is"),
        ("distill", {"teacher_update_rate": 0.1}, "teacher_update_rate=0.1 without teacher_model_name_or_path: self"),
        ("distill", {"recipe": "svd_init", "teacher_model_name_or_path": "self", "tokenizer_name": "teacher"},
         "teacher='self' and recipe 'svd_init', which would solve the student from itself"),
        ("distill", {"packing": True}, "packing=True, and the teacher reads prompts of its own"),
        ("distill", {"precompute_teacher_log_probs": True}, "has teacher_input_ids, and a cache is of text alone"),
        ("cache", {"teacher_cache": "kept"}, "has teacher_input_ids, and a cache is of text alone"),
        ("cache", {"teacher_cache": "kept", "teacher_logprobs": "no", "temperature": 1},
         "not be shown it (of teacher_prompt, privileged_context or teacher_prompt_template)"),
        ("cache", {**SELF, "teacher_cache": "kept"}, "teacher_model_name_or_path: self, and kdfast cache loads no"),
    ],
)  # fmt: skip
def test_what_does_not_work_is_said(configure, kdfast, command, options, expected):
    configure(**options)
    code, _, err = kdfast(command, "c.yaml")
    assert code == 2
    assert expected in err
    assert err.count("kdfast: ") == 1
