"""The student's own earlier self as its teacher: its weights at the start, or a moving average of them."""

import copy

import pytest
import torch
from cases import relative
from safetensors.torch import load_file
from tiny_models import loss_by_hand, tiny
from transformers import AutoModelForCausalLM, TrainerCallback

from kdfast.training import DistillationModel, KDTrainer, load_student
from kdfast.training.recipes import choose_recipe

RATE = 0.3
STEADY = {"lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.3, "recipe": "teacher_head"}


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def lora():
    return pytest.importorskip("peft").LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_it_is_a_copy_of_the_student(config, rows):
    """As a teacher that was copied by hand; at first there is nothing to learn from it."""
    found = []
    for teacher in ("self", copy.deepcopy(tiny())):
        trainer = KDTrainer(tiny(), config(**STEADY), teacher=teacher, train_dataset=rows(8))
        trainer.train()
        found.append(losses(trainer))
        kds = [line["kd"] for line in trainer.state.log_history if "kd" in line]
        assert kds[0] == pytest.approx(0, abs=1e-6)
        assert min(kds[1:]) > 1e-4
    assert found[0] == found[1]
    for name, p in tiny().named_parameters():
        assert torch.equal(trainer.model.teacher.get_parameter(name), p)


def test_auto_takes_its_own_head(config, rows, capsys):
    assert choose_recipe(tiny(), "self").recipe == "teacher_head"
    KDTrainer(tiny(), config(recipe="auto"), teacher="self", train_dataset=rows(8))
    assert "recipe teacher_head: the teacher is the student's own earlier self" in capsys.readouterr().out


def test_below_an_adapter_there_is_one_base(config, rows):
    """The teacher is the student as it was given, an adapter with it; what is not trained is in memory once."""
    base = tiny(width=24, layers=2)
    whole, frozen = {name: p.detach().clone() for name, p in base.named_parameters()}, [*base.parameters()]
    model = DistillationModel(base, "self", recipe="teacher_head", peft_config=lora())
    of_teacher = {id(p) for p in model.teacher.parameters()}
    assert {id(p) for p in frozen} <= of_teacher
    adapter = trained(model.student)
    assert len(of_teacher) == len(frozen) + len(adapter)
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    at_first = copy.deepcopy(model.student).eval()
    trainer = KDTrainer(model, config(**STEADY), train_dataset=rows(8))
    trainer.train()
    assert max(relative(model.student.get_parameter(name), p) for name, p in adapter.items()) > 1e-3
    torch.testing.assert_close(model.teacher(ids).logits, at_first(ids).logits, rtol=0, atol=0)
    assert all(torch.equal(p, other) for p, other in zip(frozen, whole.values(), strict=True))
    loss = model.eval()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, loss_by_hand(model.student, at_first, ids, ids))


def test_a_quantized_base_is_shared_too(config, rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny(width=64).save_pretrained(tmp_path / "base")
    quantized = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}}
    student = load_student(tmp_path / "base", model_init_kwargs=quantized)
    args = config(**STEADY, teacher_update_rate=RATE, save_strategy="steps", save_steps=4)
    trainer = KDTrainer(student, args, teacher="self", peft_config=lora(), train_dataset=rows(8))
    adapter = trained(trainer.model.student)
    ours, theirs = ({id(p) for p in model.parameters()} for model in (trainer.model.student, trainer.model.teacher))
    assert len(theirs - ours) == len(adapter)
    trainer.train()
    assert load_file(f"{args.output_dir}/checkpoint-4/teacher.safetensors").keys() == adapter.keys()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_an_average_follows_the_student(config, rows, adapted, every):
    """After every step, or every second one, whatever the micro-batches; the first loss after a step has it."""
    args = config(**STEADY, teacher_update_rate=RATE, teacher_sync_steps=every, gradient_accumulation_steps=2)
    student, weights = tiny(layers=2), []
    trainer = KDTrainer(student, args, teacher="self", peft_config=lora() if adapted else None, train_dataset=rows(16))
    expected = trained(trainer.model.student)

    class Keep(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            weights.append(trained(trainer.model.student))

    trainer.add_callback(Keep())
    trainer.train()
    for step, now in enumerate(weights, 1):
        if step % every == 0:
            expected = {name: (1 - RATE) * p + RATE * now[name] for name, p in expected.items()}
    assert len(weights) == 4
    for name, p in expected.items():
        torch.testing.assert_close(trainer.model.teacher.get_parameter(name), p, rtol=1e-6, atol=1e-7)
    assert not any(p.requires_grad for p in trainer.model.average.models[1].parameters())


@pytest.mark.parametrize("adapted", [False, True])
def test_a_resumed_run_has_the_average_it_had(config, rows, adapted):
    """Losses and weights to the last bit, the teacher's too, of which a checkpoint holds what is trained."""
    found, options = [], {**STEADY, "teacher_update_rate": RATE, "save_strategy": "steps", "save_steps": 2}
    for resumed in (None, "checkpoint-2"):
        args = config(**options)
        trainer = KDTrainer(
            tiny(layers=2), args, teacher="self", peft_config=lora() if adapted else None, train_dataset=rows(8)
        )
        checkpoint = resumed and f"{args.output_dir}/{resumed}"
        trainer.train(resume_from_checkpoint=checkpoint)
        teacher = {name: trainer.model.teacher.get_parameter(name) for name in trainer.model.average.names}
        found.append((losses(trainer), trained(trainer.model.student), teacher))
    (unbroken, *weights), (again, *same) = found
    assert again == unbroken
    for one, other in zip(weights, same, strict=True):
        assert all(torch.equal(p, other[name]) for name, p in one.items())
    held = load_file(f"{checkpoint}/teacher.safetensors")
    assert held.keys() == weights[1].keys()
    if not adapted:  # the folder is the student's
        student = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert not all(torch.equal(p, held[name]) for name, p in student.named_parameters())


def test_a_checkpoint_without_the_average_is_refused(config, rows):
    args = config(**STEADY, save_strategy="steps", save_steps=2)
    KDTrainer(tiny(), args, teacher="self", train_dataset=rows(8)).train()
    again = KDTrainer(tiny(), config(**STEADY, teacher_update_rate=RATE), teacher="self", train_dataset=rows(8))
    with pytest.raises(Exception, match=r"has no teacher.safetensors; it was saved without teacher_update_rate"):
        again.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")


def test_a_step_that_is_left_out_moves_no_average(config, rows):
    args = config(**STEADY, teacher_update_rate=RATE, non_finite="skip", max_steps=3)
    trainer = KDTrainer(tiny(), args, teacher="self", train_dataset=rows(8))
    seen = []

    def spoil(module, inputs, output):
        seen.append(trained_sum(trainer.model.teacher))
        return output._replace(loss=output.loss + torch.inf) if trainer.state.global_step == 1 else output

    trainer.model.register_forward_hook(spoil)
    trainer.train()
    assert seen[0] != seen[1] == seen[2]


def trained_sum(model):
    return sum(p.double().sum().item() for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        ("gpt2", {}, r"teacher='gpt2'; expected a model, as load_teacher\('gpt2'\) gives, or 'self'"),
        ("self", {"recipe": "svd_init"}, "teacher='self' and recipe 'svd_init', which would solve the student"),
        ("self", {"recipe": "compressed_head", "teacher_update_rate": RATE}, "does not look at the teacher's head"),
        ("self", {"recipe": "lm_only", "teacher_update_rate": RATE}, "does not look at the teacher's head"),
        (None, {"recipe": "lm_only", "teacher_update_rate": RATE}, "expected teacher='self', alone, with it"),
    ],
)
def test_what_does_not_fit_is_said(config, given, options, expected):
    with pytest.raises(ValueError, match=expected):
        KDTrainer(tiny(), config(**{"recipe": "teacher_head", **options}), teacher=given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"teacher_update_rate": 0.0}, r"teacher_update_rate=0.0; expected a number in \(0, 1\]"),
        ({"teacher_update_rate": 1.5}, r"teacher_update_rate=1.5; expected a number in \(0, 1\]"),
        ({"teacher_sync_steps": 2}, "teacher_sync_steps=2; expected a teacher_update_rate with it"),
    ],
)
def test_settings_that_do_not_fit_are_said(config, given, expected):
    with pytest.raises(ValueError, match=expected):
        config(**given)


def test_an_average_in_16_bits_is_refused():
    with pytest.raises(ValueError, match="bfloat16, in which an average would not move by small steps"):
        DistillationModel(tiny().bfloat16(), "self", recipe="teacher_head", teacher_update_rate=0.05)


def test_a_teacher_that_stays_may_be_run_beforehand(config, rows):
    """One that follows the student may not."""
    args = config(**STEADY, precompute_teacher_log_probs=True)
    KDTrainer(tiny(), args, teacher="self", train_dataset=rows(8)).train()
    args = config(**STEADY, precompute_teacher_log_probs=True, teacher_update_rate=RATE)
    with pytest.raises(ValueError, match=r"cannot be run beforehand.*the teacher follows the student"):
        KDTrainer(tiny(), args, teacher="self", train_dataset=rows(8))
