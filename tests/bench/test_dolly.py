"""The Dolly script on stand-ins: every step end to end, resumed, and what it says where something is missing."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "recipes"


@pytest.fixture
def dolly(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import dolly

    yield dolly
    for name in ("dolly", "stand_ins"):
        sys.modules.pop(name, None)


def table_of(out):
    lines = (out / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.slow
def test_every_step_and_none_twice(dolly, tmp_path, monkeypatch):
    pytest.importorskip("rouge_score")
    command, out = ["--quick", "--out", str(tmp_path / "run")], tmp_path / "run-quick"

    # killed in the last epoch of a student, after the first one's checkpoint
    score, began = dolly.KeepBest.on_epoch_end, []

    def begin(self, args, state, *rest, _begin=dolly.KeepBest.on_epoch_begin, **others):
        began.append((self.place.name, state.global_step))
        _begin(self, args, state, *rest, **others)

    def die(self, args, state, *rest, **others):
        if self.place.name.startswith("reverse_kl") and state.epoch > 1:
            raise KeyboardInterrupt
        score(self, args, state, *rest, **others)

    monkeypatch.setattr(dolly.KeepBest, "on_epoch_begin", begin)
    monkeypatch.setattr(dolly.KeepBest, "on_epoch_end", die)
    with pytest.raises(KeyboardInterrupt):
        dolly.main([*command, "teacher", "student"])
    monkeypatch.setattr(dolly.KeepBest, "on_epoch_end", score)
    dolly.main([*command, "table"])
    assert table_of(out)["sft"][1] == table_of(out)["jsd"][7] == "not run", "trained, but not evaluated; not trained"
    assert len(began) == 1 + 3 * 2
    dolly.main(command)
    assert began[7] == ("reverse_kl--lr0.001", 3), "the second epoch alone"
    assert len(began) == 8 + 4 * 2

    figures = table_of(out)
    assert list(figures) == list(dolly.PUBLISHED)
    assert set(figures["GKD, on-policy"][1:]) == {"not run"}
    for method in ("teacher", *dolly.METHODS):
        run = json.loads(
            (dolly.Path(out) / (method if method == "teacher" else f"{method}--lr0.001") / "run.json").read_text()
        )
        assert not any("not run" in cell for cell in figures[method])
        assert figures[method][7:9] == [f"{run['rate']:g}", str(run["epoch"])]
        assert run["seconds"] > 0
        assert run["tokens"] > 0
    assert figures["sft"][-1] == "1.00"
    assert len(list(out.glob("*/evaluation/*.json"))) == 8 * 5 * 2
    assert not list(out.glob("*/checkpoints"))
    assert "no figure means anything" in (out / "table.md").read_text()

    def never(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(dolly.KDTrainer, "train", never)
    monkeypatch.setattr(dolly.Lab, "rouge_l", never)
    dolly.main(command)
    assert table_of(out) == figures


@pytest.fixture
def lab(dolly, tmp_path):
    import stand_ins

    options = stand_ins.make(tmp_path / "stand-ins")
    return dolly.Lab(SimpleNamespace(out=tmp_path / "run", teacher=None, methods=["sft"], **options), dolly.QUICK)


def test_prompts_are_masked_and_long_ones_left_out(dolly, lab):
    row = {"instruction": "Name a stone.", "input": "", "output": "marble"}
    renamed = {"instruction": "Name a stone.", "context": "", "response": "marble", "category": "open_qa"}
    assert dolly.prompt_and_output(row) == dolly.prompt_and_output(renamed)
    assert "### Input:\nHere.\n\n### Response:\n" in dolly.prompt_and_output({**row, "input": "Here."})["prompt"]

    made = dolly.tokenize(row, lab.tokenizer, 200)
    answer = [i for i, label in zip(made["input_ids"], made["labels"], strict=True) if label != -100]
    assert lab.tokenizer.decode(answer) == "marble<|endoftext|>"
    assert made["labels"] == [-100] * made["asked"] + answer
    cut = dolly.tokenize(row, lab.tokenizer, made["asked"] - 2)
    assert set(cut["labels"]) == {-100}
    assert len(cut["input_ids"]) == len(cut["labels"]) == made["asked"] - 2

    rows, validation = lab.training_text()
    asked = [next(i for i, label in enumerate(labels) if label != -100) for labels in rows["labels"]]
    assert max(asked) <= lab.s.max_prompt_length
    assert (len(rows), len(validation)) == (23, 8)
    assert set(rows.column_names) == {"input_ids", "attention_mask", "labels"}


def test_rouge_l_is_of_the_answer_alone(lab):
    """The best of the references, stemmed and in percent; prompts of several lengths are padded on the left."""
    pytest.importorskip("rouge_score")
    answers = [lab.tokenizer(text).input_ids for text in (" the rivers<|endoftext|>", "stone<|endoftext|>tiger")]
    width = max(map(len, answers))
    end = lab.tokenizer.eos_token_id

    class Model:
        device = torch.device("cpu")

        def generate(self, input_ids, attention_mask, **options):
            assert options["max_new_tokens"] == 8
            assert (attention_mask[:, -1] == 1).all()
            assert lab.tokenizer.decode(input_ids[0, attention_mask[0] == 1]) == "Say river.\n"
            return torch.cat((input_ids, torch.tensor([a + [end] * (width - len(a)) for a in answers])), dim=1)

    rows = [{"prompt": "Say river.<n>", "output": ["a cloud", "the river"]}, {"prompt": "Say.", "output": "apple"}]
    assert lab.rouge_l(Model(), rows, 10) == pytest.approx(50.0)


def test_the_better_rate_is_taken_once_both_are_there(dolly, lab):
    lab.s = dolly.replace(dolly.QUICK, rates=(1e-3, 2e-3))
    for place, score in zip(lab.places("jsd"), (3.0, 4.0), strict=True):
        assert lab.best("jsd") is None
        place.mkdir()
        (place / "run.json").write_text(json.dumps({"rouge_l": score}))
    assert lab.best("jsd") == lab.places("jsd")[1]


def test_what_is_missing_is_named(dolly, lab, tmp_path, capsys):
    out = ["--out", str(tmp_path / "other")]
    with pytest.raises(SystemExit, match="needs nowhere/gpt2, which is neither here nor on a hub"):
        dolly.main([*out, "--student", "nowhere/gpt2"])
    with pytest.raises(SystemExit, match=r"needs nowhere/dolly/raw.jsonl.*MiniLLM \(--data\).*--quick"):
        dolly.main([*out, "--student", lab.args.student, "--data", "nowhere"])
    with pytest.raises(SystemExit, match="was made with data 'nowhere', not 'MiniLLM'; name another --out"):
        dolly.main([*out, "--student", lab.args.student])
    with pytest.raises(SystemExit, match="teacher: no finished run"):
        dolly.main([*out, "--student", lab.args.student, "--data", "nowhere", "evaluate"])
    with pytest.raises(SystemExit):
        dolly.main([*out, "evaluation"])
    assert "step 'evaluation' is unknown; expected one of teacher, student" in capsys.readouterr().err
    dolly.main([*out, "--student", lab.args.student, "--data", "nowhere", "table"])
    for method, cells in table_of(tmp_path / "other").items():
        assert cells == [f"{dolly.PUBLISHED[method]:.2f}", *["not run"] * 10]
