"""Check the wheel and the source distribution, then install the wheel as users do: `make package`.

    dist/*.whl, no extra             the loss, and the commands that need no training part
    kdfast[train,lora] from dist/    README's code, distillation, a LoRA run and its merge
    the same without triton          as on macOS and Windows, where setup.py asks for none: the `torch` engine

All in a fresh virtual environment and an empty folder, with the versions of constraints.txt. Prints a line for each
thing tried; the exit code is 1 if one failed. Takes minutes: it installs torch.
"""

import datetime
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
USE = Path(__file__).with_name("use.py")
OURS = r"kdfast/([\w/]+\.py|py\.typed|report/page\.html)"
WHEEL = re.compile(rf"{OURS}|kdfast/kernels/README\.md|kdfast-[\d.]+\.dist-info/\S+")
SDIST = re.compile(
    rf"{OURS}|kernels/(\w+\.py|README\.md)|((kdfast|kernels)(/\w+)*)?|kdfast\.egg-info(/\S+)?"
    r"|CHANGELOG\.md|LICENSE|MANIFEST\.in|PKG-INFO|README\.md|pyproject\.toml|setup\.(cfg|py)"
)
failed = []


def run(*command, cwd):
    # neither this checkout's folder nor a user's settings for Python
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


def tried(what, done, wrong=None):
    problem = wrong or (done is not None and done.returncode and (done.stdout + done.stderr)[-3000:])
    print(f"{'FAILED' if problem else 'ok':7} {what}", flush=True)
    if problem:
        failed.append(what)
        print(problem)


def contents(path):
    """Of a wheel: {name: bytes}."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def build(folder):
    """(wheel, sdist) in dist/, the wheel made from the sdist; a wheel made from the checkout is the same."""
    dist = ROOT / "dist"
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    tried("twine check", run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=folder))
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    strange = [name for name in names if not SDIST.fullmatch(name.partition("/")[2])]
    tried(f"{sdist.name}: {len(names)} entries, and none that a wheel is not made of", None, strange)
    # of a copy: building writes beside the sources, and an old build/ would be taken for one of them
    copied = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\0")
    for name in filter(None, copied):
        target = folder / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "direct", folder / "checkout", cwd=folder)
    (direct,) = (folder / "direct").glob("*.whl")
    one, other = contents(wheel), contents(direct)
    differing = sorted(name for name in {*one, *other} if one.get(name) != other.get(name) and "RECORD" not in name)
    tried(f"{wheel.name}: {len(one)} files, the same from sdist and checkout", None, differing)
    strange = [name for name in one if not WHEEL.fullmatch(name)]
    tried(f"{wheel.name}: sources, what they read, and metadata", None, strange)
    return wheel


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        place = folder / "place"
        place.mkdir()
        environment = folder / "venv"
        venv.create(environment, with_pip=True)
        python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
        constraints = ("--disable-pip-version-check", "-q", "-c", ROOT / "constraints.txt")

        def pip(*arguments):
            tried(f"pip {' '.join(map(str, arguments))}", run(python, "-m", "pip", *arguments, *constraints, cwd=place))

        def use(where, *names):
            for name in names:
                tried(f"{where}: {name}", run(python, USE, name, cwd=place))

        pip("install", wheel)
        use("the loss alone", "loss", "triton", "command", "no_training")
        pip("install", "--find-links", wheel.parent, "kdfast[train,lora]", "mypy")
        use("with [train,lora]", "command", "readme", "training", "lora", "typed")
        tried("pip check", run(python, "-m", "pip", "check", cwd=place))
        run(python, "-m", "pip", "uninstall", "-q", "-y", "triton", cwd=place)
        use("without triton", "loss", "triton", "command", "training")

        versions = "import kdfast.versions as v; print(*(f'{n} {x}' for n, x in v.versions().items() if x), sep=', ')"
        print(f"\n{datetime.date.today()}, {platform.system()} {platform.machine()}")
        print(run(python, "-c", versions, cwd=place).stdout.strip())
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
