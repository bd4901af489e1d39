"""`kdfast cache` and `kdfast distill` on a teacher cache whose files were damaged.

The cache is complete, or its making was interrupted. `kdfast cache` has to leave what it would have written, byte for
byte; a run from it has to have the losses and weights of the run from the whole cache, unless checksums were made to
match; or each says why not.
"""

# ruff: noqa: E501  (tables)

import random
import shutil
from pathlib import Path

from fuzz import checkpoints, child, command, damage
from fuzz.outcome import Finding, Outcome

from kdfast.training.durable import checksums

SETTINGS = {
    **command.SETTINGS, "recipe": "cached", "teacher_cache": "cache", "cache_shard_tokens": 512, "max_steps": 3,
    "save_strategy": "no",
}  # fmt: skip
METHODS = {"top_k": {"cache_top_k": 6}, "sample": {"cache_method": "sample", "cache_samples": 5}}
OVERRIDES = [
    ["--temperature", "3"], ["--max_length", "16"], ["--cache_top_k", "7"], ["--cache_method", "sample"], ["--cache_dtype", "float32"],
    ["--train_file", "other.txt"], ["--cache_shard_tokens", "64"], ["--valid_vocab", "200"], ["--tokenizer_name", "other"],
    ["--recipe", "svd_init"], ["--recipe", "lm_only"], ["--divergence", "reverse_kl"], ["--teacher_cache", "text.txt"], ["--teacher_cache", "none"],
    ["--cache_temperatures", "1", "3"], ["--cache_top_k", "0"], ["--cache_top_k", "2000"], ["--seed", "1"], ["--cache_dtype", "int8"],
    ["--cache_shard_tokens", "0"], ["--cache_shard_tokens", "-1"], ["--cache_temperatures", "nan"], ["--cache_samples", "70000"],
]  # fmt: skip
OVERRIDDEN = 0.12  # share of cases with another setting than the cache's
FORGED = 0.35


class Cases:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = {method: self._make(method) for method in METHODS}
        self.expected = {method: checkpoints.results(place / "work/out") for method, place in self.whole.items()}

    def _make(self, method: str) -> Path:
        """A place with a cache, and a run from it."""
        place = self.folder / method
        if not place.exists():
            work = child.fresh(place)
            work.rmdir()
            command.corner(work)
            (work / "other.txt").write_text("Other text.\n" * 500)
            shutil.copytree(work / "teacher", work / "other")
            tokens = (work / "other/tokenizer.json").read_text()
            (work / "other/tokenizer.json").write_text(
                tokens.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97')
            )
            command.write(work / "config.yaml", {**SETTINGS, **METHODS[method]})
            for name in ("cache", "distill"):
                ended = command.call([name, "config.yaml"], place)
                assert ended.code == 0, ended.err
        return place

    def attempt(self, seed: int) -> Outcome:
        chance = random.Random(f"caches {seed}")
        method = chance.choice(list(METHODS))
        place = self.folder / "case"
        work = child.fresh(place)
        work.rmdir()
        shutil.copytree(self.whole[method] / "work", work, symlinks=True)
        shutil.rmtree(work / "out")
        cache, argv, done, forged = (
            work / "cache",
            [chance.choice(["cache", "distill"]), "config.yaml"],
            [method],
            False,
        )
        if chance.random() < OVERRIDDEN:
            argv += chance.choice(OVERRIDES)
        else:
            done.append(_stand(chance, cache))
            for _ in range(chance.choice([0, 1, 1, 1, 1, 2, 3])):
                done.append(damage.tried(_damage, chance, cache))
            if chance.random() < FORGED:
                forged = True
                done.append("checksums match")
                _match(cache)
        ended = command.call(argv, place, pictures=chance.random() < command.DRAWN)
        wrong = command.wrong_end(ended)
        if wrong is None and ended.code == 0 and not forged and len(argv) == 2:
            wrong = self._differs(method, argv[0], work)
        if wrong is not None:
            return Outcome(argv[0], "finding", Finding(wrong, f"{'; '.join(done)} | {argv}"[:1500]))
        came_to, unforeseen = command.came_to(ended)
        return Outcome(argv[0], came_to, unforeseen=unforeseen)

    def _differs(self, method: str, name: str, work: Path) -> str | None:
        if name == "distill":
            found = checkpoints.results(work / "out")
            different = [key for key, value in self.expected[method].items() if found.get(key) != value]
            return f"another end than from the whole cache: {different[0]}" if different else None
        whole = self.whole[method] / "work/cache"
        for path in damage.files(whole):
            other = work / "cache" / path.relative_to(whole)
            if path.suffix == ".arrow" and (not other.is_file() or other.read_bytes() != path.read_bytes()):
                return f"another {other.parent.name}/{other.name} than the whole cache's"
        return None


def _stand(chance: random.Random, cache: Path) -> str:
    how = chance.choice(["complete", "complete", "complete", "without its summary", "without a shard", "begun"])
    shards = sorted(path for path in cache.iterdir() if path.is_dir())
    if how != "complete":
        (cache / "summary.json").unlink()
    for shard in {"without a shard": [chance.choice(shards)], "begun": shards}.get(how, []):
        shutil.rmtree(shard)
    return how


def _damage(chance: random.Random, cache: Path) -> str:
    what = chance.choice(["file"] * 10 + ["shard", "shard", "strange"])
    files, shards = damage.files(cache), sorted(path for path in cache.iterdir() if path.is_dir())
    if what == "file" and files:
        own = [path for path in files if path.parent == cache]
        path = chance.choice(own if own and chance.random() < 0.3 else files)
        return f"{path.parent.name}/" + damage.file(
            chance, path, [other for other in files if other.suffix == path.suffix]
        )
    if what == "shard" and shards:
        shard = chance.choice(shards)
        how = chance.choice(["gone", "emptied", "a file", "a link", "another's", "another's", "renamed"])
        if how == "another's":
            other = chance.choice(shards)
            if other != shard:
                aside = shard.with_name("aside")
                for one, name in ((shard, aside), (other, shard), (aside, other)):
                    one.rename(name)
        elif how == "renamed":
            shutil.rmtree(cache / f"{shard.name}9", ignore_errors=True)
            shard.rename(cache / f"{shard.name}9")
        else:
            damage.folder(chance, shard, how, cache.parent / "elsewhere")
        return f"{shard.name}: {how}"
    name = chance.choice(
        [".train-00001.incomplete", "train-99999", "notes.txt", ".eval-00000.old.incomplete", "cache.json.tmp", ".lock"]
    )
    if not (cache / name).exists():
        (cache / name).mkdir()
    return f"{name} added"


def _match(cache: Path) -> None:
    """Checksums of what there is now."""
    for shard in cache.iterdir():
        if shard.is_dir() and (shard / "SHA256SUMS").is_file():
            checksums.write(shard)
