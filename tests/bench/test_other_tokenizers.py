"""The experiment with other tokenizers: runs that `kdfast distill` accepts, its two tokenizers, and its table."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "recipes"


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import other_tokenizers

    yield other_tokenizers
    for name in ("setting", "other_tokenizers"):
        sys.modules.pop(name, None)


def test_every_run_is_one_that_kdfast_distill_accepts(experiment, tmp_path):
    from kdfast.cli.arguments import parse_mapping

    jobs = experiment.plan([])
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        keys = experiment.settings(tmp_path / "prepared", tmp_path / "runs", job)
        arguments = parse_mapping(job.name, {**keys, "output_dir": str(tmp_path / job.name)})
        longer = 3 if "max_steps" in job.contender else 1
        assert arguments.training.max_steps == longer * experiment.STEPS[job.start]
        assert (arguments.model.student_config is None) == (job.start == "pretrained")


def test_its_tokenizers(experiment, monkeypatch):
    from kdfast.training.data.alignment import OtherTokenizer

    text = ["def words(text):\n    return [word for word in text.split()]\n" * 200]
    monkeypatch.setattr(experiment, "_other_text", lambda characters: text)
    for name in ("pieces", "scripts"):
        pair = OtherTokenizer(experiment._tokenizer("bytes"), experiment._tokenizer(name))
        assert pair.student.start is None
        assert pair.teacher.prefixed
        [row] = pair.aligner()([pair.student.tokenizer("def 字  words<end>")["input_ids"]])
        assert (row.lost, row.positions[-1] >= 0) == ("", True)


def test_the_table(experiment):
    one = {"tokenizer": "bytes", "start": "fresh", "contender": "lm_only", "rate": 2e-3}
    rows = [{**one, "bits_per_byte": 2.5}, {**one, "bits_per_byte": 2.6}, {**one, "rate": 4e-3, "bits_per_byte": 3.0}]
    lines = experiment.table(rows).splitlines()[2:]
    assert lines == [
        "| bytes | fresh | lm_only | 0.002 | 2.550 ± 0.050 | 2 |",
        "| bytes | fresh | lm_only | 0.004 | 3.000 | 1 |",
    ]
