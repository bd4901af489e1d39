"""Small runs of KDTrainer that one process and several must agree on; run as a script, by every process of a launch.

One launch goes through all runs of its world size.
"""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import torch
from tiny_models import RECOMPUTE, tiny

from kdfast.training import NonFiniteLossError
from kdfast.training.teachers import side

RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Two steps on 8 rows each, however many processes share them."""

    how: str = "ddp"  # or fsdp
    family: str = "gpt2"  # tied; llama: untied
    recipe: str = "projector_fixed"
    dtype: str = "float64"
    accumulation: int = 1
    recompute: bool = False  # activation checkpointing
    shard_teacher: bool = False
    adapter: str = ""  # lora: in the layers; head: and the head trained whole
    teacher: str = ""  # self: the student at the start; prompted: it reads ids of its own
    more: tuple = ()  # further settings of KDConfig, as pairs

    @property
    def name(self):
        flags = [f"accumulation{self.accumulation}"] * (self.accumulation > 1)
        flags += ["recompute"] * self.recompute + ["shard_teacher"] * self.shard_teacher
        flags += [self.adapter] * bool(self.adapter) + [self.teacher] * bool(self.teacher)
        return "-".join([self.how, self.family, self.recipe, self.dtype, *flags, *(key for key, _ in self.more)])


FROM_ZERO = (("kd_ramp", 1.0), ("kd_ramp_start", 0.0))  # the first step's KD weight is 0: it does not run the teacher
DDP = [
    Scenario(),
    Scenario(family="llama", accumulation=2, recompute=True),
    Scenario(family="llama", recipe="projector_refit"),
    Scenario(dtype="float32", more=FROM_ZERO),
    Scenario(family="llama", recipe="teacher_head", accumulation=2, teacher="prompted"),
    Scenario(recipe="teacher_head", teacher="self", more=(("teacher_update_rate", 0.5),)),
]
FSDP = [
    Scenario("fsdp"),
    Scenario("fsdp", family="llama", recipe="probe", accumulation=2, more=(("hidden_weight", 1.0),)),
    Scenario("fsdp", family="llama", recompute=True, shard_teacher=True),
    Scenario("fsdp", recipe="svd_init", recompute=True, shard_teacher=True),
    Scenario("fsdp", dtype="float32", accumulation=2),
    Scenario("fsdp", family="llama", shard_teacher=True, teacher="prompted"),
    Scenario("fsdp", family="llama", recipe="teacher_head", dtype="float32", shard_teacher=True, more=FROM_ZERO),
]
ADAPTED = [
    Scenario(family="llama", accumulation=2, recompute=True, adapter="lora"),
    Scenario("fsdp", family="llama", recompute=True, adapter="lora"),
    Scenario("fsdp", recipe="teacher_head", shard_teacher=True, adapter="head"),
    Scenario("fsdp", family="llama", recipe="teacher_head", adapter="lora", teacher="self"),
] * (importlib.util.find_spec("peft") is not None)
SCENARIOS = {
    2: [*DDP, *FSDP, *ADAPTED],
    4: [
        Scenario(family="llama", recipe="compressed_head", more=FROM_ZERO),
        Scenario("fsdp", accumulation=2),
        Scenario("fsdp", family="llama", dtype="float32"),
        Scenario("fsdp", family="llama", recipe="svd_init", recompute=True, shard_teacher=True),
    ],
}


def settings(scenario, folder, processes, **more):
    """KDConfig's arguments."""
    given = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "report_to": [], "recipe": scenario.recipe,
        "per_device_train_batch_size": 8 // scenario.accumulation // processes, "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": scenario.accumulation, "train_sampling_strategy": "sequential",
        "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "max_grad_norm": 0.5, "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,  # a gradient that is zero but for rounding must not be normalised to one
        "ddp_backend": "gloo" if processes > 1 else None, **dict(scenario.more),
    }  # fmt: skip
    if scenario.how == "fsdp" and processes > 1:
        given["fsdp"] = True
        given["fsdp_config"] = {"activation_checkpointing": scenario.recompute}
        given["shard_teacher"] = scenario.shard_teacher
    else:
        given[RECOMPUTE] = scenario.recompute
    return {**given, **more}


def make_trainer(scenario, folder, processes=PROCESSES, **more):
    from accelerate.state import AcceleratorState

    from kdfast.training import KDConfig, KDTrainer

    AcceleratorState._reset_state()  # of the run before; the processes stay connected
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it, for whatever comes next
    dtype = getattr(torch, scenario.dtype)
    student = tiny(scenario.family, layers=2).to(dtype)
    teacher = "self" if scenario.teacher == "self" else tiny(width=24, layers=2, seed=1).to(dtype)
    args = KDConfig(**settings(scenario, folder, processes, **more))
    rows = make_rows(5 + 8 * args.max_steps)  # 5: the last global batch is filled up, and what fills it must not count
    if scenario.teacher == "prompted":
        rows = list(map(prompted, rows, range(len(rows))))
    data = {"train_dataset": rows[5:], "eval_dataset": rows[:5]}
    trainer = KDTrainer(student, args, teacher=teacher, peft_config=adapter_of(scenario), **data)
    if trainer.model.hidden_loss is not None:
        trainer.model.hidden_loss.to(dtype)
    if RANK > 0:
        start_elsewhere(trainer.model)
    return trainer


def adapter_of(scenario):
    if not scenario.adapter:
        return None
    from peft import LoraConfig

    whole = ["lm_head"] if scenario.adapter == "head" else None
    return LoraConfig(target_modules="all-linear", modules_to_save=whole, init_lora_weights=False)


def start_elsewhere(model):
    """As of a process that draws or rounds differently: what the first one has must count."""
    for p in (*model.student.parameters(), *model.logit_projector.parameters()) if model.logit_projector else ():
        p.data += 1
    solve = model.solve

    def solve_elsewhere(*args):
        starts = solve(*args)
        model.compressed_head = None
        return starts

    model.solve = solve_elsewhere


COLUMNS = ("input_ids", "labels", "prompts")  # the last is dropped but where text is generated


def make_rows(n, T=12):
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 67, (T,), generator=generator) for _ in range(n)]
    prompts = [r[: 2 + i % 3].tolist() for i, r in enumerate(rows)]
    labels = [torch.where(torch.arange(T) < 3 * i % T, -100, r) for i, r in enumerate(rows)]
    return [dict(zip(COLUMNS, row, strict=True)) for row in zip(rows, labels, prompts, strict=True)]


def prompted(row, i):
    """The row whose teacher reads i % 7 ids before it, and predicts other parts of it."""
    ids, places = torch.cat([torch.arange(3, 3 + i % 7), row["input_ids"]]), torch.arange(len(row["input_ids"])) + i % 7
    return {**row, "teacher_input_ids": ids, "teacher_positions": torch.where(places % 5 < 1 + i % 4, -1, places)}


def run(scenario, folder, processes=PROCESSES):
    """Losses, the first step's gradients before they are clipped, the weights in the end, all whole; and the logs."""
    trainer = make_trainer(scenario, folder, processes)
    losses, gradients = torch.zeros(2, dtype=torch.float64), {}
    compute_loss, clip = trainer.compute_loss, trainer._clip_grad_norm

    def note_loss(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        losses[trainer.state.global_step] += loss.detach().double() / processes
        return loss

    def note_gradients(model):
        if trainer.state.global_step == 0:
            named = trainer.model.named_parameters()
            gradients.update({plain(name): whole(p.grad) for name, p in named if p.grad is not None})
        return clip(model)

    trainer.compute_loss, trainer._clip_grad_norm = note_loss, note_gradients
    evaluated = trainer.evaluate()  # before the training, after which accelerate alone would leave out DDP
    named = trainer.model.named_parameters()
    sharded = all(hasattr(p, "full_tensor") for name, p in named if p.requires_grad or name.startswith("student."))
    assert sharded is (scenario.how == "fsdp" and processes > 1)
    trainer.train()
    twice = "_checkpoint_wrapped_module._checkpoint_wrapped_module"
    assert not any(twice in name for name, _ in trainer.model.named_modules())  # by the evaluation and by the training
    weights = weights_of(trainer)
    losses = trainer.accelerator.reduce(losses, reduction="sum")
    steps = [line for line in trainer.state.log_history if "loss" in line]
    return {"losses": losses, "gradients": gradients, "weights": weights, "steps": steps, "evaluated": evaluated}


def weights_of(trainer):
    return {plain(name): whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad}


def plain(name):
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def checkpoint(scenario, folder, kind="FULL_STATE_DICT"):
    """Four steps, and the last two of them once more from the checkpoint between; what is left is read by others."""

    def trainer(name):
        made = make_trainer(scenario, folder / name, max_steps=4, save_strategy="steps", save_steps=2)
        if scenario.how == "fsdp":
            plugin = made.accelerator.state.fsdp_plugin
            plugin.state_dict_config = plugin.optim_state_dict_config = None
            plugin.set_state_dict_type(kind)
        return made

    unbroken = trainer("unbroken")
    unbroken.train()
    unbroken.save_model()
    result = {"unbroken": weights_of(unbroken)}
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(folder / "unbroken" / "checkpoint-2"))
    result["resumed"] = weights_of(resumed)
    result["evaluated"] = resumed.evaluate()
    resumed.train()  # from the weights it has by now
    return {**result, "again": weights_of(resumed)}


def best_model(scenario, folder):
    """The better of two evaluations is loaded in the end: the first, for the second steps away from it."""
    trainer = make_trainer(
        scenario, folder, max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="ce", learning_rate=0.3, lr_scheduler_type="constant",
        adam_epsilon=1e-8,
    )  # fmt: skip
    trainer.train()
    evaluated = [line["eval_ce"] for line in trainer.state.log_history if "eval_ce" in line]
    return {"evaluated": evaluated, "loaded": trainer.evaluate()["eval_ce"], "best": trainer.state.best_metric}


def skip(scenario, folder):
    """Three steps; in the second, one process has an infinite loss, whose gradient is finite."""
    from transformers import TrainerCallback

    trainer = make_trainer(scenario, folder, max_steps=3, non_finite="skip")
    weights = []

    def one_is_infinite(module, inputs, output):
        bad = RANK == 1 and trainer.state.global_step == 1
        return output._replace(loss=output.loss + torch.inf) if bad else output

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            weights.append([whole(p).double().sum().item() for p in trainer.model.parameters()])

        on_train_end = on_step_begin

    trainer.model.register_forward_hook(one_is_infinite)
    trainer.add_callback(Keep())
    trainer.train()
    (finding,) = [finding for finding in trainer.health.findings if finding.kind == "non_finite"]
    not_saved = None
    if scenario.how == "fsdp":
        shard = next(trainer.model.parameters()).to_local()
        if RANK == 1:
            shard.data[-1] = torch.nan
        try:
            trainer.save_model()
        except NonFiniteLossError as error:
            not_saved = str(error)
    return {
        "not_saved": not_saved,
        "changed": [step for step in (1, 2, 3) if weights[step] != weights[step - 1]],
        "weights": weights,
        "skipped": [line["skipped_steps"] for line in trainer.state.log_history if "skipped_steps" in line],
        "finding": finding.message,
    }


def on_policy(scenario, folder):
    """Four steps on text that the student writes, ragged; the last two once more from the checkpoint between."""

    def trained(name, checkpoint=None):
        made = make_trainer(
            scenario, folder / name, max_steps=4, save_strategy="steps", save_steps=2, on_policy=1.0,
            on_policy_buffer=2, max_new_tokens=5, sampling_temperature=3.0,
        )  # fmt: skip
        texts, compute_loss = [], made.compute_loss

        def note(model, inputs, *args, **kwargs):
            texts.append(inputs["input_ids"].clone())
            return compute_loss(model, inputs, *args, **kwargs)

        made.compute_loss = note
        made.train(resume_from_checkpoint=checkpoint)
        return {"texts": texts, "weights": weights_of(made), "steps": made.state.log_history}

    unbroken = trained("unbroken")
    return {**unbroken, "resumed": trained("resumed", str(folder / "unbroken" / "checkpoint-2"))}


def bf16(scenario, folder):
    """Two steps in mixed precision, and what was in which dtype."""
    trainer = make_trainer(scenario, folder, bf16=True)
    dtypes, rounded = {}, []
    loss_function, compute_loss, clip = side.fused_kd_loss, trainer.compute_loss, trainer._clip_grad_norm

    def note_inputs(*args, kd_weight, **kwargs):
        dtypes["kd_weight"] = kd_weight.dtype
        return loss_function(*args, kd_weight=kd_weight, **kwargs)

    def note_outputs(model, inputs, return_outputs=False, **kwargs):
        loss, output = compute_loss(model, inputs, return_outputs=True, **kwargs)
        dtypes.update({"loss": output.loss.dtype, "tokens": output.metrics.tokens.dtype, "ce": output.metrics.ce.dtype})
        return loss

    def note_gradients(model):
        gradients = [whole(p.grad) for p in trainer.model.parameters() if p.grad is not None]
        rounded.append(all(torch.equal(g, g.bfloat16().float()) for g in gradients))
        return clip(model)

    side.fused_kd_loss, trainer.compute_loss, trainer._clip_grad_norm = note_inputs, note_outputs, note_gradients
    trainer.train()
    side.fused_kd_loss = loss_function
    lines = [line for line in trainer.state.log_history if "loss" in line]
    dtypes |= {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"steps": lines, "dtypes": dtypes, "rounded": any(rounded)}


def main(folder):
    results = {scenario.name: run(scenario, folder / scenario.name) for scenario in SCENARIOS[PROCESSES]}
    if PROCESSES == 2:
        tied, untied = Scenario("fsdp"), Scenario("fsdp", "llama", "svd_init", recompute=True, shard_teacher=True)
        results["checkpoint-ddp"] = checkpoint(Scenario(), folder / "checkpoint-ddp")
        results["checkpoint-full"] = checkpoint(tied, folder / "checkpoint-full")
        results["checkpoint-sharded"] = checkpoint(untied, folder / "checkpoint-sharded", "SHARDED_STATE_DICT")
        results["best"] = best_model(tied, folder / "best")
        for scenario in ADAPTED:
            results[f"checkpoint-{scenario.name}"] = checkpoint(scenario, folder / f"checkpoint-{scenario.name}")
        for how, shard_teacher in (("ddp", False), ("fsdp", True)):
            scenario = Scenario(how, "llama", "teacher_head", shard_teacher=shard_teacher)
            results[f"on_policy-{how}"] = on_policy(scenario, folder / f"on_policy-{how}")
        for how in ("ddp", "fsdp"):
            results[f"skip-{how}"] = skip(Scenario(how), folder / f"skip-{how}")
            results[f"bf16-{how}"] = bf16(Scenario(how, dtype="float32"), folder / f"bf16-{how}")
    torch.save(results, folder / f"results-{RANK}.pt")
    torch.distributed.barrier()  # gloo's threads abort where one process goes while the other still talks to it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
