"""Students with an adapter, and quantized weights: what is trained and saved is right, and the rest is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_models import RECOMPUTE, loss_by_hand
from torch import nn
from transformers import AutoModelForCausalLM, default_data_collator

from kdfast.training import DistillationModel, KDTrainer, load_student, load_teacher
from kdfast.training.durable.errors import DamagedCheckpointError
from kdfast.training.fsdp import check_dtypes, place_teacher
from kdfast.training.hf import check_model
from kdfast.training.recipes import choose_recipe

# What PEFT leaves inside a Llama that it was given, by kind of adapter.
IN_LAYERS = {
    "lora": ("LoraConfig", {"target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("LoraConfig", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"up_proj": 3}}),
    "dora": ("LoraConfig", {"target_modules": ["q_proj"], "use_dora": True}),
    "embedding": ("LoraConfig", {"target_modules": ["embed_tokens"]}),
    "parameters": ("LoraConfig", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "modules_to_save": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}),
    "head": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied": (
        "LoraConfig",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "bias": ("LoraConfig", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "trainable tokens": ("LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "loha": ("LoHaConfig", {"target_modules": ["q_proj"]}),
    "lokr": ("LoKrConfig", {"target_modules": ["q_proj"]}),
    "oft": ("OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 4}),
    "layer norms": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
}
PROMPTS = ("PrefixTuningConfig", "PromptTuningConfig")


def config_of(kind, settings=None, **more):
    peft = pytest.importorskip("peft")
    name, given = IN_LAYERS[kind] if settings is None else (kind, settings)
    return getattr(peft, name)(**{**copy.deepcopy(given), **more})


def adapt(model, kind, settings=None, spread=(1, 0.3), **more):
    """The PeftModel over `model`, which is changed in place; the adapter's weights drawn, so that it does something."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, config_of(kind, settings, **more))
    torch.manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(*spread)
    return adapted


def put_on_tied_head(family, kind):
    """Whether PEFT wraps a head that is tied to the embedding, in a way that leaves no one weight (V, H)."""
    return family == "qwen2" and kind == "trainable tokens"


def ids_of(rows=2, tokens=9):
    return torch.randint(3, 67, (rows, tokens), generator=torch.Generator().manual_seed(0))


def relative_error(found, expected):
    """The largest, over tensors, of |difference| / |expected|."""
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None and e.any()]
    assert len(pairs) > 0
    return max(((f.double() - e.double()).norm() / e.double().norm()).item() for f, e in pairs)


# Values and gradients


@pytest.mark.parametrize("kind", IN_LAYERS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # the second is tied
def test_gradients_are_those_of_whole_logits(tiny, family, kind):
    student, teacher = tiny(family, layers=2).double(), tiny("llama", seed=1).double()
    adapted = adapt(student, kind).double()
    if put_on_tied_head(family, kind):
        with pytest.raises(ValueError, match="has an adapter on its head"):
            DistillationModel(adapted, teacher, recipe="teacher_head")
        return
    ids = ids_of()
    truth = loss_by_hand(adapted.eval(), teacher, ids, ids)
    trained = [p for p in student.parameters() if p.requires_grad]
    expected = torch.autograd.grad(truth, trained, allow_unused=True)
    model = DistillationModel(adapted, teacher, recipe="teacher_head").eval()
    assert model.student is student
    loss = model(input_ids=ids, labels=ids).loss
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    torch.testing.assert_close(loss, truth)
    assert [f is None for f in found] == [e is None for e in expected]
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])  # plain, Conv1D, tied
@pytest.mark.parametrize("recipe", ["lm_only", "teacher_head", "compressed_head", "projector"])
def test_gradients_in_fp32_are_those_of_whole_logits_in_fp64(tiny, family, recipe):
    student, teacher = tiny(family, layers=2, spread=0.1), tiny(family, seed=1)
    modules = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    adapt(student, "lora", target_modules=modules, spread=(0, 0.1))
    gradients, ids = [], ids_of(40)
    for engine, dtype in {"reference": torch.float64, "torch": torch.float32}.items():  # the first: whole logits
        models = (copy.deepcopy(one).to(dtype) for one in (student, teacher))
        model = DistillationModel(*models, recipe=recipe, engine=engine).eval()
        if model.logit_projector is not None:
            drawn = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
            model.logit_projector.load_state_dict({"weight": drawn / 10, "bias": drawn[0]})
        model.solve([{"input_ids": ids, "labels": ids}])
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert relative_error(*reversed(gradients)) < 1e-6


# Ways to bring one


def test_peft_config_is_put_in_and_the_base_frozen(tiny, config, rows):
    student, given = tiny("llama"), config_of("lora")
    trainer = KDTrainer(
        student,
        config(recipe="projector"),
        teacher=tiny("llama", seed=1),
        peft_config=given,
        train_dataset=rows(8),
        data_collator=default_data_collator,
    )
    assert trainer.model.student is student
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert names == {name for name in names if ".lora_" in name or name.startswith("logit_projector.")}
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])} == names
    groups = {group["name"]: len(group["params"]) for group in trainer.optimizer.param_groups}
    assert groups["student"] == 4
    assert set(groups) == {"student", "projector"}


def test_the_same_adapter_comes_in_four_ways(tiny, config, rows):
    peft, losses = pytest.importorskip("peft"), []
    for how in ("peft_config", "PeftModel", "get_peft_model", "add_adapter"):
        student, given, made = tiny("llama"), config_of("lora"), {}
        torch.manual_seed(42)  # what KDTrainer sets is TrainingArguments' seed
        if how == "peft_config":
            made["peft_config"] = given
        elif how == "add_adapter":
            student.add_adapter(given)
        else:
            adapted = peft.get_peft_model(student, given)
            student = adapted if how == "PeftModel" else student
        torch.manual_seed(0)
        trainer = KDTrainer(
            student,
            config(recipe="lm_only", learning_rate=0.05),
            train_dataset=rows(8),
            data_collator=default_data_collator,
            **made,
        )
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert losses[0][-1] != losses[0][0]


def test_what_cannot_be_put_in_is_refused(tiny, config):
    peft = pytest.importorskip("peft")
    args = config(recipe="lm_only")
    with pytest.raises(TypeError, match="peft_config is dict; expected one of PEFT's, such as LoraConfig"):
        KDTrainer(tiny("llama"), args, peft_config={"r": 8})
    with pytest.raises(TypeError, match="peft_config is PromptTuningConfig; prompt and prefix tuning are not"):
        KDTrainer(tiny("llama"), args, peft_config=peft.PromptTuningConfig(num_virtual_tokens=2))
    student = tiny("llama")
    adapted = adapt(student, "lora")
    for given in (student, adapted):
        with pytest.raises(ValueError, match=r"the student has an adapter already \(at '.*q_proj'\); leave one out"):
            KDTrainer(given, args, peft_config=config_of("lora"))
    with pytest.raises(ValueError, match="peft_config is given besides a DistillationModel"):
        KDTrainer(DistillationModel(tiny("llama"), recipe="lm_only"), args, peft_config=config_of("lora"))


def test_without_peft_the_extra_is_named(tiny, config, monkeypatch):
    monkeypatch.setattr("kdfast.training.adapters.is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"peft_config needs peft: pip install 'kdfast\[lora\]'"):
        KDTrainer(tiny("llama"), config(recipe="lm_only"), peft_config=object())


@pytest.mark.parametrize("recipe", ["svd_init", "svd_blocks"])
def test_a_solved_start_is_not_put_under_an_adapter(tiny, recipe):
    student, teacher = tiny("llama"), tiny("llama", seed=1)
    assert choose_recipe(student, teacher).recipe == "svd_blocks"
    adapt(student, "lora")
    with pytest.raises(ValueError, match=r"student carries a PEFT adapter.*overwrite the embedding"):
        DistillationModel(student, teacher, recipe=recipe)
    assert choose_recipe(student, teacher).recipe == "compressed_head"


# What would not be trained, or not saved


def frozen(student):
    adapt(student, "lora", inference_mode=True)


def merged(student):
    adapt(student, "lora").merge_adapter()


def two(student):
    adapt(student, "lora").add_adapter("second", config_of("lora"))


def deleted(student):
    student.add_adapter(config_of("lora"))
    student.delete_adapter("default")  # its layers stay, and a checkpoint would have their names


def more_than_the_adapter(student):
    adapt(student, "lora")
    student.model.norm.weight.requires_grad_(True)


def counts_its_steps(student):
    adapt(student, "AdaLoraConfig", {"target_modules": ["q_proj"], "total_step": 10})


def looks_for_tokens(student):
    adapt(student, "lora", alora_invocation_tokens=[5, 6])


def shares_a_bank(student):
    adapt(student, "VBLoRAConfig", {"target_modules": ["q_proj"], "vector_length": 4, "num_vectors": 8, "topk": 2})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (frozen, r"adapter 'default' is frozen.*is_trainable=True.*inference_mode"),
        (merged, "adapter is merged into its base .* unmerge_adapter"),
        (two, r"and 2 adapters \(default, second\); expected one"),
        (deleted, r"and 0 adapters \(\); expected one.*load the model anew"),
        (more_than_the_adapter, "model.norm.weight is trained and no part of the adapter .* modules_to_save"),
        (counts_its_steps, "adapter is ADALORA, which PEFT runs by a forward of its own"),
        (looks_for_tokens, "adapter is LORA, which PEFT runs by .* not aLoRA"),
        (shares_a_bank, "adapter is VBLORA, whose weights PEFT does not find in the model alone"),
    ],
)
def test_an_adapter_that_would_be_lost_is_refused(tiny, config, rows, make, message):
    student = tiny("llama")
    make(student)
    with pytest.raises(ValueError, match=message):
        KDTrainer(student, config(recipe="lm_only"), train_dataset=rows(4))
    later = tiny("llama")
    trainer = KDTrainer(later, config(recipe="lm_only"), train_dataset=rows(4))
    make(later)
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_refused(tiny, batch, kind):
    student, teacher = tiny("llama"), tiny("llama", seed=1)
    adapted = adapt(student, kind, {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"})
    for role, models in {"student": (adapted, teacher), "teacher": (teacher, adapted)}.items():
        with pytest.raises(TypeError, match=f"{role} is PeftModelForCausalLM with P.*_TUNING; prompt and prefix"):
            DistillationModel(*models, recipe="teacher_head")
    for recipe in ("teacher_head", "projector"):  # the model underneath was frozen, and is nothing else than it was
        model = DistillationModel(student, teacher, recipe=recipe)
        with pytest.raises(ValueError, match="none of its parameters requires grad"):
            model(**batch)
        model.eval()
        assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_adapter_on_the_head_is_refused_whatever_is_compared(tiny, role):
    adapted = adapt(tiny("llama"), "LoraConfig", {"target_modules": ["lm_head"]})
    models = {"student": tiny("llama", seed=1), "teacher": tiny("llama", seed=2), role: adapted}
    for check_heads in (True, False):
        with pytest.raises(ValueError, match=rf"{role} \(LlamaForCausalLM\) has an adapter on its head.*modules_to_s"):
            DistillationModel(**models, recipe="teacher_head", check_heads=check_heads)


def test_a_merged_student_is_trained_and_saved_whole(tiny, config, rows, tmp_path):
    student = adapt(tiny("llama"), "lora").merge_and_unload()
    given = {"train_dataset": rows(4), "data_collator": default_data_collator}
    frozen = KDTrainer(student, config(recipe="projector"), teacher=tiny("llama", seed=1), **given)  # so PEFT leaves it
    with pytest.raises(ValueError, match=r"requires grad.*requires_grad_\(True\)"):
        frozen.train()
    trainer = KDTrainer(student.requires_grad_(True), config(recipe="lm_only"), **given)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    ids = torch.arange(5, 17)[None]
    assert torch.equal(load_student(tmp_path / "saved").eval()(ids).logits, student.eval()(ids).logits)


# Checkpoints


@pytest.fixture
def base(tiny, tmp_path):
    """A folder with a whole model of the family, from which adapters are trained."""

    def make(family="llama"):
        folder = tmp_path / f"base-{family}"
        if not folder.exists():
            tiny(family, layers=2, dropout=0.1).save_pretrained(folder)
        return folder

    return make


def trainer_of(base, config, rows, tiny, kind="lora", recipe="projector", **given):
    more = {"lora_dropout": 0.1} if IN_LAYERS[kind][0] == "LoraConfig" and "parameters" not in kind else {}
    given = {"learning_rate": 0.02, "save_strategy": "steps", "save_steps": 2, "max_steps": 6, **given}
    return KDTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        config(recipe=recipe, **given),
        teacher=tiny("llama", seed=1, width=24) if recipe == "projector" else None,
        peft_config=config_of(kind, **({} if kind == "dora" else more)),
        train_dataset=rows(20),
        eval_dataset=rows(3, seed=9),
        data_collator=default_data_collator,
    )


@pytest.mark.parametrize("kind", IN_LAYERS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_peft_reads_is_what_was_trained(tiny, base, config, rows, family, kind):
    peft = pytest.importorskip("peft")
    if put_on_tied_head(family, kind):
        return
    folder = base(family)
    trainer = trainer_of(folder, config, rows, tiny, kind, recipe="lm_only", max_steps=2)
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        trained = trainer.model.student.eval()(ids_of()).logits
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()(ids_of()).logits
    assert not torch.equal(trained, plain)
    for run in (Path(trainer.args.output_dir), Path(trainer.args.output_dir) / "checkpoint-2"):
        assert not (run / "config.json").exists()
        assert not (run / "model.safetensors").exists()
        made = AutoModelForCausalLM.from_pretrained(folder)
        for loaded in (
            peft.PeftModel.from_pretrained(made, run),
            peft.AutoPeftModelForCausalLM.from_pretrained(run),
        ):
            with torch.no_grad():
                assert torch.equal(loaded.eval()(ids_of()).logits, trained)
        saved = json.loads((run / "adapter_config.json").read_text())
        assert (saved["inference_mode"], saved["base_model_name_or_path"]) == (True, str(folder))


def test_files_are_those_that_peft_writes(tiny, base, config, rows, tmp_path):
    peft = pytest.importorskip("peft")
    given = config_of("lora", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base()), given)
    trainer = KDTrainer(adapted, config(recipe="lm_only"), train_dataset=rows(8), data_collator=default_data_collator)
    trainer.train()
    trainer.save_model(tmp_path / "ours")
    adapted.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((tmp_path / which / "adapter_config.json").read_text()) for which in ("ours", "theirs"))
    assert ours == theirs


@pytest.mark.parametrize("kind", ["lora", "dora", "head"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tiny, base, config, rows, kind):
    unbroken = trainer_of(base(), config, rows, tiny, kind)
    unbroken.train()
    folder = Path(unbroken.args.output_dir) / "checkpoint-2"
    assert {"adapter_model.safetensors", "adapter_config.json", "logit_projector.safetensors", "SHA256SUMS"} < {
        path.name for path in folder.iterdir()
    }
    resumed = trainer_of(base(), config, rows, tiny, kind)
    with torch.no_grad():  # whatever is not restored shows
        for p in resumed.model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    resumed.train(resume_from_checkpoint=str(folder))
    for (name, p), q in zip(resumed.model.named_parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_best_adapter_is_loaded_in_the_end(tiny, base, config, rows):
    trainer = trainer_of(
        base(), config, rows, tiny, learning_rate=0.5, save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=3,
        load_best_model_at_end=True, metric_for_best_model="ce", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    seen = {line["step"]: line["eval_ce"] for line in trainer.state.log_history if "eval_ce" in line}
    assert min(seen.values()) < seen[3]
    assert trainer.evaluate()["eval_ce"] == pytest.approx(min(seen.values()), abs=1e-6)


def test_a_checkpoint_of_another_adapter_is_named(tiny, base, config, rows):
    trainer_of(base(), config, rows, tiny).train()
    for kind in ("dora", "head"):
        with pytest.raises(DamagedCheckpointError, match="holds another adapter than the student's"):
            trainer_of(base(), config, rows, tiny, kind).train(resume_from_checkpoint=True)
    whole = KDTrainer(
        AutoModelForCausalLM.from_pretrained(base()),
        config(recipe="lm_only"),
        train_dataset=rows(8),
        data_collator=default_data_collator,
    )
    with pytest.raises(DamagedCheckpointError, match="not a checkpoint: it has no"):
        whole.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
def test_recomputed_activations_change_nothing(tiny, base, config, rows, kind):
    ended = []
    for recompute in (False, True):
        given = {"recipe": "lm_only", "max_steps": 2, "save_strategy": "no", RECOMPUTE: recompute}
        trainer = trainer_of(base(), config, rows, tiny, kind, **given)
        trainer.train()
        ended.append([p.clone() for p in trainer.model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*ended, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-7)


# Teachers


@pytest.mark.parametrize("kind", IN_LAYERS)
def test_a_teachers_adapter_counts(tiny, kind):
    student, teacher = tiny("llama"), tiny("llama", seed=1)
    plain = copy.deepcopy(teacher)
    adapted = adapt(teacher, kind)
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    truth = loss_by_hand(student, adapted.eval(), ids, ids)
    assert not torch.isclose(truth, loss_by_hand(student, plain, ids, ids))
    for same in (teacher, adapted, adapted.merge_and_unload()):
        loss = DistillationModel(student, same, recipe="teacher_head")(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, truth, rtol=1e-4, atol=1e-5)


# Folders


def test_folders_with_an_adapter(tiny, tmp_path, monkeypatch):
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    ids = torch.arange(5, 17)[None]
    adapted = adapt(load_student(tmp_path / "base"), "modules_to_save")
    adapted.save_pretrained(tmp_path / "adapter")
    for load, trained in ((load_student, True), (load_teacher, False)):
        loaded = load(tmp_path / "adapter")
        torch.testing.assert_close(loaded.eval()(ids).logits, adapted.eval()(ids).logits)
        names = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert bool(names) is trained
        assert all("lora_" in name or "modules_to_save" in name for name in names)
    monkeypatch.setattr("kdfast.training.adapters.is_peft_available", lambda: False)
    for load in (load_student, load_teacher):
        with pytest.raises(ImportError, match=r"model_name_or_path=.*holds a PEFT adapter, which needs peft: pip"):
            load(tmp_path / "adapter")


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
def test_gradients_on_a_quantized_base_are_those_of_whole_logits(tiny, tmp_path, bits):
    student, teacher, ids = quantized(tmp_path / "model", bits), tiny("llama", seed=1), ids_of()
    adapted = adapt(student, "lora", spread=(0, 0.1))
    with torch.no_grad():
        adapted.eval()(ids)  # after which bitsandbytes' 4-bit layers on some CPUs give no gradient
    model = DistillationModel(adapted, teacher, recipe="teacher_head").train()
    trained = [p for p in student.parameters() if p.requires_grad]
    assert len(trained) == 4
    truth = loss_by_hand(student, teacher, ids, ids)
    expected = torch.autograd.grad(truth, trained)
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, truth)
        assert relative_error(torch.autograd.grad(loss, trained), expected) < 1e-6
        with torch.no_grad():
            model.eval()(input_ids=ids, labels=ids)
        model.train()


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_quantized_base_is_trained_evaluated_saved_and_resumed(tiny, config, rows, tmp_path, bits):
    peft, weights = pytest.importorskip("peft"), []
    for resume in (None, str(tmp_path / "run/checkpoint-2")):
        trainer = KDTrainer(
            quantized(tmp_path / "model", bits),
            config(max_steps=4, learning_rate=0.05, eval_strategy="steps", eval_steps=1, save_strategy="steps",
                   save_steps=2),
            teacher=tiny("llama", seed=1),
            peft_config=config_of("lora", lora_dropout=0.1),
            train_dataset=rows(8),
            eval_dataset=rows(2),
            data_collator=default_data_collator,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        weights.append([p for p in trainer.model.parameters() if p.requires_grad])
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))
    trainer.save_model()
    reread = peft.PeftModel.from_pretrained(quantized(tmp_path / "model", bits), trainer.args.output_dir)
    DistillationModel(reread, recipe="lm_only")  # bitsandbytes' products for inference on some CPUs are rounded to bf16
    with torch.no_grad():
        assert torch.equal(reread.eval()(ids_of()).logits, trainer.model.student.eval()(ids_of()).logits)


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


def test_a_quantized_student_is_not_sharded(tmp_path):
    model = DistillationModel(adapt(quantized(tmp_path / "model", 4), "lora"), recipe="lm_only")
    with pytest.raises(ValueError, match=r"the student is quantized, and FSDP .* use DDP"):
        check_dtypes(model)


def test_a_teacher_of_8_bits_is_not_sharded(tiny, tmp_path):
    model = DistillationModel(tiny("llama"), quantized(tmp_path / "model", 8), recipe="teacher_head")
    with pytest.raises(ValueError, match="shard_teacher=True, and the teacher has bitsandbytes' weights of 8 bits"):
        place_teacher(model, Accelerator(cpu=True), shard=True)


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
    with pytest.raises(TypeError, match="head has to stay in floating point"):
        check_model(model, "teacher", compare=False)
