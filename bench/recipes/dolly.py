"""GPT-2 1.5B → 120M on Dolly, as the public table of divergences has it. Needs a GPU and a hub; not run yet.

    python bench/recipes/dolly.py [teacher student evaluate table] [--out runs/dolly] [--methods …] [--quick]

Steps, all by default: `teacher` fine-tunes gpt2-xl (`--teacher MiniLLM/teacher-gpt2-1.5B` takes the published one),
`student` trains one student per method and rate on fixed data, `evaluate` generates and scores, `table` prints what
there is beside the published figures. A finished run or part is read, never made again; the same command goes on where
it stopped. `--quick` does all of it with tiny models and a few rows, without a hub: whether it works, not what comes
out. One process, one GPU. Rows are tokenized as M and D do it, so KDTrainer is called here.

Downloads: gpt2 and gpt2-xl of openai-community; data sets dolly, self-inst, Vicuna, sinst, uinst of MiniLLM (or
`--data`, a folder with folders of these names). Packages: `pip install 'kdfast[train]' rouge-score`.

| setting | value | source |
|---|---|---|
| training text | dolly/raw.jsonl: its first 1000 rows validate, the rest train, without prompts of over 256 ids | M |
| row | Alpaca's prompt, response, end of text; cut at 512 ids; loss on the response alone | M D |
| teacher | gpt2-xl, 10 epochs, rate 5e-5, batch 32 (2 on each of 16 GPUs) | M D |
| student's start | gpt2 itself: no fine-tuning first, no plain text beside (DistiLLM's own method has both) | C |
| student | 20 epochs, batch 8, rates 5e-4 (the scripts') and 1e-4 (C's command), the better by validation | C |
| optimizer | AdamW, weight decay 0.01, clipped at 1, cosine from the first step to 1e-7, seed 10 | M D C |
| loss | the divergence alone (KD ratio 1) at τ = 1, mean over the response tokens of a batch | D C |
| divergences | JSD 0.1·KL(p‖m) + 0.9·KL(q‖m), m = 0.1 p + 0.9 q; skew α = 0.1; p is the teacher | D C |
| checkpoint | the epoch with the best ROUGE-L on the validation rows, one sample each | M D |
| evaluation | the five sets' valid.jsonl, sinst and uinst of 11_, 10000 rows of uinst; 256 ids asked, 256 new | M |
| sampling | temperature 1, the whole vocabulary, no 6 ids in a row twice; seeds 10 20 30 40 50 | M D |
| score | rouge_score's rougeL, F, stemmed; best of the references; mean over rows, then sets | M D |

M microsoft/LMOps minillm/, D jongwooko/distillm, C aailab-kaist/CSD task_agnostic_distillation/ (scripts/gpt2,
arguments.py, finetune.py, evaluate_main.py, losses.py, process_data_dolly.py, rouge_metric.py). PUBLISHED is taken to
be table 1 of arXiv:2509.25837, C's, whose code lists these losses as its baselines; the table itself was not at hand,
and which rate and batch each baseline had is in none of the three.

What differs: bf16 for their fp16 (weights and optimizer fp32; teacher and evaluated models bf16); rows padded to the
longest of a batch, not to 512; an epoch's last, smaller batch is kept; the 6-gram rule in validation too (theirs has it
in evaluation alone). On-policy methods (GKD, MiniLLM) generate while they train: not here.

GPU memory, calculated, not measured (AdamW 16 bytes a parameter, autocast's copies 2, activations 34 bytes · width ·
layers a token, the loss by `kdfast plan`): teacher 32 GiB in micro-batches of 4, students 7 GiB, sft 4 GiB, evaluating
the teacher 6 GiB. Disk: best epoch 5.8 GiB, a student's 0.5; while one trains a checkpoint of three times that, or two.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback

from kdfast import JSD, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, TotalVariation
from kdfast.training import DistillationModel, KDConfig, KDTrainer, load_student, load_teacher
from kdfast.training.durable import atomic_io

STEPS = ("teacher", "student", "evaluate", "table")
METHODS = {
    "sft": None, "forward_kl": ForwardKL(), "reverse_kl": ReverseKL(), "jsd": JSD(0.1), "skew_kl": SkewKL(0.1),
    "total_variation": TotalVariation(), "skew_reverse_kl": SkewReverseKL(0.1),
}  # fmt: skip
PUBLISHED = {
    "teacher": 23.44, "sft": 16.80, "forward_kl": 18.10, "reverse_kl": 19.44, "jsd": 19.44, "skew_kl": 19.91,
    "total_variation": 20.67, "skew_reverse_kl": 21.44, "GKD, on-policy": 20.17,
}  # fmt: skip
SETS = {
    "Dolly": "dolly/valid.jsonl", "Self-Instruct": "self-inst/valid.jsonl", "Vicuna": "Vicuna/valid.jsonl",
    "S-NI": "sinst/11_/valid.jsonl", "UnNI": "uinst/11_/valid.jsonl",
}  # fmt: skip
ASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32  # of models that are not trained
NOT_RUN = "not run"
NOTE = (
    "ROUGE-L ± standard deviation over sampling seeds, of one training run. Seconds: of training, without validation. "
    "Price of a token: in sft's, prompts counted."
)


@dataclass(frozen=True)
class Settings:
    """Hold the protocol's numbers."""

    max_length: int = 512
    max_prompt_length: int = 256
    validation_rows: int = 1000
    evaluation_rows: int = 10_000  # of each set, at most
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    generation_batch: int = 16
    teacher_epochs: int = 10
    teacher_rate: float = 5e-5
    teacher_batch: tuple[int, int] = (4, 8)  # rows, micro-batches
    epochs: int = 20
    batch: tuple[int, int] = (8, 1)
    rates: tuple[float, ...] = (5e-4, 1e-4)
    warning: str = ""


QUICK = Settings(
    max_length=108, max_prompt_length=100, validation_rows=8, evaluation_rows=4, seeds=(10, 20), generation_batch=8,
    teacher_epochs=1, teacher_rate=3e-3, teacher_batch=(4, 2), epochs=2, batch=(8, 1), rates=(1e-3,),
    warning="**Stand-ins: no figure means anything.**",
)  # fmt: skip


def prompt_and_output(row: dict[str, Any]) -> dict[str, str]:
    """Return both of a training row, which has the columns of MiniLLM's copy or of databricks-dolly-15k."""
    context = row.get("input") or row.get("context")
    ask = ASK.format(", paired with an input that provides further context" if context else "")
    middle = f"### Input:\n{context}\n\n" if context else ""
    prompt = f"{ask}### Instruction:\n{row['instruction']}\n\n{middle}### Response:\n"
    return {"prompt": prompt, "output": row["output"] if "output" in row else row["response"]}


def tokenize(row: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, Any]:
    """Return a training row's ids, its prompt masked in the labels, and how many ids ask."""
    prompt, output = prompt_and_output(row).values()
    asked = len(tokenizer(prompt).input_ids)
    ids = [*tokenizer(prompt + output).input_ids, tokenizer.eos_token_id][:max_length]
    labels = [-100] * min(asked, len(ids)) + ids[asked:]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "asked": asked}


class Lab:
    """The steps, over one folder of runs."""

    def __init__(self, args: argparse.Namespace, settings: Settings) -> None:
        self.args, self.s, self.out = args, settings, args.out
        given = {name: getattr(args, name) for name in ("data", "student", "teacher_base", "teacher")}
        given, before = json.loads(json.dumps(given | asdict(settings))), read(self.out / "settings.json")
        if before not in (None, given):
            name = next(name for name in given if before.get(name) != given[name])
            raise SystemExit(
                f"{self.out} was made with {name} {before.get(name)!r}, not {given[name]!r}; name another --out"
            )
        with needed(args.student):
            self.tokenizer = AutoTokenizer.from_pretrained(args.student)
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_io.write_text(self.out / "settings.json", json.dumps(given, indent=1))

    def rows(self, path: str) -> Dataset:
        folder, _, file = path.partition("/")
        with needed(f"{self.args.data}/{path}"):
            place = f"{self.args.data}/{folder}"
            return load_dataset(place, data_files=file, split="train", cache_dir=str(self.out / "datasets"))

    def training_text(self) -> tuple[Dataset, list[dict[str, Any]]]:
        """Return tokenized rows to train on; prompts and references to validate on."""
        s, raw = self.s, self.rows("dolly/raw.jsonl")
        if len(raw) <= s.validation_rows:
            raise SystemExit(f"dolly/raw.jsonl has {len(raw)} rows; expected more than {s.validation_rows}")
        validation = [prompt_and_output(row) for row in raw.select(range(s.validation_rows))]
        options = {"tokenizer": self.tokenizer, "max_length": s.max_length}
        rows = raw.select(range(s.validation_rows, len(raw)))
        rows = rows.map(tokenize, fn_kwargs=options, remove_columns=rows.column_names)
        short = [i for i, asked in enumerate(rows["asked"]) if asked <= s.max_prompt_length]
        return rows.select(short).remove_columns("asked"), validation

    def train(self, place: Path, base: str, rate: float, teacher: Any = None, divergence: Any = None) -> dict[str, Any]:
        """Return the record of one run, whose best epoch lies in place/best; a finished one is read."""
        if (record := read(place / "run.json")) is not None:
            return record
        s, of_teacher = self.s, place.name == "teacher"
        rows, validation = self.training_text()
        batch, micro_batches = s.teacher_batch if of_teacher else s.batch
        kd = {"recipe": "teacher_head", "temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.0}
        config = KDConfig(
            str(place / "checkpoints"), **(kd if divergence else {"recipe": "lm_only"}), seed=10, data_seed=10,
            per_device_train_batch_size=batch, gradient_accumulation_steps=micro_batches, max_grad_norm=1.0,
            num_train_epochs=s.teacher_epochs if of_teacher else s.epochs, learning_rate=rate, weight_decay=0.01,
            lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-7}, bf16=CUDA, logging_steps=50,
            save_strategy="epoch", save_total_limit=1, report_to="none", dataloader_pin_memory=CUDA,
        )  # fmt: skip
        with needed(base):
            student = load_student(base)
        recipe = replace(config.resolved(), divergence=divergence) if divergence else config.resolved()
        keep = KeepBest(place, self, validation)
        trainer = KDTrainer(
            DistillationModel(student, teacher, recipe=recipe, tokenizer=self.tokenizer), config, train_dataset=rows,
            processing_class=self.tokenizer, data_collator=DataCollatorForSeq2Seq(self.tokenizer), callbacks=[keep],
        )  # fmt: skip
        checkpoint = trainer.find_checkpoint(True)
        if checkpoint is None or not trainer.load_finished(checkpoint):
            trainer.train(resume_from_checkpoint=checkpoint)
        timed = sum(epoch["steps"] for epoch in keep.epochs.values())  # fewer than all where an epoch was interrupted
        seconds = sum(epoch["seconds"] for epoch in keep.epochs.values()) / timed * trainer.state.max_steps
        tokens = sum(map(len, rows["input_ids"])) * config.num_train_epochs
        record = {"rate": rate, **keep.best, "seconds": seconds, "tokens": tokens}
        atomic_io.write_text(place / "run.json", json.dumps(record))
        shutil.rmtree(place / "checkpoints")
        return record

    def places(self, method: str) -> list[Path]:
        names = ["teacher"] if method == "teacher" else [f"{method}--lr{rate:g}" for rate in self.s.rates]
        return [self.out / name for name in names]

    def best(self, method: str) -> Path | None:
        """Return where the best run of a method lies, or None where one of its rates is left."""
        if method == "teacher" and self.args.teacher:
            return self.out / "teacher"
        runs = [(run["rouge_l"], place) for place in self.places(method) if (run := read(place / "run.json"))]
        return max(runs)[1] if len(runs) == len(self.places(method)) else None

    def model(self, method: str) -> str:
        if (place := self.best(method)) is None:
            raise SystemExit(f"{method}: no finished run in {self.out}; run the step that trains it first")
        return self.args.teacher if method == "teacher" and self.args.teacher else str(place / "best")

    def teacher(self) -> None:
        if not self.args.teacher:
            self.train(self.out / "teacher", self.args.teacher_base, self.s.teacher_rate)

    def student(self) -> None:
        teacher = None
        for method in self.args.methods:
            for place, rate in zip(self.places(method), self.s.rates, strict=True):
                if METHODS[method] and teacher is None and not (place / "run.json").is_file():
                    with needed(path := self.model("teacher")):
                        teacher = load_teacher(path, dtype=DTYPE)
                run = self.train(place, self.args.student, rate, teacher if METHODS[method] else None, METHODS[method])
                gc.collect()  # the run's model, before the next one's
                print(f"{place.name}: ROUGE-L {run['rouge_l']:.2f} in validation, epoch {run['epoch']}", flush=True)

    def evaluate(self) -> None:
        for method in ("teacher", *self.args.methods):
            path, model = self.model(method), None
            for name, seed in itertools.product(SETS, self.s.seeds):
                part = part_of(self.best(method), name, seed)
                if part.is_file():
                    continue
                if model is None:
                    with needed(path):
                        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE)
                    model.to("cuda" if CUDA else "cpu").eval()
                rows, start = list(self.rows(SETS[name]))[: self.s.evaluation_rows], time.monotonic()
                record = {"rouge_l": self.rouge_l(model, rows, seed), "rows": len(rows)}
                part.parent.mkdir(parents=True, exist_ok=True)
                atomic_io.write_text(part, json.dumps(record | {"seconds": time.monotonic() - start}))
                print(f"{method}, {name}, seed {seed}: ROUGE-L {record['rouge_l']:.2f}", flush=True)

    @torch.no_grad()
    def rouge_l(self, model: Any, rows: list[dict[str, Any]], seed: int) -> float:
        """Return the mean ROUGE-L, in percent, of one sampled answer to each row's prompt."""
        from rouge_score.rouge_scorer import RougeScorer

        s, tokenizer, scorer, scores = self.s, self.tokenizer, RougeScorer(["rougeL"], use_stemmer=True), []
        torch.manual_seed(seed)
        for i in range(0, len(rows), s.generation_batch):
            chunk = rows[i : i + s.generation_batch]
            ids = [tokenizer(row["prompt"].replace("<n>", "\n")).input_ids[: s.max_prompt_length] for row in chunk]
            given = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
            generated = model.generate(
                **given, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=6,
                max_new_tokens=s.max_length - s.max_prompt_length, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            texts = tokenizer.batch_decode(generated[:, given.input_ids.shape[1] :], skip_special_tokens=True)
            for text, row in zip(texts, chunk, strict=True):
                references = row["output"] if isinstance(row["output"], list) else [row["output"]]
                scores += [max(scorer.score(one, text.strip())["rougeL"].fmeasure for one in references)]
        return 100 * statistics.fmean(scores)

    def table(self) -> None:
        """Print and write what there is; the rest is "not run"."""
        head = ["method", "published", "mean of sets", *SETS, "rate", "epoch", "seconds", "price of a token"]
        lines, sft = [head, ["---"] * len(head)], read((self.best("sft") or self.out) / "run.json")
        for method, published in PUBLISHED.items():
            place = (self.best(method) if method in ("teacher", *METHODS) else None) or self.out / "nothing"
            parts = [[read(part_of(place, name, seed)) for seed in self.s.seeds] for name in SETS]
            scores = [[part["rouge_l"] for part in found] if all(found) else [] for found in parts]
            means = [statistics.fmean(of_seed) for of_seed in zip(*scores, strict=True)] if all(scores) else []
            line = [method, f"{published:.2f}", spread(means), *map(spread, scores)]
            if run := read(place / "run.json"):
                line += [f"{run['rate']:g}", str(run["epoch"]), f"{run['seconds']:.0f}"]
                line += [f"{run['seconds'] / run['tokens'] * sft['tokens'] / sft['seconds']:.2f}"] if sft else []
            lines.append(line + [NOT_RUN] * (len(head) - len(line)))
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        atomic_io.write_text(self.out / "table.md", f"{self.s.warning}\n\n{text}\n{NOTE}\n".lstrip())
        print((self.out / "table.md").read_text())


class KeepBest(TrainerCallback):
    """Score every epoch on the validation rows, before its checkpoint, and keep the best one's student."""

    def __init__(self, place: Path, lab: Lab, validation: list[dict[str, Any]]) -> None:
        self.place, self.lab, self.validation = place, lab, validation
        self.epochs: dict[str, Any] = read(place / "epochs.json") or {}

    @property
    def best(self) -> dict[str, Any]:
        epoch = max(self.epochs, key=lambda one: self.epochs[one]["rouge_l"])
        return {"epoch": int(epoch), "rouge_l": self.epochs[epoch]["rouge_l"]}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start, self.step = time.monotonic(), state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if CUDA:
            torch.cuda.synchronize()
        seconds, epoch, student = time.monotonic() - self.start, str(round(state.epoch)), model.student
        student.eval()
        with torch.random.fork_rng(), torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            score = self.lab.rouge_l(student, self.validation, 10)
        student.train()
        self.epochs[epoch] = {"rouge_l": score, "seconds": seconds, "steps": state.global_step - self.step}
        if self.best["epoch"] == int(epoch):
            atomic_io.discard(staged := atomic_io.staging(self.place / "best"))
            for one in (student, self.lab.tokenizer):
                one.save_pretrained(staged)
            atomic_io.publish(staged, self.place / "best", replace=True)
        atomic_io.write_text(self.place / "epochs.json", json.dumps(self.epochs))


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Stop with one line where something that is to be read or downloaded is not to be had."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"dolly.py needs {what}, which is neither here nor on a hub that can be reached ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). All that it needs: models openai-community/gpt2 and gpt2-xl (--student, "
            f"--teacher-base) and {', '.join(path.split('/')[0] for path in SETS.values())} of MiniLLM (--data), as "
            "names on the hub or folders. Without them, --quick tries every step on stand-ins"
        ) from error


def part_of(place: Path, name: str, seed: int) -> Path:
    return place / "evaluation" / f"{name}--seed{seed}.json"


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}" if values else NOT_RUN


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/dolly"))
    parser.add_argument("--data", default="MiniLLM", help="owner on the hub, or a folder, of dolly, self-inst, …")
    parser.add_argument("--student", default="openai-community/gpt2", help="name on the hub, or a folder")
    parser.add_argument("--teacher-base", default="openai-community/gpt2-xl", help="what the teacher is trained from")
    parser.add_argument("--teacher", help="a teacher to take as it is, such as MiniLLM/teacher-gpt2-1.5B")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--quick", action="store_true", help="all of it on stand-ins: whether it works")
    args = parser.parse_args(argv)
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"step {min(unknown)!r} is unknown; expected one of {', '.join(STEPS)}")
    if args.quick:
        sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this one
        import stand_ins

        args.out = args.out.with_name(args.out.name + "-quick")
        vars(args).update(stand_ins.make(args.out / "stand-ins"))
    lab = Lab(args, QUICK if args.quick else Settings())
    for step in args.steps or STEPS:
        getattr(lab, step)()


if __name__ == "__main__":
    main()
