"""The terms of every recipe against the same written with logits, and where their gradients go."""

import pytest
import torch
import torch.nn.functional as F

from kdfast.training import DistillationModel
from kdfast.training.recipes import Recipe

V = 67
DETACHED = {"teacher": "projected", "teacher_grad": "none", "anchor_weight": 0.8}


def make(tiny, batch, **recipe):
    settings = Recipe("test", **recipe)
    model = DistillationModel(tiny("llama"), tiny("gpt2", width=24, seed=1), recipe=settings).double()
    model.solve([batch])
    return model


class Written:
    """Logits and losses of a batch, made whole."""

    def __init__(self, model, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        self.kept = torch.zeros_like(batch["labels"], dtype=torch.bool)
        self.kept[:, :-1] = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, 1:] == 1)
        self.kept &= batch["attention_mask"] == 1
        self.labels = batch["labels"].roll(-1, 1)[self.kept]
        self.student = model.student(**inputs).logits[self.kept]
        with torch.no_grad():
            self.hidden = model.teacher.base_model(**inputs).last_hidden_state[self.kept]
            self.true = model.teacher.get_output_embeddings()(self.hidden)

    def kd(self, teacher, temperature=2.0):
        p, q = (teacher / temperature).log_softmax(-1), (self.student / temperature).log_softmax(-1)
        return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()

    def ce(self, logits):
        return F.cross_entropy(logits, self.labels)


def gradients(model, loss):
    names, tensors = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return {n: torch.zeros(()) if g is None else g for n, g in zip(names, found, strict=True)}


def assert_same(model, batch, expected):
    """Value and every gradient; `expected` is differentiated as it was written."""
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name in ours:
        assert torch.allclose(*torch.broadcast_tensors(ours[name], theirs[name]), rtol=1e-6, atol=1e-9), name


def projected(model, written, *, weight):
    return F.linear(model.logit_projector(written.hidden), weight)


def test_the_anchor_is_the_projected_teachers_cross_entropy(tiny, batch):
    model = make(tiny, batch, **DETACHED)
    written = Written(model, batch)
    logits = projected(model, written, weight=model.student.get_output_embeddings().weight.detach())
    expected = written.ce(written.student) + 0.7 * written.kd(logits.detach()) + 0.8 * written.ce(logits)
    assert_same(model, batch, expected)


def test_a_probe_learns_from_its_anchor_alone(tiny, batch):
    model = make(tiny, batch, teacher="probe", anchor_weight=0.8)
    written = Written(model, batch)
    logits = projected(model, written, weight=model.logit_projector.head)
    assert torch.equal(model.logit_projector.head, model.student.get_output_embeddings().weight)
    expected = written.ce(written.student) + 0.7 * written.kd(logits.detach()) + 0.8 * written.ce(logits)
    assert_same(model, batch, expected)


def test_the_compressed_head_is_a_fixed_teacher(tiny, batch):
    model = make(tiny, batch, teacher="compressed_head", compressed_rank=8)
    written = Written(model, batch)
    head = model.compressed_head(written.hidden)
    expected = written.ce(written.student) + 0.7 * written.kd(head.hidden @ head.weight.T)
    assert_same(model, batch, expected)
    assert not any("compressed_head" in name for name in model.state_dict())
    model.load_state_dict(model.state_dict())


NO_WEIGHT = [
    {"teacher": "own_head"},
    {"teacher": "compressed_head", "compressed_rank": 8},
    {"teacher": "projected", "projector_init": "svd", "projector_resolve_steps": 16},
    {"teacher": "cached"},
]


@pytest.mark.parametrize("recipe", NO_WEIGHT, ids=lambda recipe: recipe["teacher"])
def test_a_kd_weight_of_zero_leaves_the_teacher_out(tiny, batch, recipe):
    model = make(tiny, batch, **recipe)
    if recipe["teacher"] == "cached":
        entries = torch.zeros(*batch["input_ids"].shape, 1)
        batch = {**batch, "teacher_indices": entries.long(), "teacher_log_probs": entries}
        model.teacher_tail = "renormalize"
    runs = []
    model.teacher.base_model.register_forward_hook(lambda *_: runs.append(1))
    alone = DistillationModel(model.student, recipe=Recipe("test", teacher="none", kd_weight=0.0))
    expected = alone(**batch)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.student.named_parameters()}
    model.student.zero_grad()
    loss, metrics = model(**batch, kd_weight=0.0)[:2]
    loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=0)
    for name, p in model.student.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert [bool(value.isnan()) for value in (metrics.kd, metrics.agreement, metrics.ce)] == [True, True, False]
    assert metrics.tokens == expected.metrics.tokens
    assert runs == []
    if recipe["teacher"] != "cached":  # a tensor's value is not waited for, and evaluation has its metrics
        assert model(**batch, kd_weight=torch.zeros(())).metrics.kd > 0
        assert model.eval()(**batch, kd_weight=0.0).metrics.kd > 0
        assert len(runs) == 2
    assert model.train()(**batch, kd_weight=0.0, with_fidelity=True).fidelity.kl_teacher_student > 0


@pytest.mark.parametrize(
    "recipe",
    [
        {"teacher": "own_head", "hidden_weight": 1.0},
        {"teacher": "projected", "projector_resolve_steps": 16, "anchor_weight": 1.0},
        {"teacher": "projected"},  # trained: DDP waits for its gradient
        {"teacher": "probe", "anchor_weight": 1.0},
    ],
)
def test_what_else_needs_the_teacher_has_it_at_a_kd_weight_of_zero(tiny, batch, recipe):
    model = make(tiny, batch, **recipe)
    found, expected = model(**batch, kd_weight=0.0), model(**batch, kd_weight=torch.zeros(()))
    assert found.metrics.kd > 0
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_entries_are_missed_at_a_kd_weight_of_zero_too(tiny, batch):
    model = make(tiny, batch, teacher="cached")
    with pytest.raises(ValueError, match="teacher_indices is None"):
        model(**batch, kd_weight=0.0)


def test_a_compressed_head_has_to_be_made_first(tiny, batch):
    model = DistillationModel(tiny(), tiny(width=24, seed=1), recipe=Recipe("test", teacher="compressed_head"))
    with pytest.raises(RuntimeError, match=r"call model\.solve\(batches\)"):
        model(**batch)


def test_fidelity_is_that_of_the_surrogate(tiny, batch):
    model = make(tiny, batch, teacher="compressed_head", compressed_rank=8)
    written = Written(model, batch)
    head = model.compressed_head(written.hidden)
    z = head.hidden @ head.weight.T
    found = model(**batch, with_fidelity=True).fidelity
    kl = F.kl_div(z.log_softmax(-1), written.true.log_softmax(-1), reduction="batchmean", log_target=True)
    assert found.kl_teacher_projected.item() == pytest.approx(kl.item(), rel=1e-6)
    assert found.ce_projected.item() == pytest.approx(written.ce(z).item(), rel=1e-6)


@pytest.mark.parametrize("recipe", [{"student_init": "svd", "teacher": "none"}, {"teacher": "compressed_head"}])
def test_vocabularies_must_be_the_same_where_heads_are_compared(tiny, recipe):
    with pytest.raises(ValueError, match="valid_vocab"):
        DistillationModel(tiny(V=67), tiny(V=80, seed=1), recipe=Recipe("test", **recipe))
