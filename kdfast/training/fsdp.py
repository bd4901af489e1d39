"""FSDP2 through accelerate: how a `DistillationModel` is sharded, and shards on their way to and from disk.

The loss is computed in the root's forward from the heads' weights, and no head's own forward ever runs. So the root
must own the heads (with a tied embedding), the projector and the maps of the hidden-state loss: FSDP gathers them
before that forward and keeps them until the root's backward ends. The layers, and an untied input embedding, are
sharded one by one.

The teacher is frozen: each process keeps a whole copy, outside the modules that FSDP shards, or with `shard_teacher`
it is sharded as the student is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer

from kdfast.training.hf import is_dispatched, is_quantized
from kdfast.training.model import DistillationModel

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def turn_on_for_cpus(accelerator: Accelerator, plugin_args: dict[str, Any] | None) -> None:
    """Turn FSDP on for CPUs, so that a launch can be tried there; accelerate would run DDP."""
    asked = plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args or {})
        accelerator.state.distributed_type = DistributedType.FSDP


def check_launch(trainer: Trainer, shard_teacher: bool, projector_resolve_steps: int) -> None:
    """Raise ValueError for an unsupported way of distributing, or one that does not work with the recipe."""
    if trainer.is_deepspeed_enabled:
        raise ValueError("DeepSpeed is not supported; use FSDP2, as in examples/accelerate/fsdp2.yaml")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and parallel.non_data_parallel_size != 1:
        raise ValueError(
            f"parallelism_config={parallel}: tensor, context and sequence parallelism are not supported; expected "
            "data parallelism alone (dp_replicate_size, dp_shard_size)"
        )
    if not trainer.is_fsdp_enabled:
        if shard_teacher:
            raise ValueError(
                "shard_teacher=True without FSDP: there are no shards. Launch with examples/accelerate/fsdp2.yaml, or "
                "leave it out"
            )
        return
    check_plugin(trainer.accelerator.state.fsdp_plugin)
    if projector_resolve_steps > 0:
        raise ValueError(
            f"projector_resolve_steps={projector_resolve_steps} under FSDP, where no process has the student's whole "
            "head to solve with. Use recipe='svd_init' or 'compressed_head', or DDP"
        )


def check_plugin(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raise ValueError for FSDP settings that would train wrongly or are not tested here."""
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version}; expected 2: version 1 is deprecated and not tested here. Set "
            "fsdp_version: 2 in accelerate's configuration, as examples/accelerate/fsdp2.yaml does, or "
            "fsdp_config={'version': 2}"
        )
    if plugin.cpu_offload is True or isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "fsdp_offload_params=true is not supported: the optimizer would run on the CPU. Set it to false; "
            "shard_teacher=True and fsdp_activation_checkpointing: true save memory"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading=true is not supported: only one process would have the teacher. Set it to "
            "false"
        )


def set_mixed_precision(accelerator: Accelerator) -> None:
    """Gather and compute in 16 bits, reduce in fp32, and leave the loss and its metrics as they are.

    accelerate's own policy would round gradients before summing them over the processes, the schedules' weights on
    the way in, and loss and token counts on the way out.
    """
    dtype = COMPUTE_DTYPES.get(str(accelerator.mixed_precision))
    accelerator.state.fsdp_plugin.mixed_precision_policy = (
        None if dtype is None else MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    )


def place_teacher(model: DistillationModel, accelerator: Accelerator, shard: bool) -> None:
    """Keep the teacher outside the modules that FSDP shards, or with `shard` inside. Call before solving starts."""
    teacher = model.teacher
    if teacher is None:
        return
    if model.shared_head is not None:
        model.shared_head.to(accelerator.device)
    if model.average is not None:
        raise ValueError(
            "teacher_update_rate under FSDP, where no process has the student whole to average it. Use DDP, or leave "
            "teacher_update_rate out: the teacher 'self' stays as it began"
        )
    if shard and not {id(p) for p in teacher.parameters()}.isdisjoint(map(id, model.student.parameters())):
        raise ValueError("shard_teacher=True, and the teacher shares the student's weights; leave shard_teacher out")
    if shard and model.several:
        raise ValueError(
            f"shard_teacher=True with several teachers ({', '.join(model.several)}), which is not supported. Leave it "
            "out: every process has them whole; offload_teachers=True keeps them on the CPU"
        )
    if is_dispatched(teacher):
        if shard:
            raise ValueError(
                "shard_teacher=True, and accelerate has offloaded the teacher or spread it over devices (device_map, "
                "cpu_offload). Load it whole, or leave shard_teacher out"
            )
        return
    if shard and getattr(teacher, "is_loaded_in_8bit", False):
        raise ValueError(
            "shard_teacher=True, and the teacher has bitsandbytes' weights of 8 bits, which FSDP cannot split. Load it "
            "with load_in_4bit or whole, or leave shard_teacher out"
        )
    if not shard:
        model._modules.pop("teacher", None)
        object.__setattr__(model, "teacher", teacher.to(accelerator.device))
    elif (dtype := COMPUTE_DTYPES.get(str(accelerator.mixed_precision))) is not None:
        teacher.to(dtype)  # type: ignore[arg-type]  # the dtype FSDP would gather it in; a wrapper hides the annotation


def check_dtypes(model: DistillationModel) -> None:
    """Raise ValueError if trained weights have more than one dtype, or the student's are quantized."""
    if any(is_quantized(p) for p in model.student.parameters()):
        raise ValueError(
            "the student is quantized, and FSDP with such weights is not tested here. Load it whole, or use DDP"
        )
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"the trained weights are {' and '.join(sorted(map(str, dtypes)))}; FSDP wants one dtype. Load the student "
            "in fp32 (dtype='float32') and set bf16=True, which computes in bf16"
        )


@contextmanager
def root_owns_the_heads(model: DistillationModel) -> Iterator[None]:
    """Stop accelerate, while it shards, from giving a tied embedding a group of its own."""
    check_dtypes(model)
    student = model.student
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    held = {id(p) for p in head.parameters()}  # an adapter's modules_to_save contain the original too
    tied = any(id(p) in held for p in embedding.parameters())
    if tied and not isinstance(model, FSDPModule):
        model.get_input_embeddings = lambda: None  # type: ignore[assignment, method-assign, return-value]
    try:
        yield
    finally:
        model.__dict__.pop("get_input_embeddings", None)


@contextmanager
def gathered_once(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Keep gathered weights until the end: `generate` runs one forward per token, not equally many in each process."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        reshard(model)
        for part in parts:
            part.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the unsharded `state_dict` on the first process's CPU; empty on the others. All processes must call it.

    Only one whole tensor is on a device at a time. Tied weights stay one tensor.
    """
    first = torch.distributed.get_rank() == 0
    state = _sharded_state(model)
    if isinstance(model, DistillationModel):
        state = model.saved_state(state)
    distinct = {id(value): value.detach() for value in state.values()}
    for key, value in distinct.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            distinct[key] = whole.cpu()
    return {name: distinct[id(value)] for name, value in state.items()} if first else {}


def load_full_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load `state`, which is whole in every process, into a module that may be sharded."""
    if any(isinstance(value, DTensor) for value in _sharded_state(module).values()):
        set_model_state_dict(module, {**state}, options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)


def reshard(model: nn.Module) -> None:
    """Free the root's gathered weights, which a forward without a backward leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _sharded_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state's own tensors, so that tied ones are the same object."""
    reshard(module)
    return module.state_dict(keep_vars=True)
