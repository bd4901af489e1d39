"""report.html: one file that needs nothing else, every number in it, and no panel or column without a number.

Curves are looked at as points, before they are drawn.
"""

import math
import re
from html.parser import HTMLParser

import pytest

from kdfast.report.curves import PANELS, differ_in_tokens, limits_after_the_fall, panels
from kdfast.report.page import made_here, minus_lm_only, png_names, table, text_table, write_pngs, write_report
from kdfast.report.read_runs import Run, log_table
from kdfast.training.on_policy.texts import Text

LOG = [
    {"step": 1, "loss": 9.0, "ce": 8.0, "kd": 2.0, "kd_weight": 0.1, "learning_rate": 1e-3},
    {"step": 2, "loss": 8.0, "ce": 7.0, "kd": 1.0, "kd_weight": 0.4, "learning_rate": 5e-4},
    {"step": 2, "eval_ce": 7.5, "eval_kl_teacher_student": 1.25},
]
SUMMARY = {"recipe": "run5", "eval_ce": 7.5, "perplexity": math.exp(7.5), "kl_teacher_student": 1.25, "tokens": 4096}
ONE_PANEL = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}]  # drawing a panel is what costs time


def run(name, log, summary=None):
    return Run(name, log_table(log), summary or {})


RUNS = [run("with KD <b>", LOG, SUMMARY), run("without", LOG[2:], {"recipe": "lm_only", "eval_ce": 7.25})]


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
    assert titles[0] == ("Student cross entropy, nats, curves of 2 run(s). Last values: with KD <b> 7.5; without 7.5.")
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert captions[:3] == [panel.title for panel in PANELS[:3]]
    assert "KD weight" in captions
    assert "Temperature" not in captions  # nothing logged it
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.images)
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "7.5000" in page.cells
    assert page.cells[:4] == ["run", "with KD <b>", "without", "recipe"]  # a column for each of few
    assert "a &lt; b" in text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def points(runs):
    """title → [(run, evaluated, [(x, y), …]), …]"""
    return {
        panel.title: [(c.run, c.evaluated, list(c.points.items())) for c in curves] for panel, curves in panels(runs)
    }


def test_curves_hold_the_points():
    found = points(RUNS)
    evaluated = [(0, True, [(2, 7.5)]), (1, True, [(2, 7.5)])]
    assert found["Student cross entropy, nats"] == [(0, False, [(1, 8), (2, 7)]), *evaluated]
    perplexity = found["Student perplexity"]  # not logged
    assert [(run, how) for run, how, _ in perplexity] == [(0, False), (0, True), (1, True)]
    assert perplexity[0][2] == [(1, pytest.approx(math.exp(8))), (2, pytest.approx(math.exp(7)))]
    assert found["Learning rate of the student"] == [(0, False, [(1, 1e-3), (2, 5e-4)])]  # from learning_rate


def test_every_group_has_its_learning_rate_and_memory_is_in_mib():
    log = [{"step": 1, "learning_rate": 9.0, "lr_student": 1.0, "lr_projector": 5.0, "lr_router": 2.0, "lr_other": 3.0}]
    found = points([run("r", [{**log[0], "memory_bytes": 3 * 2**20, "aux_loss": 2.5}])])
    rates = {title: y for title, [(_, _, [(_, y)])] in found.items()}
    assert rates == {
        "Load-balancing loss of experts": 2.5,
        "Learning rate of the student": 1.0,
        "Learning rate of the projector": 5.0,
        "Learning rate of routers": 2.0,
        "Learning rate of other parameters": 3.0,
        "Memory, MiB": 3.0,
    }


def counting(tokens_per_step, *, steps=(10, 20, 30)):
    trained = [{"step": s, "loss": 1.0, "tokens_seen": s * tokens_per_step} for s in steps]
    return run("r", [*trained[:2], {"step": 25, "eval_loss": 2.0}, *trained[2:]])


def test_runs_that_differ_in_tokens_per_step_are_drawn_over_tokens():
    small, large = counting(100), counting(400)
    assert not differ_in_tokens([small, counting(101)])  # masked rows
    assert points([small])["Total loss"][1] == (0, True, [(25, 2.0)])
    assert points([small, large])["Total loss"][1::2] == [(0, True, [(2500, 2.0)]), (1, True, [(10_000, 2.0)])]
    plain = run("transformers'", LOG)  # counts no tokens: there are only steps to compare by
    assert not differ_in_tokens([small, large, plain])
    assert differ_in_tokens([small, large, run("without a log", [])])


def test_pictures_are_those_of_the_panels_with_numbers(tmp_path):
    runs = [RUNS[0], run("_$x$ \u2016", LOG)]  # neither a formula nor a label that matplotlib drops
    written = write_pngs(tmp_path, runs)
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()} <= set(png_names())
    assert "student-perplexity.png" in png_names()
    assert len(written) == len(panels(runs))
    assert all(path.read_bytes().startswith(b"\x89PNG") and made_here(path) for path in written)


def test_a_page_is_known_from_a_users_own(tmp_path):
    write_report(tmp_path / "report.html", "t", [run("r", ONE_PANEL, SUMMARY)])
    assert made_here(tmp_path / "report.html")
    (tmp_path / "notes.md").write_text("the kdfast report of Tuesday")
    assert not made_here(tmp_path / "notes.md")


def test_health_messages_stand_under_the_table(tmp_path):
    said = [(3, "the loss <rises>"), (3, "so does the gradient"), (9, "late")]
    health = [{"step": step, "kind": "x", "message": message} for step, message in said]
    ill, well = run("ill", ONE_PANEL, {"health": health}), run("well", ONE_PANEL, SUMMARY)
    write_report(tmp_path / "report.html", "t", [ill, well])
    text = (tmp_path / "report.html").read_text()
    said = text[text.index("What the health check said") : text.index("<h2>Curves")]
    messages = ["step 3: the loss &lt;rises&gt;", "step 3: so does the gradient", "step 9: late"]
    assert re.findall("<li>(.*?)</li>", said) == messages
    assert re.findall("<h3>(.*?)</h3>", said) == ["ill"]
    write_report(tmp_path / "report.html", "t", [well])
    assert "health check" not in (tmp_path / "report.html").read_text()


def test_a_value_that_is_not_finite_leaves_a_gap_and_no_warning(tmp_path):
    log = [*LOG, {"step": 3, "loss": float("nan"), "ce": float("inf"), "kd": None, "learning_rate": "x"}]
    log += [{"step": s, "ce": 690.0, "eval_perplexity": 1e300} for s in range(4, 20)]  # diverged: near float's end
    write_report(tmp_path / "report.html", "t", [run("r", log, SUMMARY)])


def test_the_same_runs_give_the_same_page(tmp_path):
    runs = [run(f"run {i}", ONE_PANEL, SUMMARY) for i in range(9)]
    pages = []
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, "t", runs)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_a_run_without_a_log_is_a_table_alone(tmp_path):
    write_report(tmp_path / "report.html", "t", [run("r", [], SUMMARY)])
    assert Page((tmp_path / "report.html").read_text()).images == []


def test_table_shows_a_dash_where_a_number_does_not_apply_and_drops_empty_columns():
    made = table(RUNS)
    assert [["run", *made.columns], *([name, *row] for name, *row in made.itertuples())] == [
        ["run", "recipe", "student CE", "perplexity", "KL(true‖student)", "tokens"],
        ["with KD <b>", "run5", "7.5000", "1,808.04", "1.2500", "4,096"],
        ["without", "lm_only", "7.2500", "–", "–", "–"],
    ]


def test_students_are_compared_with_lm_only_at_equal_tokens_and_at_equal_seconds():
    def student(name, recipe, ce, tokens, seconds, **more):
        summary = {"recipe": recipe, "eval_ce": ce, "tokens": tokens, "seconds": seconds, "student_parameters": 9}
        return run(name, [], {**summary, **more})

    runs = [
        student("teacher", "lm_only", 4.0, 1000, 100.0, student_parameters=99),
        student("short", "lm_only", 6.0, 1000, 10.0),
        student("long", "lm_only", 5.5, 4000, 42.0),
        student("killed", "lm_only", 5.9, 1005, 31.0, unfinished="step 9 of 10"),
        student("live", "teacher_head", 5.75, 1010, 39.0),
        student("kept", "svd_init", 5.25, 2000, 12.0, teacher_seconds=30.0),
        student("slow", "projector", 5.5, 1000, 60.0),
        student("other text", "probe", 5.5, 1000, 10.0, eval_tokens=7),
    ]
    made = table(runs)
    assert dict(made["minus LM only, equal tokens"]) == {
        **dict.fromkeys(("teacher", "short", "long", "killed", "kept", "other text"), "–"),
        "live": "-0.250",  # 1000 of 1010, not 1005 of a run that is not finished
        "slow": "-0.500",
    }
    assert {name: minus_lm_only(one, runs, "seconds") for name, one in zip(made.index, runs, strict=True)} == {
        **dict.fromkeys(("teacher", "short", "long", "killed", "slow", "other text")),
        "live": 0.25,  # 42 s of 39
        "kept": -0.25,  # 42 s of 12 + 30
    }
    assert made["teacher's seconds"]["kept"] == "30.0"


def test_text_table_is_aligned():
    few, many = (text_table(runs).splitlines() for runs in (RUNS, 40 * RUNS))
    for lines in (few, many):
        assert len({len(line) for line in lines}) == 1
    assert few[0].split("  ")[0] == many[0].split("  ")[0] == "run"
    assert few[1].startswith("recipe ")  # the narrower of the two
    assert "student CE  perplexity" in many[0]


@pytest.mark.parametrize("count", [1, 2, 11])  # eleven is one more than there are colors
def test_any_number_of_runs(tmp_path, count):
    write_report(tmp_path / "report.html", "t", [run(f"run {i}", ONE_PANEL, SUMMARY) for i in range(count)])
    text = (tmp_path / "report.html").read_text()
    assert len(Page(text).cells) == (count + 1) * (1 + len(table(RUNS).columns))
    assert len(Page(text).images) == 1


def test_a_cross_entropy_past_every_perplexity_has_no_panel_of_one(tmp_path):
    log = [{"step": step, "loss": 900.0, "ce": 900.0 + step} for step in (1, 2)]
    write_report(tmp_path / "report.html", "run", [run("run", log)])
    assert "Student perplexity" not in [panel.title for panel, _ in panels([run("run", log)])]


def test_a_short_run_beside_a_long_one_keeps_its_first_values_in_sight():
    long = run("long", [{"step": step, "ce": 3.0} for step in range(1, 101)])
    short = run("short", [{"step": step, "ce": 9.0 - step} for step in (1, 2, 5)])
    curves = next(curves for panel, curves in panels([long, short]) if panel.keys == ("ce",))
    assert limits_after_the_fall(curves) == (3.0, 8.0)


def test_generated_text_is_shown_of_the_first_the_middle_and_the_last_step(tmp_path):
    texts = [Text(step, "student", f"<p{step}>", f"said at {step}") for step in range(1, 6)]
    write_report(tmp_path / "page.html", "t", [run("a", ONE_PANEL)._replace(texts=texts), run("b", ONE_PANEL)])
    page = (tmp_path / "page.html").read_text()
    Page(page)
    assert re.findall("said at ([0-9])", page) == ["1", "3", "5"]
    assert "&lt;p3&gt;<mark>said at 3</mark>" in page


def test_a_kl_that_is_a_lower_bound_is_said_to_be_one():
    """The answers of a server, beside a run with a live teacher."""
    runs = [run("live", [], SUMMARY), run("served", [], {**SUMMARY, "kl_is_lower_bound": True})]
    assert [*table(runs)["KL(true‖student)"]] == ["1.2500", "≥ 1.2500"]
    assert [*table([run("plain", [], {"recipe": "lm_only", "kl_is_lower_bound": True})])] == ["recipe"]
