"""Mixtures of experts: their load-balancing loss is transformers' own, in the loss and in the log."""

import pytest
import torch
from tiny_models import RECOMPUTE, TINY_MOE, loss_by_hand, tiny_moe, tiny_vision
from transformers import AutoConfig, AutoModelForCausalLM

from kdfast.training import DistillationModel, KDTrainer
from kdfast.training.hf import check_model, shift_labels

MOE = list(TINY_MOE)
DOGE = {"vocab_size": 67, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DOGE |= {"num_experts": 16, "num_experts_per_tok": 2, "pad_token_id": 0}


@pytest.fixture(name="batch")
def _batch(batch):
    """The one of all tests, with the labels that transformers' own loss would count, and we would not, masked."""
    targets = shift_labels(batch["labels"], batch["attention_mask"])
    return {**batch, "labels": torch.nn.functional.pad(targets[:, :-1], (1, 0), value=-100)}


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def agree(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("family", MOE)
def test_loss_and_gradients_are_transformers_own(family, batch):
    student = tiny_moe(family)
    own = student(**batch, output_router_logits=True)
    own.loss.backward()
    expected = gradients(student)
    model = DistillationModel(student, recipe="lm_only")
    output = model(**batch)
    torch.testing.assert_close(output.aux_loss, own.aux_loss, rtol=0, atol=0)
    torch.testing.assert_close(output.loss, own.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.metrics.ce, student(**batch).loss, rtol=1e-6, atol=0)
    output.loss.backward()
    agree(gradients(student), expected)


def test_the_term_is_the_same_under_every_recipe(tiny, batch):
    student, teacher = tiny_moe("mixtral"), tiny("llama", seed=3)
    with torch.no_grad():
        aux = student(**batch, output_router_logits=True).aux_loss
    for recipe in ("lm_only", "teacher_head", "projector", "probe"):
        given = None if recipe == "lm_only" else teacher
        with_term, without = (
            DistillationModel(student, given, recipe=recipe, router_aux_loss_coef=coef) for coef in (None, 0.0)
        )
        with_term.load_state_dict(without.state_dict())
        difference = with_term(**batch).loss - without(**batch).loss
        torch.testing.assert_close(difference, 0.25 * aux, rtol=1e-5, atol=1e-6)
        assert without(**batch).aux_loss is None
    doubled = DistillationModel(student, recipe="lm_only", router_aux_loss_coef=0.5)(**batch)
    torch.testing.assert_close(doubled.loss - doubled.metrics.ce, 0.5 * aux, rtol=1e-5, atol=1e-6)


def test_a_teacher_has_no_such_term(tiny):
    ids = torch.randint(3, 67, (2, 9))
    teacher, student = tiny_moe("mixtral", output_router_logits=True), tiny("llama")
    output = DistillationModel(student, teacher, recipe="teacher_head")(ids, labels=ids, temperature=2.0, kd_weight=0.7)
    assert output.aux_loss is None
    expected = loss_by_hand(student, teacher, ids, ids)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)


def test_micro_batches_share_the_term(batch):
    """By their targets, so that the coefficient means the same whatever the number of micro-batches."""
    model = DistillationModel(tiny_moe("mixtral"), recipe="lm_only")
    counts = (shift_labels(batch["labels"]) != -100).sum(1).tolist()
    total = terms = 0
    for i, count in enumerate(counts):
        row = {name: x[i : i + 1] for name, x in batch.items()}
        output = model(**row, num_items_in_batch=sum(counts))
        total += output.loss
        terms += output.metrics.ce * count / sum(counts) + 0.25 * output.aux_loss * count / sum(counts)
    torch.testing.assert_close(total, terms, rtol=1e-6, atol=0)
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert model(**nothing, num_items_in_batch=torch.tensor(0)).loss == 0


def test_the_trainer_adds_and_logs_it(tiny, config, rows):
    student = tiny_moe("mixtral")
    data = rows(4)
    whole = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        own = student(**whole, output_router_logits=True)
    args = config(recipe="teacher_head", per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=1)
    trainer = KDTrainer(student, args, teacher=tiny("llama", seed=3), train_dataset=data, eval_dataset=data)
    evaluated = trainer.evaluate()
    assert evaluated["eval_aux_loss"] == pytest.approx(own.aux_loss.item(), rel=1e-6)
    assert evaluated["eval_ce"] == pytest.approx(own.loss.item() - 0.25 * own.aux_loss.item(), rel=1e-6)
    trainer.train()
    (line,) = (line for line in trainer.state.log_history if "loss" in line)
    assert line["aux_loss"] == pytest.approx(own.aux_loss.item(), rel=1e-6)
    parts = line["ce"] + line["kd_weight"] * line["temperature"] ** 2 * line["kd"] + 0.25 * line["aux_loss"]
    assert line["loss"] == pytest.approx(parts, rel=1e-6)
    plain = KDTrainer(tiny("llama"), config(recipe="lm_only"), train_dataset=data, eval_dataset=data)
    assert "eval_aux_loss" not in plain.evaluate()


def test_layers_that_are_recomputed_give_the_same_gradients(batch):
    found = []
    for recompute in (False, True):
        student = tiny_moe("qwen3_moe")
        if recompute:
            getattr(student, f"{RECOMPUTE}_enable")()
        DistillationModel(student, recipe="lm_only").train()(**batch).loss.backward()
        found.append(gradients(student))
    agree(*found)


def test_layers_that_are_recomputed_without_a_gradient_for_it_are_refused(batch):
    student = tiny_moe("mixtral")
    model = DistillationModel(student, recipe="lm_only").train()
    getattr(student, f"{RECOMPUTE}_enable")({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True: the load-balancing loss would have no gradient"):
        model(**batch)
    model.eval()(**batch)
    DistillationModel(student, recipe="lm_only", router_aux_loss_coef=0).train()(**batch)


def test_a_loss_that_is_not_there_is_refused_where_it_is_asked_for(tiny):
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.1: LlamaForCausalLM has no load-balancing loss"):
        DistillationModel(tiny("llama"), recipe="lm_only", router_aux_loss_coef=0.1)
    llama4 = tiny_vision("llama4").language_model  # a mixture of experts, in whose loss transformers has no such term
    assert DistillationModel(llama4, recipe="lm_only").router_loss is None
    llama4.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True: Llama4ForCausalLM has no load-balancing loss"):
        DistillationModel(llama4, recipe="lm_only")
    DistillationModel(llama4, recipe="lm_only", router_aux_loss_coef=0)


def test_a_loss_that_is_another_is_found_out(monkeypatch):
    model = tiny_moe("mixtral")
    model.router_aux_loss_coef = 0.3  # its forward's; what is read of it
    check_model(model, "student")
    monkeypatch.setattr("kdfast.training.hf.RouterLoss.__call__", lambda self, logits, mask: logits[0].mean())
    with pytest.raises(ValueError, match=r"student \(MixtralForCausalLM\): its own loss .* has 0\.\d+ more"):
        check_model(model, "student")
    check_model(model, "student", router_aux_loss_coef=0)
    doge = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", is_moe=True, **DOGE))
    with pytest.raises(ValueError, match="DogeForCausalLM: how it computes its load-balancing loss is not known"):
        check_model(doge, "student")


ROUTERS = {
    **{family: {"mlp.gate.weight"} for family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")},
    "gpt_oss": {"mlp.router.weight", "mlp.router.bias"},
    "granitemoe": {"block_sparse_moe.router.weight"},
    "phimoe": {"mlp.router.weight"},
    "jamba": {"feed_forward.router.weight"},
    "jetmoe": {"mlp.router.layer.weight", "self_attention.experts.router.layer.weight"},
}


@pytest.mark.parametrize("family", MOE)
def test_routers_have_a_learning_rate_of_their_own(family, config, rows):
    student = tiny_moe(family)
    names = {id(p): name for name, p in student.named_parameters()}
    trainer = KDTrainer(
        student, config(recipe="lm_only", router_lr_multiplier=2.0, max_steps=1), train_dataset=rows(2)
    )
    trainer.train()
    groups = (group for group in trainer.optimizer.param_groups if group["name"] == "router")
    found = [names[id(p)] for group in groups for p in group["params"]]
    assert {name.split(".", 3)[-1] for name in found} == ROUTERS[family]
    routers = [module for module in student.modules() if type(module).__name__.endswith(("Router", "TopKGating"))]
    assert len(found) == sum(1 for module in routers for _ in module.parameters())
    (line,) = (line for line in trainer.state.log_history if "loss" in line)
    assert line["lr_router"] == 2 * line["lr_student"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_adapter_on_a_router_has_the_routers_rate(family, config, rows):
    peft = pytest.importorskip("peft")
    router = ROUTERS[family] & {"mlp.gate.weight", "mlp.router.weight"}
    adapter = peft.LoraConfig(target_modules=["q_proj"], target_parameters=[*router])
    args = config(recipe="lm_only", router_lr_multiplier=2.0)
    trainer = KDTrainer(tiny_moe(family), args, peft_config=adapter, train_dataset=rows(2))
    groups = {group["name"]: group["params"] for group in trainer.create_optimizer().param_groups}
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = {part: {names[id(p)].split(".")[5] for p in groups[part]} for part in groups}
    assert found == {"student": {"q_proj"}, "router": {"gate" if family == "mixtral" else "router"}}


def test_a_rate_for_routers_that_are_not_there_is_reported(tiny, config, rows, capsys):
    said = "router_lr_multiplier=2 has no use: the student has no routers"
    for given, expected in (({"router_lr_multiplier": 2.0}, True), ({}, False)):
        args = config(recipe="projector_fixed", max_steps=1, **given)  # whose own multiplier is 2
        KDTrainer(tiny("llama"), args, teacher=tiny("llama", seed=1), train_dataset=rows(2)).train()
        assert (said in capsys.readouterr().out) == expected


def test_a_mixture_without_sparse_layers_is_a_dense_model(batch):
    student = tiny_moe("qwen3_moe", mlp_only_layers=[0, 1])
    output = DistillationModel(student, recipe="lm_only")(**batch)
    assert output.aux_loss is None
    torch.testing.assert_close(output.loss, student(**batch).loss, rtol=1e-6, atol=0)
