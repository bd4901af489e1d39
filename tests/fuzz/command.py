"""How a command of kdfast's must end, whatever it was given: see `wrong_end`."""

import os
import re
import warnings
from pathlib import Path

import datasets
import transformers.models.gpt2.modeling_gpt2  # noqa: F401  # once, in the parent of all cases
import yaml
from byte_tokenizer import make_tokenizer
from command_line import CONFIG
from fuzz import child

import kdfast.cli.demo
import kdfast.cli.distill
import kdfast.cli.plan
import kdfast.cli.report
import kdfast.report.page
from kdfast.cli.main import main

CODES = {0: "done", 1: "failed, in words", 2: "refused, in words"}
SETTINGS = {**CONFIG, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
DRAWN = 0.03  # share of cases whose pages have real pictures, which take seconds


def call(argv: list[str], place: Path, *, pictures: bool = False, seconds: float = child.SECONDS) -> child.Ended:
    """`kdfast ARGV` in place/work."""

    def act() -> int:
        os.environ |= {"HOME": str(place), "TMPDIR": str(place), "XDG_CACHE_HOME": str(place / "cache")}
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place / "cache")
        datasets.config.HF_DATASETS_CACHE = place / "cache"
        datasets.config.DOWNLOADED_DATASETS_PATH = datasets.config.EXTRACTED_DATASETS_PATH = place / "cache"
        if not pictures:
            kdfast.report.page.draw = lambda *_: b"<svg></svg>"
        warnings.resetwarnings()  # as a user has them, not as errors
        warnings.simplefilter("ignore")
        return main(argv)

    return child.run(act, place, seconds)


def wrong_end(ended: child.Ended) -> str | None:
    """What is wrong with how it ended: a hang, a crash, a traceback, no word of why, or a write out of its folder."""
    last = (ended.err.strip().splitlines() or [""])[-1][:300]
    if ended.forbidden:
        return f"it tried: {ended.forbidden[0]}"
    if ended.code == -1:
        return f"no end after {ended.seconds:.0f} s"
    if "Traceback (most recent call last)" in ended.err + ended.out:
        return f"traceback: {_where(ended.err)}{last}"
    if ended.code not in CODES:
        return f"exit code {ended.code}: {last}"
    if ended.code == 0:
        return None
    told = [line for line in ended.err.splitlines() if line.startswith("kdfast")]
    if not told:
        return f"exit code {ended.code} without a word: {last}"
    if len([line for line in told if not line.startswith("kdfast distill: warning")]) > 1:
        return f"{len(told)} lines in place of one: {told}"[:300]
    return None


def came_to(ended: child.Ended) -> tuple[str, str | None]:
    """In a few words, and what it said of an error that nobody has thought of."""
    told = re.search(r"^kdfast: (unforeseen .{0,200})", ended.err, re.M)
    return (CODES[ended.code], None) if told is None else ("unforeseen error, in one line", told[1])


def _where(text: str) -> str:
    """The last line of kdfast's own in a traceback."""
    lines = re.findall(r'File "[^"]*/kdfast/(\S+)", line (\d+), in (\S+)', text)
    return "{}:{} {}: ".format(*lines[-1]) if lines else ""


def write(config: Path, settings: dict) -> None:
    config.write_text(yaml.safe_dump(settings, sort_keys=False))


def corner(folder: Path) -> Path:
    """Text, a teacher with its tokenizer: what helpers/command_line.py's config names."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder.mkdir()
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=257, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text("".join(f"{i}: {i * i} is the square of {i}\n" for i in range(100)))
    return folder
