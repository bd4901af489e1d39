"""A teacher that runs once: its most likely ids for every token go to disk, and the student learns from those.

    python examples/offline_teacher.py
    python examples/offline_teacher.py --use gpt2-medium gpt2 train.txt held_out.txt --cache caches/gpt2-medium

First `cache_teacher` writes, for each token, the k most likely ids, their log-probabilities and the mass of all
others (264 bytes a token at k = 64 and V ≤ 65536). Then the teacher can go: the loop reads blocks with their entries
through `TeacherCache`, which refuses other text, another tokenizer or temperature, and damaged files. In the loss the
student is compared with k + 1 categories, the last one everything else, exactly at τ = 1 and at the temperatures of
the cache. A cache that is complete is not made again, and one that was interrupted goes on.

It ends with the cache's size and the student's cross entropy on held-out text, in nats per token, before and
after: 136 bytes a token at k = 32, 8.1 and 5.8 with the small models.

For your own models: the same in two commands is `kdfast cache CONFIG.yaml` and `kdfast distill CONFIG.yaml` with
`teacher_cache: FOLDER` in the file; docs/teachers.md has the formats. One cache serves all students with the
teacher's vocabulary. `KDTrainer` takes `cached` as its `train_dataset`, without a teacher.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed

from kdfast import fused_kd_loss
from kdfast.training import CachedEntries, TeacherCache, backbone, cache_teacher, head, small_models

TEMPERATURE, BATCH = 2.0, 4


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", nargs=4, metavar=("TEACHER", "STUDENT", "TEXT", "EVAL_TEXT"))
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="5e-5 is more like it for a trained student")
    parser.add_argument("--k", type=int, default=32, help="ids kept of each token")
    parser.add_argument("--cache", help="folder of the cache (default: none is kept)")
    args = parser.parse_args(argv)
    teacher_name, student_name, text, eval_text = args.use or small_models()

    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    set_seed(0)
    rows = blocks(text, tokenizer)
    rows = rows[torch.randperm(len(rows))[: BATCH * args.max_steps]]  # what this run will read, and no more
    train = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    held_out = blocks(eval_text, tokenizer)[:64]

    with tempfile.TemporaryDirectory() as nowhere:
        folder = args.cache or nowhere
        teacher = AutoModelForCausalLM.from_pretrained(teacher_name).eval()
        summary = cache_teacher(
            teacher, {"train": train}, folder, k=args.k, temperatures=[TEMPERATURE], tokenizer=tokenizer
        )
        del teacher

        cache = TeacherCache(folder)
        cache.check_tokenizer(tokenizer)
        student = AutoModelForCausalLM.from_pretrained(student_name, dtype="float32")
        before = cross_entropy(student, held_out)
        train_student(student, cache.dataset("train", train, temperature=TEMPERATURE), args)
    print(f"cache: {summary}")
    print(f"held-out cross entropy: {before:.3f} before, {cross_entropy(student, held_out):.3f} after")


def train_student(student, cached, args):
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.max_steps, pct_start=0.1)
    loader = forever(DataLoader(cached, batch_size=BATCH, shuffle=True, collate_fn=default_data_collator))
    student.train()
    for step in range(1, args.max_steps + 1):
        batch = next(loader)
        teacher = CachedEntries(batch["teacher_indices"], batch["teacher_log_probs"], batch["teacher_log_tails"])
        hidden = backbone(student)(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        loss, metrics = fused_kd_loss(
            head(student, hidden),
            teacher.at(TEMPERATURE),
            F.pad(batch["labels"][:, 1:], (0, 1), value=-100),  # position t has to say id t + 1
            temperature=TEMPERATURE,
            kd_weight=2.0,
            ce_weight=1.0,
            return_metrics=True,
        )
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 1 or step % max(1, args.max_steps // 5) == 0:
            print(f"step {step}: loss {loss.item():.4f}, ce {metrics.ce.item():.4f}, kd {metrics.kd.item():.4f}")


def forever(loader):
    while True:
        yield from loader


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
