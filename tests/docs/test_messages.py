"""The messages in docs/troubleshooting.md are what the code says, word for word, and each of them is provoked here."""

import math

import documents
import pytest
import torch
from chats import UNMARKED, chat_tokenizer, raw
from tiny_models import tiny

from kdfast import DistillationModel, Head, KDConfig, KDTrainer, fused_kd_loss
from kdfast.cli.main import main
from kdfast.training import HealthThresholds, tokenize_dataset
from kdfast.training.diagnostics import Log
from kdfast.training.recipes import choose_recipe

PAGE = "docs/troubleshooting.md"
QUOTED = [block.text for block in documents.blocks(PAGE) if block.language == "text"]


class DTensor(torch.Tensor):
    pass


def heads():
    student = Head(torch.randn(6, 8, requires_grad=True), torch.randn(40, 8))
    return student, Head(torch.randn(6, 12), torch.randn(40, 12))


def warning(kind, line, progress=0.0):
    log = Log(HealthThresholds(), 67)
    if "loss" not in line:  # an evaluation, after some training
        log.read({"loss": 5.5, "temperature": 2.0}, progress)
    return f"{kind}: {log.read(line, progress)[kind]}"


def initial_loss():
    return warning("initial_loss", {"loss": 14.0, "ce": 13.0, "kd": 0.1, "kd_weight": 0.7, "temperature": 2.0})


def kl():
    return warning("kl", {"loss": 9.0, "kd": 6.5}, 0.3)


def follows():
    kls = {"eval_kl_teacher_student": 0.34, "eval_kl_teacher_projected": 0.38}
    return warning("follows", {"eval_ce": 5.5, "eval_kd": 0.007, "eval_ce_projected": 5.6, **kls}, 0.5)


def non_finite():
    student = tiny()
    with torch.no_grad():
        student.get_input_embeddings().weight.fill_(math.nan)
    args = KDConfig(output_dir="out", recipe="lm_only", max_steps=1, use_cpu=True, report_to="none")
    rows = [{"input_ids": list(range(3, 9)), "labels": list(range(3, 9))}]
    KDTrainer(DistillationModel(student, recipe="lm_only", check_heads=False), args, train_dataset=rows).train()


def heads_of_other_sizes():
    choose_recipe(tiny(V=40), tiny(V=43))


def label_out_of_range():
    fused_kd_loss(*heads(), torch.arange(6) + 35)


def unmarked_template():
    tokenize_dataset(raw("messages"), chat_tokenizer(UNMARKED), assistant_only_loss=True)


def teacher_with_gradient():
    student, teacher = heads()
    fused_kd_loss(student, Head(teacher.hidden, teacher.weight.requires_grad_()))


def two_dtypes():
    student, teacher = heads()
    fused_kd_loss(Head(student.hidden, student.weight.bfloat16()), teacher)


def sharded():
    student, teacher = heads()
    fused_kd_loss(Head(student.hidden, student.weight.as_subclass(DTensor)), teacher)


def unsolved():
    ids = torch.zeros(1, 4, dtype=torch.long)
    DistillationModel(tiny(), tiny(), recipe="svd_init")(ids, labels=ids)


CASES = (
    initial_loss, kl, follows, non_finite, heads_of_other_sizes, label_out_of_range, unmarked_template,
    teacher_with_gradient, two_dtypes, sharded, unsolved,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def quotes_of(said):
    return [text for text in QUOTED if documents.matches(text, said)]


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    try:
        said = case()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert len(quotes_of(said)) == 1, said


def test_an_unknown_key(tmp_path, capsys):
    (tmp_path / "CONFIG.yaml").write_text("temprature: 2\n")
    assert main(["distill", "CONFIG.yaml"]) == 2
    assert len(quotes_of(capsys.readouterr().err.splitlines()[-1])) == 1


def test_every_message_is_tried():
    assert len(QUOTED) == len(CASES) + 1


def test_what_a_first_loss_is_made_of():
    assert f"{math.log(262144):.1f} nats at V = 262,144" in documents.source(PAGE)
    assert f"at 2² · 0.7, a KL of 9 adds {2**2 * 0.7 * 9:.0f}" in documents.source(PAGE)


def test_why_a_loss_does_not_move():
    student, teacher = heads()
    assert not fused_kd_loss(Head(student.hidden.detach(), student.weight), teacher).requires_grad
    loss, metrics = fused_kd_loss(student, teacher, torch.full((6,), -100), return_metrics=True)
    assert loss == 0
    assert metrics.tokens == 0


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_labels_that_are_not_shifted_or_twice(ahead):
    """Nine tokens of ten are what the one before says: a student whose labels are right, 1 ahead, learns just that."""
    torch.manual_seed(0)
    follower, ids = torch.randperm(40), torch.randint(40, (4, 500))
    for t in range(1, 500):
        ids[:, t] = torch.where(torch.rand(4) < 0.9, follower[ids[:, t - 1]], ids[:, t])
    embedding, W = torch.randn(40, 32).requires_grad_(), torch.randn(40, 32).mul(0.1).requires_grad_()
    optimizer = torch.optim.Adam([embedding, W], lr=0.05)

    def cross_entropy(rows, ahead):
        return fused_kd_loss(Head(embedding[rows[:, : 500 - ahead]], W), None, rows[:, ahead:], ce_weight=1.0)

    before = cross_entropy(ids[3:], 1)
    for _ in range(60):
        loss = cross_entropy(ids[:3], ahead)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = cross_entropy(ids[3:], 1)
    assert (loss < 0.05) == (ahead == 0)
    assert (held_out > before + 2) == (ahead != 1)
    assert (loss > 0.6) == (ahead == 2)


def test_accumulation():
    """Micro-batches of 2 targets and of 1: divided by 3, their losses add up to the whole; a mean of means is off."""
    (student, teacher), labels = heads(), torch.tensor([1, 2, -100, -100, -100, 3])

    def accumulated(**options):
        return sum(
            fused_kd_loss(
                Head(student.hidden[rows], student.weight), Head(teacher.hidden[rows], teacher.weight), labels[rows],
                ce_weight=1.0, **options,
            )
            for rows in (slice(0, 3), slice(3, 6))
        )  # fmt: skip

    whole = fused_kd_loss(student, teacher, labels, ce_weight=1.0)
    torch.testing.assert_close(accumulated(num_items_in_batch=3), whole)
    assert (accumulated() / 2 - whole).abs() > 0.01
