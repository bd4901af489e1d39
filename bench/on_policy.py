"""`OMP_NUM_THREADS=1 python bench/on_policy.py`: TRL's on-policy trainers with their own loss, and with our example's.
bench/results/on-policy-step-cpu.md keeps a run.

A step is `compute_loss` and its backward on one batch of written text: generating it costs the same on either side and
is not in it. Models have real widths and vocabularies, and two layers. Peak bytes are those above weights, batch and
gradients, each in a process of its own. Seconds are medians of rounds in turn in one process; on a CPU they are its
own, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import measure
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
ROWS, PROMPT, WRITTEN = 4, 32, 64  # of the batch, and tokens of each row


class Size(NamedTuple):
    vocab: int
    student: int
    teacher: int


SIZES = {
    "gpt2-medium → gpt2": Size(50257, 768, 1024),
    "Qwen2.5 1.5B → 0.5B": Size(151936, 896, 1536),
    "small_models": Size(2048, 96, 192),
}
CONTENDERS = {
    "GKDTrainer": ("GKDTrainer", "FusedGKDTrainer"),
    "DistillationTrainer": ("DistillationTrainer", "FusedDistillationTrainer"),
}


def make_models(size: Size) -> tuple[Qwen2ForCausalLM, ...]:
    """Return a student and a teacher with random weights, two layers each."""
    torch.manual_seed(0)
    widths = (size.student, size.teacher)
    return tuple(
        Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=size.vocab, hidden_size=H, intermediate_size=4 * H, num_hidden_layers=2,
                num_attention_heads=H // 32, num_key_value_heads=H // 32, tie_word_embeddings=True,
            )
        )
        for H in widths
    )  # fmt: skip


def make_step(name: str, size: Size, both: tuple[Qwen2ForCausalLM, ...]) -> Callable[[int, int, int], None]:
    """Return a function of rows, prompt and written tokens, which takes one step of the trainer called `name`."""
    import trl_on_policy as example

    gkd = "GKD" in name  # TRL's defaults: the JSD at β = ½; else the reverse KL
    config = (example.GKDConfig if gkd else example.DistillationConfig)(
        tempfile.gettempdir(), bf16=False, gradient_checkpointing=False, report_to="none"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, "a")), eos_token="<end>", pad_token="<end>"
    )
    rows = Dataset.from_list([{"prompt": "a", "messages": []}])
    trainer = getattr(example, name)(*both, config, train_dataset=rows, processing_class=tokenizer)
    trainer.model.train()

    def step(B: int, P: int, C: int) -> None:
        torch.manual_seed(1)
        prompts, written = (torch.randint(size.vocab, (B, n), device=trainer.args.device) for n in (P, C))
        batch = {
            "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
            "completion_ids": written, "completion_mask": torch.ones_like(written),
            "num_items_in_batch": torch.tensor(B * C, device=prompts.device),
        }  # fmt: skip
        batch = example.with_labels(batch) if gkd else batch
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(B * C)).backward()

    return step


def peak_bytes(name: str, size: Size) -> int:
    """Return the peak above weights, batch and gradients."""
    both = make_models(size)
    step = make_step(name, size, both)
    step(ROWS, PROMPT, WRITTEN)  # what libraries, threads and the row work's compiler take is not the loss's
    both[0].zero_grad()
    gc.collect()
    peak = measure.peak_above_inputs(lambda: step(ROWS, PROMPT, WRITTEN))
    return peak - sum(p.grad.nbytes for p in both[0].parameters() if p.grad is not None)


def seconds_of(step: Callable[[int, int, int], None]) -> float:
    if measure.CUDA:
        return measure.seconds_of(lambda: step(ROWS, PROMPT, WRITTEN))
    start = time.process_time()
    step(ROWS, PROMPT, WRITTEN)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", nargs=2, metavar=("TRAINER", "SIZE"), help="print this one's peak bytes alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.peak:
        print(peak_bytes(args.peak[0], SIZES[args.peak[1]]))
        return
    print(f"{ROWS} × ({PROMPT} + {WRITTEN}) tokens, fp32, {measure.machine()}, load {os.getloadavg()[0]:.1f}")
    print("| models | trainer | peak MiB, theirs | ours | seconds, theirs | ours | theirs/ours |")
    print("|---|---|---|---|---|---|---|")
    for label, size in SIZES.items():
        both = make_models(size)
        for trainer, pair in CONTENDERS.items():
            steps = [make_step(name, size, both) for name in pair]
            for step in steps:
                step(ROWS, PROMPT, WRITTEN)
            theirs, ours = zip(*([seconds_of(step) for step in steps] for _ in range(args.rounds)), strict=True)
            peaks = [int(measure.in_fresh_process("on_policy", "--peak", name, label)) / 2**20 for name in pair]
            seconds = [statistics.median(times) for times in (theirs, ours)]
            figures = [f"{x:,.0f}" for x in peaks] + [f"{x:.3g}" for x in seconds]
            print(f"| {label}, V = {size.vocab:,} | {trainer} | {' | '.join(figures)} |", end=" ")
            print(f"{measure.ratio(theirs, ours):.2f} |", flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
