"""The loss in a loop of your own: PyTorch, two transformers models, and of kdfast its loss.

    python examples/plain_loop.py
    python examples/plain_loop.py --use gpt2-medium gpt2 train.txt held_out.txt

The backbones give hidden states, the loss gets those and the heads' weights: no logits are made. Labels are shifted
here, in one line, since the loss never does it. Without `--use` a small teacher is trained first, once for all
examples.

It ends with one line: the student's cross entropy on held-out text, in nats per token, before and after, and that of
the same student trained without a teacher (same data, same order, same rate): 8.1, 5.5 and 5.9 with the small models,
whose teacher has 4.8. Other versions of Python have another library, so another text, and other second digits.

For your own models: `backbone` and `head` know where transformers' families keep what goes into the loss, with their
logit scales and softcaps. For a batch with padding or images pass the attention mask or pixel values to both backbones,
and set the labels of padding to -100. Where the teacher's tokenizer is not the student's, two_vocabularies.py says what
can be done.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from kdfast import fused_kd_loss
from kdfast.training import backbone, head, small_models


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", nargs=4, metavar=("TEACHER", "STUDENT", "TEXT", "EVAL_TEXT"))
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="5e-5 is more like it for a trained student")
    args = parser.parse_args(argv)
    teacher_name, student_name, text, eval_text = args.use or small_models()

    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    train, held_out = blocks(text, tokenizer), blocks(eval_text, tokenizer)[:64]
    teacher = AutoModelForCausalLM.from_pretrained(teacher_name).eval().requires_grad_(False)

    after = {}
    for kd_weight in (0.0, 2.0):
        print("with the teacher:" if kd_weight else "without a teacher:")
        student = AutoModelForCausalLM.from_pretrained(student_name, dtype="float32")
        before = cross_entropy(student, held_out)
        train_student(student, teacher, train, kd_weight, args)
        after[kd_weight] = cross_entropy(student, held_out)
    print(
        f"held-out cross entropy: {before:.3f} before, {after[2.0]:.3f} after "
        f"({after[0.0]:.3f} without a teacher; the teacher's own: {cross_entropy(teacher, held_out):.3f})"
    )


def train_student(student, teacher, train, kd_weight, args, batch_size=4):
    set_seed(0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.max_steps, pct_start=0.1)
    student.train()
    for step in range(1, args.max_steps + 1):
        ids = train[torch.randint(len(train), (batch_size,))]  # (B, T)
        targets = F.pad(ids[:, 1:], (0, 1), value=-100)  # (B, T): position t has to say id t + 1, the last one nothing
        with torch.no_grad():
            from_teacher = head_over(teacher, ids)
        loss, metrics = fused_kd_loss(
            head_over(student, ids),
            from_teacher,
            targets,
            temperature=2.0,
            kd_weight=kd_weight,  # times τ²·KL(teacher ‖ student)
            ce_weight=1.0,
            return_metrics=True,
        )
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 1 or step % max(1, args.max_steps // 5) == 0:
            print(f"step {step}: loss {loss.item():.4f}, ce {metrics.ce.item():.4f}, kd {metrics.kd.item():.4f}")


def head_over(model, ids):
    """The model's last hidden states (B, T, H), final norm included, and the head that they go through."""
    return head(model, backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)


def blocks(path, tokenizer, length=128):
    """The text as ids (n, length)."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@torch.no_grad()
def cross_entropy(model, ids):
    model.eval()
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


if __name__ == "__main__":
    main()
