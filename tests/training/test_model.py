import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdfast.training import RECIPES, DistillationModel
from kdfast.training.hf import shift_labels
from kdfast.training.recipes import get_recipe

TAU, KD_WEIGHT = 1.7, 0.6
HEADS = {  # family → (logit scale, softcap) of conftest's models, applied here by hand to the projected teacher
    "gpt2": (1.0, None),
    "llama": (1.0, None),
    "qwen2": (1.0, None),
    "gemma2": (1.0, 3.0),
    "cohere": (0.25, None),
    "granite": (0.25, None),
}


def plain_loss(model, batch):
    """The same loss as anyone would write it from model(**x).logits."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits_s = model.student(**inputs).logits
    with torch.no_grad():
        if model.recipe.teacher == "own_head":
            logits_t = model.teacher(**inputs).logits
        elif model.recipe.teacher == "projected":
            hidden_t = model.teacher.base_model(**inputs).last_hidden_state
    if model.recipe.teacher == "projected":
        scale, softcap = HEADS[model.config.model_type]
        logits_t = scale * model.student.get_output_embeddings()(model.logit_projector(hidden_t))
        if softcap is not None:
            logits_t = softcap * torch.tanh(logits_t / softcap)
    targets = shift_labels(batch["labels"], batch["attention_mask"])
    kept = targets != -100
    loss = F.cross_entropy(logits_s[kept], targets[kept])
    if model.recipe.teacher == "none":
        return loss
    log_q, log_p = (logits_s[kept] / TAU).log_softmax(-1), (logits_t[kept] / TAU).log_softmax(-1)
    return loss + KD_WEIGHT * TAU**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recipe", ["lm_only", "projector", "teacher_head"])
@pytest.mark.parametrize("family", sorted(HEADS))
def test_loss_and_gradients_are_those_of_the_logits(tiny, batch, no_logits, family, recipe):
    if family == "gemma2":  # transformers' eager attention gives NaN gradients in float64 where a row sees nothing
        batch["attention_mask"][2] = 1
    # teacher of another family and width, so that nothing of the student's can stand in for it
    teacher = tiny("gpt2" if family == "llama" else "llama", width=24, seed=1)
    model = DistillationModel(tiny(family), teacher, recipe=recipe).double()
    truth = copy.deepcopy(model)
    no_logits(model.student, model.teacher)
    loss = model(**batch, temperature=TAU, kd_weight=KD_WEIGHT).loss
    loss.backward()
    expected = plain_loss(truth, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    ours, theirs = gradients(model), gradients(truth)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_weights_are_taken_as_tensors(tiny, batch):
    model = DistillationModel(tiny(), tiny(width=24, seed=1), recipe="projector_fixed")
    numbers = model(**batch, temperature=TAU, kd_weight=KD_WEIGHT).loss
    tensors = model(**batch, temperature=torch.tensor(TAU), kd_weight=torch.tensor(KD_WEIGHT)).loss
    torch.testing.assert_close(numbers, tensors)


def test_the_divisor_is_num_items_in_batch(tiny, batch):
    model = DistillationModel(tiny(), tiny(width=24, seed=1), recipe="projector_fixed")
    targets = (shift_labels(batch["labels"], batch["attention_mask"]) != -100).sum()
    loss = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=4 * targets).loss, loss / 4)


@pytest.mark.parametrize("items", [0, torch.tensor(0)])
def test_a_step_without_labels_has_the_kd_term_of_all_tokens(tiny, batch, items):
    recipe = replace(get_recipe("teacher_head"), kd_on="all")
    model = DistillationModel(tiny(), tiny(width=24, seed=1), recipe=recipe).train()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    n = (model.kd_targets(model.targets(batch["labels"]), batch["input_ids"], batch["attention_mask"]) != -100).sum()
    alone = model(**batch)
    assert alone.loss > 0
    loss = model(**batch, num_items_in_batch=items, kd_items_in_batch=n).loss
    torch.testing.assert_close(loss, alone.loss)


def test_the_teacher_stays_in_eval_mode_and_out_of_everything(tiny, batch):
    teacher = tiny("gpt2", width=24, dropout=0.5, seed=1)
    model = DistillationModel(tiny("gpt2", dropout=0.5), teacher, recipe="projector_fixed")
    model.train()
    assert model.student.training
    assert not any(module.training for module in model.teacher.modules())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    state = model.state_dict()
    assert state
    assert not any("teacher" in name for name in state)
    other = DistillationModel(tiny("gpt2", seed=2), tiny("gpt2", width=24, seed=3), recipe="projector_fixed")
    other.load_state_dict(state, strict=True)
    torch.testing.assert_close(other.logit_projector.weight, model.logit_projector.weight)
    model(**batch).loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())


def test_a_missing_student_weight_is_still_missed(tiny):
    model = DistillationModel(tiny(), tiny(width=24, seed=1), recipe="projector_fixed")
    state = model.state_dict()
    state.pop("logit_projector.weight")
    with pytest.raises(RuntimeError, match=r"logit_projector\.weight"):
        model.load_state_dict(state)


def test_the_head_is_not_cloned(tiny, batch):
    model = DistillationModel(tiny("gpt2"), tiny(width=24, seed=1), recipe="projector_fixed")
    assert model.student.lm_head.weight is model.student.transformer.wte.weight
    model(**batch).loss.backward()
    assert model.student.transformer.wte.weight.grad.abs().sum() > 0


def test_lm_only_needs_no_teacher_and_does_not_run_one(tiny, batch):
    teacher = tiny(width=24, seed=1)
    model = DistillationModel(tiny(), teacher, recipe="lm_only")
    teacher.model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    alone = DistillationModel(tiny(), recipe="lm_only")
    torch.testing.assert_close(model(**batch).loss, alone(**batch).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_teacher_under_a_wide_student(tiny, batch, dtype):
    model = DistillationModel(tiny(), tiny(width=24, seed=1).to(dtype), recipe="projector_fixed")
    assert model.logit_projector.weight.dtype == torch.float32
    output = model(**batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()


def test_autocast(tiny, batch):
    model = DistillationModel(tiny(), tiny(width=24, seed=1), recipe="projector_fixed")
    wide = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = model(**batch).loss
    narrow.backward()
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, wide, rtol=2e-2, atol=2e-2)
    assert model.logit_projector.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_fidelity_is_kl_to_the_true_teacher_at_temperature_1(tiny, batch, family):
    model = DistillationModel(tiny(family), tiny(width=24, seed=1), recipe="projector").eval()
    output = model(**batch, with_fidelity=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    scale, softcap = HEADS[family]
    projected = model.logit_projector(model.teacher.model(**inputs).last_hidden_state)
    logits_p = scale * model.student.get_output_embeddings()(projected)
    logits_p = logits_p if softcap is None else softcap * torch.tanh(logits_p / softcap)
    kept = shift_labels(batch["labels"], batch["attention_mask"]) != -100
    truth = model.teacher(**inputs).logits[kept].log_softmax(-1)
    for ours, logits in (
        (output.fidelity.kl_teacher_student, model.student(**inputs).logits),
        (output.fidelity.kl_teacher_projected, logits_p),
    ):
        expected = F.kl_div(logits[kept].log_softmax(-1), truth, reduction="batchmean", log_target=True)
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)


def test_no_fidelity_across_vocabularies(tiny, batch):
    model = DistillationModel(tiny(V=67), tiny(V=70, width=24, seed=1), recipe="projector_fixed").eval()
    assert model(**batch, with_fidelity=True).fidelity is None


def test_teacher_head_needs_one_vocabulary(tiny):
    with pytest.raises(ValueError, match=r"recipe 'teacher_head' compares.*70 rows and the student's 67"):
        DistillationModel(tiny(V=67), tiny(V=70), recipe="teacher_head")


def test_teacher_head_of_a_teacher_padded_more(tiny, batch):
    """67 and 70 rows of which 61 are real: the loss and the fidelity of both cut to those."""
    student, teacher = tiny(V=67), tiny(V=70, width=24, seed=1)
    model = DistillationModel(student, teacher, recipe="teacher_head", valid_vocab=61).eval()
    ids = batch["input_ids"] % 61
    labels = torch.where(batch["labels"] == -100, -100, batch["labels"] % 61)
    batch = {**batch, "input_ids": ids, "labels": labels}
    output = model(**batch, with_fidelity=True)
    mask = batch["attention_mask"]
    kept = shift_labels(labels, mask) != -100
    truth, ours = (m(ids, attention_mask=mask).logits[kept][:, :61].log_softmax(-1) for m in (teacher, student))
    expected = F.kl_div(ours, truth, reduction="batchmean", log_target=True)
    torch.testing.assert_close(output.fidelity.kl_teacher_student, expected.detach(), rtol=1e-4, atol=1e-5)


def test_errors_say_what_is_missing(tiny, batch):
    with pytest.raises(ValueError, match="teacher is None; recipe 'projector_fixed' needs one"):
        DistillationModel(tiny(), recipe="projector_fixed")
    student = tiny()
    with pytest.raises(ValueError, match="same object"):
        DistillationModel(student, student, recipe="projector_fixed")
    with pytest.raises(ValueError, match="recipe='run9' is unknown"):
        DistillationModel(tiny(), recipe="run9")
    with pytest.raises(ValueError, match="labels is None"):
        DistillationModel(tiny(), recipe=RECIPES["lm_only"])(batch["input_ids"])
