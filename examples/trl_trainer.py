"""TRL's SFTTrainer with our loss: its data handling, packing and masks of prompts, distilled from a teacher.

    pip install trl
    python examples/trl_trainer.py
    python examples/trl_trainer.py --use gpt2-medium gpt2 train.txt held_out.txt

SFTTrainer tokenises, appends the end-of-text token, masks what is not to be learned with -100 (prompts, with
`completion_only_loss`; what the user says, with `assistant_only_loss`) and hands batches to `compute_loss`. That one
method is overridden. The student's hidden states come from its own forward, called through the wrapper, so DDP works;
`num_items_in_batch` is the divisor, so gradient accumulation changes nothing.

In TRL's trainers for distillation the student writes the text itself: trl_on_policy.py.

It ends with the student's cross entropy on held-out completions, in nats per token, before and after: 8.1 and 5.5 with
the small models.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdfast import fused_kd_loss
from kdfast.training import head, small_models

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    raise SystemExit("this example needs TRL: pip install trl") from None


class FusedKDTrainer(SFTTrainer):
    def __init__(self, *args, teacher_model, temperature=2.0, kd_weight=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher_model = teacher_model.to(self.args.device).eval().requires_grad_(False)
        self.temperature, self.kd_weight = temperature, kd_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # (B, T): position t has to say id t + 1
        student = head_over(model, self.accelerator.unwrap_model(model), inputs)
        with torch.no_grad():
            teacher = head_over(self.teacher_model, self.teacher_model, inputs)
        loss, metrics = fused_kd_loss(
            student,
            teacher,
            targets,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=1.0,
            num_items_in_batch=num_items_in_batch,
            return_metrics=True,
        )
        mode = "train" if self.model.training else "eval"  # SFTTrainer logs the means of what stands here
        self._metrics[mode]["ce"].append(metrics.ce.item())
        self._metrics[mode]["kd"].append(metrics.kd.item())
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages gradients; divided by all targets, they are to be summed
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


def head_over(model, unwrapped, inputs):
    """The last hidden states (B, T, H), final norm included, and the head that they go through."""
    inputs = {name: x for name, x in inputs.items() if name != "labels"}
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
    student = AutoModelForCausalLM.from_pretrained(student_name, dtype="float32")
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = FusedKDTrainer(
            student,
            SFTConfig(
                output_dir=args.output_dir or nowhere,
                save_strategy="steps" if args.output_dir else "no",
                max_steps=args.max_steps,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                max_length=128,
                completion_only_loss=True,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                bf16=torch.cuda.is_available(),  # TRL's default, which it refuses on a CPU
                logging_steps=max(1, args.max_steps // 5),
                report_to="none",
            ),
            teacher_model=AutoModelForCausalLM.from_pretrained(teacher_name),
            train_dataset=pairs(text),
            eval_dataset=pairs(eval_text).take(200),
            processing_class=tokenizer,
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    print(f"held-out cross entropy: {before['eval_ce']:.3f} before, {after['eval_ce']:.3f} after")


def pairs(path):
    """Prompt and completion from plain text: a paragraph's first line and the rest. TRL masks the prompt."""
    paragraphs = [part.strip("\n") for part in Path(path).read_text(encoding="utf-8").split("\n\n")]
    parts = [part.partition("\n") for part in paragraphs if len(part) > 80]
    return Dataset.from_list([{"prompt": first, "completion": "\n" + rest} for first, _, rest in parts if rest])


if __name__ == "__main__":
    main()
