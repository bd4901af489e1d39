"""Teacher and student with vocabularies of two sizes: padded embeddings, and a student with tokens of its own.

    python examples/two_vocabularies.py
    python examples/two_vocabularies.py --use gpt2-medium gpt2 train.txt held_out.txt

1. **Padding.** One tokenizer, two embeddings padded to different multiples (Qwen2.5 has 151936 rows and 152064, of
   which 151665 are tokens). Rows beyond the tokenizer are no tokens, whatever weights they have:
   `valid_vocab=len(tokenizer)` ends both softmaxes there. Right wherever the *tokens* are the same. (KDTrainer finds
   that out by itself.)
2. **Tokens added.** The student's tokenizer has all of the teacher's ids and some more (markers of a chat, of tools;
   here one for the three quotes of a docstring). They are real tokens, which the student must learn to write: the
   labels teach it, over its whole vocabulary, and `vocab="truncate"` ends the KD term's softmaxes, the teacher's and
   the student's, at the shared ids. Right where the extra ids are few and the shared ones mean the same. The teacher
   reads, in place of a token it does not have, one that it has; and where such a token is to be written, it has no
   opinion: `kd_token_weights` leaves KD out there.

Never pad the smaller side with logits of zero: exp(0) is mass. Where ids mean different things to two tokenizers, the
teacher has to read its own: KDTrainer does that under recipe="shared_tokens".

It ends with a line for each part: what the padding or the new token takes of the probability, and the student's cross
entropy on held-out text, in nats per token, before and after: 8.1 and 5.8 in both parts with the small models.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from kdfast import fused_kd_loss
from kdfast.training import backbone, head, small_models

QUOTES, MARKER = '"""', "<|doc|>"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", nargs=4, metavar=("TEACHER", "STUDENT", "TEXT", "EVAL_TEXT"))
    parser.add_argument("--max-steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="5e-5 is more like it for a trained student")
    args = parser.parse_args(argv)
    names = args.use or small_models()
    padding(*names, args)
    added_tokens(*names, args)


def padding(teacher_name, student_name, text, eval_text, args):
    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    teacher, student = models(teacher_name, student_name)
    teacher.resize_token_embeddings(len(tokenizer) + 192, mean_resizing=True)  # as somebody else might have padded it
    student.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=True)
    train, held_out = blocks(read(text), tokenizer), blocks(read(eval_text), tokenizer)[:64]

    def kd_options(ids):
        return {"valid_vocab": len(tokenizer)}

    with torch.no_grad():
        p = logits(teacher, held_out[:8]).softmax(-1)[..., len(tokenizer) :].sum(-1).mean().item()
    before = cross_entropy(student, held_out, len(tokenizer))
    train_student(student, teacher, train, lambda ids: ids, kd_options, args)
    after = cross_entropy(student, held_out, len(tokenizer))
    print(f"padding: its rows would take {p:.1%} of the teacher's probability")
    print(f"padding: held-out cross entropy: {before:.3f} before, {after:.3f} after")


def added_tokens(teacher_name, student_name, text, eval_text, args):
    theirs, ours = AutoTokenizer.from_pretrained(teacher_name), AutoTokenizer.from_pretrained(teacher_name)
    ours.add_tokens([MARKER], special_tokens=True)
    shared, marker = len(theirs), ours.convert_tokens_to_ids(MARKER)
    assert set(ours.get_vocab().items()) - set(theirs.get_vocab().items()) == {(MARKER, marker)}
    teacher, student = models(teacher_name, student_name)
    student.resize_token_embeddings(len(ours))
    train, held_out = (blocks(read(path).replace(QUOTES, MARKER), ours) for path in (text, eval_text))
    held_out = held_out[:64]

    # what the teacher reads for each of the student's ids
    reads = torch.arange(len(ours))
    reads[marker] = theirs(QUOTES, add_special_tokens=False)["input_ids"][-1]

    def kd_options(ids):
        known = F.pad(ids[:, 1:] < shared, (0, 1), value=False)  # the teacher can write what follows
        return {"vocab": "truncate", "kd_token_weights": known.float()}

    before = cross_entropy(student, held_out, len(ours))
    train_student(student, teacher, train, lambda ids: reads[ids], kd_options, args)
    after = cross_entropy(student, held_out, len(ours))
    with torch.no_grad():
        p = logits(student, held_out).softmax(-1)[:, :-1, marker]
    share = (held_out[:, 1:] == marker).float().mean()
    print(f"added tokens: {share:.2%} of the text is {MARKER}; the student gives it {p.mean():.2%}")
    print(f"added tokens: held-out cross entropy: {before:.3f} before, {after:.3f} after")


def train_student(student, teacher, train, teacher_reads, kd_options, args, batch_size=4):
    set_seed(0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.max_steps, pct_start=0.1)
    student.train()
    for step in range(1, args.max_steps + 1):
        ids = train[torch.randint(len(train), (batch_size,))]  # (B, T), the student's
        with torch.no_grad():
            from_teacher = head_over(teacher, teacher_reads(ids))
        loss = fused_kd_loss(
            head_over(student, ids),
            from_teacher,
            F.pad(ids[:, 1:], (0, 1), value=-100),
            temperature=2.0,
            kd_weight=2.0,
            ce_weight=1.0,
            **kd_options(ids),
        )
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 1 or step == args.max_steps:
            print(f"step {step}: loss {loss.item():.4f}")


def models(teacher_name, student_name):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_name).eval().requires_grad_(False)
    return teacher, AutoModelForCausalLM.from_pretrained(student_name, dtype="float32")


def head_over(model, ids):
    """The model's last hidden states (B, T, H), final norm included, and the head that they go through."""
    return head(model, backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)


def logits(model, ids):
    model.eval()
    return model(ids).logits


@torch.no_grad()
def cross_entropy(model, ids, vocabulary):
    """Over the first `vocabulary` ids: rows beyond it are padding."""
    z = logits(model, ids)[:, :-1, :vocabulary]
    return F.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten()).item()


def read(path):
    return Path(path).read_text(encoding="utf-8")


def blocks(text, tokenizer, length=128):
    """The text as ids (n, length)."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


if __name__ == "__main__":
    main()
