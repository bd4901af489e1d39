"""`kdfast distill` and `kdfast report` on a run whose files were damaged.

The run stands at some point between its second step and its end. Files are flipped, cut, emptied, deleted, exchanged,
replaced by folders, links, garbage and pickles that would run code; half of the time SHA256SUMS is made to match.
Whatever ends with 0, and was not made to look right, must have the losses, numbers and weights of the unbroken run.
"""

# ruff: noqa: E501  (tables)

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import torch
from fuzz import child, command, damage
from fuzz.outcome import Finding, Outcome

from kdfast.training.durable import checksums

FINAL = ("summary.json", "report.html", "model.safetensors", "config.json", "trainer_state.json", "logit_projector.safetensors")  # fmt: skip
NUMBERS = ("eval_ce", "perplexity", "kd", "kl_teacher_student", "kl_teacher_projected", "tokens", "steps")
FORGED = 0.35  # share of cases whose checksums are made to match


class Pwned:
    def __reduce__(self):
        return os.system, ("touch pwned",)


class Cases:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = folder / "whole"
        if not self.whole.exists():
            work = child.fresh(self.whole)
            work.rmdir()
            command.corner(work)
            command.write(work / "config.yaml", command.SETTINGS)
            ended = command.call(["distill", "config.yaml"], self.whole)
            assert ended.code == 0, ended.err
        self.expected = results(self.whole / "work/out")

    def attempt(self, seed: int) -> Outcome:
        chance = random.Random(f"checkpoints {seed}")
        place = self.folder / "case"
        work = child.fresh(place)
        work.rmdir()
        shutil.copytree(self.whole / "work", work, symlinks=True)
        out = work / "out"
        stands = chance.choice(
            ["at step 2", "at step 2", "after the last step", "after the last step", "before its summary", "finished"]
        )
        _stand(out, stands)
        done, forged = [stands], False
        for _ in range(chance.choice([1, 1, 1, 2, 3, 5])):
            done.append(damage.tried(_damage, chance, out, work))
        if chance.random() < FORGED:
            forged = True
            done.append("checksums match")
            for folder in out.glob("checkpoint-*"):
                if folder.is_dir():
                    try:
                        checksums.write(folder)
                    except OSError:  # a link to nowhere, a folder in the place of the list
                        done.append("but one")
        argv = chance.choice([["distill", "config.yaml"]] * 7 + [["report", "out"]] * 2 + [
            ["distill", "config.yaml", "--resume_from_checkpoint", chance.choice(["out/checkpoint-2", "out/checkpoint-4", "true", "out"])]])  # fmt: skip
        ended = command.call(argv, place, pictures=chance.random() < command.DRAWN)
        wrong = command.wrong_end(ended)
        if wrong is None and (work / "pwned").exists():
            wrong = "code in a checkpoint was run"
        if wrong is None and ended.code == 0 and argv[0] == "distill":
            wrong = self._differs(out, ended, forged)
        if wrong is not None:
            return Outcome(argv[0], "finding", Finding(wrong, f"{'; '.join(done)} | {argv}"[:1500]))
        came_to, unforeseen = command.came_to(ended)
        if argv[0] == "distill" and ended.code == 0:
            came_to = "an end" if forged else "the unbroken run's end"
            came_to = "finished already" if "finished already" in ended.out else came_to
        return Outcome(argv[0], came_to, unforeseen=unforeseen)

    def _differs(self, out: Path, ended: child.Ended, forged: bool) -> str | None:
        """From the unbroken run's end."""
        if forged or "finished already" in ended.out:
            return None
        try:
            found = results(out)
        except (OSError, ValueError) as error:
            return f"exit code 0, and {error}"
        different = [name for name, value in self.expected.items() if found.get(name) != value]
        return f"another end than the unbroken run's: {different[0]}" if different else None


def results(out: Path) -> dict[str, object]:
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    summary = json.loads((out / "summary.json").read_text())
    weights = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    losses = [[entry.get(key) for key in ("step", "loss", "ce", "kd", "grad_norm")] for entry in log if "loss" in entry]
    return {"losses": losses, **{name: summary[name] for name in NUMBERS}, **weights}


def _stand(out: Path, where: str) -> None:
    if where == "finished":
        return
    (out / "summary.json").unlink()
    if where == "before its summary":
        return
    for name in FINAL:
        (out / name).unlink(missing_ok=True)
    if where == "at step 2":
        shutil.rmtree(out / "checkpoint-4")


def _damage(chance: random.Random, out: Path, work: Path) -> str:
    what = chance.choice(["file"] * 14 + ["code", "code", "folder", "folder", "strange"])
    folders = [path for path in sorted(out.glob("checkpoint-*")) if path.is_dir()]
    files = damage.files(out)
    if what == "file" and files:
        path = chance.choice(files)
        if path.stat().st_size == 0 and not os.access(path, os.R_OK):
            return "nothing"
        return f"{path.parent.name}/" + damage.file(chance, path, [f for f in files if f.suffix == path.suffix])
    if what == "code" and folders:
        folder = chance.choice(folders)
        path = folder / chance.choice(
            [
                "optimizer.pt",
                "scheduler.pt",
                "rng_state.pth",
                "scaler.pt",
                "optimizer.bin",
                "pytorch_model.bin",
                "training_args.bin",
            ]
        )
        if path.is_dir() or path.is_symlink():
            return "nothing"
        if chance.random() < 0.5:
            path.write_bytes(pickle.dumps(Pwned()))
        else:
            torch.save({"state": Pwned()}, path)
        return f"{path.parent.name}/{path.name}: code"
    if what == "folder" and folders:
        folder = chance.choice(folders)
        how = chance.choice(["gone", "emptied", "a file", "a link", "renamed", "twice"])
        if how == "twice":
            shutil.copytree(folder, out / f"checkpoint-{chance.choice([3, 5, 100])}", symlinks=True, dirs_exist_ok=True)
        elif how == "renamed":
            folder.rename(
                out
                / chance.choice(
                    [
                        ".checkpoint-4.old.incomplete",
                        ".checkpoint-6.incomplete",
                        "checkpoint-0",
                        "checkpoint-04",
                        "damaged-checkpoint-4",
                        "checkpoint-x",
                    ]
                )
            )
        else:
            damage.folder(chance, folder, how, work / "elsewhere")
        return f"{folder.name}: {how}"
    name = chance.choice(
        [
            "checkpoint-6",
            "checkpoint-99999999999999999999",
            "checkpoint--1",
            ".incomplete",
            ".checkpoint-4.incomplete",
            "checkpoint-7.tmp",
            "checkpoint-8",
        ]
    )
    made = out / name
    if not made.exists() and not made.is_symlink():
        if chance.random() < 0.7:
            made.mkdir()
            if chance.random() < 0.5:
                (made / chance.choice(["trainer_state.json", "SHA256SUMS", "model.safetensors"])).write_bytes(b"{}")
        else:
            made.write_text("x")
    return f"{name} added"
