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

    def kd(self, teacher, mask=None, temperature=2.0):
        p, q = (teacher / temperature).log_softmax(-1), (self.student / temperature).log_softmax(-1)
        rows = (p.exp() * (p - q)).sum(-1)
        rows = rows if mask is None else rows * mask
        return temperature**2 * rows.sum() / len(rows)

    def ce(self, logits, targets=None):
        return F.cross_entropy(logits, self.labels if targets is None else targets)


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


def projected(model, written, *, weight=None):
    weight = model.student.get_output_embeddings().weight if weight is None else weight
    return F.linear(model.logit_projector(written.hidden), weight)


@pytest.mark.parametrize("anchor_targets", ["labels", "teacher_argmax", "teacher"])
@pytest.mark.parametrize("anchor_head", ["detached", "attached"])
def test_anchors(tiny, batch, anchor_targets, anchor_head):
    model = make(tiny, batch, **DETACHED, anchor_targets=anchor_targets, anchor_head=anchor_head)
    written = Written(model, batch)
    weight = model.student.get_output_embeddings().weight
    logits = projected(model, written, weight=weight if anchor_head == "attached" else weight.detach())
    if anchor_targets == "teacher":
        q, p = logits.log_softmax(-1), written.true.log_softmax(-1)
        # the attached anchor is a KL, the loss's own a cross entropy: the true teacher's entropy apart
        anchor = F.kl_div(q, p, reduction="batchmean", log_target=True)
        if anchor_head == "detached":
            anchor = anchor - (p.exp() * p).sum(-1).mean()
    else:
        anchor = written.ce(logits, written.true.argmax(-1) if anchor_targets == "teacher_argmax" else None)
    expected = written.ce(written.student) + 0.7 * written.kd(logits.detach()) + 0.8 * anchor
    assert_same(model, batch, expected)


@pytest.mark.parametrize("gate", ["right", "agrees"])
def test_gates_take_tokens_out_of_the_kd_term(tiny, batch, gate):
    model = make(tiny, batch, **DETACHED, kd_gate=gate)
    with torch.no_grad():  # so that some tokens pass and some do not
        model.logit_projector.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    written = Written(model, batch)
    logits = projected(model, written, weight=model.student.get_output_embeddings().weight.detach())
    if gate == "right":  # make one right
        batch["labels"][0, 7] = logits[3].argmax()
        written = Written(model, batch)
    else:
        model.teacher.get_output_embeddings().weight.data[logits[2].argmax()] += 5 * written.hidden[2]
        written = Written(model, batch)
        logits = projected(model, written, weight=model.student.get_output_embeddings().weight.detach())
    passes = logits.argmax(-1) == (written.labels if gate == "right" else written.true.argmax(-1))
    assert 0 < passes.sum() < len(passes)
    kd = written.kd(logits.detach(), passes)
    assert_same(model, batch, written.ce(written.student) + 0.7 * kd + 0.8 * written.ce(logits))


@pytest.mark.parametrize("anchor_targets", ["labels", "teacher"])
def test_a_probe_learns_from_its_anchor_alone(tiny, batch, anchor_targets):
    model = make(tiny, batch, teacher="probe", anchor_weight=0.8, anchor_targets=anchor_targets)
    written = Written(model, batch)
    logits = projected(model, written, weight=model.logit_projector.head)
    assert torch.equal(model.logit_projector.head, model.student.get_output_embeddings().weight)
    if anchor_targets == "labels":
        anchor = written.ce(logits)
    else:
        log_p = written.true.log_softmax(-1)
        anchor = F.kl_div(logits.log_softmax(-1), log_p, reduction="batchmean", log_target=True)
    expected = written.ce(written.student) + 0.7 * written.kd(logits.detach()) + 0.8 * anchor
    assert_same(model, batch, expected)


def test_the_compressed_head_is_a_fixed_teacher(tiny, batch):
    model = make(tiny, batch, teacher="compressed_head", compressed_rank=8)
    written = Written(model, batch)
    head = model.compressed_head(written.hidden)
    expected = written.ce(written.student) + 0.7 * written.kd(head.hidden @ head.weight.T)
    assert_same(model, batch, expected)
    assert not any("compressed_head" in name for name in model.state_dict())
    model.load_state_dict(model.state_dict())


def test_a_compressed_head_has_to_be_made_first(tiny, batch):
    model = DistillationModel(tiny(), tiny(width=24, seed=1), recipe=Recipe("test", teacher="compressed_head"))
    with pytest.raises(RuntimeError, match=r"call model\.solve\(batches\)"):
        model(**batch)


def test_fidelity_is_that_of_the_stand_in(tiny, batch):
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
