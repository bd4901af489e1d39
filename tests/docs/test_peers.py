"""What docs/peers.md says and leaves to a test: names of options, figures, and rows of the full table."""

import dataclasses

import documents
import pytest
from chats import QUESTIONS, assistant, chat_tokenizer, user
from datasets import Dataset
from tiny_models import tiny

from kdfast import KDConfig
from kdfast.training import tokenize_dataset

IGNORED = -100

PAGE = documents.source("docs/peers.md")


def test_names_of_gkd_config():
    """Every name in the table is a field of the configuration in whose column it stands."""
    pytest.importorskip("trl.experimental.gkd", exc_type=ImportError, reason="pip install trl")
    from trl import DistillationConfig
    from trl.experimental.gkd import GKDConfig

    theirs, ours = ({field.name for field in dataclasses.fields(cls)} for cls in (GKDConfig, KDConfig))
    assert {"beta", "temperature", "lmbda", "seq_kd", "max_new_tokens"} <= theirs
    assert {"teacher_model_name_or_path", "model_init_kwargs", "teacher_model_init_kwargs"} <= theirs
    assert {"recipe", "beta", "temperature", "sampling_temperature", "ce_weight", "on_policy", "seq_kd"} <= ours
    assert {"max_new_tokens", "kd_ratio"} <= ours
    assert GKDConfig.temperature == 0.9
    assert (GKDConfig.lmbda, KDConfig.on_policy) == (0.5, 0.0)
    assert "temperature" in {field.name for field in dataclasses.fields(DistillationConfig)}


def test_figures_of_a_step():
    text = documents.source("bench/results/on-policy-step-cpu.md")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    found = {row[1]: row[2:] for row in rows if row[0].endswith("V = 151,936")}
    page = " ".join(PAGE.split())
    mib, ours, seconds, our_seconds = found["GKDTrainer"]
    assert f"`GKDTrainer` took {mib} MiB and {seconds} s with its own loss, {ours} MiB and {our_seconds} s" in page
    mib, ours, seconds, our_seconds = found["DistillationTrainer"]
    assert abs(int(mib) - int(ours)) < 5
    assert f"the memory is the same, and its {seconds} s became {our_seconds} s" in page


def test_rows_are_those_of_the_full_table():
    """A cell says yes, or no, where that of tests/peers/README.md does."""
    full = _table(documents.source("tests/peers/README.md").split("## Who has what")[1])
    names = {
        "teacher's own head, on hidden states": "hidden states and the teacher's own head",
        "τ²": "τ²",
        "vocabulary-parallel KL": "vocabulary-parallel",
        "a second backward is right": "second backward right",
        "`torch.compile(fullgraph=True)`": "`torch.compile(fullgraph=True)`",
        "cross entropy in the same pass": "cross entropy in the same pass",
        "logits never whole": "logits never whole",
        "fp32 logits from bf16 inputs": "fp32 logits from 16-bit inputs",
        "top-k teachers": "sparse top-k log-probabilities",
        "second derivatives": "double backward",
        "vocabularies of different sizes": "vocabularies of different size",
        "projected teacher, without whole logits": "projected through the student's own head, gradient to "
        "projector and W",
        "CPU": "CPU",
    }
    short = _table(PAGE.split("## Who has what")[1])
    assert short.keys() - names.keys() == {"symmetric KL, skew KLs, total variation, αβ"}
    for row, cells in short.items():
        if row in names:
            for mine, its in zip(cells, full[names[row]], strict=False):  # the full table has a column of tests
                assert (mine in ("yes", "reference engine")) == its.startswith("yes"), (row, mine, its)


def _table(text):
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| |", "| **"))]
    rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
    return {row[0]: row[1:] for row in rows}


def test_what_gkd_counts_and_divides_by(tmp_path):
    """Its data's labels are those of prompts with completions here; its divisor is their number, whoever wrote."""
    pytest.importorskip("trl.experimental.gkd", exc_type=ImportError, reason="pip install trl")
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    seen = []

    class Watched(GKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append((int(num_items_in_batch), int((inputs["labels"][:, 1:] != IGNORED).sum())))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    tokenizer = chat_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    chats = [[user(question), assistant(answer)] for question, answer in QUESTIONS]
    split = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
    rows, _ = tokenize_dataset(Dataset.from_list(split), tokenizer, max_length=64)
    options = {"output_dir": str(tmp_path), "max_steps": 1, "max_new_tokens": 2, "bf16": False, "report_to": "none",
               "save_strategy": "no", "per_device_train_batch_size": len(chats)}  # fmt: skip
    for lmbda in (0.0, 1.0):
        data = Dataset.from_list([{"messages": chat} for chat in chats])
        models = (tiny(V=len(tokenizer), seed=seed) for seed in (0, 1))
        Watched(*models, GKDConfig(**options, lmbda=lmbda), train_dataset=data, processing_class=tokenizer).train()
    targets = sum(label != IGNORED for row in rows for label in row["labels"])
    (divisor, count), (divisor_of_written, written) = seen
    assert divisor == count == divisor_of_written == targets
    assert written < targets
