"""On-policy distillation in TRL: the student writes, the teacher's distributions over all ids answer, and no logits.

    pip install trl
    python examples/trl_on_policy.py
    python examples/trl_on_policy.py --use Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2.5-0.5B-Instruct chats.jsonl held.jsonl

`FusedLoss` goes before either of TRL's trainers, and overrides `compute_loss` alone. Generation by transformers or
vLLM, chat templates, LoRA (`peft_config=…`), λ, and what is logged stay TRL's, as does the objective: the JSD's β; no
τ²; GKDTrainer's `temperature` in sampling alone, DistillationTrainer's in the loss too; the mean over the text that was
written, prompts and padding masked (GKDTrainer divides by the number of the data's labels, which are counted before
the student writes). Rows are {"messages": [{"role": "user", "content": …}, …, the assistant's]}.

GKDTrainer's own loss makes whole logits and many copies of them, DistillationTrainer's makes tiles:
bench/on_policy.py measures both beside this one.

Without --use both models are `small_models`' and chats are made from their text: a user shows lines of Python, and the
assistant goes on. A fresh student first learns from these chats and its own text in turn (GKDTrainer, λ = ½), then from
its own alone (DistillationTrainer, reverse KL). It ends with the cross entropy of held-out answers, in nats per token,
and the reverse KL on what the student itself writes, before and after.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdfast import JSD, fused_kd_loss
from kdfast.training import backbone, head, small_models

try:
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
except ImportError:
    raise SystemExit("this example needs TRL: pip install trl") from None

TEMPLATE = (
    "{% for message in messages %}{{ message.content + ('\n' if message.role == 'user' else eos_token) }}{% endfor %}"
)


class FusedLoss:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        temperature = 1.0
        if "completion_ids" in inputs:  # DistillationTrainer's; GKDTrainer's have labels
            temperature = self.temperature
            if self.model.training:  # DDP averages gradients; divided by all that was written, they are to be summed
                num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            inputs = with_labels(inputs)
        targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # (B, T): position t has to say id t + 1
        rows = targets != -100
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        output = model(**read, output_hidden_states=True, logits_to_keep=1)  # through the wrapper, so DDP works
        teacher = self.accelerator.unwrap_model(self.teacher_model).eval().requires_grad_(False)
        with torch.no_grad():
            hidden = backbone(teacher)(**read).last_hidden_state
        loss, metrics = fused_kd_loss(
            head(self.accelerator.unwrap_model(model), output.hidden_states[-1][rows]),
            head(teacher, hidden[rows]),
            targets[rows],
            divergence=JSD(self.beta),
            temperature=temperature,
            temperature_squared=False,
            num_items_in_batch=num_items_in_batch,
            return_metrics=True,
        )
        logged = self._metrics["train" if self.model.training else "eval"]  # TRL logs the means of what stands here
        logged["ce"].append(metrics.ce.item())
        logged["entropy"].append(metrics.student_entropy.item())
        return (loss, {}) if return_outputs else loss


class FusedGKDTrainer(FusedLoss, GKDTrainer):
    pass


class FusedDistillationTrainer(FusedLoss, DistillationTrainer):
    pass


def with_labels(inputs):
    """Return GKDTrainer's batch for DistillationTrainer's: ids (B, T), and -100 for what the student did not write."""
    if "pixel_values" in inputs:
        raise ValueError("this example reads text: pass on pixel_values and what belongs to them to both models")
    prompts, written, mask = inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"]
    labels = written.masked_fill(mask * inputs.get("tool_mask", 1) == 0, -100)
    return {
        "input_ids": torch.cat([prompts, written], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], mask], dim=1),
        "labels": torch.cat([torch.full_like(prompts, -100), labels], dim=1),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", nargs=4, metavar=("TEACHER", "STUDENT", "CHATS", "HELD_OUT"))
    parser.add_argument("--max-steps", type=int, default=100, help="of either trainer")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="1e-5 is more like it for a trained student")
    args = parser.parse_args(argv)
    teacher_name, student_name, *texts = args.use or small_models()
    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if args.use:
        chats, held_out = (load_dataset("json", data_files=path, split="train") for path in texts)
    else:
        tokenizer.chat_template = TEMPLATE
        chats, held_out = make_chats(texts[0], tokenizer, 1600), make_chats(texts[1], tokenizer, 100)
    student = AutoModelForCausalLM.from_pretrained(student_name, dtype="float32")
    teacher = AutoModelForCausalLM.from_pretrained(teacher_name)

    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "max_steps": args.max_steps,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "bf16": torch.cuda.is_available(),  # TRL's default, which it refuses on a CPU
            "gradient_checkpointing": False,
            "logging_steps": max(1, args.max_steps // 5),
            "save_strategy": "no",
            "report_to": "none",
        }
        mixed = FusedGKDTrainer(
            student,
            teacher,
            GKDConfig(**common, lmbda=0.5, beta=0.5, max_new_tokens=args.max_new_tokens),
            train_dataset=chats,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
        before = mixed.evaluate()
        mixed.train()
        after = mixed.evaluate()
        print(f"held-out cross entropy: {before['eval_ce']:.3f} before, {after['eval_ce']:.3f} after")

        own = FusedDistillationTrainer(
            student,
            teacher,
            DistillationConfig(**common, beta=1.0, max_completion_length=args.max_new_tokens),
            train_dataset=questions(chats),
            eval_dataset=questions(held_out),
            processing_class=tokenizer,
        )
        before = own.evaluate()
        own.train()
        after = own.evaluate()
        print(f"reverse KL on its own text: {before['eval_loss']:.3f} before, {after['eval_loss']:.3f} after")


def questions(chats):
    """Return all but the answers: DistillationTrainer's rows."""
    return chats.map(lambda row: {"prompt": row["messages"][:-1]}, remove_columns=chats.column_names)


def make_chats(path, tokenizer, number):
    """Return chats about a text: the user shows some lines of it, and the assistant goes on."""
    documents = [d.splitlines() for d in Path(path).read_text(encoding="utf-8").split(tokenizer.eos_token)]
    documents, draw, rows = [d for d in documents if len(d) > 20], random.Random(0), []
    while len(rows) < number:
        lines = draw.choice(documents)
        at = draw.randrange(len(lines) - 6)
        shown, said = ("\n".join(lines[i:j]).strip("\n") for i, j in ((at, at + 4), (at + 4, at + 6)))
        asked, answer = (len(tokenizer(part).input_ids) for part in (shown, said))
        if 0 < asked <= 64 and 0 < answer < 32:  # the models read 128 tokens
            turns = {"user": shown, "assistant": said}
            rows.append({"messages": [{"role": role, "content": content} for role, content in turns.items()]})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    main()
