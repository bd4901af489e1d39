"""Solved starts against dense float64 solutions."""

import pytest
import torch

from kdfast import Head
from kdfast.closed_form import Factors, solve_lstsq, solve_svd
from kdfast.ops.logit_chunks import mean_probabilities

V, HT, HS = 301, 24, 9


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def teacher_head(bias=False, dtype=torch.float64, **options):
    """Hidden states with a mean and very different variances, as real ones have; and a head with a mean."""
    hidden = draw(500, HT, seed=1) * torch.logspace(-1, 0.5, HT, dtype=torch.float64) + draw(HT, seed=2)
    weight = 0.5 * draw(V, HT, seed=3) + draw(HT, seed=4)
    return Head(
        hidden.to(dtype),
        weight.to(dtype),
        draw(V, seed=5).to(dtype) if bias else None,
        **{"logit_scale": 1.0, **options},
    )


def logits(hidden, weight, bias=None, scale=1.0):
    z = hidden @ weight.T
    return scale * (z if bias is None else z + bias)


def project(projection, hidden):
    z = hidden @ projection.weight.T
    return z if projection.bias is None else z + projection.bias


def centred(z, d):
    return z - (z * d).sum(-1, keepdim=True) / d.sum()


def weighted_error(z, other, d):
    return ((centred(z, d) - centred(other, d)).square() * d).sum().item()


@pytest.mark.parametrize("bias", [False, True])
def test_svd_is_the_best_low_rank_head_there_is(bias):
    """The bound is Eckart and Young's on the logits themselves, made whole and decomposed densely."""
    teacher = teacher_head(bias)
    d = torch.rand(V, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) + 0.01
    start = solve_svd(teacher, HS, vocab_weights=d)
    true = logits(teacher.hidden, teacher.weight, teacher.bias)
    ours = logits(project(start.projection, teacher.hidden), start.embedding)
    values = torch.linalg.svdvals(centred(true, d) * d.sqrt())
    assert weighted_error(true, ours, d) == pytest.approx(values[HS:].square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("width", [HT, HT + 1, HT + 7])
@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 0.25)])
def test_svd_of_full_rank_gives_the_teachers_logits(width, bias, scale):
    if bias and width == HT:
        width = HT + 1  # a bias is one more direction
    teacher = teacher_head(bias, logit_scale=scale)
    start = solve_svd(teacher, width, std=0.02, logit_scale=3.0)
    ours = logits(project(start.projection, teacher.hidden), start.embedding, scale=3.0)
    true = logits(teacher.hidden, teacher.weight, teacher.bias, scale)
    assert (ours.log_softmax(-1) - true.log_softmax(-1)).abs().max() < 1e-9
    assert start.embedding.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-6)
    assert start.embedding.shape == (V, width)


def test_under_a_softcap_the_logits_themselves_are_kept():
    teacher = teacher_head(softcap=5.0)
    start = solve_svd(teacher, HT)
    ours = logits(project(start.projection, teacher.hidden), start.embedding)
    assert (ours - logits(teacher.hidden, teacher.weight)).abs().max() < 1e-9


def test_few_hidden_states_do_not_break_a_full_rank():
    """Fewer rows than Ht leave directions unseen; the ridge keeps them."""
    teacher = teacher_head()
    few = Head(teacher.hidden[:5], teacher.weight)
    start = solve_svd(few, HT)
    ours = logits(project(start.projection, teacher.hidden), start.embedding)
    true = logits(teacher.hidden, teacher.weight)
    assert (ours.log_softmax(-1) - true.log_softmax(-1)).abs().max() < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("student_bias", "teacher_bias"), [(False, False), (True, False), (True, True)])
def test_lstsq_against_a_dense_solution(weighted, student_bias, teacher_bias):
    teacher = teacher_head(teacher_bias, logit_scale=2.0)
    student = Head(draw(0, HS), draw(V, HS, seed=6), draw(V, seed=7) if student_bias else None, logit_scale=0.5)
    d = (
        torch.rand(V, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        if weighted
        else torch.ones(V).double()
    )
    projection = solve_lstsq(student, teacher, vocab_weights=d, ridge=0.0)

    # dense: every hidden unit of the teacher is one right-hand side, the constant over V one more unknown
    unknowns = torch.cat([0.5 * student.weight, torch.ones(V, 1).double()], 1)
    bias = (2.0 * teacher.bias if teacher_bias else 0) - (0.5 * student.bias if student_bias else 0)
    has_bias = student_bias or teacher_bias
    wanted = torch.cat([2.0 * teacher.weight, bias[:, None]], 1) if has_bias else 2.0 * teacher.weight
    dense = torch.linalg.lstsq(d.sqrt()[:, None] * unknowns, d.sqrt()[:, None] * wanted).solution[:HS]
    assert torch.allclose(projection.weight, dense[:, :HT], rtol=1e-9, atol=1e-10)
    if has_bias:
        assert torch.allclose(projection.bias, dense[:, HT], rtol=1e-9, atol=1e-10)


def test_lstsq_finds_the_projector_that_made_the_teacher():
    weight, true = draw(V, HS), draw(HS, HT, seed=1)
    teacher = Head(draw(500, HT, seed=2), weight @ true + draw(HT, seed=3))  # the same constant for every id
    assert torch.allclose(solve_lstsq(Head(draw(0, HS), weight), teacher).weight, true, atol=1e-5)


def test_vocabularies_that_differ_by_padding():
    teacher = teacher_head()
    padded = Head(teacher.hidden, torch.cat([teacher.weight, 100 * draw(7, HT)]))
    same = solve_svd(padded, HS, valid_vocab=V)
    start = solve_svd(teacher, HS)
    for one, other in ((same.embedding[:V], start.embedding), (same.projection.weight, start.projection.weight)):
        assert torch.allclose(one.abs(), other.abs(), atol=1e-8)
    student = Head(draw(0, HS), draw(V, HS, seed=6))
    one = solve_lstsq(student, padded, valid_vocab=V).weight
    assert torch.allclose(one, solve_lstsq(student, teacher).weight, atol=1e-9)


def test_more_rows_than_a_block(monkeypatch):
    whole = Factors(teacher_head()).singular_values
    monkeypatch.setattr("kdfast.closed_form.ROWS", 64)  # 301 = 4·64 + 45
    assert torch.allclose(Factors(teacher_head()).singular_values, whole, rtol=1e-10)


def test_passes_over_logits(monkeypatch):
    head = teacher_head(bias=True, softcap=4.0)
    z = 4.0 * torch.tanh(logits(head.hidden, head.weight, head.bias) / 4.0)
    monkeypatch.setattr("kdfast.ops.logit_chunks.CHUNK_BYTES", 4 * V * 33)  # 500 = 15·33 + 5
    assert torch.allclose(mean_probabilities(head), z.softmax(-1).mean(0), atol=1e-12)
    assert torch.allclose(mean_probabilities(head, 5)[:5], z[:, :5].softmax(-1).mean(0), atol=1e-12)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: solve_svd(t, 0), "width=0"),
        (lambda t: solve_svd(Head(t.hidden[:0], t.weight), 3), "teacher.hidden has no rows"),
        (lambda t: solve_svd(Head(t.hidden / 0, t.weight), 3, vocab_weights=torch.ones(V)), "NaN or infinity"),
        (lambda t: solve_svd(t, 3, vocab_weights=torch.ones(V + 1)), r"vocab_weights is \(302,\); expected \(301,\)"),
        (lambda t: solve_svd(t, 3, vocab_weights=-torch.ones(V)), "not all 0"),
        (lambda t: solve_lstsq(Head(t.hidden, draw(V + 1, HS)), t), "302"),
    ],
)
def test_errors_name_the_argument(call, says):
    with pytest.raises(ValueError, match=says):
        call(teacher_head())
