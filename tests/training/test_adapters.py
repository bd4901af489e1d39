"""Adapters and quantized weights: what is not trained and saved as it should be is refused, and the rest is right."""

import copy

import pytest
import torch
from accelerate import Accelerator
from tiny_models import loss_by_hand
from torch import nn
from transformers import default_data_collator

from kdfast.training import DistillationModel, KDTrainer, load_student, load_teacher
from kdfast.training.fsdp import place_teacher
from kdfast.training.hf import check_model

# What PEFT leaves inside a Llama that it was given, by kind of adapter. Those on the head are refused at once.
IN_LAYERS = {
    "lora": ("LoraConfig", {"target_modules": ["q_proj", "v_proj"]}),
    "dora": ("LoraConfig", {"target_modules": ["q_proj"], "use_dora": True}),
    "embedding": ("LoraConfig", {"target_modules": ["embed_tokens"]}),
    "parameters": ("LoraConfig", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "modules_to_save": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}),
    "trainable tokens": ("LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "loha": ("LoHaConfig", {"target_modules": ["q_proj"]}),
}
ON_THE_HEAD = {
    "lora": ("LoraConfig", {"target_modules": ["lm_head"]}),
    "modules_to_save": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}
PROMPTS = ("PrefixTuningConfig", "PromptTuningConfig")


def adapt(model, kind, settings):
    """The PeftModel over `model`, which is changed in place; the adapter's weights drawn, so that it does something."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, getattr(peft, kind)(**settings))
    torch.manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(1, 0.3)
    return adapted


@pytest.mark.parametrize("kind", IN_LAYERS)
def test_the_trainer_refuses_a_student_that_was_adapted_in_place(tiny, config, rows, kind):
    student = tiny("llama")
    adapted = adapt(student, *IN_LAYERS[kind])
    for recipe in ("teacher_head", "auto"):
        with pytest.raises(ValueError, match=r"student carries a PEFT adapter \(at '.*merge_and_unload.*requires_grad"):
            KDTrainer(student, config(recipe=recipe), teacher=tiny("llama", seed=1), train_dataset=rows(4))
    with pytest.raises(ValueError, match="student carries a PEFT adapter"):
        KDTrainer(DistillationModel(student, recipe="lm_only"), config(recipe="lm_only"), train_dataset=rows(4))
    with pytest.raises(TypeError, match=r"student is PeftModel.*merge_and_unload\(\).requires_grad_\(True\)"):
        KDTrainer(adapted, config(recipe="teacher_head"), teacher=tiny("llama", seed=1), train_dataset=rows(4))


def test_the_trainer_refuses_what_transformers_adapted(tiny, config, rows):
    peft = pytest.importorskip("peft")
    student = tiny("llama")
    student.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="student carries a PEFT adapter"):
        KDTrainer(student, config(recipe="lm_only"), train_dataset=rows(4))
    student.delete_adapter("default")  # its layers stay, and a checkpoint would have their names
    with pytest.raises(ValueError, match="student carries a PEFT adapter"):
        KDTrainer(student, config(recipe="lm_only"), train_dataset=rows(4))


def test_an_adapter_is_known_without_peft(tiny, config, rows):
    student = tiny("llama")
    layer = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    trainer = KDTrainer(student, config(recipe="lm_only"), train_dataset=rows(4))
    student.model.layers[0].mlp.up_proj = layer(16, 32, bias=False)
    with pytest.raises(ValueError, match=r"at 'model.layers.0.mlp.up_proj'"):
        KDTrainer(student, config(recipe="lm_only"), train_dataset=rows(4))
    with pytest.raises(ValueError, match=r"at 'model.layers.0.mlp.up_proj'"):  # that came after the trainer
        trainer.train()


@pytest.mark.parametrize("kind", ON_THE_HEAD)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_adapter_on_the_head_is_refused_whatever_is_compared(tiny, kind, role):
    model = tiny("llama")
    adapt(model, *ON_THE_HEAD[kind])
    models = {"student": tiny("llama", seed=1), "teacher": tiny("llama", seed=2), role: model}
    for check_heads in (True, False):
        with pytest.raises(ValueError, match=rf"{role} \(LlamaForCausalLM\) has an adapter on its head"):
            DistillationModel(**models, recipe="teacher_head", check_heads=check_heads)


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_refused(tiny, batch, kind):
    student, teacher = tiny("llama"), tiny("llama", seed=1)
    adapted = adapt(student, kind, {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"})
    with pytest.raises(TypeError, match="prompt and prefix tuning are not supported"):
        DistillationModel(adapted, teacher, recipe="teacher_head")
    with pytest.raises(TypeError, match="teacher is PeftModelForCausalLM"):
        DistillationModel(teacher, adapted, recipe="teacher_head")
    for recipe in ("teacher_head", "projector"):  # the model underneath was frozen, and is nothing else than it was
        model = DistillationModel(student, teacher, recipe=recipe)
        with pytest.raises(ValueError, match="none of its parameters requires grad"):
            model(**batch)
        model.eval()
        assert model(**batch).loss.isfinite()


def test_a_merged_student_is_trained_and_saved_whole(tiny, config, rows, tmp_path):
    student = adapt(tiny("llama"), *IN_LAYERS["lora"]).merge_and_unload()
    frozen = KDTrainer(  # so PEFT leaves it: the projector alone would be trained
        student,
        config(recipe="projector"),
        teacher=tiny("llama", seed=1),
        train_dataset=rows(4),
        data_collator=default_data_collator,
    )
    with pytest.raises(ValueError, match=r"requires grad.*requires_grad_\(True\)"):
        frozen.train()
    trainer = KDTrainer(
        student.requires_grad_(True),
        config(recipe="lm_only"),
        train_dataset=rows(4),
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    ids = torch.arange(5, 17)[None]
    assert torch.equal(load_student(tmp_path / "saved").eval()(ids).logits, student.eval()(ids).logits)


@pytest.mark.parametrize("kind", IN_LAYERS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # the second is tied
def test_in_a_loop_of_ones_own_an_adapted_student_is_right_or_refused(tiny, family, kind):
    student, teacher = tiny(family), tiny("llama", seed=1)
    adapt(student, *IN_LAYERS[kind])
    if family == "qwen2" and kind == "trainable tokens":  # which PEFT puts on a tied head too
        with pytest.raises(ValueError, match="has an adapter on its head"):
            DistillationModel(student, teacher, recipe="teacher_head")
        return
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    trained = [p for p in student.parameters() if p.requires_grad]
    truth = loss_by_hand(student.eval(), teacher, ids, ids)
    expected = torch.autograd.grad(truth, trained, allow_unused=True)
    loss = DistillationModel(student, teacher, recipe="teacher_head")(input_ids=ids, labels=ids).loss
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert any(gradient is not None and gradient.any() for gradient in found)


@pytest.mark.parametrize("kind", IN_LAYERS)
def test_a_teachers_adapter_counts(tiny, kind):
    student, teacher = tiny("llama"), tiny("llama", seed=1)
    plain = copy.deepcopy(teacher)
    adapted = adapt(teacher, *IN_LAYERS[kind])
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    truth = loss_by_hand(student, adapted.eval(), ids, ids)
    assert not torch.isclose(truth, loss_by_hand(student, plain, ids, ids))
    for same in (teacher, adapted.get_base_model(), adapted.merge_and_unload()):
        loss = DistillationModel(student, same, recipe="teacher_head")(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, truth, rtol=1e-4, atol=1e-5)


def test_a_solved_embedding_is_not_put_under_an_adapter(tiny):
    student = tiny("llama")
    adapt(student, *IN_LAYERS["lora"])
    with pytest.raises(ValueError, match=r"student carries a PEFT adapter.*overwrite the embedding"):
        DistillationModel(student, tiny("llama", seed=1), recipe="svd_init")


# Folders


def test_folders_with_an_adapter(tiny, tmp_path, monkeypatch):
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    ids = torch.arange(5, 17)[None]
    student = load_student(tmp_path / "base")
    adapted = adapt(student, *IN_LAYERS["lora"])
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model_name_or_path=.*holds a PEFT adapter.*merge_and_unload"):
        load_student(tmp_path / "adapter")
    logits = load_teacher(tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(logits, adapted.eval()(ids).logits)
    base.save_pretrained(tmp_path / "adapter")  # beside a whole model it would be passed over without PEFT
    monkeypatch.setattr("kdfast.training.hf.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match=r"teacher_model_name_or_path=.*holds a PEFT adapter.*peft installed"):
        load_teacher(tmp_path / "adapter")


@pytest.mark.parametrize("load", [load_student, load_teacher])
def test_weights_that_would_be_drawn_at_random_are_an_error(tiny, tmp_path, load):
    model = tiny("llama")
    state = {name.replace("q_proj", "q_proj.base_layer"): value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "in place", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, first model.layers.0.self_attn.q_proj"):
        load(tmp_path / "in place")
    model.model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"first lm_head.weight, which would be drawn at random"):
        load(tmp_path / "headless")


# Quantized weights


def quantized(folder, bits):
    """A model of widths that 4 bits go into, read with so many bits a weight."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=67, **sizes)).save_pretrained(folder)
    options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_quantized_student_gets_gradients(tiny, tmp_path, bits):
    peft = pytest.importorskip("peft")
    student = quantized(tmp_path / "model", bits)
    peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model = DistillationModel(student, tiny("llama", seed=2), recipe="teacher_head").train()
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in student.parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_student_is_refused_and_a_teacher_is_right(tiny, config, rows, tmp_path, bits):
    teacher = quantized(tmp_path / "model", bits)
    for recipe in ("teacher_head", "auto"):
        with pytest.raises(ValueError, match=r"student \(LlamaForCausalLM\) is quantized \(model.layers.0"):
            KDTrainer(
                quantized(tmp_path / "model", bits), config(recipe=recipe), teacher=teacher, train_dataset=rows(4)
            )
    with pytest.raises(ValueError, match="is quantized"):
        DistillationModel(quantized(tmp_path / "model", bits), teacher, recipe="teacher_head", check_heads=False)
    student = tiny("llama")
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = DistillationModel(student, teacher, recipe="teacher_head")(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, loss_by_hand(student, teacher, ids, ids), rtol=1e-4, atol=1e-5)
    trainer = KDTrainer(
        student,
        config(recipe="teacher_head"),
        teacher=teacher,
        train_dataset=rows(8),
        data_collator=default_data_collator,
    )
    trainer.train()


def test_a_teacher_of_8_bits_is_not_sharded(tiny, tmp_path):
    model = DistillationModel(tiny("llama"), quantized(tmp_path / "model", 8), recipe="teacher_head")
    with pytest.raises(ValueError, match="shard_teacher=True, and the teacher has bitsandbytes' weights of 8 bits"):
        place_teacher(model, Accelerator(cpu=True), shard=True)


def test_an_adapted_quantized_student(tiny, config, rows, tmp_path):
    student, teacher = quantized(tmp_path / "model", 4), tiny("llama", seed=1)
    adapt(student, *IN_LAYERS["lora"])
    with pytest.raises(ValueError, match="student carries a PEFT adapter"):
        KDTrainer(student, config(recipe="teacher_head"), teacher=teacher, train_dataset=rows(4))
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = DistillationModel(student, teacher, recipe="teacher_head")(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, loss_by_hand(student, teacher, ids, ids), rtol=1e-4, atol=1e-5)


def test_a_quantized_student_is_known_without_bitsandbytes(tiny):
    student = tiny("llama")
    up = student.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(torch.zeros(up.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"is quantized \(model.layers.0.mlp.up_proj.weight\)"):
        check_model(student, "student", compare=False)
    check_model(student, "teacher", compare=False)
    up.weight = nn.Parameter(torch.zeros(up.weight.shape, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"is quantized \(model.layers.0.mlp.up_proj.weight\)"):
        check_model(student, "student", compare=False)
    student = tiny("llama")
    student.is_quantized = True
    with pytest.raises(ValueError, match=r"is quantized \(as its hf_quantizer has it\)"):
        check_model(student, "student")


def test_a_head_of_another_librarys_tensors_is_refused(tiny):
    from torch.testing._internal.two_tensor import TwoTensor

    model = tiny("llama")
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(TwoTensor(weight, weight))
    with pytest.raises(TypeError, match="A quantized head has to stay in floating point"):
        check_model(model, "teacher", compare=False)
