"""report.html: one file that needs nothing else, every number in it, and no panel or column without a number."""

import math
import re
from html.parser import HTMLParser

import pytest

from kdfast.training.report import PANELS, Run, table, text_table, write_report

LOG = [
    {"step": 1, "loss": 9.0, "ce": 8.0, "kd": 2.0, "kd_weight": 0.1, "learning_rate": 1e-3},
    {"step": 2, "loss": 8.0, "ce": 7.0, "kd": 1.0, "kd_weight": 0.4, "learning_rate": 5e-4},
    {"step": 2, "eval_ce": 7.5, "eval_kl_teacher_student": 1.25},
]
SUMMARY = {"recipe": "run5", "eval_ce": 7.5, "perplexity": math.exp(7.5), "kl_teacher_student": 1.25, "tokens": 4096}
RUNS = [Run("with KD <b>", LOG, SUMMARY), Run("without", LOG[2:], {"recipe": "lm_only", "eval_ce": 7.25})]


class Page(HTMLParser):
    """Images, cells, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.images, self.cells, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag not in ("meta",):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


def test_page_is_self_contained_and_has_the_panels_that_have_numbers(tmp_path):
    write_report(tmp_path / "report.html", "A title", RUNS, note="a < b")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    titles = [image["alt"] for image in page.images]
    assert titles[:3] == [panel for panel, _ in PANELS[:3]]
    assert "KD weight" in titles
    assert "Temperature" not in titles  # nothing logged it
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.images)
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "7.5000" in page.cells
    assert "■ with KD <b>" in page.cells
    assert "a &lt; b" in text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_curves_hold_the_points(monkeypatch):
    import matplotlib.figure

    from kdfast.training import report

    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    report._images(RUNS)
    axes = drawn[0].axes[0]
    assert axes.get_title() == "Student cross entropy, nats"
    points = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata())]
    assert points == [[[1, 8], [2, 7]], [[2, 7.5]], [[2, 7.5]]]


def test_a_value_that_is_not_finite_leaves_a_gap_and_no_warning(tmp_path):
    log = [*LOG, {"step": 3, "loss": float("nan"), "ce": float("inf"), "kd": None, "learning_rate": "x"}]
    write_report(tmp_path / "report.html", "t", [Run("r", log, SUMMARY)])


def test_a_run_without_a_log_is_a_table_alone(tmp_path):
    write_report(tmp_path / "report.html", "t", [Run("r", [], SUMMARY)])
    assert Page((tmp_path / "report.html").read_text()).images == []


def test_table_shows_a_dash_where_a_number_does_not_apply_and_drops_empty_columns():
    assert table(RUNS) == [
        ["run", "recipe", "student CE", "perplexity", "KL(true‖student)", "tokens"],
        ["with KD <b>", "run5", "7.5000", "1,808.04", "1.2500", "4,096"],
        ["without", "lm_only", "7.2500", "–", "–", "–"],
    ]


def test_text_table_is_aligned():
    lines = text_table(RUNS).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].startswith("run ")
    assert lines[1] == "-" * len(lines[0])


@pytest.mark.parametrize("count", [1, 9])  # nine is one more than there are colours
def test_any_number_of_runs(tmp_path, count):
    write_report(tmp_path / "report.html", "t", [Run(f"run {i}", LOG, SUMMARY) for i in range(count)])
    assert len(Page((tmp_path / "report.html").read_text()).cells) == (count + 1) * len(table(RUNS)[0])
