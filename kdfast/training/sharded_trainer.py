"""`ShardedTrainer`: a trainer with FSDP2 as a `DistillationModel` needs it; without FSDP nothing is added.

Checkpoints hold the whole student in the usual format, and the optimizer's state as accelerate writes it: one file
(FULL_STATE_DICT) or one a process (SHARDED_STATE_DICT).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from kdfast.training import fsdp
from kdfast.training.config import KDConfig
from kdfast.training.durable.trainer import ResumableTrainer
from kdfast.training.model import DistillationModel

# the optimizer's state in a checkpoint, by who wrote it
WRITERS = {
    "optimizer.pt": "one process or DDP",
    "optimizer.bin": "FSDP2 with FULL_STATE_DICT",
    "optimizer_0": "FSDP2 with SHARDED_STATE_DICT",
}


class ShardedTrainer(ResumableTrainer):
    """
    Raises:
        ValueError: a way of distributing that is not supported, or that the recipe cannot be trained under.
    """

    model: DistillationModel
    args: KDConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._check_distribution()
        if self.is_fsdp_enabled:
            fsdp.set_mixed_precision(self.accelerator)
            fsdp.place_teacher(self.model, self.accelerator, self.args.shard_teacher)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        fsdp.turn_on_for_cpus(self.accelerator, self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def _check_distribution(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed is not supported; use FSDP2, as in examples/accelerate/fsdp2.yaml")
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and parallel.non_data_parallel_size != 1:
            raise ValueError(
                f"parallelism_config={parallel}: tensor, context and sequence parallelism are not supported; expected "
                "data parallelism alone (dp_replicate_size, dp_shard_size)"
            )
        if not self.is_fsdp_enabled:
            if self.args.shard_teacher:
                raise ValueError(
                    "shard_teacher=True without FSDP: there are no shards. Launch with "
                    "examples/accelerate/fsdp2.yaml, or leave it out"
                )
            return
        fsdp.check_plugin(self.accelerator.state.fsdp_plugin)
        if (steps := self.model.recipe.projector_resolve_steps) > 0:
            raise ValueError(
                f"projector_resolve_steps={steps} under FSDP, where no process has the student's whole head to solve "
                "with. Use recipe='svd_init' or 'compressed_head', or DDP"
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.is_fsdp_enabled and self.optimizer is None:  # before any training
            self._shard()
        return super().evaluate(*args, **kwargs)

    def _shard(self) -> None:
        self.create_optimizer()  # accelerate shards a model together with its optimizer only
        with fsdp.root_owns_the_heads(self.model):
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.model

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        with fsdp.root_owns_the_heads(self.model):
            return super()._prepare_for_training(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        if self.is_fsdp_enabled:
            fsdp.reshard(self.model)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:
            self._save(output_dir, fsdp.full_state(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin  # Trainer would write the model once more, in FSDP's own format
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def check_start(self, checkpoint: str | Path | None) -> None:
        """Raises ValueError where training cannot start, or go on from a checkpoint, before anything takes long."""
        if self.is_fsdp_enabled:
            fsdp.check_dtypes(self.model)
        if checkpoint is not None:
            self._check_optimizer_state(Path(checkpoint))

    def _check_optimizer_state(self, checkpoint: Path) -> None:
        expected = "optimizer.pt"
        if self.is_fsdp_enabled:
            whole = "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
            expected = "optimizer.bin" if whole else "optimizer_0"
        found = [name for name in WRITERS if (checkpoint / name).exists()]
        if not found:
            raise ValueError(
                f"resume_from_checkpoint={str(checkpoint)!r}: it was saved with save_only_model=True, without "
                "optimizer and schedule, and cannot be gone on from. Start a new run from its student "
                "(model_name_or_path) in another output_dir"
            )
        if expected not in found:
            raise ValueError(
                f"resume_from_checkpoint={str(checkpoint)!r}: its optimizer's state, {found[0]}, was written by "
                f"{WRITERS[found[0]]}, and this launch is {WRITERS[expected]}. Launch it the same way, or start a new "
                "run from its student (model_name_or_path)"
            )
