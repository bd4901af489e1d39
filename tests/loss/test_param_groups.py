import pytest
import torch
from torch import nn

from kdfast.param_groups import distillation_param_groups
from kdfast.projector import LogitProjector


class RMSNorm(nn.Module):
    """As in Llama: a norm that no torch class gives away, without a bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.norm = RMSNorm()
        self.ln_f = nn.LayerNorm(4)
        self.up = nn.Linear(4, 4)
        self.router = nn.Linear(4, 2, bias=False)
        self.experts_bias = nn.Parameter(torch.zeros(2, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.lm_head = nn.Linear(4, 9, bias=False)
        self.lm_head.weight = self.embed.weight  # tied


class Distillation(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = Student()
        self.logit_projector = LogitProjector(6, 4)
        self.layer_projection = nn.Linear(6, 4)


def rates(groups):
    return {group["name"]: group["lr"] for group in groups}


def by_parameter(model, groups):
    """name → (group's name, decays); fails where a parameter is in two groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], (g["name"], g["weight_decay"] > 0)) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_every_trainable_parameter_in_exactly_one_group():
    model = Distillation()
    found = by_parameter(model, distillation_param_groups(model, 1e-4, weight_decay=0.1))
    assert found == {
        "student.embed.weight": ("student", True),
        "student.norm.weight": ("student", False),
        "student.ln_f.weight": ("student", False),
        "student.ln_f.bias": ("student", False),
        "student.up.weight": ("student", True),
        "student.up.bias": ("student", False),
        "student.experts_bias": ("student", False),
        "student.router.weight": ("router", True),
        "logit_projector.weight": ("projector", True),
        "logit_projector.bias": ("projector", False),
        "layer_projection.weight": ("other", True),
        "layer_projection.bias": ("other", False),
    }


def test_rates_are_1_2_5_1():
    groups = distillation_param_groups(Distillation(), 5e-5)
    assert rates(groups) == pytest.approx({"student": 5e-5, "router": 1e-4, "projector": 2.5e-4, "other": 5e-5})
    assert [g["weight_decay"] for g in groups] == [0.0] * len(groups)


def test_projector_lr_wins_over_its_multiplier():
    groups = distillation_param_groups(Distillation(), 5e-5, projector_lr=1e-3, projector_lr_multiplier=7.0)
    assert rates(groups)["projector"] == 1e-3


def test_a_model_without_student_submodule_is_the_student():
    groups = distillation_param_groups(Student(), 1e-3, router_lr_multiplier=3.0)
    assert rates(groups) == pytest.approx({"student": 1e-3, "router": 3e-3})


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod"])
def test_names_under_a_wrapper(wrapper):
    # DDP and torch.compile put a prefix before every name
    model = nn.Module()
    setattr(model, wrapper, Distillation())
    assert set(rates(distillation_param_groups(model, 1.0))) == {"student", "router", "projector", "other"}


def test_an_optimizer_takes_the_groups_and_keeps_their_names():
    optimizer = torch.optim.AdamW(distillation_param_groups(Distillation(), 1e-3, weight_decay=0.1))
    assert {group["name"] for group in optimizer.param_groups} == {"student", "router", "projector", "other"}
    assert all(group["params"] for group in optimizer.param_groups)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="lr=-1"):
        distillation_param_groups(Student(), -1)
    with pytest.raises(ValueError, match="projector_lr=nan"):
        distillation_param_groups(Student(), 1e-3, projector_lr=float("nan"))
    with pytest.raises(ValueError, match=r"no parameter that requires a gradient.*student.requires_grad_\(True\)"):
        distillation_param_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)
