"""Make the pictures of the documents: `make gallery`.

    docs/divergences.png          what each divergence rewards (plot_divergences.py)
    docs/gallery/NAME.svg         what a command prints, as a terminal shows it
    docs/gallery/NAME.png         curves that `kdfast report --png` draws

The commands run on the models and chats that examples/lora_chat.py leaves in runs/lora_chat, made there if they are
missing: a few minutes of two cores.
"""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import shutil
from pathlib import Path

import plot_divergences
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from kdfast.cli.main import main as kdfast

DOCS = Path(__file__).resolve().parent
CONFIG = "examples/lora_chat.yaml"
MODELS, RUNS = Path("runs/lora_chat"), Path("runs/gallery")
COMMANDS = {
    "data": f"kdfast data {CONFIG}",
    "plan": "kdfast plan --student-width 896 --teacher-width 3584 --kind head --vocab 151936 --memory 24GiB",
    "report": f"kdfast report {RUNS} --output {RUNS}/report.html --png {RUNS}",
}
CURVES = {"cross-entropy": "student-cross-entropy-nats.png", "kl": "kl-true-teacher-student.png"}
# rich's own format loads its font from the web
SVG = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S).replace(
    "Fira Code", "ui-monospace, Menlo, Consolas"
)


def make(output: Path, steps: int) -> list[Path]:
    """Distill with and without a teacher, so many steps each, and draw what commands show; return the pictures."""
    runpy.run_path(str(DOCS.parent / "examples/lora_chat.py"))["make"](MODELS)
    shutil.rmtree(RUNS, ignore_errors=True)
    evaluate = f"--eval_strategy steps --eval_steps {max(1, steps // 5)}"
    for name, recipe in (("distilled", "auto"), ("no_teacher", "lm_only")):
        run(f"kdfast distill {CONFIG} --recipe {recipe} --max_steps {steps} {evaluate} --output_dir {RUNS / name}")
    output.mkdir(parents=True, exist_ok=True)
    shown = {name: run(command) for name, command in COMMANDS.items()}
    for name, printed in shown.items():
        (output / f"{name}.svg").write_text(terminal(COMMANDS[name], printed), encoding="utf-8")
    for name, file in CURVES.items():
        shutil.copy(RUNS / file, output / f"{name}.png")
    return [*(output / f"{name}.svg" for name in shown), *(output / f"{name}.png" for name in CURVES)]


class Terminal(io.StringIO):
    """What a command takes for a terminal, and prints colors to."""

    def isatty(self) -> bool:
        return True


def run(command: str) -> str:
    """Return what a command prints."""
    with contextlib.redirect_stdout(Terminal()) as said:
        code = kdfast([str(DOCS.parent / word) if word == CONFIG else word for word in shlex.split(command)[1:]])
    if code:
        raise SystemExit(f"{command}: exit code {code}")
    return said.getvalue()


def terminal(command: str, printed: str) -> str:
    """Return an SVG of a terminal as wide as the longest line, at most 120 characters, which fill a page on GitHub."""
    text = Text.from_ansi(printed.rstrip())
    console = Console(record=True, width=min(120, max(map(len, text.plain.split("\n")))), file=io.StringIO())
    console.print(Text(f"$ {command}\n", style="bold"), text, sep="\n")
    svg = console.export_svg(title="", theme=MONOKAI, code_format=SVG)
    width, height = map(float, re.findall(r"[\d.]+", svg.partition('viewBox="0 0 ')[2])[:2])
    return svg.replace("viewBox", f'width="{0.56 * width:.0f}" height="{0.56 * height:.0f}" viewBox', 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DOCS / "gallery")
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    args = parser.parse_args()
    for path in make(args.output, args.steps):
        print(path)
    plot_divergences.main()
