"""On-policy distillation where the teacher is right and the training text is not always: sums of two-digit numbers.

    OMP_NUM_THREADS=1 python bench/recipes/on_policy.py --runs FOLDER [--seeds 0 1 2] [--out FILE.json]

A prompt is `31+59=`, the completion the sum's three digits, the last digit first, and an end. Of the training rows'
completions WRONG have a wrong digit; the teacher was trained on right ones. A student of half its parameters is trained
on the rows by supervision alone, for no student writes a sum before it has seen one, and goes on from there by what
`CONTENDERS` lists, each at its better learning rate of RATES by seed 0, on batches of BATCH rows. All have the same
budget of tokens, those that are written and those that are read by a training step. Exact match is that
of greedy completions of HELD_OUT prompts that are in no training row. Seconds are of one core's work
(`time.process_time`), generation included, evaluation not. A finished run is read from --runs, never made again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdfast.training import KDConfig, KDTrainer
from kdfast.training.on_policy.generation import Sampling, write

PLUS, EQUALS, END, V = 10, 11, 12, 13
DIGITS = 2
PROMPT, ANSWER, ROW = 6, 4, 10  # tokens
ROWS, HELD_OUT, WRONG, BATCH = 20_000, 1_000, 0.3, 128
TEACHER = {"width": 64, "layers": 2, "steps": 1000, "rate": 4e-3}
STUDENT = {"width": 48, "layers": 2, "steps": 400, "rate": 5e-3}
BUDGET = 250 * BATCH * ROW  # tokens after the common start, read by a step or written
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
PURE: dict[str, Any] = {"recipe": "teacher_head", "ce_weight": 0.0, "kd_weight": 1.0, "temperature": 1.0}
CONTENDERS: dict[str, dict[str, Any]] = {
    "supervised": {"recipe": "lm_only"},
    "KD, forward": {**PURE, "divergence": "forward_kl"},
    "KD, reverse": {**PURE, "divergence": "reverse_kl"},
    "seq_kd": {"recipe": "lm_only", "seq_kd": True},
    "seq_kd and KD, forward": {**PURE, "divergence": "forward_kl", "seq_kd": True},
    "on-policy, forward": {**PURE, "divergence": "forward_kl", "on_policy": 1.0},
    "on-policy, reverse": {**PURE, "divergence": "reverse_kl", "on_policy": 1.0},
    "on-policy, skew reverse": {**PURE, "divergence": "skew_reverse_kl", "on_policy": 1.0},
    "half on-policy, forward": {**PURE, "divergence": "forward_kl", "on_policy": 0.5},
    "half on-policy, reverse": {**PURE, "divergence": "reverse_kl", "on_policy": 0.5},
    "on-policy, forward, buffer 4": {
        **PURE,
        "divergence": "forward_kl",
        "on_policy": 1.0,
        "on_policy_buffer": 4,
    },
    "on-policy, reverse, buffer 4": {**PURE, "divergence": "reverse_kl", "on_policy": 1.0, "on_policy_buffer": 4},
}


def digits(number: int, n: int) -> list[int]:
    """Return the digits of a number, the last first."""
    return [number // 10**i % 10 for i in range(n)]


def make_rows(n: int, wrong: float, seed: int) -> list[dict[str, Any]]:
    """Return rows of sums, of which `wrong` have a wrong digit; those that are held out are in none."""
    draw, rows = random.Random(seed), []
    while len(rows) < n:
        a, b = draw.randrange(10**DIGITS), draw.randrange(10**DIGITS)
        if is_held_out(a, b):
            continue
        answer = digits(a + b, ANSWER - 1)
        if draw.random() < wrong:
            at = draw.randrange(ANSWER - 1)
            answer[at] = (answer[at] + draw.randrange(1, 10)) % 10
        ids = [*prompt_of(a, b), *answer, END]
        rows.append({"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:], "prompts": ids[:PROMPT]})
    return rows


def prompt_of(a: int, b: int) -> list[int]:
    return [*digits(a, DIGITS)[::-1], PLUS, *digits(b, DIGITS)[::-1], EQUALS]


def is_held_out(a: int, b: int) -> bool:
    return random.Random(1000 * a + b).random() < 0.1


def held_out() -> list[tuple[int, int]]:
    draw, found = random.Random(7), []
    while len(found) < HELD_OUT:
        pair = draw.randrange(10**DIGITS), draw.randrange(10**DIGITS)
        found += [pair] * is_held_out(*pair)
    return found


def model(width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    ids = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": END}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=V, num_attention_heads=4, max_position_embeddings=32, **sizes, **ids)
    )


def exact_match(student: LlamaForCausalLM) -> float:
    """Return the share of right greedy completions."""
    pairs = held_out()
    prompts = torch.tensor([prompt_of(*pair) for pair in pairs])
    made = write(student, prompts, torch.ones_like(prompts), Sampling(ANSWER, 0.0, 1.0, 0, (END,), END, V), (0,))
    right = [[*prompt_of(a, b), *digits(a + b, ANSWER - 1), END] for a, b in pairs]
    return statistics.mean(ids[mask > 0].tolist() == r for ids, mask, r in zip(*made[:2], right, strict=True))


def train(student: LlamaForCausalLM, folder: Path, rows: Any, teacher: Any = None, **settings: Any) -> KDTrainer:
    given: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
        "per_device_train_batch_size": BATCH, "lr_scheduler_type": "cosine", "warmup_steps": 50, "logging_steps": 100,
        "max_new_tokens": ANSWER, "weight_decay": 0.0, "precompute_teacher_log_probs": False, "health": False,
    }  # fmt: skip
    trainer = KDTrainer(student, KDConfig(**given | settings), teacher=teacher, train_dataset=rows)
    trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return trainer


def trained_before(folder: Path, of: dict[str, Any], seed: int, n: int, wrong: float) -> LlamaForCausalLM:
    """Return a model that was trained by supervision alone, from its folder if it is there."""
    if not (folder / "config.json").exists():
        made = model(of["width"], of["layers"], seed)
        rows = make_rows(n, wrong, seed)
        settings = {"recipe": "lm_only", "max_steps": of["steps"], "learning_rate": of["rate"], "seed": seed}
        train(made, folder / "run", rows, **settings)
        print(f"{folder.name}: {exact_match(made):.1%}", flush=True)
        made.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def steps_of(settings: dict[str, Any]) -> int:
    """Return the steps for which what is read and written comes to the budget."""
    written = 1.0 if settings.get("seq_kd") else settings.get("on_policy", 0.0) / settings.get("on_policy_buffer", 1)
    return round(BUDGET / (BATCH * (ROW + written * ANSWER)))


def result(name: str, seed: int, rate: float, wrong: float, teacher: LlamaForCausalLM, runs: Path) -> dict[str, Any]:
    """Return what one run came to, from its file if it was made before."""
    file = runs / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}-{rate:g}{f'-{wrong:g}' * (wrong != WRONG)}.json"
    if not file.exists():
        settings = dict(CONTENDERS[name])
        student = trained_before(runs / f"start-{seed}", STUDENT, seed, ROWS, WRONG)
        began = time.process_time()
        trainer = train(
            student, runs / file.stem, make_rows(ROWS, wrong, seed), teacher, max_steps=steps_of(settings),
            learning_rate=rate, seed=seed, **settings,
        )  # fmt: skip
        seconds = time.process_time() - began
        lines = [line for line in trainer.state.log_history if "loss" in line]
        seen = ("kd", "kd_on_policy", "entropy_on_policy", "completion_length", "eos_share", "repetition")
        made = {
            "contender": name, "seed": seed, "rate": rate, "steps": steps_of(settings), "seconds": round(seconds, 1),
            "exact_match": exact_match(student), "last": {k: round(lines[-1][k], 4) for k in seen if k in lines[-1]},
        }  # fmt: skip
        file.write_text(json.dumps(made, indent=1))
    return json.loads(file.read_text())


def table(results: list[dict[str, Any]]) -> str:
    """Return a row per contender: its rate, exact match of every seed and their mean, seconds."""
    rows = ["| contender | rate | exact match, by seed | mean | seconds |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(one["contender"] for one in results):
        of = [one for one in results if one["contender"] == name]
        found = [one["exact_match"] for one in of]
        by_seed = " ".join(f"{x:.1%}" for x in found)
        seconds = statistics.mean(one["seconds"] for one in of)
        rows.append(f"| {name} | {of[0]['rate']:g} | {by_seed} | {statistics.mean(found):.1%} | {seconds:.0f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--wrong", type=float, default=WRONG, help="share of wrong rows after the common start")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    teacher = trained_before(given.runs / "teacher", TEACHER, 100, 4 * ROWS, 0.0)
    results, tuning = [], []
    rates: dict[str, float] = {}
    for seed in given.seeds:
        for name in given.contenders:
            if name not in rates:
                tried = [result(name, 0, rate, given.wrong, teacher, given.runs) for rate in given.rates]
                tuning += tried
                rates[name] = max(tried, key=lambda one: one["exact_match"])["rate"]
            results.append(result(name, seed, rates[name], given.wrong, teacher, given.runs))
            print(results[-1], flush=True)
    print(table(results))
    if given.out:
        starts = {
            seed: exact_match(trained_before(given.runs / f"start-{seed}", STUDENT, seed, ROWS, WRONG))
            for seed in given.seeds
        }
        about = {
            "teacher": exact_match(teacher),
            "starts": starts,
            "wrong": given.wrong,
            "budget": BUDGET,
            "threads": torch.get_num_threads(),
        }
        given.out.write_text(json.dumps({"setting": about, "runs": results, "tuning": tuning}, indent=1) + "\n")


if __name__ == "__main__":
    main()
