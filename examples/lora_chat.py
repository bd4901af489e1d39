"""A LoRA on chats: the student itself stays as it is, and a teacher that knows such chats is distilled into an adapter.

    python examples/lora_chat.py
    python examples/lora_chat.py --use Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2.5-0.5B chats.jsonl held_out.jsonl \\
        --chat-template qwen.jinja

Rows are {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}. Labels are on what the
assistant says alone: the tokenizer's chat template says where that is, between {% generation %} and
{% endgeneration %}. Most models' templates, such as Qwen's, lack the marks: give a copy that has them. What is trained
and saved is the adapter:

- `PeftModel.from_pretrained(student, output_dir)` reads it, and `kdfast merge` makes a whole model of it;
- the head is frozen, so that its gradient is not computed: two products with it in place of three.

Without --use the student is made too: a small model that has read some of Python's library, never a chat. Its teacher
is wider, has read more, and was tuned on many chats; the student gets few. It ends with the cross entropy of what the
assistant says in held-out chats, in nats per token, before and after, and after the same steps without a teacher.
`lora_chat.yaml` has the same settings for `kdfast distill`, and takes the models that are kept in runs/lora_chat.
"""

import argparse
import random
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdfast.training import KDConfig, KDTrainer, small_models

try:
    from peft import LoraConfig
except ImportError as error:
    raise SystemExit("this example needs PEFT: pip install peft") from error

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CHATS, OF_TEACHER = 64, 1600


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--use", nargs=4, metavar=("TEACHER", "STUDENT", "CHATS", "HELD_OUT"))
    parser.add_argument("--chat-template", help="a file, in place of the tokenizer's own")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", default="runs/lora_chat", help="of models, chats, adapters")
    args = parser.parse_args(arguments)
    place = Path(args.output_dir)
    used = args.use or make(place)
    chats, held_out = (load_dataset("json", data_files=str(path), split="train") for path in used[2:])
    ended = {}
    for recipe in ("lm_only", "auto"):
        print(f"recipe {recipe}, {args.max_steps} steps on {len(chats)} chats:")
        of_chats = {"assistant_only_loss": True, "chat_template": args.chat_template}
        config = settings(place / recipe, args, recipe=recipe, logging_steps=20, **of_chats)
        trainer = KDTrainer(
            AutoModelForCausalLM.from_pretrained(used[1]),
            config,
            teacher=None if recipe == "lm_only" else AutoModelForCausalLM.from_pretrained(used[0]),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            train_dataset=chats,
            eval_dataset=held_out,
            processing_class=AutoTokenizer.from_pretrained(used[0]),
        )
        before = trainer.evaluate()["eval_ce"]
        trainer.train()
        ended[recipe] = trainer.evaluate()["eval_ce"]
        trainer.save_model()
        trainer.save_state()  # what a report draws
    print(f"held-out cross entropy: {before:.3f} before, {ended['auto']:.3f} after")
    print(f"({ended['lm_only']:.3f} without a teacher; kdfast report {place} draws both)")


def settings(folder, args, **more):
    return KDConfig(
        output_dir=str(folder),
        max_steps=args.max_steps,
        per_device_train_batch_size=8,
        learning_rate=args.learning_rate,
        max_length=128,
        seed=args.seed,
        report_to="none",
        save_strategy="no",
        **more,
    )


def make(place):
    """Return the teacher, the student, chats and held-out chats, made once."""
    paths = [place / name for name in ("teacher", "student", "chats.jsonl", "held_out.jsonl")]
    if all(path.exists() for path in paths):
        return paths
    small = small_models()
    tokenizer = AutoTokenizer.from_pretrained(small.teacher)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    many = make_chats(small.text, tokenizer, OF_TEACHER)
    text = Dataset.from_dict({"text": Path(small.text).read_text(encoding="utf-8").split(tokenizer.eos_token)})
    plan = (small.teacher, many, paths[0], 1e-3, 150), (small.student, text, paths[1], 3e-3, 250)
    for source, rows, target, rate, steps in plan:
        args = argparse.Namespace(max_steps=steps, learning_rate=rate, seed=0)
        config = settings(target, args, recipe="lm_only", assistant_only_loss=rows is many)
        model = AutoModelForCausalLM.from_pretrained(source)
        print(f"the {target.name}, made once, {steps} steps on {len(rows):,} rows:")
        trainer = KDTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
    many.select(range(CHATS)).to_json(paths[2])
    make_chats(small.eval_text, tokenizer, 200).to_json(paths[3])
    return paths


def make_chats(path, tokenizer, number):
    """Chats about a text: the user shows some lines of it, and the assistant goes on."""
    documents = [d.splitlines() for d in Path(path).read_text(encoding="utf-8").split(tokenizer.eos_token)]
    documents, draw, rows = [d for d in documents if len(d) > 20], random.Random(0), []
    while len(rows) < number:
        lines = draw.choice(documents)
        at = draw.randrange(len(lines) - 8)
        shown, said = ("\n".join(lines[i:j]).strip("\n") for i, j in ((at, at + 5), (at + 5, at + 8)))
        if shown.strip() and said.strip():
            turns = {"user": f"Go on:\n{shown}", "assistant": said}
            rows.append({"messages": [{"role": role, "content": content} for role, content in turns.items()]})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    main()
