"""docs/first-model.md: its table is a run of the demo, its lowest versions are the package's."""

import json
import re

import documents

from kdfast.report.page import text_table
from kdfast.report.read_runs import Run, log_table

PAGE = documents.source("docs/first-model.md")


def test_the_table_is_what_the_demo_printed():
    """bench/results/demo.json holds the summary.json that `kdfast demo` left."""
    summaries = json.loads((documents.ROOT / "bench/results/demo.json").read_text())
    printed = text_table([Run(name, log_table([]), summary) for name, summary in summaries.items()])
    (table,) = [block.text.strip() for block in documents.blocks("docs/first-model.md") if block.language == "text"]
    assert [line for line in table.splitlines() if line not in (*printed.splitlines(), "…")] == []
    seen = {name: summary["kd"] for name, summary in summaries.items() if summary["kd"] is not None}
    assert set(sorted(seen, key=seen.get)[:2]) == {"projector", "projector_fixed"}  # least, of all that have one
    assert f"`auto` takes `{summaries['auto']['recipe']}` here" in PAGE


def test_the_lowest_versions_are_those_of_the_package():
    setup = (documents.ROOT / "setup.py").read_text()
    required = dict(re.findall(r'"([a-z]+)>=([\d.]+)[";]', setup)) | {"python": re.search(r">=(3\.\d+)", setup)[1]}
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", PAGE.partition("| newest tried |")[2], re.M))
    named = {
        "python": rows["Python"],
        **dict(zip(("torch", "triton"), rows["torch, with its Triton"].split(", "), strict=True)),
        "transformers": rows["transformers"],
        **dict(zip(("accelerate", "datasets"), rows["accelerate, datasets"].split(", "), strict=True)),
    }
    for name, lowest in named.items():
        digits = required[name].split(".")
        assert lowest.split(".")[: len(digits)] == digits, name
