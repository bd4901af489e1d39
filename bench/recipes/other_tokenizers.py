"""What a teacher with another tokenizer is worth: bits per byte against LM only, at equal tokens.

    python bench/recipes/other_tokenizers.py [--prepared runs/prepared] [--runs runs/tokenizers] [--only TEXT …]

The teacher is worth.py's "strong" one, byte-level BPE of 4096 tokens. Students are half as wide as others there, and
their tokenizers are trained on another text, the sources of transformers: "bytes", byte-level BPE of 2048 tokens;
"scripts", Unigram of 6000 with ▁ and byte fallback, whose tokens are of words, digits, marks or blanks alone, as
sentencepiece trains them; "pieces", the same with anything but blanks in one token, and never two blanks. A pretrained
student has seen PRETRAINING steps of the same text, without a teacher. PLAN says which runs there are, in the order in
which they are made; learning rates were tuned for each contender on seed 0. One process; a finished run is read, never
made again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules beside this one

import setting
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdfast.demo.toy_text import once
from kdfast.training.durable.atomic_io import write_text
from kdfast.versions import versions

WIDTH, LENGTH = 64, 112  # the teacher has 128 positions, and reads a student's row in fewer tokens
STEPS = {"fresh": 384, "pretrained": 192}
PRETRAINING = 768
TEXT_BYTES, TOKENIZER_CHARACTERS = 3_000_000, {"bytes": 3_000_000, "pieces": 2_000_000, "scripts": 2_000_000}

# tokenizer | start | recipe and keys that differ from it | learning rates | seeds
PLAN = """
bytes   | fresh      | lm_only                    | 1e-3 2e-3 4e-3 8e-3      | 0
bytes   | fresh      | shared_tokens              | 2e-3 4e-3                | 0
bytes   | fresh      | shared_tokens kd_weight=2  | 2e-3                     | 0
bytes   | fresh      | projector_fixed            | 2e-3                     | 0
pieces  | fresh      | lm_only                    | 1e-3 2e-3 4e-3           | 0
pieces  | fresh      | shared_tokens              | 2e-3 4e-3                | 0
pieces  | fresh      | projector_fixed            | 2e-3                     | 0
scripts | fresh      | lm_only                    | 1e-3 2e-3 4e-3           | 0
scripts | fresh      | shared_tokens              | 2e-3 4e-3 8e-3           | 0
bytes   | fresh      | lm_only                    | 2e-3                     | 1 2
bytes   | fresh      | shared_tokens              | 2e-3                     | 1 2
scripts | fresh      | lm_only                    | 2e-3                     | 1 2
scripts | fresh      | shared_tokens              | 4e-3                     | 1 2
bytes   | pretrained | lm_only                    | 5e-4 1e-3 2e-3 4e-3      | 0
bytes   | pretrained | shared_tokens              | 1e-3 2e-3 4e-3 8e-3      | 0
scripts | pretrained | lm_only                    | 5e-4 1e-3 2e-3 4e-3      | 0
scripts | pretrained | shared_tokens              | 2e-3 4e-3                | 0
bytes   | pretrained | lm_only                    | 2e-3                     | 1 2
bytes   | pretrained | shared_tokens              | 4e-3                     | 1 2
scripts | pretrained | lm_only                    | 2e-3                     | 1 2
scripts | pretrained | shared_tokens              | 2e-3                     | 1 2
bytes   | fresh      | lm_only max_steps=1152     | 2e-3                     | 0
scripts | fresh      | shared_tokens              | 2e-3                     | 1 2
bytes   | fresh      | projector_fixed            | 2e-3                     | 1 2
bytes   | pretrained | projector_fixed            | 2e-3                     | 0 1 2
scripts | fresh      | projector_fixed            | 2e-3                     | 0 1 2
scripts | pretrained | projector_fixed            | 2e-3                     | 0 1 2
bytes   | pretrained | lm_only                    | 4e-3                     | 1 2
bytes   | pretrained | lm_only max_steps=576      | 2e-3                     | 0
"""


class Job(NamedTuple):
    tokenizer: str
    start: str
    contender: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        contender = self.contender.replace(" ", "+")
        return f"{self.tokenizer}-{self.start}-{contender}-{self.rate:g}-seed{self.seed}"


def plan(only: list[str]) -> list[Job]:
    """Return the runs that are planned, those alone whose name has one of the texts `only`, if any."""
    rows = ([part.strip() for part in line.split("|")] for line in PLAN.strip().splitlines())
    jobs = [
        Job(tokenizer, start, contender, float(rate), int(seed))
        for tokenizer, start, contender, rates, seeds in rows
        for seed in seeds.split()
        for rate in rates.split()
    ]
    return [job for job in jobs if not only or any(text in job.name for text in only)]


def settings(prepared: Path, runs: Path, job: Job) -> dict[str, Any]:
    """Return the settings of `kdfast distill`."""
    keys = setting.student(prepared, setting.Case(WIDTH, False), job.rate, job.seed, STEPS[job.start])
    recipe, *changes = job.contender.split()
    keys |= _text(prepared, runs, job.tokenizer) | {"teacher_model_name_or_path": str(prepared / "strong")}
    if job.start == "pretrained":
        del keys["student_config"]
        keys["model_name_or_path"] = str(runs / f"{job.tokenizer}-pretrained")
    return keys | {"recipe": recipe} | {key: json.loads(x) for key, x in (change.split("=") for change in changes)}


def prepare(prepared: Path, runs: Path, tokenizer: str, pretrained: bool) -> None:
    """Make the text, a tokenizer and the pretrained student that has it, unless they are there."""
    once(runs / "text", lambda path: _write_text(path, setting.first_files(prepared / "train", TEXT_BYTES)))
    once(runs / tokenizer, lambda path: _tokenizer(tokenizer).save_pretrained(path))
    if pretrained:
        keys = setting.settings(
            prepared,
            setting.STUDENT_LAYERS,
            WIDTH,
            steps=PRETRAINING,
            batch=setting.BATCH,
            learning_rate=2e-3,
            seed=1000,
        )
        setting.run(runs / f"{tokenizer}-pretrained", keys | _text(prepared, runs, tokenizer) | {"recipe": "lm_only"})


def _text(prepared: Path, runs: Path, tokenizer: str) -> dict[str, Any]:
    places = {"train_file": str(runs / "text"), "eval_file": str(prepared / "eval")}
    return {**places, "tokenizer_name": str(runs / tokenizer), "max_length": LENGTH}


def _write_text(path: Path, text: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "text.txt").write_text(text, encoding="utf-8")


def _other_text(characters: int) -> list[str]:
    """Return sources of transformers that come to so many characters."""
    files = sorted(Path(transformers.__file__).parent.rglob("*.py"))
    random.Random(0).shuffle(files)
    texts: list[str] = []
    for file in files:
        if file.stat().st_size > 2000 and sum(map(len, texts)) <= characters:
            texts.append(file.read_text(encoding="utf-8"))
    return texts


BLANKS = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
SCRIPTS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        pre_tokenizers.Split(Regex(r"▁+(?![^▁])|▁?\p{L}+|▁?\p{N}|▁?[^▁\p{L}\p{N}]+"), "isolated"),
    ]
)


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    if name != "bytes":
        return _unigram(name, {"pieces": BLANKS, "scripts": SCRIPTS}[name])
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_other_text(TOKENIZER_CHARACTERS[name]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def _unigram(name: str, pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizer
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=6000 - 256, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    lines = (line for text in _other_text(TOKENIZER_CHARACTERS[name]) for line in text.splitlines())
    backend.train_from_iterator(lines, trainer)
    described = json.loads(backend.to_str())
    vocabulary, fallback = described["model"]["vocab"], [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    described["model"] |= {"byte_fallback": True, "unk_id": 0, "vocab": [*vocabulary[:3], *fallback, *vocabulary[3:]]}
    backend = Tokenizer.from_str(json.dumps(described))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prepared", type=Path, default=Path("runs/prepared"), help="where worth.py has its models")
    parser.add_argument("--runs", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--only", nargs="*", default=[], help="runs whose name has one of these")
    parser.add_argument("--minutes", type=float, default=60, help="no run is begun after so many")
    args = parser.parse_args()
    os.environ.setdefault("KDFAST_COMPILE", "0")
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    for job in plan(args.only):
        path = args.runs / "runs" / job.name
        if not (path / "summary.json").is_file() and time.monotonic() > end:
            continue
        prepare(args.prepared, args.runs, job.tokenizer, job.start == "pretrained")
        summary = setting.run(path, settings(args.prepared, args.runs, job)).summary
        print(f"{job.name}: {summary['bits_per_byte']:.4f} bits per byte, {summary['seconds']:.0f} s", flush=True)
        for weights in path.glob("*.safetensors"):  # figures are what is kept
            weights.unlink()
        result = collect(args.runs)
        write_text(args.out / "tokenizers.json", json.dumps(result, indent=1) + "\n")
    print(table(collect(args.runs)["runs"]))


def collect(runs: Path) -> dict[str, Any]:
    """Return every finished run of PLAN, and what they were made with."""
    rows = []
    for job in plan([]):
        if (path := runs / "runs" / job.name / "summary.json").is_file():
            summary = json.loads(path.read_text())
            names = ("steps", "bits_per_byte", "eval_ce", "kl_teacher_student", "tokens", "seconds", "times_lm_only")
            rows.append({**job._asdict(), **{name: summary[name] for name in names}})
    return {"date": datetime.date.today().isoformat(), "versions": versions(), "runs": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each tokenizer, start, contender and rate: mean and half the range over seeds."""
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        found[row["tokenizer"], row["start"], row["contender"], row["rate"]].append(row["bits_per_byte"])
    lines = ["| tokenizer | start | recipe | rate | bits per byte | seeds |", "|---|---|---|---|---|---|"]
    for (*names, rate), bits in found.items():
        spread = f" ± {(max(bits) - min(bits)) / 2:.3f}" if len(bits) > 1 else ""
        lines.append(f"| {' | '.join(names)} | {rate:g} | {statistics.mean(bits):.3f}{spread} | {len(bits)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
