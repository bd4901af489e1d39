"""A LightningModule around `DistillationModel`.

    pip install lightning
    python examples/lightning_module.py
    python examples/lightning_module.py --use gpt2-medium gpt2 train.txt held_out.txt

`DistillationModel` has student, frozen teacher and loss under one forward. It keeps the teacher in eval mode whatever
Lightning sets, and out of every `state_dict`, so checkpoints hold the student alone. `distillation_param_groups`
leaves the teacher out of the optimizer and gives a projector, where the recipe has one, its own rate.

It ends with the student's cross entropy on held-out text, in nats per token, before and after: 8.1 and
5.5 with the small models.

For your own data: `accumulate_grad_batches` averages micro-batches, each the mean over its own targets, which is
right here, where all blocks are of one length. With padding, give `num_items_in_batch` (accelerate_loop.py counts it)
times 1/accumulate_grad_batches. `Trainer(strategy="ddp", …)` works as it stands.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdfast import distillation_param_groups
from kdfast.training import DistillationModel, small_models

try:
    import lightning as L
except ImportError:
    raise SystemExit("this example needs Lightning: pip install lightning") from None


class Distillation(L.LightningModule):
    def __init__(self, student, teacher, learning_rate, kd_weight=2.0, recipe="teacher_head"):
        super().__init__()
        self.model = DistillationModel(student, teacher, recipe=recipe)
        self.learning_rate, self.kd_weight = learning_rate, kd_weight

    def training_step(self, batch, _):
        output = self.model(**batch, kd_weight=self.kd_weight)
        self.log_dict({"loss": output.loss, "ce": output.metrics.ce, "kd": output.metrics.kd}, prog_bar=True)
        return output.loss

    def validation_step(self, batch, _):
        output = self.model(**batch, kd_weight=self.kd_weight)
        self.log_dict({"val_ce": output.metrics.ce, "val_kd": output.metrics.kd}, sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(distillation_param_groups(self.model, self.learning_rate, weight_decay=0.01))
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", nargs=4, metavar=("TEACHER", "STUDENT", "TEXT", "EVAL_TEXT"))
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="5e-5 is more like it for a trained student")
    parser.add_argument("--output-dir", help="checkpoints go here (default: none are kept)")
    args = parser.parse_args(argv)
    teacher_name, student_name, text, eval_text = args.use or small_models()

    L.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    train = DataLoader(blocks(text, tokenizer), batch_size=4, shuffle=True)
    held_out = DataLoader(blocks(eval_text, tokenizer)[:64], batch_size=16)
    module = Distillation(
        AutoModelForCausalLM.from_pretrained(student_name, dtype="float32"),
        AutoModelForCausalLM.from_pretrained(teacher_name),
        args.learning_rate,
    )
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = L.Trainer(
            max_steps=args.max_steps,
            gradient_clip_val=1.0,
            log_every_n_steps=max(1, args.max_steps // 5),
            enable_checkpointing=args.output_dir is not None,
            default_root_dir=args.output_dir or nowhere,
            logger=False,
            enable_model_summary=False,
        )
        (before,) = trainer.validate(module, held_out, verbose=False)
        trainer.fit(module, train)
        (after,) = trainer.validate(module, held_out, verbose=False)
    trainer.print(f"held-out cross entropy: {before['val_ce']:.3f} before, {after['val_ce']:.3f} after")


def blocks(path, tokenizer, length=128):
    """The text in rows of `length` ids; the labels are the ids, not shifted."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


if __name__ == "__main__":
    main()
