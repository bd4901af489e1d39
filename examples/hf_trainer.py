"""`transformers.Trainer` with our loss and without our trainer: one method, `compute_loss`, is overridden.

    python examples/hf_trainer.py
    python examples/hf_trainer.py --use gpt2-medium gpt2 train.txt held_out.txt

Everything else is Trainer's: arguments, loop, logging, resume, trackers, DDP. Three things to get right are shown
here:

- no logits: the model is asked for hidden states, and for the logits of one position, since of none it cannot be;
  it is called through the wrapper that Trainer hands over, so DDP synchronises the gradients;
- the divisor: `num_items_in_batch`, the targets of all micro-batches and processes of a step, is passed on, so
  gradient accumulation and padding change nothing. The first label of a row is no target: -100 here, for a Trainer
  that counts it;
- the teacher: frozen, in eval mode, no part of the model, so in no optimizer and no checkpoint. It doesn't run in
  evaluation: eval_loss is the cross entropy, comparable with a run without a teacher.

It ends with the student's cross entropy on held-out text, in nats per token, before and after: 8.1 and
5.5 with the small models.

For your own script: copy the class and `head_over`, and pass teacher=. Any data set and collator will do whose labels
are not shifted and -100 at padding, such as DataCollatorForLanguageModeling(tokenizer, mlm=False). compute_metrics
gets no predictions, since logits are never made. What this does not have, and `kd_trainer.py` has: schedules of weight
and temperature, solved starts, evaluation against the teacher, log-probabilities for compute_metrics, FSDP2.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from kdfast import fused_kd_loss
from kdfast.training import head, small_models


class FusedKDTrainer(Trainer):
    def __init__(self, *args, teacher, temperature=2.0, kd_weight=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.temperature, self.kd_weight = temperature, kd_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")  # (B, T)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)  # (B, T): position t has to say id t + 1
        student = head_over(model, self.accelerator.unwrap_model(model), inputs)
        teacher = None  # in evaluation the loss is the cross entropy alone
        if model.training:
            with torch.no_grad():
                teacher = head_over(self.teacher, self.teacher, inputs)
        loss = fused_kd_loss(
            student,
            teacher,
            targets,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=1.0,
            num_items_in_batch=num_items_in_batch,
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages gradients; divided by all targets, they are to be summed
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


def head_over(model, unwrapped, inputs):
    """The last hidden states (B, T, H), final norm included, and the head that they go through."""
    output = model(**inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False)
    return head(unwrapped, output.hidden_states[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", nargs=4, metavar=("TEACHER", "STUDENT", "TEXT", "EVAL_TEXT"))
    parser.add_argument("--max-steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="5e-5 is more like it for a trained student")
    parser.add_argument("--output-dir", help="checkpoints go here (default: none are kept)")
    args = parser.parse_args(argv)
    teacher_name, student_name, text, eval_text = args.use or small_models()

    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    student = AutoModelForCausalLM.from_pretrained(student_name, dtype="float32")  # bf16=True computes in bfloat16
    train, held_out = paragraphs(text), paragraphs(eval_text)[:200]

    def collate(texts):
        """Rows of unlike length, padded; labels are the ids, -100 at padding and at the first position."""
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, 0] = -100
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    before = cross_entropy(student, collate(held_out))
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = FusedKDTrainer(
            student,
            TrainingArguments(
                output_dir=args.output_dir or nowhere,
                save_strategy="steps" if args.output_dir else "no",
                max_steps=args.max_steps,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                logging_steps=max(1, args.max_steps // 5),
                remove_unused_columns=False,
                report_to="none",
            ),
            teacher=AutoModelForCausalLM.from_pretrained(teacher_name),
            train_dataset=train,
            data_collator=collate,
        )
        trainer.train()
    after = cross_entropy(student, collate(held_out))
    print(f"held-out cross entropy: {before:.3f} before, {after:.3f} after")


def paragraphs(path):
    """What blank lines part, if it is more than a line; a list of strings is data set enough for Trainer."""
    return [part for part in Path(path).read_text(encoding="utf-8").split("\n\n") if len(part) > 80]


@torch.no_grad()
def cross_entropy(model, batch):
    model.eval()
    device = model.device
    logits = model(batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten().to(device)).item()


if __name__ == "__main__":
    main()
