"""Text to blocks: nothing lost but the tail, documents apart, the same every time, and errors that name the file."""

import json

import pytest
from byte_tokenizer import make_tokenizer
from transformers import PreTrainedTokenizerFast

from kdfast.training.data.text import DataError, _pieces, hold_out, load_blocks, read_dataset, read_files


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def read_back(tokenizer, blocks):
    return tokenizer.decode([i for block in blocks["input_ids"] for i in block])


def test_line_breaks_and_document_ends_survive(tmp_path, tokenizer):
    (tmp_path / "b.txt").write_text("second\n\n  file\n")
    (tmp_path / "a.py").write_text("def f():\n\treturn 'é'\n")
    blocks = load_blocks("train_file", read_files("train_file", str(tmp_path)), tokenizer, max_length=8)
    whole = "def f():\n\treturn 'é'\n<end>second\n\n  file\n<end>"
    kept = len(tokenizer(whole)["input_ids"]) // 8 * 8
    assert read_back(tokenizer, blocks) == tokenizer.decode(tokenizer(whole)["input_ids"][:kept])
    assert blocks["labels"][:] == blocks["input_ids"][:]


def test_a_long_document_is_cut_without_loss(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("kdfast.training.data.text.LONGEST_PIECE", 10)  # lines shorter, as long, longer
    text = "abc\n" * 7 + "0123456789" * 3 + "\n" + "123456789\n" * 2 + "end"
    (tmp_path / "a.txt").write_text(text)
    assert all(len(piece) <= 10 for piece in _pieces(text))
    blocks = load_blocks("train_file", read_files("train_file", str(tmp_path / "a.txt")), tokenizer, max_length=1)
    assert read_back(tokenizer, blocks) == text + "<end>"


def test_rows_are_documents(tmp_path, tokenizer):
    rows = [{"body": "one", "n": 1}, {"body": None, "n": 2}, {"body": "three", "n": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    documents = read_files("train_file", str(tmp_path / "a.jsonl"))
    blocks = load_blocks("train_file", documents, tokenizer, max_length=1, text_column="body")
    assert read_back(tokenizer, blocks) == "one<end><end>three<end>"
    with pytest.raises(DataError, match=r"eval_file: a\.jsonl has no column 'bodi'; its columns are body, n.*'body'"):
        load_blocks("eval_file: a.jsonl", documents, tokenizer, max_length=1, text_column="bodi")


def test_parquet_csv_and_a_saved_folder(tmp_path, tokenizer):
    from datasets import Dataset

    source = Dataset.from_dict({"text": ["one", "two"]})
    source.to_parquet(tmp_path / "a.parquet")
    source.to_csv(tmp_path / "a.csv")
    (tmp_path / "folder").mkdir()
    source.to_json(tmp_path / "folder/train.jsonl")
    for documents in (
        read_files("train_file", str(tmp_path / "a.parquet")),
        read_files("train_file", str(tmp_path / "*.csv")),
        read_dataset("dataset_name", str(tmp_path / "folder")),
    ):
        assert read_back(tokenizer, load_blocks("x", documents, tokenizer, max_length=1)) == "one<end>two<end>"


def test_the_second_time_comes_from_the_cache(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    cached = []
    for max_length in (8, 8, 4):  # loaded anew each time, as a second run of the command line does
        loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
        documents = read_files("train_file", str(tmp_path / "a.txt"))
        cached.append(load_blocks("train_file", documents, loaded, max_length).cache_files)
    assert cached[0] == cached[1] != cached[2]


def test_held_out_blocks_are_the_last_ones(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("0123456789" * 4)
    blocks = load_blocks("train_file", read_files("train_file", str(tmp_path)), tokenizer, max_length=10)
    train, evaluation = hold_out(blocks, 0.3)
    assert (len(train), len(evaluation)) == (3, 1)
    with pytest.raises(DataError, match=r"eval_fraction=0\.1 leaves nothing to train on: there are 1 block"):
        hold_out(blocks.select([0]), 0.1)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.txt", None, "gone.txt' does not exist"),
        ("empty.txt", "", "empty.txt' is empty"),
        ("broken.json", '{"text": "a"', "broken.json' could not be read as json"),
        ("broken.parquet", "text", "broken.parquet' could not be read as parquet"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"^train_file: .*{expected}"):
        read_files("train_file", str(tmp_path / name))


def test_a_folder_without_text_and_one_with_two_kinds_are_named(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="without a readable file"):
        read_files("train_file", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match="mixes json and text files"):
        read_files("train_file", str(tmp_path))


def test_too_little_text_and_a_tokenizer_without_an_end_are_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("short")
    documents = read_files("train_file", str(tmp_path))
    with pytest.raises(DataError, match=r"train_file holds 1 document\(s\) and not one full block of max_length=64"):
        load_blocks("train_file", documents, tokenizer, max_length=64)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, name_or_path="endless")
    with pytest.raises(DataError, match="'endless' has no end-of-text token"):
        load_blocks("train_file", documents, endless, max_length=1)


def test_an_unknown_data_set_is_named(tmp_path):
    with pytest.raises(DataError, match=r"dataset_name: data set '.*gone', configuration None, split 'train'"):
        read_dataset("dataset_name", str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text\n1\n2\n", "'text' holds int64, expected text"),
        ("a.json", '{"text": ["a"]}\n', "'text' holds no text, expected text"),
        ("a.json", '{"text": {"a": 1}}\n', "'text' holds no text, expected text"),
        ("a.json", '{"text": null}\n', "not one full block"),
        ("a.json", " null", "is no JSON of rows; expected it to begin with"),  # what ends pyarrow by SIGSEGV
        ("a.jsonl", "null\n{}\n", "is no JSON of rows"),
    ],
)
def test_a_column_that_is_no_text_is_named(tmp_path, tokenizer, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=expected):
        load_blocks("train_file", read_files("train_file", str(tmp_path / name)), tokenizer, max_length=8)
