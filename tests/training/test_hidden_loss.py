import pytest
import torch

from kdfast.training import DistillationModel
from kdfast.training.recipes import Recipe
from kdfast.training.teachers.hidden_states import HiddenStateLoss


def states(layers, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, width, generator=generator) for _ in range(layers + 1)]


def test_it_is_one_less_the_correlation():
    loss, targets = HiddenStateLoss(2, 4, 8, 12), torch.tensor([[1, 2, -100, 4, -100], [-100, 1, 1, 1, 1]])
    student, teacher = states(2, 8, 0), states(4, 12, 1)
    expected = []
    for i, j in ((1, 2), (2, 4)):
        ours = loss.maps[i - 1](student[i])
        for b, t in (targets != -100).nonzero().tolist():
            pair = torch.stack([ours[b, t], teacher[j][b, t]])
            expected.append(1 - torch.corrcoef(pair)[0, 1])
    assert loss(student, teacher, targets).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    assert loss(student, teacher, targets, items=14).item() == pytest.approx(sum(expected).item() / 28, rel=1e-4)


def test_scale_and_shift_of_a_layer_do_not_count():
    loss, targets = HiddenStateLoss(1, 1, 8, 12), torch.ones(2, 5, dtype=torch.long)
    student, teacher = states(1, 8, 0), states(1, 12, 1)
    moved = [100 * h + 7 for h in teacher]
    assert loss(student, moved, targets).item() == pytest.approx(loss(student, teacher, targets).item(), rel=1e-4)


def test_in_the_model_with_its_weight(tiny, batch):
    def total(weight):
        torch.manual_seed(0)
        recipe = Recipe("test", teacher="own_head", hidden_weight=weight)
        return DistillationModel(tiny("gpt2", layers=2), tiny(width=24, layers=3, seed=1), recipe=recipe)

    with_it, without = total(0.5), total(0.0)
    loss = with_it(**batch).loss
    assert 0.1 < (loss - without(**batch).loss).item() / 0.5 < 2
    loss.backward()
    assert all(p.grad is not None for p in with_it.hidden_loss.parameters())
    assert all(p.grad is None for p in with_it.teacher.parameters())
    assert without.hidden_loss is None


def test_nothing_counted_is_zero():
    loss, targets = HiddenStateLoss(1, 1, 8, 12), torch.full((2, 5), -100)
    assert loss(states(1, 8, 0), states(1, 12, 1), targets).item() == 0


def test_no_targets_in_any_process_are_a_loss_of_zero():
    loss, targets = HiddenStateLoss(1, 1, 8, 12), torch.full((2, 5), -100)
    student = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(2)]
    value = loss(student, [torch.randn(2, 5, 12)] * 2, targets, items=torch.tensor(0))
    value.backward()
    assert value == 0
    assert not student[1].grad.any()
