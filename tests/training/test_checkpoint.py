import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from kdfast.training import DistillationModel, KDTrainer
from kdfast.training.durable.atomic_io import publish, staging
from kdfast.training.durable.checkpoint import load_models, recover, rotate, save_models
from kdfast.training.durable.resume import best_checkpoint
from kdfast.training.recipes import Recipe

PROJECTOR_FILE = "logit_projector.safetensors"


def make(tiny, config, data, recipe="projector_fixed", family="gpt2", **given):
    args = config(recipe=recipe, save_strategy="steps", save_steps=2, max_steps=6, **given)
    student = tiny(family, dropout=0.2)
    return KDTrainer(student, args, teacher=tiny(width=24, seed=1), train_dataset=data, eval_dataset=data[:3])


def losses(trainer):
    return {line["step"]: (line["loss"], line["kd_weight"]) for line in trainer.state.log_history if "loss" in line}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(tiny, rows, config, accumulate):
    # dropout on, the KD weight in its ramp, the projector with a learning rate of its own
    data, given = rows(20), {"gradient_accumulation_steps": accumulate, "kd_ramp": 1.0}
    unbroken = make(tiny, config, data, **given)
    unbroken.train()
    resumed = make(tiny, config, data, **given)
    with torch.no_grad():  # whatever is not restored shows
        for p in resumed.model.student.parameters():
            p.add_(1.0)
        resumed.model.logit_projector.weight.add_(1.0)
    resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-2")
    ours, truth = losses(resumed), losses(unbroken)
    assert sorted(ours) == [1, 2, 3, 4, 5, 6]
    for step in (3, 4, 5, 6):
        assert ours[step] == pytest.approx(truth[step], rel=1e-6), step
    for (name, p), q in zip(resumed.model.named_parameters(), unbroken.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    seen = [[line["tokens_seen"] for line in t.state.log_history if "loss" in line] for t in (resumed, unbroken)]
    assert seen[0] == seen[1]


def test_resume_true_takes_the_last_checkpoint(tiny, rows, config):
    make(tiny, config, rows(8)).train()
    resumed = make(tiny, config, rows(8))
    resumed.args.max_steps = 7
    resumed.train(resume_from_checkpoint=True)
    assert max(losses(resumed)) == 7
    assert resumed.state.global_step == 7


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_plain_from_pretrained_reads_the_student(tiny, rows, config, family):
    trainer = make(tiny, config, rows(8), family=family)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-6"
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = rows(1)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.student.eval()(ids).logits)
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "model.safetensors", PROJECTOR_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json", "training_args.json",
    }  # fmt: skip
    assert json.loads((folder / "training_args.json").read_text())["recipe"] == "projector_fixed"


def test_the_teacher_is_nowhere(tiny, rows, config):
    trainer = make(tiny, config, rows(8))
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-6"
    kept = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kept |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert kept["weight"] == [16, 24], "the projector"
    # 24 is the teacher's width alone, and no parameter of the student has it
    assert not [name for name, shape in kept.items() if 24 in shape and name != "weight"]
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(trained)


def test_the_tokenizer_is_saved(tiny, rows, config, tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    KDTrainer(tiny(), config(recipe="lm_only"), processing_class=tokenizer).save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "tokenizer.json").is_file()


def test_rotation_keeps_the_newest_and_the_best(tiny, rows, config):
    given = {"save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    given |= {"metric_for_best_model": "eval_ce", "greater_is_better": True}  # so that the first one is the best
    trainer = make(tiny, config, rows(3), learning_rate=1e-2, **given)
    trainer.train()
    evaluated = {line["step"]: line["eval_ce"] for line in trainer.state.log_history if "eval_ce" in line}
    assert max(evaluated, key=evaluated.get) == 2, "it learns"
    run = Path(trainer.args.output_dir)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-6"]
    assert trainer.state.best_model_checkpoint == str(run / "checkpoint-2")
    for name in ("checkpoint-2", "checkpoint-6"):  # at its own saving too, before it has its name
        state = json.loads((run / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(run / "checkpoint-2"), name
    assert trainer.evaluate()["eval_ce"] == pytest.approx(evaluated[2], rel=1e-5), "the best model was loaded"


def test_a_best_step_evaluated_after_its_save_is_kept(tiny, rows, config):
    given = {"save_total_limit": 2, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    given |= {"metric_for_best_model": "eval_ce", "greater_is_better": True, "save_strategy": "steps"}
    args = config(recipe="lm_only", learning_rate=1e-2, **given)

    class SavesFirst(TrainerCallback):  # as at the end of an epoch, whose evaluation follows the last step's save
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = False

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                metrics = trainer.evaluate()
                trainer._determine_best_metric(metrics, None)

    trainer = KDTrainer(tiny(), args, train_dataset=rows(4), eval_dataset=rows(3), callbacks=[SavesFirst()])
    trainer.train()
    run = Path(trainer.args.output_dir)
    assert trainer.state.best_model_checkpoint == str(run / "checkpoint-2")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_the_best_is_known_however_the_run_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    for name in ("checkpoint-1", "checkpoint-3"):
        (tmp_path / "run" / name).mkdir(parents=True)
    state = TrainerState(best_model_checkpoint="link/checkpoint-1", best_global_step=1)
    assert best_checkpoint(state, tmp_path / "run") == tmp_path / "run/checkpoint-1"
    rotate(tmp_path / "run", 1, state.best_model_checkpoint, ended=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


def test_rotation_leaves_a_copy_beside_the_checkpoints(tmp_path):
    for name in ("checkpoint-2", "checkpoint-2-mine", "checkpoint-4"):
        (tmp_path / name).mkdir()
    rotate(tmp_path, 1, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2-mine", "checkpoint-4"]


def test_the_newest_goes_out_of_sight_before_it_is_deleted_for_the_best(tiny, rows, config, monkeypatch):
    given = {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    given |= {"metric_for_best_model": "eval_ce", "greater_is_better": True}  # so that the first one is the best
    trainer = make(tiny, config, rows(3), learning_rate=1e-2, **given)
    deleted, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: (deleted.append(Path(path).name), rmtree(path, **more)))
    trainer.train()
    assert [path.name for path in Path(trainer.args.output_dir).iterdir()] == ["checkpoint-2"]
    assert deleted == [".checkpoint-4.deleted.incomplete", ".checkpoint-6.deleted.incomplete"]
    assert trainer.args.save_total_limit == 1


class Killed(BaseException):
    """As a signal would: not an Exception that someone might handle."""


@pytest.mark.slow
@pytest.mark.parametrize("at", ["_save_optimizer_and_scheduler", "_save_rng_state", "_write_arguments"])
def test_a_run_killed_while_saving_leaves_no_partial_checkpoint(tiny, rows, config, monkeypatch, at):
    trainer = make(tiny, config, rows(8))
    original = getattr(trainer, at)

    def die(*args):
        if trainer.state.global_step == 4:
            raise Killed
        return original(*args)

    monkeypatch.setattr(trainer, at, die)
    with pytest.raises(Killed):
        trainer.train()
    run = trainer.args.output_dir
    assert get_last_checkpoint(run).endswith("checkpoint-2")
    assert not list(Path(run).glob("checkpoint-4*"))

    resumed = make(tiny, config, rows(8), save_total_limit=5)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in Path(run).iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_nobody_sees_a_checkpoint_before_it_is_complete(tiny, rows, config):
    seen = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(sorted(path.name for path in Path(args.output_dir).iterdir()))

    trainer = make(tiny, config, rows(8))
    trainer.add_callback(Watch())
    write_arguments = trainer._write_arguments

    def look(folder):
        assert get_last_checkpoint(trainer.args.output_dir) is None or trainer.state.global_step > 2
        assert not (Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}").exists()
        write_arguments(folder)

    trainer._write_arguments = look
    trainer.train()
    assert seen[0] == ["checkpoint-2"]


def test_save_model_into_a_folder_with_checkpoints(tiny, rows, config):
    trainer = make(tiny, config, rows(8))
    trainer.train()
    trainer.save_model()
    run = Path(trainer.args.output_dir)
    assert (run / "checkpoint-6").is_dir()
    assert (run / PROJECTOR_FILE).is_file()
    assert not list(run.glob(".*"))
    ids = rows(1)[0]["input_ids"][None]
    with torch.no_grad():
        expected = trainer.model.student.eval()(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(run).eval()(ids).logits, expected)


def test_models_round_trip_and_say_what_is_missing(tiny, tmp_path):
    model = DistillationModel(tiny("qwen2"), tiny(width=24, seed=1), recipe="projector_fixed")
    save_models(tmp_path, model)
    other = DistillationModel(tiny("qwen2", seed=7), tiny(width=24, seed=1), recipe="projector_fixed")
    load_models(tmp_path, other)
    for (name, p), q in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert other.student.lm_head.weight is other.student.model.embed_tokens.weight, "still tied"

    (tmp_path / PROJECTOR_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no {PROJECTOR_FILE}"):
        load_models(tmp_path, other)
    with pytest.raises(ValueError, match=r"not a checkpoint: it has no config\.json"):
        load_models(tmp_path / "nowhere", other)


def test_a_probe_and_the_maps_of_the_hidden_loss_round_trip(tiny, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        recipe = Recipe("test", teacher="probe", anchor_weight=1.0, hidden_weight=1.0)
        return DistillationModel(tiny("qwen2", seed=seed), tiny(width=24, seed=1), recipe=recipe)

    model, other = make(2), make(3)
    save_models(tmp_path, model)
    load_models(tmp_path, other)
    names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"student", "logit_projector", "hidden_loss"}
    for (name, p), q in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name
    (tmp_path / "hidden_loss.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no hidden_loss\.safetensors"):
        load_models(tmp_path, other)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["compressed_head", "probe"])
def test_solved_recipes_resume_where_they_stopped(tiny, rows, config, tmp_path, recipe):
    """The start is solved again, the weights are the checkpoint's, and the fixed teacher is the same as before."""

    def make(steps, folder):
        # kd_until: half of the run would be another step in a shorter one
        given = {"student_init": "svd", "kd_until": 1.0} if recipe == "compressed_head" else {"projector_init": "lstsq"}
        args = config(
            recipe=recipe, max_steps=steps, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / folder),
            lr_scheduler_type="constant", **given,
        )  # fmt: skip
        return KDTrainer(tiny("gpt2"), args, teacher=tiny(width=24, seed=1), train_dataset=rows(8))

    whole = make(4, "whole")
    whole.train()
    make(2, "parts").train()
    resumed = make(4, "parts")
    resumed.train(resume_from_checkpoint=True)
    for (name, p), q in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_a_checkpoint_without_all_weights_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model = DistillationModel(tiny(), recipe="lm_only")
    save_models(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of the student: model\.norm\.weight"):
        load_models(tmp_path, model)


def test_resume_from_nowhere(tiny, rows, config):
    with pytest.raises(ValueError, match="resume_from_checkpoint='nowhere': no such folder"):
        make(tiny, config, rows(8)).train(resume_from_checkpoint="nowhere")


def test_publish_replaces_whole_or_file_by_file(tmp_path):
    def folder(path, **files):
        path.mkdir()
        for name, text in files.items():
            (path / name).write_text(text)
        return path

    final = tmp_path / "checkpoint-2"
    publish(folder(staging(final), a="1"), final, replace=True)
    publish(folder(staging(final), b="2"), final, replace=True)
    assert [path.name for path in final.iterdir()] == ["b"]
    publish(folder(staging(final), c="3", b="4"), final, replace=False)
    assert {path.name: path.read_text() for path in final.iterdir()} == {"b": "4", "c": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    staging(final).mkdir()
    (tmp_path / ".incomplete").mkdir()  # of a final model
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
