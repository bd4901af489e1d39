"""Public names say what they take, give and raise; pages are built of that; examples in docstrings run."""

import html
import importlib
import importlib.util
import inspect
import re
import textwrap

import documents
import pytest
import torch

import kdfast
from kdfast.training import DistillationModel, KDConfig

MODULES = ("kdfast", "kdfast.training", "kdfast.plan")


def _public(module):
    """Return {name: object} of what `__all__` lists."""
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in found.__all__ if not name.startswith("__")}


PUBLIC = {f"{module}.{name}": value for module in MODULES for name, value in _public(module).items() if callable(value)}
# fields documented one by one, in their metadata or by comments beside them, which the pages show
BY_FIELD = (
    "KDConfig",
    "Recipe",
    "HealthThresholds",
    "KDMetrics",
    "HeadFidelity",
    "Finding",
    "Shape",
    "CachedEntries",
    "CacheSummary",
)


ELSEWHERE = ("kdfast.training.TeacherCache",)  # whose example docs/teachers.md has, with what it needs


def _documented_parameters(value):
    if inspect.isclass(value) and (value.__name__ in BY_FIELD or issubclass(value, BaseException)):
        return []
    return [name for name in inspect.signature(value).parameters if name not in ("self", "options")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    value = PUBLIC[name]
    doc = value.__doc__ or ""
    assert len(doc.split()) > 4
    assert not doc.startswith(f"{value.__name__}("), f"{name} has no docstring of its own"
    told = doc + _symbols(doc)
    absent = [p for p in _documented_parameters(value) if not re.search(rf"\b{p}\b", told)]
    assert absent == [], f"{name}: {absent} are not explained"


def _symbols(doc):
    """A divergence's parameter is the Greek letter in its formula."""
    return " alpha" * ("α" in doc) + " beta" * ("β" in doc)


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_raised_is_said(name):
    value = PUBLIC[name]
    if inspect.isclass(value) and issubclass(value, BaseException):
        return
    raising = re.search(r"^\s+raise (\w+)", inspect.getsource(value), re.M)
    if raising and raising.group(1) not in ("AssertionError", "NotImplementedError"):
        assert re.search(r"\b[Rr]aise", value.__doc__ or ""), f"{name} raises {raising.group(1)}"


def test_every_key_of_the_command_line_has_a_help_text():
    from kdfast.cli import arguments

    parser = arguments._Parser("test")
    ours = {key for cls in arguments.ARGUMENT_CLASSES for key in cls.__annotations__}
    assert [a.dest for a in parser._actions if a.dest in ours and not a.help] == []


def test_the_pages_have_every_public_name(tmp_path):
    pytest.importorskip("pdoc")
    spec = importlib.util.spec_from_file_location("build_api", documents.ROOT / "docs/build_api.py")
    build_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_api)
    assert build_api.MODULES == MODULES
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in build_api.build(tmp_path)}
    assert list(pages) == ["kdfast.html", "kdfast/training.html", "kdfast/plan.html", "index.html"]
    for module in MODULES:
        page = pages[f"{module.replace('.', '/')}.html"]
        assert [name for name in _public(module) if f'<section id="{name}">' not in page] == []
        for name, value in _public(module).items():
            if callable(value) and name != "KDConfig" and not (inspect.isclass(value) and issubclass(value, Exception)):
                section = page.partition(f'<section id="{name}">')[2].partition("</section>")[0]
                shown = set(re.findall(r"\w+", section))
                assert [p for p in inspect.signature(value).parameters if p not in shown] == [], name
    loss, training = pages["kdfast.html"], pages["kdfast/training.html"]
    assert "indices    (*, K)  integer ids, in any order" in loss  # columns stay
    assert KDConfig.__dataclass_fields__["kd_weight"].metadata["help"] in html.unescape(training)
    assert "(*, K) any float dtype: top-k at" in training  # a comment
    assert "per_device_train_batch_size" not in training.partition('<section id="KDConfig">')[2].partition("<pre")[0]


def _examples():
    for name, doc in {"kdfast": kdfast.__doc__, **{name: value.__doc__ for name, value in PUBLIC.items()}}.items():
        for block in re.findall(r"(?:^|\n\n)((?:(?: {4,}\S[^\n]*)?\n)+)", inspect.cleandoc(doc or "") + "\n"):
            code = textwrap.dedent(block).strip()
            if "(" in code and "=" in code and _is_python(code) and name not in ELSEWHERE:
                yield pytest.param(code, id=name)


def _is_python(code):
    """Or a formula, or columns."""
    try:
        compile(code, "docstring", "exec")
    except SyntaxError:
        return False
    return True


@pytest.mark.parametrize("code", list(_examples()))
def test_examples_run(code):
    torch.manual_seed(0)
    student = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 40)})
    names = vars(kdfast) | {
        "h_s": torch.randn(6, 8), "W": torch.randn(40, 8), "h_t": torch.randn(6, 12), "P": torch.randn(8, 12),
        "hidden_s": torch.randn(6, 8), "hidden_t": torch.randn(6, 12), "b": torch.randn(40), "p": torch.randn(8),
        "labels": torch.arange(6), "F": torch.nn.functional, "τ": 2.0,
        "student": student, "student_hidden": torch.randn(6, 8), "teacher_hidden": torch.randn(6, 12),
        "projector": torch.nn.Linear(12, 8), "DistillationModel": DistillationModel,
    }  # fmt: skip
    student.lm_head = student["lm_head"]
    exec(code, dict(names))
