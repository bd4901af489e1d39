"""What is refused before anything is sharded, and what accelerate is told. Sharded runs: test_distributed.py."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from kdfast.training import DistillationModel, KDTrainer, NonFiniteLossError, fsdp
from kdfast.training.durable.nan_guard import NonFiniteGuard


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    """What these tests write into accelerate's state is every later trainer's too."""
    yield
    AcceleratorState._reset_state()


def plugin(**changes):
    return SimpleNamespace(**{"fsdp_version": 2, "cpu_offload": None, "cpu_ram_efficient_loading": False, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version=1; expected 2"),
        ({"cpu_offload": torch.distributed.fsdp.CPUOffloadPolicy()}, "fsdp_offload_params=true is not supported"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading=true is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(changes, message):
    fsdp.check_plugin(plugin())
    with pytest.raises(ValueError, match=message):
        fsdp.check_plugin(plugin(**changes))


@pytest.mark.parametrize(("given", "sharded"), [("true", True), (True, True), ("false", False), (None, False)])
def test_fsdp_is_true_or_false_in_text_too(config, given, sharded):
    args = config(fsdp=given)
    assert bool(args.fsdp) is sharded
    assert (args.fsdp_plugin_args is not None) is sharded


def test_a_sharded_teacher_needs_shards(tiny, config):
    with pytest.raises(ValueError, match="shard_teacher=True without FSDP"):
        KDTrainer(tiny(), config(shard_teacher=True), teacher=tiny(width=24))


@pytest.mark.parametrize(
    ("launched", "message"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed is not supported; use FSDP2"),
        ({"is_fsdp_enabled": True}, "projector_resolve_steps=2 under FSDP"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(tiny, config, launched, message):
    trainer = KDTrainer(tiny(), config(recipe="projector_refit", projector_resolve_steps=2), teacher=tiny(width=24))
    trainer.accelerator.state.fsdp_plugin = plugin()
    vars(trainer).update(launched)
    with pytest.raises(ValueError, match=message):
        fsdp.check_launch(trainer, trainer.args.shard_teacher, trainer.model.recipe.projector_resolve_steps)


def test_other_parallelism_is_refused(tiny, config):
    trainer = KDTrainer(tiny(), config(), teacher=tiny(width=24))
    trainer.accelerator.state.parallelism_config = SimpleNamespace(non_data_parallel_size=2)
    with pytest.raises(ValueError, match="tensor, context and sequence parallelism are not supported"):
        fsdp.check_launch(trainer, trainer.args.shard_teacher, trainer.model.recipe.projector_resolve_steps)


def test_what_is_summed_is_on_the_accelerator():
    """NCCL takes nothing else, and before it is sharded a model may be on the CPU."""
    guard, summed = NonFiniteGuard(torch.device("cpu"), lambda: None), []
    guard._current = guard._current.to("meta")
    guard.check_weights(
        [("a", torch.ones(2)), ("b", torch.ones(3))],
        lambda marks: (summed.append(marks.device.type), torch.zeros(2))[1],
    )
    assert summed == ["meta"]


def test_a_weight_that_is_bad_in_another_process_is_named():
    guard = NonFiniteGuard(torch.device("cpu"), lambda: None)
    with pytest.raises(NonFiniteLossError, match=r"1 parameter\(s\) hold NaN or infinity, first b"):
        guard.check_weights([("a", torch.ones(2)), ("b", torch.ones(3))], lambda marks: torch.tensor([0.0, 1.0]))


def test_weights_of_two_dtypes_are_refused_before_anything_takes_long(tiny, config):
    trainer = KDTrainer(tiny().bfloat16(), config(), teacher=tiny(width=24))
    trainer.accelerator.state.fsdp_plugin, trainer.is_fsdp_enabled = plugin(), True
    with pytest.raises(ValueError, match="FSDP wants one dtype"):
        trainer.train()
    assert trainer.optimizer is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_an_embedding_that_is_not_the_head_may_be_a_group_of_its_own(tiny, family):
    model = DistillationModel(tiny(family), tiny(width=24), recipe="projector_fixed")
    embedding = model.student.get_input_embeddings()
    with fsdp.root_owns_the_heads(model):
        assert model.get_input_embeddings() is (None if family == "gpt2" else embedding)
    assert model.get_input_embeddings() is embedding


def test_trained_weights_of_two_dtypes_are_refused(tiny):
    model = DistillationModel(tiny().bfloat16(), tiny(width=24), recipe="projector_fixed")
    with (
        pytest.raises(ValueError, match=r"torch.bfloat16 and torch.float32; FSDP wants one dtype. Load the student"),
        fsdp.root_owns_the_heads(model),
    ):
        pass


def test_a_replicated_teacher_is_out_of_the_module_tree_and_a_sharded_one_in_it(tiny):
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")
    for shard, layers in ((False, ["LlamaDecoderLayer"]), (True, ["GPT2Block", "LlamaDecoderLayer"])):
        model = DistillationModel(tiny("llama"), tiny("gpt2", width=24), recipe="teacher_head")
        fsdp.place_teacher(model, accelerator, shard)
        assert model._no_split_modules == layers
        assert any(name.startswith("teacher.") for name, _ in model.named_parameters()) is shard
        assert model.teacher.dtype == (torch.bfloat16 if shard else torch.float32)
        model.train()
        assert not model.teacher.training
        ids = torch.arange(6)[None]
        assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize(
    ("launched", "written", "message"),
    [
        (None, "optimizer.bin", "written by FSDP2 with FULL_STATE_DICT, and this launch is one process or DDP"),
        ("FULL_STATE_DICT", "optimizer.pt", "written by one process or DDP, and this launch is FSDP2 with FULL"),
        ("SHARDED_STATE_DICT", "optimizer.bin", "FULL_STATE_DICT, and this launch is FSDP2 with SHARDED_STATE_DICT"),
    ],
)
def test_an_optimizer_state_of_another_launch_is_refused(tiny, config, tmp_path, launched, written, message):
    trainer = KDTrainer(tiny(), config(), teacher=tiny(width=24))
    trainer.is_fsdp_enabled = launched is not None
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(state_dict_type=launched)
    with pytest.raises(ValueError, match=r"saved with save_only_model=True.*Start a new run from its student"):
        trainer.check_start(tmp_path)
    (tmp_path / written).touch()
    with pytest.raises(ValueError, match=message):
        trainer.check_start(tmp_path)


def test_a_teacher_that_is_the_student_is_not_sharded_with_it(tiny):
    peft, cpu = pytest.importorskip("peft"), SimpleNamespace(device="cpu", mixed_precision="no")
    model = DistillationModel(tiny(), "self", recipe="teacher_head", teacher_update_rate=0.5)
    with pytest.raises(ValueError, match="teacher_update_rate under FSDP"):
        fsdp.place_teacher(model, cpu, shard=False)
    model = DistillationModel(tiny(), "self", recipe="teacher_head", peft_config=peft.LoraConfig())
    with pytest.raises(ValueError, match="shard_teacher=True, and the teacher shares the student's weights"):
        fsdp.place_teacher(model, cpu, shard=True)
