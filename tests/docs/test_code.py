"""Code in the documents runs, prints what is printed there, and fails as is said there (`documents` has the marks)."""

import contextlib
import importlib.util
import io
import re
import warnings

import documents
import pytest
import torch


def _pages_with_code(long):
    found = []
    for page in documents.pages():
        kinds = {block.language for block in documents.blocks(page)}
        if "python" in kinds and ("long" in kinds) is long:
            found.append(page)
    return found


@pytest.fixture(autouse=True)
def _as_a_reader_has_it(monkeypatch, tmp_path):
    """An empty folder, nothing set; defaults of torch that a page changes are put back."""
    monkeypatch.chdir(tmp_path)
    for name in ("KDFAST_SCRATCH_BYTES", "KDFAST_CHECK"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


def _run(page):
    names = {"__name__": "document"}
    blocks = [block for block in documents.blocks(page) if block.language != "long"]
    left_out, missing = False, []
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language in ("not run", "file"):
            assert block.text.strip(), f"{page}:{block.line}: say why it is not run"
            left_out = True
        elif block.language == "needs":
            left_out = not _installed(block.text.strip())
            missing += [block.text.strip()] * left_out
        elif block.language in ("run", "python"):
            expected = following if following is not None and _directly_after(page, block, following) else None
            if not left_out:
                _try(page, block, expected, names)
            left_out = left_out and block.language == "run"  # a mark holds up to the code that is seen
    if missing:
        pytest.skip(f"all but the code for {', '.join(dict.fromkeys(missing))} was run: not installed")


def _installed(module):
    """Imported here, because what a package warns of is its own business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "." not in module:
            return importlib.util.find_spec(module) is not None
        try:
            importlib.import_module(module)
        except ImportError:
            return False
    return True


def _directly_after(page, block, following):
    between = documents.source(page)[block.stop : following.start]
    return following.language == "text" and not between.strip()


def _try(page, block, expected, names):
    said = "" if expected is None else expected.text.strip()
    error = re.match(r"(\w*(?:Error|Warning|Exception)): ", said)
    if error is None:
        printed = _execute(page, block, names)
        assert expected is None or documents.matches(said, printed), f"{page}:{block.line} prints\n{printed}"
        return
    with pytest.raises(Exception) as caught:
        _execute(page, block, names)
    came = f"{type(caught.value).__name__}: {caught.value}"
    assert documents.matches(said, came), f"{page}:{block.line} raises\n{came}"


def _execute(page, block, names):
    code = compile("\n" * (block.line - 1) + block.text.strip(" "), str(documents.ROOT / page), "exec")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue()


@pytest.mark.parametrize("page", _pages_with_code(long=False))
def test_code(page):
    _run(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", _pages_with_code(long=True))
def test_long_code(page):
    _run(page)


def test_the_runner_can_fail(tmp_path, monkeypatch):
    """Wrong output, a wrong message, an error that does not come."""
    for text in (
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "```python\nraise ValueError('a')\n```\n```text\nValueError: b\n```\n",
        "```python\npass\n```\n```text\nValueError: b\n```\n",
        "```python\nassert 1 == 2\n```\n",
    ):
        (tmp_path / "page.md").write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(documents, "ROOT", tmp_path)
            documents.source.cache_clear()
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                _run("page.md")
    documents.source.cache_clear()
