"""`kdfast distill | report | plan | doctor` with damaged configs, data, models and arguments of the command line."""

# ruff: noqa: E501  (tables)

import dataclasses
import os
import random
import shutil
from pathlib import Path
from typing import Any

import yaml
from fuzz import child, command, damage
from fuzz.config_values import DATA, OVERRIDES, STRINGS, TAME, WORDS
from fuzz.outcome import Finding, Outcome

from kdfast.cli.arguments import ARGUMENT_CLASSES

DISTILLED = 0.86  # share of cases; the others are of the other commands


class Cases:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corner = folder / "corner"
        if not self.corner.exists():
            command.corner(self.corner)
        self.keys = [f.name for cls in ARGUMENT_CLASSES for f in dataclasses.fields(cls) if f.init]

    def attempt(self, seed: int) -> Outcome:
        chance = random.Random(f"configs {seed}")
        place = self.folder / "case"
        work = child.fresh(place)
        shutil.copytree(self.corner, work, dirs_exist_ok=True)
        if chance.random() < DISTILLED:
            argv, done = self._distill(chance, work)
        else:
            argv, done = _another(chance)
        ended = command.call(argv, place, pictures=chance.random() < command.DRAWN)
        wrong = command.wrong_end(ended)
        if wrong is None and (work / "pwned").exists():
            wrong = "code in the config was run"
        if wrong is None and ended.code == 0 and argv[0] == "distill" and "-h" not in argv and "--help" not in argv:
            wrong = _unfinished(ended, work)
        if wrong is None:
            came_to, unforeseen = command.came_to(ended)
            return Outcome(argv[0], came_to, unforeseen=unforeseen)
        return Outcome(argv[0], "finding", Finding(wrong, f"{'; '.join(done)} | {argv}"[:1500]))

    def _distill(self, chance: random.Random, work: Path) -> tuple[list[str], list[str]]:
        settings: dict[Any, Any] = {
            **command.SETTINGS,
            "max_steps": 2,
            "student_config": dict(command.SETTINGS["student_config"]),
        }
        done, argv, lines = [], [], []
        text = None
        config = work / "config.yaml"
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            what = chance.choice(["key"] * 6 + ["value"] * 3 + ["student"] * 2 + ["word", "word", "data", "data", "data", "teacher",
                                  "teacher", "bytes", "override", "override", "file", "lacks", "misspelt", "strange key", "twice"])  # fmt: skip
            if what == "key":
                key = chance.choice(list(STRINGS) + list(TAME))
                settings[key] = chance.choice({**STRINGS, **TAME}[key])
                done.append(f"{key}={settings[key]!r}")
            elif what == "value":
                key = chance.choice([*self.keys, *command.SETTINGS])
                settings[key] = chance.choice(TAME.get(key, damage.JUNK))
                done.append(f"{key}={settings[key]!r}"[:100])
            elif what == "student":
                if isinstance(before := settings.get("student_config"), dict):
                    how, settings["student_config"] = damage.json_of(chance, dict(before))
                else:
                    how, settings["student_config"] = "another", chance.choice(damage.JUNK)
                done.append(f"student_config: {how} {settings['student_config']!r}"[:300])
            elif what == "word":
                key, word = chance.choice([*command.SETTINGS, "student_config", "x"]), chance.choice(WORDS)
                settings.pop(key, None)
                lines.append(f"{key}: {word}")
                done.append(lines[-1][:100])
            elif what == "data":
                name = chance.choice(list(DATA))
                (work / "data").mkdir(exist_ok=True)
                content = chance.choice(DATA[name])
                if chance.random() < 0.2:
                    _, content = damage.bytes_of(chance, content)
                (work / "data" / name).write_bytes(content)
                settings[chance.choice(["train_file", "train_file", "eval_file"])] = f"data/{name}"
                done.append(f"{name}: {content[:40]!r}")
            elif what == "teacher":
                files = damage.files(work / "teacher")
                done.append("teacher/" + damage.tried(damage.file, chance, chance.choice(files), files))
                if chance.random() < 0.3:
                    settings.pop("student_config", None)
                    settings["model_name_or_path"] = "teacher"
            elif what == "override":
                argv += [
                    chance.choice([*OVERRIDES, f"--{chance.choice(self.keys)}"]) for _ in range(chance.choice([1, 2]))
                ]
                done.append(f"argv {argv}")
            elif what == "lacks":
                key = chance.choice(list(settings))
                del settings[key]
                done.append(f"no {key}")
            elif what == "misspelt":
                key = str(chance.choice(list(settings)))
                settings[key[:1] + key[2:]] = settings.pop(key, 1)
                done.append(f"misspelt {key}")
            elif what == "strange key":
                lines.append(
                    chance.choice(
                        [
                            "1: 2",
                            "~: 1",
                            "[a]: 1",
                            "? {a: 1}\n: 2",
                            "'': 1",
                            "2001-01-01: 1",
                            ".nan: 1",
                            "true: 1",
                            "é: 1",
                            "'a b': 1",
                        ]
                    )
                )
                done.append(lines[-1])
            elif what == "twice":
                key = chance.choice(list(command.SETTINGS))
                lines.append(f"{key}: 3")
                done.append(f"{key} twice")
            else:
                text = what
        config.write_text(
            yaml.safe_dump(settings, allow_unicode=True, sort_keys=False) + "".join(f"{line}\n" for line in lines),
            encoding="utf-8",
            errors="surrogatepass",
        )
        if text == "bytes":
            how, content = damage.bytes_of(chance, config.read_bytes())
            how = chance.choice([how, "utf-16", "bom"])
            content = {
                "utf-16": config.read_text(errors="replace").encode("utf-16"),
                "bom": b"\xef\xbb\xbf" + config.read_bytes(),
            }.get(how, content)
            config.write_bytes(content)
            done.append(f"config.yaml: {how}")
        elif text == "file":
            done.append(_replace(chance, config))
        return [
            "distill",
            chance.choice(["config.yaml"] * 20 + ["", ".", "gone.yaml", "/dev/null", "x" * 300, "a\0b", "--help", "-"]),
            *argv,
        ], done


def _replace(chance: random.Random, config: Path) -> str:
    """Something else in the config's place."""
    how = chance.choice(
        ["folder", "loop", "dangling", "fifo", "aliases", "deep", "long", "documents", "list", "scalar", "empty"]
    )
    if how in ("folder", "loop", "dangling", "fifo"):
        config.unlink()
        if how == "folder":
            config.mkdir()
        elif how == "fifo":
            os.mkfifo(config)
        else:
            config.symlink_to("config.yaml" if how == "loop" else "nowhere")
    else:
        lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        content = {
            "aliases": "a0: &a0 [x]\n" + "\n".join(lines), "deep": "recipe: " + "[" * 5000, "long": "recipe: " + "x" * 3_000_000,
            "documents": config.read_text(errors="replace") + "---\na: 1\n", "list": "- recipe\n- run5\n", "scalar": "recipe", "empty": "# nothing\n",
        }[how]  # fmt: skip
        config.write_text(content, errors="replace")
    return f"config.yaml: {how}"


def _another(chance: random.Random) -> tuple[list[str], list[str]]:
    """Another command with arguments of all kinds."""
    values = ["0", "-1", "1", "7", "768", "50257", "1e3", "a", "", "99999999999999999999", "nan", "inf", "é", "24GiB", "1e400", "-5GiB", "0.0", "teacher",
              "text.txt", "gone", "x" * 300, "a\0b", ".", "H200", "float16", "cpu", "head", "projected"]  # fmt: skip
    options = {
        "plan": ["--student", "--teacher", "--student-width", "--teacher-width", "--vocab", "--kind", "--tokens", "--dtype", "--device", "--memory",
                 "--resident", "--scratch-bytes", "--optimizer-bytes", "--json", "--x"],
        "doctor": ["--tokens", "--vocab", "--dtype", "--scratch-bytes", "--x"],
        "report": ["--output", "--png", "--title", "--x", "teacher", "text.txt", "gone", "a=b", "=", "a=", "=teacher", ".", "/proc/self", "a\0b", "x" * 300],
        "x": ["--version", "-h"],
    }  # fmt: skip
    name = chance.choice(["plan", "plan", "plan", "doctor", "report", "report", "x"])
    argv = [name]
    if name == "plan" and chance.random() < 0.8:
        argv += ["--student-width", chance.choice(["768", "7"]), "--vocab", chance.choice(["50257", "11"])]
    for _ in range(chance.randint(0, 4)):
        argv.append(chance.choice(options[name]))
        if argv[-1].startswith("--"):
            argv.append(chance.choice(values))
    return argv, []


def _unfinished(ended: child.Ended, work: Path) -> str | None:
    """A run that ended with 0 has its summary."""
    if "summary.json" in ended.out or list(work.rglob("summary.json")) or "usage:" in ended.out:
        return None
    return f"exit code 0 and no summary: {ended.out[-200:]}"
