"""A mixture of experts learns from a dense teacher, with its load-balancing loss and without.

    python examples/moe.py
    python examples/moe.py --use TEACHER MOE_STUDENT train.txt held_out.txt --learning-rate 5e-5

A router that is free to choose soon sends most tokens to few experts. transformers' own load-balancing loss works
against that; here it is added to the distillation loss with the coefficient of the student's configuration, or with
`router_aux_loss_coef`, and logged as `aux_loss`: as many as the experts that a token takes (2 here) where all are
taken equally often, more where not. `router_lr_multiplier` is for the routers' learning rate.

It ends with a line for each run: the student's cross entropy on held-out text, in nats per token, before and after, and
the share of tokens that the busiest of a layer's 8 experts gets, a quarter where all get as many.

For your own: any mixture of experts of transformers will do, as student and as teacher (a teacher's loss is left
out). Those that transformers balances otherwise, such as DeepSeek-V3, have no such loss, and none is added.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, default_data_collator, set_seed

from kdfast.training import KDConfig, KDTrainer, backbone, load_student, load_teacher, small_models

FRESH = {
    "model_type": "qwen3_moe",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "router_aux_loss_coef": 0.2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", nargs=4, metavar=("TEACHER", "STUDENT", "TEXT", "EVAL_TEXT"))
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args(argv)
    teacher_name, student_name, text, eval_text = args.use or small_models()

    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    train, held_out = blocks(text, tokenizer), blocks(eval_text, tokenizer).take(64)
    for coef in (None, 0.0):  # the configuration's own, and none
        set_seed(0)
        given = {"model_name_or_path": student_name} if args.use else {"student_config": FRESH}
        student = load_student(**given, tokenizer=tokenizer)
        with tempfile.TemporaryDirectory() as nowhere:
            trainer = KDTrainer(
                student,
                KDConfig(
                    output_dir=nowhere,
                    save_strategy="no",
                    recipe="teacher_head",
                    router_aux_loss_coef=coef,
                    router_lr_multiplier=2.0,
                    max_steps=args.max_steps,
                    learning_rate=args.learning_rate,
                    lr_scheduler_type="cosine",
                    warmup_steps=args.max_steps // 20,
                    per_device_train_batch_size=4,
                    per_device_eval_batch_size=16,
                    logging_steps=max(1, args.max_steps // 5),
                    report_to="none",
                ),
                teacher=load_teacher(teacher_name, tokenizer=tokenizer),
                train_dataset=train,
                eval_dataset=held_out,
                processing_class=tokenizer,
                data_collator=default_data_collator,  # blocks are of one length: nothing to pad
            )
            before = trainer.evaluate()
            trainer.train()
            after = trainer.evaluate()
        print("with the load-balancing loss:" if coef is None else "without it:")
        print(f"held-out cross entropy: {before['eval_ce']:.3f} before, {after['eval_ce']:.3f} after")
        print(f"the busiest expert gets {busiest(student, held_out):.0%} of the tokens")


@torch.no_grad()
def busiest(student, rows):
    """The share of tokens that take the busiest expert of a layer, the mean over layers."""
    ids = torch.tensor(rows["input_ids"], device=student.device)
    layers = backbone(student.eval())(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
    taken = student.config.num_experts_per_tok
    counts = [logits.topk(taken).indices.flatten().bincount() for logits in layers]
    return sum(count.max().item() / ids.numel() for count in counts) / len(counts)


def blocks(path, tokenizer, length=128):
    """The text in rows of `length` ids; the labels are the ids, not shifted."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


if __name__ == "__main__":
    main()
