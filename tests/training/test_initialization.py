"""Solved starts inside a DistillationModel and a KDTrainer."""

import copy
import itertools
from unittest import mock

import pytest
import torch

from kdfast import fused_kd_loss
from kdfast.ops.logit_chunks import mean_probabilities
from kdfast.training import DistillationModel, KDTrainer
from kdfast.training.durable.checkpoint import load_models
from kdfast.training.hf import backbone, head
from kdfast.training.recipes import Recipe

SVD = {"student_init": "svd", "projector_init": "svd"}


def ids(n=8, T=60, V=67):
    drawn = torch.randint(3, V, (n, T), generator=torch.Generator().manual_seed(3))
    return {"input_ids": drawn, "labels": drawn}


def make(tiny, family="llama", width=24, **recipe):
    return DistillationModel(tiny(family), tiny("gpt2", width=width, seed=1), recipe=Recipe("test", **recipe))


def measured(model, batch):
    output = model(**batch, with_fidelity=True)
    return output.fidelity.kl_teacher_projected.item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "cohere"])
def test_svd_at_full_rank_is_the_true_teacher(tiny, family):
    """Student as wide as the teacher: the projected teacher is exact, whatever the student's logit scale."""
    model = make(tiny, family, width=16, teacher="projected", **SVD)
    before = model.student.get_output_embeddings().weight.square().mean().sqrt()
    starts = model.solve([ids()])
    assert measured(model, ids()) < 1e-9
    assert starts[0].kl < 1e-9
    assert starts[0].agreement == 1.0
    after = model.student.get_output_embeddings().weight.square().mean().sqrt()
    assert after.item() == pytest.approx(before.item(), rel=1e-4)


def test_an_untied_student_gets_both_ends(tiny):
    model = make(tiny, "llama", teacher="none", student_init="svd")
    model.solve([ids()])
    ends = model.student.get_input_embeddings().weight, model.student.get_output_embeddings().weight
    assert torch.equal(*ends)


def test_a_solved_projector_is_nearer_than_a_drawn_one(tiny):
    # teacher and student of one family and almost the same weights, as after pretraining on the same text
    student = tiny("llama", width=16)
    teacher = tiny("llama", width=16)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    drawn = DistillationModel(student, teacher, recipe=Recipe("test", teacher="projected"))
    solved = DistillationModel(student, teacher, recipe=Recipe("test", teacher="projected", projector_init="lstsq"))
    starts = solved.solve([ids()])
    assert measured(solved, ids()) < 0.2 * measured(drawn, ids())
    assert starts[0].what == "projector_init='lstsq'"
    assert 0 < starts[0].kl < 0.2 * measured(drawn, ids())


def test_reported_fidelity_is_that_of_held_out_targets(tiny):
    model = make(tiny, teacher="projected", projector_init="lstsq")
    batch = ids()
    (start,) = model.solve([batch])
    with torch.no_grad():
        hidden = backbone(model.teacher)(batch["input_ids"]).last_hidden_state[:, :-1].reshape(-1, 24)
    hidden = hidden[: 16 * 24][::8]
    true = head(model.teacher, hidden)
    surrogate = head(model.student, model.logit_projector(hidden).detach())
    assert start.tokens == len(hidden) == 48
    assert start.kl == pytest.approx(fused_kd_loss(surrogate, true, temperature=1.0).item(), rel=1e-5)
    figures = f"KL(true‖start) {start.kl:.3f}, agreement {start.agreement:.0%} on 48 tokens"
    assert str(start) == f"projector_init='lstsq': {figures}"


def test_a_projector_solved_again_follows_a_moved_embedding(tiny):
    model = make(tiny, teacher="projected", projector_init="lstsq", projector_resolve_steps=3, teacher_grad="none")
    model.solve([ids()])
    assert not model.logit_projector.weight.requires_grad
    with torch.no_grad():
        model.student.get_output_embeddings().weight.mul_(3.0)
    off = measured(model, ids())
    model.solve_projector_again()
    assert measured(model, ids()) < 0.9 * off


def test_a_projector_solved_again_at_once_is_what_it_was(tiny, monkeypatch):
    """The vocabulary's weights come from one sample of the text, not a second one."""
    monkeypatch.setattr("kdfast.closed_form.FREQUENCY_ROWS", 50)
    model = make(tiny, teacher="projected", projector_init="lstsq", projector_resolve_steps=3, teacher_grad="none")
    model.solve([ids()])
    before = model.logit_projector.weight.clone()
    model.solve_projector_again()
    assert torch.equal(model.logit_projector.weight, before)


@pytest.mark.parametrize(
    "recipe",
    [
        {"teacher": "projected", "projector_init": "lstsq", "projector_resolve_steps": 3, "teacher_grad": "none"},
        {"teacher": "compressed_head"},
    ],
    ids=lambda recipe: recipe["teacher"],
)
def test_the_vocabularys_weights_are_computed_once(tiny, recipe):
    model = make(tiny, student_init="svd", **recipe)
    with mock.patch("kdfast.closed_form.mean_probabilities", wraps=mean_probabilities) as computed:
        model.solve([ids()])
    assert computed.call_count == 1


def test_where_no_rank_is_near_enough_the_head_stays_whole(tiny):
    model = make(tiny, teacher="compressed_head", compressed_kl=1e-30)
    (start,) = model.solve([ids()])
    assert "stays whole (max_kl=1e-30; at its full rank 24" in start.what
    whole = make(tiny, teacher="own_head")
    assert torch.equal(model(**ids()).loss, whole(**ids()).loss)


def test_a_fidelity_decides_the_rank(tiny):
    model = make(tiny, width=48, teacher="compressed_head", compressed_kl=0.5)
    (start,) = model.solve([ids()])
    assert model.compressed_head.rank == 16
    assert start.kl == model.compressed_head.fidelity.kl <= 0.5


def test_nothing_wanted_nothing_read(tiny):
    def never():
        raise AssertionError("a batch was read")
        yield

    assert make(tiny, teacher="own_head").solve(never()) == []


def test_no_text_is_said_so(tiny):
    with pytest.raises(ValueError, match="batches hold 0 targets"):
        make(tiny, teacher="compressed_head").solve([])


def test_trainer_solves_once_before_the_first_step_and_says_so(tiny, rows, config, capsys):
    def run(**given):
        args = config(recipe="compressed_head", student_init="svd", learning_rate=0.0, **given)
        data = {"train_dataset": rows(30), "eval_dataset": rows(4)}
        return KDTrainer(tiny("gpt2"), args, teacher=tiny(width=24, seed=1), **data)

    trainer = run()
    assert trainer.solve_seconds == 0
    fidelity = trainer.evaluate()["eval_kl_teacher_projected"]
    took = trainer.solve_seconds
    trainer.train()
    assert trainer.solve_seconds == took > 0
    assert trainer.evaluate()["eval_kl_teacher_projected"] == pytest.approx(fidelity)
    out = capsys.readouterr().out
    for what in ("student_init='svd', the embedding alone", "teacher's head at rank 24"):
        assert out.count(f"{what}: KL(true‖start)") == 1
    # the order of the data and the random state of training are as without solving
    again = run(seed=1)
    again.train()
    for one, other in zip(trainer.starts, again.starts, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=0.5)


@pytest.mark.parametrize("recipe", ["svd_init", "svd_blocks"])
def test_a_further_trainer_goes_on_from_what_is_trained(tiny, rows, config, recipe):
    model = DistillationModel(tiny("gpt2"), tiny("gpt2", seed=1), recipe=recipe)
    KDTrainer(model, config(), train_dataset=rows(30)).train()
    trained = copy.deepcopy(model.student.state_dict())
    further = KDTrainer(model, config(learning_rate=0.0), train_dataset=rows(30))
    further.train()
    assert further.starts == []
    assert all(torch.equal(trained[name], value) for name, value in model.student.state_dict().items())


def test_kd_ends_where_a_schedule_or_a_setting_says(tiny, config):
    given = {"teacher": tiny("gpt2", seed=1), "kd_weight_schedule": lambda progress: 0.3}
    assert KDTrainer(tiny("gpt2"), config(recipe="svd_init"), **given).kd_weight_schedule(1.0) == 0.3
    with pytest.raises(ValueError, match=r"kd_until=0.5 and kd_weight_schedule; expected one of them"):
        KDTrainer(tiny("gpt2"), config(recipe="svd_init", kd_until=0.5), **given)


def test_trainer_solves_the_projector_again(tiny, rows, config):
    solved = []
    given = {"projector_init": "lstsq", "projector_resolve_steps": 2, "teacher_grad": "none"}
    args = config(recipe="projector", **given, max_steps=5)
    trainer = KDTrainer(tiny("gpt2"), args, teacher=tiny(width=24, seed=1), train_dataset=rows(30))
    projector = trainer.model.logit_projector
    trainer.model.register_forward_pre_hook(lambda model, args: solved.append(projector.weight.detach().clone()))
    trainer.train()
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(solved)]
    assert changed == [False, True, False, True]


def test_weights_that_were_loaded_are_not_solved_over(tiny, rows, config, tmp_path):
    def make():
        return KDTrainer(
            tiny("gpt2"), config(recipe="svd_init", save_strategy="steps", save_steps=4, calibration_tokens=300),
            teacher=tiny("gpt2", width=24, seed=1), train_dataset=rows(40), eval_dataset=rows(4, seed=6),
        )  # fmt: skip

    trained = make()
    trained.train()
    expected = trained.evaluate()["eval_ce"]
    loaded, finished = make(), make()
    load_models(tmp_path / "run/checkpoint-4", loaded.model)
    assert finished.load_finished(tmp_path / "run/checkpoint-4")
    for trainer in (loaded, finished):
        assert trainer.evaluate()["eval_ce"] == pytest.approx(expected, rel=1e-6)
        weights = trainer.model.student.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in trained.model.student.state_dict().items())
    assert finished.state.global_step == 4
    assert not make().load_finished(_with_steps_left(tmp_path / "run/checkpoint-4"))


def _with_steps_left(checkpoint):
    path = checkpoint / "trainer_state.json"
    path.write_text(path.read_text().replace('"max_steps": 4', '"max_steps": 5'))
    return checkpoint
