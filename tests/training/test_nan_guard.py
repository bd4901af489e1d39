import re
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from kdfast.training import KDTrainer, NonFiniteLossError
from kdfast.training.durable.nan_guard import NonFiniteGuard

NAN, INF = float("nan"), float("inf")


def break_at(trainer, step, name="student.model.norm.weight", value=NAN):
    """A parameter goes bad just before step `step` (from 1), as an update that overflows would do."""

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == step:
                with torch.no_grad():
                    dict(trainer.model.named_parameters())[name].fill_(value)

    trainer.add_callback(Break())


def make(tiny, config, rows, **given):
    args = config(**{"recipe": "projector_fixed", "save_strategy": "steps", "save_steps": 2, "max_steps": 8, **given})
    return KDTrainer(tiny(), args, teacher=tiny(width=24, seed=1), train_dataset=rows(8))


def snapshot(trainer):
    """The parameters the optimizer acted on, and how often."""
    steps = []
    trainer.create_optimizer().register_step_pre_hook(lambda *_: steps.append(1))
    return steps


def test_the_run_stops_at_the_bad_step_and_keeps_the_last_good_checkpoint(tiny, rows, config):
    trainer = make(tiny, config, rows)
    break_at(trainer, step=4)
    steps = snapshot(trainer)
    with pytest.raises(NonFiniteLossError, match=r"step 4: the loss is nan .*kd_weight 0\.7, temperature 2") as caught:
        trainer.train()
    assert isinstance(caught.value, RuntimeError)
    assert len(steps) == 3, "the optimizer must not act on a bad gradient"
    last = str(Path(trainer.args.output_dir) / "checkpoint-2")
    assert (caught.value.step, caught.value.checkpoint) == (4, last)
    assert f"The last good checkpoint is {last}." in str(caught.value)
    assert [path.name for path in Path(trainer.args.output_dir).iterdir()] == ["checkpoint-2"]


def test_without_a_checkpoint_the_message_says_so(tiny, rows, config):
    trainer = make(tiny, config, rows)
    break_at(trainer, step=1)
    with pytest.raises(NonFiniteLossError, match=r"No checkpoint had been saved yet\.") as caught:
        trainer.train()
    assert caught.value.checkpoint is None


def test_a_gradient_that_is_not_finite_stops_it_too(tiny, rows, config):
    trainer = make(tiny, config, rows)
    trainer.model.student.lm_head.weight.register_hook(
        lambda grad: grad * INF if trainer.state.global_step + 1 == 3 else grad
    )
    steps = snapshot(trainer)
    with pytest.raises(NonFiniteLossError, match=re.compile(r"step 3: the gradient norm is (nan|inf)")):
        trainer.train()
    assert len(steps) == 2


def test_nothing_bad_is_saved(tiny, rows, config, tmp_path):
    trainer = make(tiny, config, rows)
    with torch.no_grad():
        trainer.model.logit_projector.weight[0, 0] = INF
    with pytest.raises(NonFiniteLossError, match=r"1 parameter\(s\) hold NaN .*first logit_projector\.weight"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


class DeferredGuard(NonFiniteGuard):
    """As on a GPU, where only `check` reads."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._every_step = False


@pytest.mark.parametrize(
    ("given", "kept"), [({"logging_steps": 100}, 4), ({"save_steps": 100, "logging_steps": 3}, None)]
)
def test_on_a_gpu_it_stops_at_the_next_log_or_save(tiny, rows, config, monkeypatch, given, kept):
    monkeypatch.setattr("kdfast.training.trainer.NonFiniteGuard", DeferredGuard)
    trainer = make(tiny, config, rows, **given)
    break_at(trainer, step=5)
    with pytest.raises(NonFiniteLossError, match="step 5: the loss is nan") as caught:
        trainer.train()
    run = Path(trainer.args.output_dir)
    assert trainer.state.global_step == 6
    assert caught.value.checkpoint == (None if kept is None else str(run / f"checkpoint-{kept}"))
    assert not (run / "checkpoint-6").exists()


def test_the_first_bad_step_is_remembered_without_reading():
    guard = DeferredGuard(torch.device("cpu"), lambda: None)
    good, bad = torch.tensor(1.0), torch.tensor(NAN)
    for step, loss in enumerate([good, bad, good, torch.tensor(INF)], start=7):
        guard.watch_loss(step, loss, ce=good, kd=bad, kd_weight=0.5, temperature=2.0)
        guard.watch_gradient(good)
    with pytest.raises(NonFiniteLossError, match=r"step 8: the loss is nan \(.*ce 1, kd nan, kd_weight 0\.5"):
        guard.check()


def test_a_metric_that_is_nan_is_no_reason_to_stop():
    guard = NonFiniteGuard(torch.device("cpu"), lambda: None)
    guard.watch_loss(1, torch.tensor(1.0), ce=torch.tensor(1.0), kd=torch.tensor(NAN), kd_weight=0.0, temperature=2.0)
    guard.check()
