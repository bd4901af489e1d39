"""What `import kdfast` costs, and that kernels/ hides nobody's package, in a checkout and in a wheel."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("kdfast", "kernels", "setup.py", "pyproject.toml", "LICENSE", "README.md")


def python(*arguments, cwd=ROOT):
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_and_numpy_only():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import kdfast\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert python("-c", code).split() == ["kdfast"]
    if _installed():
        requirements = importlib.metadata.requires("kdfast") or []
        needed = {re.split(r"[^\w-]", r)[0] for r in requirements if "extra ==" not in r}
        assert needed == {"torch", "numpy", "triton"}  # triton on Linux, and imported by its engines alone


def test_import_takes_less_than_a_second_beyond_torch():
    code = "import time, torch; start = time.perf_counter(); import kdfast; print(time.perf_counter() - start)"
    assert min(float(python("-c", code)) for _ in range(3)) < 1  # the best of three: other programs run too


def test_hugging_face_kernels_is_theirs_from_the_root():
    pytest.importorskip("kernels")
    theirs = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
    for first in ("transformers.activations, kernels", "kdfast, kernels, transformers.activations"):
        assert Path(python("-c", f"import {first}; print(kernels.__file__)").strip()) == Path(theirs)


def test_our_kernels_are_found_in_a_checkout():
    code = "import kdfast.kernels; print(*kdfast.kernels.__path__)"
    assert Path(python("-c", code).strip()) == ROOT / "kernels"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since building writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"]  # no network
    python("-m", "pip", "wheel", *options, "-w", str(folder), str(folder / "source"))
    return next(folder.glob("kdfast-*.whl"))


def test_wheel_ships_kdfast_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"kdfast"}
    shipped = {name for name in names if name.endswith(".py")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "kdfast").rglob("*.py")}
    kernels = {f"kdfast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert shipped == sources | kernels  # nothing forgotten in setup.py's list


def test_wheel_finds_its_kernels(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import kdfast.kernels; print(kdfast.__file__); print(*kdfast.kernels.__path__)"
    package, kernels = python("-c", code, cwd=tmp_path).splitlines()
    assert Path(package) == tmp_path / "kdfast/__init__.py"
    assert Path(kernels) == tmp_path / "kdfast/kernels"


def test_version_is_one():
    version = python("-c", "import kdfast; print(kdfast.__version__)").strip()
    assert python("-m", "kdfast", "--version").strip() == f"kdfast {version}"
    if _installed():
        assert importlib.metadata.version("kdfast") == version


def _installed() -> bool:
    try:
        importlib.metadata.version("kdfast")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
