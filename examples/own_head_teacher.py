"""Which teacher? The same student from four: none, projected, the teacher's own head, and that head at a low rank.

    python examples/own_head_teacher.py
    python examples/own_head_teacher.py --use gpt2-medium gpt2 train.txt held_out.txt --max-kl 0.05

- `Projected(hidden_t, projector.weight)`: through a trained projector and the student's own head. It needs no head of
  the teacher's, and no common vocabulary. Its KL falls quickly because the projector learns to imitate the student.
- `Head(hidden_t, W_t)`: the teacher as it is. It costs 2·V·Ht operations a token more than the student alone.
- `compress_head(...)`: two thin factors in place of W_t, solved once from some hidden states and then fixed, at the
  lowest rank whose measured KL to the whole head is at most `--max-kl`. It costs 2·V·rank.

It ends with a table: for each teacher the student's cross entropy on held-out text and KL(teacher ‖ student) there,
both at τ = 1 in nats per token, beside the KL that the loss saw at the last step: small for the projected teacher, and
no sign of learning. With the small models, where the low rank is 48 of 192:

    teacher       cross entropy   KL(teacher || student)   KL the loss saw
    none                   6.12                     1.45                 -
    projected              6.30                     1.63             0.006
    own head               5.81                     1.11             0.293
    compressed             5.80                     1.11             0.282

Same first weights, data and order in all four. One seed; docs/recipes.md has the experiment with three.

For your own models: the two heads must share a vocabulary; two_vocabularies.py says what if they do not.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from kdfast import LogitProjector, Projected, compress_head, distillation_param_groups, fused_kd_loss
from kdfast.training import backbone, head, small_models


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", nargs=4, metavar=("TEACHER", "STUDENT", "TEXT", "EVAL_TEXT"))
    parser.add_argument("--max-steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="5e-5 is more like it for a trained student")
    parser.add_argument("--max-kl", type=float, default=0.01, help="of the compressed head to the whole one, in nats")
    args = parser.parse_args(argv)
    teacher_name, student_name, text, eval_text = args.use or small_models()

    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    train, held_out = blocks(text, tokenizer), blocks(eval_text, tokenizer)[:64]
    teacher = AutoModelForCausalLM.from_pretrained(teacher_name).eval().requires_grad_(False)

    with torch.no_grad():  # hidden states of some text: 4·Ht rows or more
        rows = 8 * teacher.config.hidden_size // train.shape[1] + 1
        compressed = compress_head(head_over(teacher, train[:rows]), max_kl=args.max_kl)
    width = teacher.config.hidden_size
    print(f"compressed head: rank {compressed.rank} of {width}, KL {compressed.fidelity.kl:.4f} to the whole one")

    table = {}
    for kind in ("none", "projected", "own head", "compressed"):
        set_seed(0)
        student = AutoModelForCausalLM.from_pretrained(student_name, dtype="float32")
        seen = train_student(student, teacher, train, kind, compressed, args)
        table[kind] = (*measure(student, teacher, held_out), seen)

    print(f"\n{'teacher':<12}{'cross entropy':>15}{'KL(teacher || student)':>25}{'KL the loss saw':>18}")
    for kind, (ce, kl, seen) in table.items():
        print(f"{kind:<12}{ce:>15.3f}{kl:>25.3f}{'-' if kind == 'none' else f'{seen:.3f}':>18}")


def train_student(student, teacher, train, kind, compressed, args, batch_size=4):
    """Trains it; returns the KL that the loss saw last, at τ = 2."""
    model = torch.nn.ModuleDict({"student": student})
    if kind == "projected":  # under this name distillation_param_groups gives it five times the rate
        model["logit_projector"] = LogitProjector(teacher.config.hidden_size, student.config.hidden_size, init="normal")
    groups = distillation_param_groups(model, args.learning_rate)
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, args.max_steps, pct_start=0.1)

    generator = torch.Generator().manual_seed(0)  # the same batches for all
    student.train()
    for _ in range(args.max_steps):
        ids = train[torch.randint(len(train), (batch_size,), generator=generator)]
        with torch.no_grad():
            whole = head_over(teacher, ids)
        if kind == "none":
            source = None
        elif kind == "projected":
            projector = model["logit_projector"]
            source = Projected(whole.hidden, projector.weight, projector.bias)
        else:
            source = whole if kind == "own head" else compressed(whole.hidden)
        loss, metrics = fused_kd_loss(
            head_over(student, ids),
            source,
            shifted(ids),
            temperature=2.0,
            kd_weight=2.0,
            ce_weight=1.0,
            return_metrics=True,
        )
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"{kind}: loss {loss.item():.4f} at the last step")
    return metrics.kd.item()


def head_over(model, ids):
    """The model's last hidden states (B, T, H), final norm included, and the head that they go through."""
    return head(model, backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)


def shifted(ids):
    """Targets (B, T): position t has to say id t + 1, the last one nothing."""
    return F.pad(ids[:, 1:], (0, 1), value=-100)


@torch.no_grad()
def measure(student, teacher, ids):
    """(cross entropy, KL(teacher ‖ student)), by the same function, at τ = 1."""
    student.eval()
    _, metrics = fused_kd_loss(
        head_over(student, ids),
        head_over(teacher, ids),
        shifted(ids),
        temperature=1.0,
        ce_weight=1.0,
        return_metrics=True,
    )
    return metrics.ce.item(), metrics.kd.item()


def blocks(path, tokenizer, length=128):
    """The text as ids (n, length)."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


if __name__ == "__main__":
    main()
