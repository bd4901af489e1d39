"""What `import kdfast` costs, and that kernels/ hides nobody's package, in a checkout and in a wheel."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from kdfast import _version

ROOT = Path(__file__).parents[2]
SOURCES = (
    "kdfast",
    "kernels",
    "tests",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
)


def python(*arguments, cwd=ROOT):
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_and_numpy_only():
    """Nor any module of torch that `import torch` leaves out: those of its compiler take a second and more."""
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import kdfast\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)\n"
        "import kdfast.kernels; print(*kdfast.kernels.__path__)"
    )
    modules, kernels = python("-c", code).splitlines()
    assert modules.split() == ["kdfast"]
    assert Path(kernels) == ROOT / "kernels"  # as in any checkout
    if _installed():
        requirements = importlib.metadata.requires("kdfast") or []
        needed = {re.split(r"[^\w-]", r)[0] for r in requirements if "extra ==" not in r}
        assert needed == {"torch", "numpy", "triton"}  # triton on Linux, and imported by its engines alone


def test_hugging_face_kernels_is_theirs_from_the_root():
    pytest.importorskip("kernels")
    theirs = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
    code = "import kdfast, kernels, transformers.activations; print(kernels.__file__)"
    assert Path(python("-c", code).strip()) == Path(theirs)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(sdist, the wheel made from it): built from a copy, since building writes beside the sources. No network."""
    folder = tmp_path_factory.mktemp("distributions")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    build = "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"
    python("-W", "ignore", "-c", build, "sdist", str(folder), cwd=folder / "source")
    sdist = next(folder.glob("kdfast-*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    python("-W", "ignore", "-c", build, "wheel", str(folder), cwd=next((folder / "unpacked").iterdir()))
    return sdist, next(folder.glob("kdfast-*.whl"))


@pytest.fixture(scope="module")
def wheel(distributions):
    return distributions[1]


def test_sdist_holds_what_a_wheel_is_made_of_and_no_tests(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "kdfast/py.typed"} <= names
    assert "kdfast/report/page.html" in names
    assert {name.split("/")[0] for name in names if name.endswith(".py")} == {"setup.py", "kdfast", "kernels"}


def test_wheel_ships_kdfast_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    assert {name.split("/")[0] for name in held if ".dist-info" not in name} == {"kdfast"}
    shipped = {name: content for name, content in held.items() if name.endswith(".py")}
    sources = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / "kdfast").rglob("*.py")}
    kernels = {f"kdfast/kernels/{path.name}": path.read_bytes() for path in (ROOT / "kernels").glob("*.py")}
    assert shipped == sources | kernels  # nothing forgotten in setup.py's list
    assert {"kdfast/py.typed", "kdfast/report/page.html"} <= held.keys()
    assert any(name.endswith("licenses/LICENSE") for name in held)
    metadata = next(content for name, content in held.items() if name.endswith("METADATA")).decode()
    assert f"Version: {_version.__version__}\n" in metadata
    assert {"train", "lora", "quantized", "examples"} <= set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.M))


def test_the_description_leads_nowhere_but_to_the_web(wheel):
    """Where it is shown there are no files of this repository to link to."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        description = archive.read(name).decode().partition("\n\n")[2]
    assert description.startswith("# kdfast\n")
    assert re.findall(r"\]\((?!https?://)[^)]*\)|<!--|(?:src|href)=\S*", description) == []
    links = re.findall(r"(?<!!)\[([^\]]+)\]\((?!https?://)", (ROOT / "README.md").read_text())
    assert links
    assert [text for text in links if text not in description] == []  # the words of a link stay


# what macOS and Windows have: no Triton, and Windows not these modules of Python's own either
BARE = """
import sys
for name in ("triton", "transformers", "resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
import kdfast.kernels, torch
from kdfast.cli.main import main
print(kdfast.__file__, *kdfast.kernels.__path__, sep="\\n")
hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
def gradients(engine):
    loss = kdfast.fused_kd_loss(kdfast.Head(hidden, weight), kdfast.Projected(torch.ones(5, 4)), engine=engine)
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]
torch.testing.assert_close(gradients("auto"), gradients("reference"))
try:
    gradients("triton_tiled")
except ValueError as error:
    print(error)
assert main(["doctor"]) == 0
print(main(["distill", "config.yaml"]))
"""


def test_wheel_without_triton_and_the_training_part(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = subprocess.run([sys.executable, "-c", BARE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, kernels, refused, *_, code = done.stdout.splitlines()
    assert Path(package) == tmp_path / "kdfast/__init__.py"
    assert Path(kernels) == tmp_path / "kdfast/kernels"
    assert "engine='triton_tiled' needs the package triton, which is not installed" in refused
    assert code == "2"
    assert "distill needs transformers: pip install 'kdfast[train]'" in done.stderr


def test_version_is_one():
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == _version.__version__
    assert python("-m", "kdfast", "--version").strip() == f"kdfast {_version.__version__}"
    if _installed():
        assert importlib.metadata.version("kdfast") == _version.__version__


def _installed() -> bool:
    try:
        importlib.metadata.version("kdfast")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
