"""`kdfast cache`, and `kdfast distill` from what it wrote."""

import errno
import json
import re

import pytest
import yaml
from byte_tokenizer import make_tokenizer

from kdfast.cli import distill
from kdfast.cli.output_dir import claim
from kdfast.training.cache import write

CACHE = {"teacher_cache": "kept", "cache_top_k": 257, "cache_dtype": "float32", "cache_shard_tokens": 200}


@pytest.fixture
def configured(place):
    """The current directory; c.yaml asks for a cache of the whole vocabulary and a run from it."""
    config = yaml.safe_load((place / "config.yaml").read_text())
    (place / "c.yaml").write_text(yaml.safe_dump(config | CACHE | {"recipe": "auto"}))
    return place


def losses(place, out):
    log = json.loads((place / out / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in log for key in ("loss", "eval_loss", "eval_kl_teacher_student") if key in entry]


def test_from_a_cache_as_from_the_live_teacher(configured, kdfast, monkeypatch):
    code, out, err = kdfast("cache", "c.yaml")
    assert code == 0, err
    tokens, size, speed = re.search(
        r"([\d,]+) tokens, [\d.]+ MB, ([\d.]+) bytes a token, ([\d,]+) tokens/s", out
    ).groups()
    summary = json.loads((configured / "kept/summary.json").read_text())
    assert int(tokens.replace(",", "")) == summary["tokens"]
    assert float(size) == pytest.approx(summary["bytes_per_token"], abs=0.05)
    assert float(size) > 257 * (2 + 4)
    assert int(speed.replace(",", "")) > 0

    code, out, err = kdfast("distill", "c.yaml", "--teacher_cache=", "--recipe", "teacher_head", "--output_dir", "live")
    assert code == 0, err

    def no_teacher(*args, **kwargs):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(distill, "load_teacher", no_teacher)
    code, out, err = kdfast("distill", "c.yaml")
    assert code == 0, err
    assert "recipe cached: the data set brings a teacher's cached entries" in out
    trained = json.loads((configured / "out/summary.json").read_text())
    assert trained["recipe"] == "cached"
    assert trained["teacher_seconds"] == summary["seconds"]
    assert trained["times_lm_only"] == 1
    assert losses(configured, "out") == pytest.approx(losses(configured, "live"), rel=1e-6)
    assert len(losses(configured, "out")) == 2 + 2

    code, out, err = kdfast("distill", "c.yaml", "--recipe", "lm_only", "--output_dir", "alone")  # what it has to beat
    assert code == 0, err
    assert json.loads((configured / "alone/summary.json").read_text())["kl_teacher_student"] > 0


def test_hidden_states_are_kept_where_nothing_is_said(configured, kdfast, monkeypatch):
    """Of a rank, for runs at any temperature, under any divergence: whole they are the live teacher."""
    plain = ["--teacher_cache", "kept", "--cache_dtype", "float32", "--compressed_rank", "4096"]
    code, out, err = kdfast("cache", "config.yaml", *plain)
    assert code == 0, err
    assert "of the teacher's head: KL(teacher ‖ what is kept) 0, agreement 100%" in out
    assert json.loads((configured / "kept/cache.json").read_text())["method"] == "hidden"
    of_run = ["--temperature", "3", "--divergence", "jsd", "--output_dir"]
    assert kdfast("distill", "config.yaml", "--recipe", "teacher_head", *of_run, "live")[0] == 0
    monkeypatch.setattr(distill, "load_teacher", None)
    code, _, err = kdfast("distill", "config.yaml", "--recipe", "cached", *plain[:2], *of_run, "out")
    assert code == 0, err
    assert losses(configured, "out") == pytest.approx(losses(configured, "live"), rel=1e-5)
    refused = {
        "--compressed_rank=8 --compressed_kl=0.1": "compressed_rank=8 and max_kl=0.1",
        "--cache_top_k=4 --cache_dtype=int8": "cache_dtype='int8'; expected 'float16'",
    }
    for wrong, said in refused.items():
        code, _, err = kdfast("cache", "config.yaml", "--teacher_cache", "other", *wrong.split())
        assert (code, said in err) == (2, True), err


def test_a_complete_cache_is_left_alone_and_an_interrupted_one_completed(configured, kdfast, monkeypatch):
    def full(*args, **kwargs):
        if len(list((configured / "kept").glob("train-*"))) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **kwargs)

    save = write.Dataset.save_to_disk
    monkeypatch.setattr(write.Dataset, "save_to_disk", full)
    code, _, err = kdfast("cache", "c.yaml")
    assert code == 1
    assert "No space left on device. Once that is mended (a full disk: make room), the same command goes on" in err
    code, _, err = kdfast("distill", "c.yaml")
    assert code == 2
    assert "'kept' is not complete" in err
    monkeypatch.undo()
    monkeypatch.chdir(configured)
    assert kdfast("cache", "c.yaml")[0] == 0
    files = {path: path.stat().st_mtime_ns for path in (configured / "kept").rglob("*")}
    code, out, _ = kdfast("cache", "c.yaml")
    assert code == 0
    assert "kept: complete already" in out
    assert files == {path: path.stat().st_mtime_ns for path in (configured / "kept").rglob("*")}


def test_what_a_run_refuses(configured, kdfast):
    """Another text, block length, tokenizer, teacher, temperature, recipe; a damaged shard."""
    assert kdfast("cache", "c.yaml", "--cache_top_k", "4")[0] == 0
    (configured / "other.txt").write_text((configured / "text.txt").read_text().replace("square", "SQUARE"))
    make_tokenizer(extra=["<more>"]).save_pretrained(configured / "tokenizer")
    refused = {
        "split 'eval', is of other data": ["--train_file", "other.txt"],
        "is of other data: then": ["--max_length", "16"],
        "has other tokens": ["--tokenizer_name", "tokenizer"],
        "'kept' is a cache of 'teacher'. Name that one": [
            "--teacher_model_name_or_path",
            "gpt2",
            "--tokenizer_name",
            "teacher",
        ],
        "temperature=3; 'kept' was made for 1, 2": ["--temperature", "3"],
        "teacher_cache='kept'; expected a cache for cached, either for auto": ["--recipe", "projector_fixed"],
        "'nowhere' is no teacher cache": ["--teacher_cache", "nowhere", "--recipe", "cached"],
    }
    for message, overrides in refused.items():
        code, _, err = kdfast("distill", "c.yaml", *overrides)
        assert (code, message in err, err.count("kdfast: ")) == (2, True, 1), err
    code, _, err = kdfast("distill", "config.yaml", "--recipe", "cached")
    assert (code, "and teacher_cache=None; expected a cache for cached" in err) == (2, True)
    arrow = next((configured / "kept" / "train-00001").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-3])
    code, _, err = kdfast("distill", "c.yaml")
    assert (code, "is damaged: " in err, "Remove that folder" in err) == (2, True, True)


def test_what_the_cache_refuses(configured, kdfast, capsys):
    refused = {
        "teacher_cache is missing; kdfast cache needs it": ["--teacher_cache="],
        "teacher_model_name_or_path is missing; kdfast cache needs it": ["--teacher_model_name_or_path="],
        "cache_top_k=300; expected 1 to 257": ["--cache_top_k", "300"],
        "cache_method='beam'; expected one of hidden, sample, top_k": ["--cache_method", "beam"],
        "max_length=65 is more than the 64 positions the teacher has": ["--max_length", "65"],
    }
    for message, overrides in refused.items():
        code, _, err = kdfast("cache", "c.yaml", *overrides)
        assert (code, message in err, err.count("kdfast: ")) == (2, True, 1), err
    assert kdfast("cache", "c.yaml", "--cache_top_k", "4")[0] == 0
    code, _, err = kdfast("cache", "c.yaml", "--cache_top_k", "5")
    assert (code, "something else (k: then 4, now 5)" in err) == (2, True)
    with pytest.raises(SystemExit, match="0"):
        kdfast("cache", "--help")
    out = capsys.readouterr().out
    assert "usage: kdfast cache CONFIG.yaml" in out
    assert "--cache_top_k" in out
    assert "--kd_weight" not in out


def test_a_run_makes_the_cache_it_names_and_the_next_one_reads_it(configured, kdfast):
    for name in ("first", "second"):
        code, out, err = kdfast("distill", "c.yaml", "--recipe", "svd_init", "--output_dir", name)
        assert (code, "kept: the teacher's entries are there" in out) == (0, name == "second"), err
        summary = json.loads((configured / name / "summary.json").read_text())
        settings = (summary["recipe"], summary["settings"]["teacher"], summary["settings"]["student_init"])
        assert settings == ("svd_init", "cached", "svd")
        assert summary["kl_teacher_student"] > 0
    assert json.loads((configured / "kept" / "cache.json").read_text())["splits"].keys() == {"train"}


def test_what_a_run_makes_in_its_folder_goes_with_it(configured, kdfast):
    run = ["c.yaml", "--teacher_cache=", "--precompute_teacher_log_probs", "true", "--recipe", "teacher_head"]
    assert kdfast("distill", *run)[0] == 0
    made = configured / "out" / "teacher_cache" / "cache.json"
    assert json.loads(made.read_text())["temperatures"] == [2]
    assert kdfast("distill", *run, "--temperature", "3")[0] == 2
    assert kdfast("distill", *run, "--temperature", "3", "--overwrite_output_dir", "true")[0] == 0
    assert json.loads(made.read_text())["temperatures"] == [3]


def test_a_run_thrown_away_takes_its_own_entries_with_it_alone(tmp_path):
    run, kept = tmp_path / "run", tmp_path / "run" / "teacher_cache"
    for named, stays in ((None, False), (str(kept), True)):
        kept.mkdir(parents=True, exist_ok=True)
        (run / "kdfast.json").write_text("{}")
        claim(run, {"teacher_cache": named}, overwrite=True)
        assert kept.exists() == stays
