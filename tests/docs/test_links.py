"""Links and anchors of the documents lead somewhere; the map of documents has them all; no page names a machine."""

import re

import documents
import pytest

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.M)
_MACHINE = re.compile(r"(?<![\w.])/(?:home|tmp|work|root|Users|opt|mnt)/")


def anchors(page):
    """GitHub's: lower case, punctuation dropped, blanks to hyphens, repetitions numbered."""
    found = []
    for heading in _HEADING.findall(documents.prose(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(f"{anchor}-{n}" if (n := sum(a == anchor for a in found)) else anchor)
    return found


@pytest.mark.parametrize("page", documents.pages())
def test_links(page):
    folder = (documents.ROOT / page).parent
    for link in _LINK.findall(documents.prose(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else documents.ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(str(target.relative_to(documents.ROOT))), f"{page}: {link}"


def test_the_map_has_every_document():
    linked = {link.partition("#")[0] for link in _LINK.findall(documents.prose("docs/README.md"))}
    pages = {page.removeprefix("docs/") for page in documents.pages() if page.startswith("docs/")}
    assert pages - linked - {"README.md"} == set()


def test_a_stranger_can_read_them_to_the_end():
    docs = [page for page in documents.pages() if page.startswith("docs/")]
    assert len(docs) <= 12
    assert sum(len(documents.source(page).split()) for page in docs) <= 16_000
    assert len(documents.source("README.md").split()) <= 1_100


@pytest.mark.parametrize("page", documents.pages())
def test_no_page_names_a_machine(page):
    assert _MACHINE.findall(documents.source(page)) == []


@pytest.mark.parametrize("page", documents.pages())
def test_code_is_fenced(page):
    """An indented block is no code anybody runs: what is indented by four is a picture in characters, never Python."""
    text = documents.prose(page)
    for paragraph in re.findall(r"(?:^|\n\n)((?: {4}[^\n]*\n)+)", text):
        assert not re.search(r"^ {4}(?:from \w[\w.]* import|import |def |class |\w+ = \w+\()", paragraph, re.M), (
            paragraph
        )
