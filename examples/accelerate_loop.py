"""accelerate: one process or many, gradient accumulation, and a divisor that is right under both.

    python examples/accelerate_loop.py
    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py --use gpt2-medium gpt2 train.txt held_out.txt

`DistillationModel` has student, frozen teacher and loss under one forward, so the hooks of DDP run as they should; it
shifts the labels itself. Rows are of unlike length: a mean over each micro-batch would weigh a token in a short row
more. So the targets of all micro-batches and processes of a step are counted first and given as the divisor.

It ends with the student's cross entropy on held-out text, in nats per token, before and after: 8.1 and
5.5 with the small models.

For your own models: `recipe="auto"` takes the best measured one, and `teacher_head`, which is used here, compares with
the teacher's own head. Recipes with solved starts want `model.solve(batches)` before the first step. FSDP2 takes more
than `prepare`: docs/distributed.md, or `KDTrainer`, which does it.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from kdfast import distillation_param_groups
from kdfast.training import DistillationModel, shift_labels, small_models


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", nargs=4, metavar=("TEACHER", "STUDENT", "TEXT", "EVAL_TEXT"))
    parser.add_argument("--max-steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="5e-5 is more like it for a trained student")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step and process")
    args = parser.parse_args(argv)

    accelerator = Accelerator()
    with accelerator.main_process_first():
        teacher_name, student_name, text, eval_text = args.use or small_models()
    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def collate(texts):
        """Rows of unlike length, padded; labels are the ids, not shifted, -100 at padding."""
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    set_seed(0)
    model = DistillationModel(
        AutoModelForCausalLM.from_pretrained(student_name, dtype="float32"),
        AutoModelForCausalLM.from_pretrained(teacher_name),
        recipe="teacher_head",
    )
    optimizer = torch.optim.AdamW(distillation_param_groups(model, args.learning_rate, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_steps)
    loader = DataLoader(paragraphs(text), batch_size=4, shuffle=True, drop_last=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    held_out = {name: x.to(accelerator.device) for name, x in collate(paragraphs(eval_text)[:200]).items()}

    before = cross_entropy(model, held_out)
    batches = forever(loader)
    for step in range(1, args.max_steps + 1):
        micro_batches = [next(batches) for _ in range(args.accumulate)]
        items = accelerator.gather(sum(targets(batch) for batch in micro_batches)).sum()
        total = 0.0
        for i, batch in enumerate(micro_batches):
            last = i == args.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss = model(**batch, kd_weight=2.0, num_items_in_batch=items).loss
                accelerator.backward(loss * accelerator.num_processes)  # DDP averages over processes; this is a sum
            total += loss.detach()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 1 or step % max(1, args.max_steps // 5) == 0:
            whole = accelerator.reduce(total, "sum").item()
            accelerator.print(f"step {step}: loss {whole:.4f}, {items.item()} targets")
    accelerator.print(f"held-out cross entropy: {before:.3f} before, {cross_entropy(model, held_out):.3f} after")
    accelerator.end_training()


def targets(batch):
    """How many the batch has, (1,): what the model's own shift leaves."""
    return (shift_labels(batch["labels"], batch["attention_mask"]) != -100).sum()[None]


def forever(loader):
    while True:
        yield from loader


def paragraphs(path):
    """What blank lines part, if it is more than a line."""
    return [part for part in Path(path).read_text(encoding="utf-8").split("\n\n") if len(part) > 80]


@torch.no_grad()
def cross_entropy(model, batch):
    """The loss's own figure: DistillationModel returns means of all terms beside the loss."""
    model.eval()
    ce = model(**batch).metrics.ce.item()
    model.train()
    return ce


if __name__ == "__main__":
    main()
