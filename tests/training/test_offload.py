"""Teachers that accelerate has offloaded: they stay where they are, and every number is what it would be otherwise."""

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import AutoModelForCausalLM, default_data_collator

from kdfast.training import DistillationModel, KDTrainer, TeacherCache, cache_teacher, head
from kdfast.training.cache.description import teacher_fingerprint
from kdfast.training.fsdp import place_teacher

CPU = torch.device("cpu")
FAMILIES = ["llama", "gpt2", "gemma2", "biased"]  # an own head; a tied one; tied, with a cap; own, with a bias
RECIPES = ["projector", "teacher_head", "compressed_head", "svd_init", "projector_refit", "probe"]


@pytest.fixture
def make(tiny):
    """A teacher of width 32."""

    def made(family):
        model = tiny("llama" if family == "biased" else family, width=32)
        if family == "biased":
            model.lm_head = nn.Linear(32, 67)
        return model

    return made


def on_cpu(model, folder):
    cpu_offload(model, execution_device=CPU)


def on_disk(model, folder):
    disk_offload(model, str(folder), execution_device=CPU)


def in_parts(model, folder):
    """Some parts in place, some on the disk: what device_map="auto" makes of a model that does not fit."""
    leaves = [name for name, module in model.named_modules() if not [*module.children()]]
    places = {name: "disk" if "mlp" in name or "lm_head" in name else "cpu" for name in leaves}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


def with_more_hooks(model, folder):
    on_cpu(model, folder)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        add_hook_to_module(module, ModelHook(), append=True)


WAYS = [on_cpu, on_disk, in_parts, with_more_hooks]


def names_offloaded(model):
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}


def run(student, teacher, batch, recipe, **options):
    torch.manual_seed(7)  # of a projector's start
    model = DistillationModel(student, teacher, recipe=recipe, **options)
    model.to(CPU)
    model.solve([batch] * 3, tokens=32)
    output = model(**batch, with_fidelity=True)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return {"loss": output.loss, **output.metrics._asdict(), **output.fidelity._asdict(), **gradients}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value is expected[name] or torch.equal(value.nan_to_num(-1), expected[name].nan_to_num(-1)), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_teacher_gives_the_same_bits(tiny, make, batch, tmp_path, family, way):
    expected = run(tiny("llama", seed=1), make(family), batch, "teacher_head")
    teacher = make(family)
    way(teacher, tmp_path)
    offloaded = names_offloaded(teacher)
    assert offloaded
    assert_same(run(tiny("llama", seed=1), teacher, batch, "teacher_head"), expected)
    assert names_offloaded(teacher) >= offloaded, "it is where it was"


@pytest.mark.parametrize("recipe", RECIPES)
def test_under_every_recipe(tiny, make, batch, tmp_path, recipe):
    expected = run(tiny("llama", seed=1, spread=0.02), make("gpt2"), batch, recipe)
    teacher = make("gpt2")
    on_disk(teacher, tmp_path)
    assert_same(run(tiny("llama", seed=1, spread=0.02), teacher, batch, recipe), expected)


@pytest.mark.parametrize("recipe", ["auto", "teacher_head", "projector_refit"])
@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_the_trainer_leaves_an_offloaded_teacher_where_it_is(tiny, make, config, rows, tmp_path, recipe, hidden_weight):
    def train(teacher, folder):
        saved = {"output_dir": str(tmp_path / folder), "save_strategy": "steps", "save_steps": 2}
        trainer = KDTrainer(
            tiny("llama", seed=1, spread=0.02),
            config(recipe=recipe, hidden_weight=hidden_weight, **saved),
            teacher=teacher,
            train_dataset=rows(16),
            eval_dataset=rows(4),
            data_collator=default_data_collator,
        )
        trainer.train()
        numbers = {k: v for k, v in trainer.evaluate().items() if not k.endswith(("_second", "runtime"))}
        weights = AutoModelForCausalLM.from_pretrained(tmp_path / folder / "checkpoint-4").state_dict()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], numbers, weights

    losses, numbers, weights = train(make("llama"), "whole")
    teacher = make("llama")
    on_cpu(teacher, tmp_path)
    found = train(teacher, "offloaded")
    assert found[0] == losses
    assert found[1] == numbers
    assert_same(found[2], weights)
    assert teacher.lm_head.weight.is_meta


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_an_offloaded_teacher_is_the_same_cache(make, rows, tmp_path, family, way):
    teacher, data = make(family), rows(4)
    cache_teacher(teacher, {"train": data}, tmp_path / "cache", k=8, name="teacher")
    way(teacher, tmp_path / "offloaded")
    cache_teacher(teacher, {"train": data}, tmp_path / "cache", k=8, name="teacher")  # the same teacher: it is complete
    cache_teacher(teacher, {"train": data}, tmp_path / "again", k=8, name="teacher")
    one, other = (TeacherCache(tmp_path / folder).dataset("train", data) for folder in ("cache", "again"))
    for i in range(len(data)):
        assert_same(one[i], other[i])
    assert teacher_fingerprint(teacher) == teacher_fingerprint(make(family))


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_student_is_refused(tiny, config, rows, tmp_path, way):
    student = tiny("llama")
    way(student, tmp_path)
    for recipe in ("teacher_head", "auto"):
        with pytest.raises(ValueError, match=r"student \(LlamaForCausalLM\).*offloaded by accelerate.*meta"):
            KDTrainer(student, config(recipe=recipe), teacher=tiny("llama", seed=1), train_dataset=rows(4))


def test_under_fsdp_an_offloaded_teacher_is_not_sharded(tiny, tmp_path):
    teacher = tiny("llama", seed=1)
    on_cpu(teacher, tmp_path)
    model = DistillationModel(tiny("llama"), teacher, recipe="teacher_head")
    place_teacher(model, Accelerator(cpu=True), shard=False)
    assert model.teacher is teacher
    with pytest.raises(ValueError, match="shard_teacher=True, and accelerate has offloaded the teacher"):
        place_teacher(model, Accelerator(cpu=True), shard=True)


def test_the_head_of_an_offloaded_model_is_read_frozen_alone(tiny, tmp_path):
    model = tiny("llama")
    hidden, weight = torch.zeros(3, 16), model.lm_head.weight.detach()
    on_cpu(model, tmp_path)
    with pytest.raises(ValueError, match=r"offloaded.*would get no gradient.*requires_grad_\(False\)"):
        head(model, hidden)
    with torch.no_grad():
        assert torch.equal(head(model, hidden).weight, weight)
    assert torch.equal(head(model.requires_grad_(False), hidden).weight, weight)


def test_a_student_with_hooks_on_one_device_is_trained(tiny, batch):
    student = tiny("llama")
    dispatch_model(student, {"": "cpu"}, force_hooks=True)
    expected = run(tiny("llama"), tiny("llama", seed=1), batch, "teacher_head")
    assert_same(run(student, tiny("llama", seed=1), batch, "teacher_head"), expected)
