"""Stand-ins for what dolly.py downloads: two tiny GPT-2s with a tokenizer, and its six files in their real columns."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kdfast.demo.toy_text import once, train_tokenizer

WORDS = ["apple", "river", "stone", "cloud", "tiger", "violet", "copper", "marble"]
ASK = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.<n><n>"
    "### Instruction:<n>{}<n><n>### Response:<n>"
)


def make(folder: Path) -> dict[str, str]:
    """Return options of dolly.py that name what lies in `folder`; made where it is not there."""
    once(folder, _write)
    return {"student": str(folder / "gpt2"), "teacher_base": str(folder / "gpt2-xl"), "data": str(folder / "data")}


def _write(folder: Path) -> None:
    rows = [
        {
            "instruction": f"Name {word} and {other}.",
            "context": f"There is {word} here." if i % 3 == 0 else "",
            "response": f"{word}, {other}",
            "category": "open_qa",
        }
        for i, (word, other) in enumerate((a, b) for a in WORDS for b in WORDS[:4])
    ]
    rows[-1]["instruction"] *= 20  # longer than a prompt may be
    files = {"dolly/raw.jsonl": rows}
    for i, name in enumerate(("dolly/valid", "self-inst/valid", "Vicuna/valid", "sinst/11_/valid", "uinst/11_/valid")):
        asked = [(f"Say {word}.", [word, f"the {word}"] if i % 2 else word) for word in WORDS[:5]]
        files[f"{name}.jsonl"] = [{"prompt": ASK.format(ask), "output": answer} for ask, answer in asked]
    for name, lines in files.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = [ASK.replace("<n>", "\n"), *(" ".join(row.values()) for row in rows)]
    for name, layers, width in (("gpt2", 1, 16), ("gpt2-xl", 2, 32)):
        train_tokenizer(folder / name, text, 384)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        torch.manual_seed(0)
        sizes = {"n_layer": layers, "n_embd": width, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)}
        end = tokenizer.eos_token_id
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)).save_pretrained(folder / name)
