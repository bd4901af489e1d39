"""`model_init` and `hyperparameter_search`: a student per run and per trial, one teacher."""

import pytest
import torch
from accelerate.utils import release_memory
from transformers import default_data_collator
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend

from kdfast.training import DistillationModel, KDTrainer, load_student
from kdfast.training.durable import checksums

NAMES = ("learning_rate", "temperature", "kd_ratio", "recipe")
TRIALS = [
    {"learning_rate": 1e-3, "temperature": 2.0, "kd_ratio": 0.3, "recipe": "svd_init"},
    {"learning_rate": 1e-2, "temperature": 1.0, "kd_ratio": 0.7, "recipe": "teacher_head"},
    {"learning_rate": 1e-2, "temperature": 2.0, "kd_ratio": 0.5, "recipe": "compressed_head"},
]


class Trial:
    """What optuna's trials have that is used here."""

    def __init__(self, number, params):
        self.number, self.params = number, params


class Backend(HyperParamSearchBackendBase):
    """Does with TRIALS what transformers' own backend does with optuna's."""

    name = "optuna"

    @staticmethod
    def is_available():
        return True

    def run(self, trainer, n_trials, direction, **kwargs):
        found = []
        for number, params in enumerate(TRIALS[:n_trials]):
            trainer.objective = None
            trainer.train(resume_from_checkpoint=None, trial=Trial(number, params))
            if trainer.objective is None:
                trainer.objective = trainer.compute_objective(trainer.evaluate())
            self.seen.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
            found.append(BestRun(str(number), trainer.objective, params))
            trainer.model_wrapped, trainer.model = release_memory(trainer.model_wrapped, trainer.model)
            trainer.accelerator.clear()
        return min(found, key=lambda run: run.objective)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    monkeypatch.setattr(Backend, "seen", [], raising=False)
    monkeypatch.setattr("transformers.trainer.Trainer._report_to_hp_search", lambda *_: None)  # which wants optuna
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    return Backend


@pytest.fixture
def trainer(tiny, config, rows):
    """A trainer of students that `model_init` makes, or of one that is given."""

    def make(model=None, teacher=None, model_init=None, **given):
        init = None if model is not None else model_init or (lambda: tiny("llama", seed=1, spread=0.02))
        return KDTrainer(
            model,
            config(**given),
            model_init=init,
            teacher=tiny("llama", width=32, seed=2) if teacher is None else teacher,
            train_dataset=rows(16),
            eval_dataset=rows(4),
            data_collator=default_data_collator,
        )

    return make


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("recipe", ["svd_init", "projector_fixed", "compressed_head", "lm_only"])
def test_each_run_starts_anew_and_as_with_a_model(tiny, trainer, recipe):
    expected = losses(trainer(tiny("llama", seed=1, spread=0.02), recipe=recipe))
    made = trainer(recipe=recipe)
    assert losses(made) == expected
    assert losses(made) == expected, "a second run goes on from nothing"


def test_each_trial_is_a_run_of_its_own_under_its_settings(tiny, trainer, backend, tmp_path):
    teacher = tiny("llama", width=32, seed=2)
    expected = [
        losses(trainer(teacher=teacher, model_init=lambda: tiny("llama", seed=1, spread=0.02), **p)) for p in TRIALS
    ]
    searched = trainer(teacher=teacher)
    given = []

    def space(trial):
        given.append(trial.number)
        return trial.params

    best = searched.hyperparameter_search(space, n_trials=3, backend="optuna")
    assert backend.seen == expected
    assert {*given} == {0, 1, 2}
    assert best.hyperparameters in TRIALS
    for name, value in best.hyperparameters.items():  # as transformers' documentation has it
        setattr(searched.args, name, value)
    assert losses(searched) == expected[int(best.run_id)]
    assert searched.model.teacher is teacher
    assert searched.evaluate()["eval_ce"] == pytest.approx(best.objective)


def test_the_student_may_depend_on_the_trial(tiny, trainer, backend):
    seen = []

    def make(trial):
        seen.append(trial and trial.number)
        return tiny("llama", seed=1, layers=1 if trial is None else 1 + trial.number)

    trainer(recipe="teacher_head", model_init=make).hyperparameter_search(lambda t: {}, n_trials=2, backend="optuna")
    assert seen == [None, 0, 1]


def test_checkpoints_of_trials_are_apart_and_whole(trainer, backend, tmp_path):
    given = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "ce", "save_total_limit": 1}
    searched = trainer(recipe="teacher_head", **given, **best)
    searched.hyperparameter_search(lambda trial: {"learning_rate": 1e-3}, n_trials=2, backend="optuna")
    for number in (0, 1):
        (folder,) = (tmp_path / f"run/run-{number}").iterdir()
        assert checksums.find_damage(folder) is None
        assert load_student(folder).config.vocab_size == 67


def test_settings_of_a_trial_are_checked(trainer, backend):
    searched = trainer(recipe="teacher_head")
    with pytest.raises(ValueError, match="kd_ratio=2; expected a number in"):
        searched.hyperparameter_search(lambda trial: {"kd_ratio": 2}, n_trials=1, backend="optuna")


def test_the_teachers_entries_are_made_once(trainer, backend, capsys):
    given = {"recipe": "teacher_head", "precompute_teacher_log_probs": None, "max_steps": 24}
    trainer(**given).hyperparameter_search(lambda trial: {"learning_rate": 1e-3}, n_trials=2, backend="optuna")
    printed = capsys.readouterr().out
    assert printed.count("the teacher's entries are there") == 1


def test_what_does_not_go_together(tiny, trainer, config, backend):
    with pytest.raises(ValueError, match="model_init and model are given"):
        KDTrainer(tiny(), config(recipe="lm_only"), model_init=tiny)
    optimizer = torch.optim.SGD(tiny().parameters())
    with pytest.raises(ValueError, match="model_init and optimizers are given"):
        KDTrainer(args=config(recipe="lm_only"), model_init=tiny, optimizers=(optimizer, None))
    with pytest.raises(RuntimeError, match="need to pass your model through a model_init"):
        trainer(tiny("llama")).hyperparameter_search(n_trials=1, backend="optuna")


def test_a_model_init_may_wrap_the_student_itself(tiny, config, rows):
    def make():
        return DistillationModel(tiny("llama", seed=1), tiny("llama", seed=2), recipe="teacher_head")

    def run(**given):
        return losses(KDTrainer(args=config(), train_dataset=rows(8), data_collator=default_data_collator, **given))

    assert run(model_init=make) == run(model=make())


def test_a_search_with_optuna(trainer):
    pytest.importorskip("optuna")
    searched = trainer(recipe="svd_init", eval_strategy="steps", eval_steps=2)
    best = searched.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)}, n_trials=2
    )
    assert 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-2
