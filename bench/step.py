"""A whole training step of a student with its teacher: the pairs of models, the contenders, one step, its peak memory.

    loss = CE + kd_weight·τ²·KL(teacher ‖ student at τ),  each the mean over the targets;  τ = 2, kd_weight = 0.7
    step = forward of both models and the loss, backward, optimizer step, zero_grad

What differs in conventions: TRL's generalized_jsd_loss at beta=0 is the same KL with the same divisor (the targets that
are not −100), but without τ², which is multiplied in here. TRL's GKD trainer itself stays at τ = 1 and has no cross
entropy; here that is the model's own `.loss`, as a trainer that adds one gets it. Labels are shifted by each contender
itself. A projected teacher (run5) is another loss: timed, not compared.

`python -m step JSON` is one measurement of memory in a process of its own; see `peak_in_fresh_process`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from unittest import mock

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from kdfast.training.hf import backbone, shift_labels
from kdfast.training.loading import load_student
from kdfast.training.model import DistillationModel

TEMPERATURE, KD_WEIGHT = 2.0, 0.7
PROMPT = 8  # first tokens of every sequence have no label, so that a wrong divisor shows


def gpt2(layers: int, width: int, heads: int, vocab: int = 50257, positions: int = 1024) -> dict[str, Any]:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocab, "n_positions": positions}
    return {"model_type": "gpt2", "bos_token_id": vocab - 1, "eos_token_id": vocab - 1, **sizes, **no_dropout}


def qwen2(layers: int, width: int, heads: int, inner: int) -> dict[str, Any]:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    more = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "attention_dropout": 0.0}
    return {"model_type": "qwen2", **sizes, **more}


PAIRS = {  # student, teacher: the figures of the published models, random weights
    "gpt2": (gpt2(12, 768, 12), gpt2(24, 1024, 16)),
    "qwen2.5": (qwen2(24, 896, 14, 4864), qwen2(28, 1536, 12, 8960)),
    "tiny": (gpt2(2, 32, 2, 1031, 64), gpt2(2, 64, 2, 1031, 64)),
}
TITLES = {
    "gpt2": "GPT-2 (124M) from gpt2-medium",
    "qwen2.5": "Qwen2.5-0.5B from Qwen2.5-1.5B",
    "tiny": "Tiny pair",
}


@dataclass(frozen=True)
class Setting:
    """dtype "float32" or "bfloat16" is that of all weights; "autocast" an fp32 student under bf16 autocast with a
    bf16 teacher."""

    pair: str
    sequence: int  # tokens
    dtype: str = "float32"
    optimizer: str = "adamw"  # or "sgd", without momentum
    device: str = "cpu"
    checkpointing: bool = False  # of the student's activations


class Batch(NamedTuple):
    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), not shifted


Loss = Callable[[Batch], Tensor]


def ours(recipe: str) -> Callable[..., tuple[Loss, list[nn.Parameter]]]:
    def make(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[Loss, list[nn.Parameter]]:
        model = DistillationModel(student, teacher, recipe=recipe)
        projector = model.logit_projector
        options = {"temperature": TEMPERATURE, "kd_weight": KD_WEIGHT}

        def loss(batch: Batch) -> Tensor:
            return model(batch.input_ids, labels=batch.labels, **options).loss

        return loss, [] if projector is None else list(projector.parameters())

    return make


def eager_trl(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[Loss, list[nn.Parameter]]:
    """The forward of TRL's GKDTrainer.compute_loss. `.float()`: accelerate gives trainers fp32 logits."""
    trainer: Any = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer

    def loss(batch: Batch) -> Tensor:
        out = student(input_ids=batch.input_ids, labels=batch.labels, use_cache=False)
        with torch.no_grad():
            z_t = teacher(input_ids=batch.input_ids, use_cache=False).logits.float()
        kl = trainer.generalized_jsd_loss(
            out.logits.float()[:, :-1], z_t[:, :-1], labels=batch.labels[:, 1:], beta=0.0, temperature=TEMPERATURE
        )
        return out.loss + KD_WEIGHT * TEMPERATURE**2 * kl

    return loss, []


def eager_torch(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[Loss, list[nn.Parameter]]:
    """What one writes without a library."""

    def loss(batch: Batch) -> Tensor:
        z_s = student(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        with torch.no_grad():
            z_t = teacher(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        targets = batch.labels[:, 1:]
        ce = F.cross_entropy(z_s.flatten(0, 1), targets.flatten())
        log_q, log_p = F.log_softmax(z_s / TEMPERATURE, -1), F.log_softmax(z_t / TEMPERATURE, -1)
        real = targets != -100
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[real].sum() / real.sum()
        return ce + KD_WEIGHT * TEMPERATURE**2 * kl

    return loss, []


def chunked(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[Loss, list[nn.Parameter]]:
    """The least memory to be had without kdfast: TRL's kernel for the KL, PyTorch's for the cross entropy."""
    kernel = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    # "auto" takes a few rows at a time: on a CPU 10 times as long as these many (V=50257, 128 tokens: 4.6 s and 0.55)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1024 if torch.cuda.is_available() else 256)

    def loss(batch: Batch) -> Tensor:
        targets = shift_labels(batch.labels).flatten()
        h_s = backbone(student)(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        with torch.no_grad():
            h_t = backbone(teacher)(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        W, W_t = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
        real = targets != -100
        rows, _ = kernel.apply(h_s[real], W, None, h_t[real], W_t, None, 0.0, TEMPERATURE)
        ce = F.linear_cross_entropy(h_s, W, targets, ignore_index=-100, options=options)
        return ce + KD_WEIGHT * TEMPERATURE**2 * rows.sum() / real.sum()

    return loss, []


@dataclass(frozen=True)
class Contender:
    name: str
    make: Callable[[PreTrainedModel, PreTrainedModel], tuple[Loss, list[nn.Parameter]]]  # loss, further parameters
    same_loss: bool = True
    peer: bool = True  # not ours: where it fails, that is a line of the table

    def prepare(self, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[Loss, list[nn.Parameter]]:
        """Raises `Missing` where a peer, or what it needs, is not installed."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a peer's own, on import
                return self.make(student, teacher)
        except (ImportError, AttributeError) as error:
            if not self.peer:
                raise
            raise Missing(f"not installed: {error}") from error


class Missing(Exception):
    """Why a contender cannot run here."""


EAGER = "eager, plain torch"
CONTENDERS = [
    Contender("kdfast, teacher's own head", ours("teacher_head"), peer=False),
    Contender("kdfast, projected teacher", ours("projector_fixed"), same_loss=False, peer=False),
    Contender("eager, TRL's generalized_jsd_loss", eager_trl),
    Contender(EAGER, eager_torch),
    Contender("chunked, TRL's KL + torch's cross entropy", chunked),
]


def by_name(name: str) -> Contender:
    return next(contender for contender in CONTENDERS if contender.name == name)


class Bench:
    """One student and one teacher, shared by the contenders `names` (all that can run), and one optimizer.

    missing: name → why it cannot run.
    """

    def __init__(self, setting: Setting, names: list[str] | None = None) -> None:
        self.setting = setting
        self.student, self.teacher = models(setting)
        if setting.checkpointing:
            self.student.activation_checkpointing_enable()
        self.losses: dict[str, Loss] = {}
        self.missing: dict[str, str] = {}
        parameters = list(self.student.parameters())
        for contender in CONTENDERS:
            if names is None or contender.name in names:
                try:
                    self.losses[contender.name], more = contender.prepare(self.student, self.teacher)
                except Missing as reason:
                    self.missing[contender.name] = str(reason)
                    continue
                parameters += more
        self.parameters = parameters
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[setting.optimizer]
        # so small a rate that the weights stay what they are; fused, as the trainers' default is: no temporaries
        self.optimizer = kind(parameters, lr=1e-7, weight_decay=0.0, fused=True)

    def batch(self, size: int, sequence: int | None = None) -> Batch:
        shape, generator = (size, sequence or self.setting.sequence), torch.Generator().manual_seed(size)
        ids = torch.randint(self.student.config.vocab_size, shape, generator=generator).to(self.setting.device)
        labels = ids.clone()
        labels[:, : min(PROMPT, shape[1] // 2)] = -100
        return Batch(ids, labels)

    def backward(self, name: str, batch: Batch) -> float | Tensor:
        """The detached loss; gradients are left in `.grad`."""
        with self.autocast():
            loss = self.losses[name](batch)
        loss.backward()
        return loss.detach()

    def step(self, name: str, batch: Batch) -> None:
        self.backward(name, batch)
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        self.optimizer.zero_grad()
        if self.setting.device == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> Any:
        if self.setting.dtype != "autocast":
            return nullcontext()
        return torch.autocast(self.setting.device, torch.bfloat16)

    @contextmanager
    def backbones_replayed(self, batch: Batch) -> Iterator[Callable[[str], None]]:
        """Inside, both backbones only hand out the hidden states they made of `batch`: what is left of a step is the
        loss with its heads, forward and backward, in the very code that the whole step runs."""

        def replay(states: Tensor) -> Callable[..., BaseModelOutputWithPastAndCrossAttentions]:
            return lambda *_, **__: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)

        def run(name: str) -> None:
            states.grad = None
            self.backward(name, batch)
            self.clear()

        with torch.no_grad(), self.autocast():
            states, fixed = (
                backbone(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
                for model in (self.student, self.teacher)
            )
        states = states.detach().requires_grad_()
        with ExitStack() as stack:
            for model, hidden in ((self.student, states), (self.teacher, fixed)):
                stack.enter_context(mock.patch.object(backbone(model), "forward", replay(hidden)))
            yield run

    def differences(self, batch: Batch) -> dict[str, dict[str, float]]:
        """|loss − plain torch's| and ‖gradient of the student's embedding − plain torch's‖, relative to the latter,
        of every contender that computes the same loss."""
        weight = self.student.get_input_embeddings().weight
        found: dict[str, tuple[float, Tensor]] = {}
        for name in sorted(self.losses, key=lambda name: name != EAGER):  # plain torch first
            if by_name(name).same_loss:
                loss = float(self.backward(name, batch))
                found[name] = loss, weight.grad.clone()
                self.clear()
        true_loss, true_gradient = found[EAGER]
        norm = true_gradient.float().norm()
        return {
            name: {
                "loss_difference": abs(loss - true_loss) / abs(true_loss),
                "gradient_difference": float((gradient.float() - true_gradient.float()).norm() / norm),
            }
            for name, (loss, gradient) in found.items()
        }


def models(setting: Setting) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher: weights from N(0, 0.02²), biases 0, embeddings that give logits a deviation of 2."""
    dtypes = {"float32": ("float32", "float32"), "bfloat16": ("bfloat16",) * 2, "autocast": ("float32", "bfloat16")}
    made = []
    for config, dtype in zip(PAIRS[setting.pair], dtypes[setting.dtype], strict=True):
        with no_init_weights():  # to draw them takes a minute for 1.5B, in each of some 30 processes
            model = load_student(student_config=config, dtype=dtype)
        model.tie_weights()
        _fill(model)
        made.append(model.to(setting.device))
    student, teacher = made
    return student.train(), teacher.requires_grad_(False).eval()


@torch.no_grad()
def _fill(model: PreTrainedModel) -> None:
    period = 4194301  # prime: no two rows of a weight are the same
    table = torch.randn(period, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        for part in parameter.view(-1).split(period):
            part.copy_(table[: part.numel()])
        table = table.roll(1009)
    embedding = model.get_input_embeddings().weight
    embedding.mul_(100 * embedding.shape[1] ** -0.5)  # at 0.02 the KL would be too small a part of the loss to check


def peak_of_step(setting: Setting, name: str, size: int) -> dict[str, Any]:
    """Bytes by which one step of `size` sequences rises above models, gradients and optimizer state.

    A CPU's is the peak of the resident set, a GPU's the allocator's; both less the gradients' bytes, which the step
    allocates. "memory_run_seconds" is that one's, pages' first touch included. Where it does not fit: "out_of_memory".
    """
    bench = Bench(setting, [name])
    bench.step(name, bench.batch(1, min(16, setting.sequence)))  # libraries loaded, optimizer state allocated
    batch = bench.batch(size)
    gc.collect()
    gradients = sum(p.numel() * p.element_size() for p in bench.parameters if p.requires_grad)
    start = time.perf_counter()
    room = None
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        room = torch.cuda.mem_get_info()[0] - gradients
    try:
        peak = measure.peak_above_inputs(lambda: bench.step(name, batch))
    except torch.OutOfMemoryError:
        return {"out_of_memory": True, "room": room}
    seconds = time.perf_counter() - start
    return {"peak_bytes": peak - gradients, "gradient_bytes": gradients, "memory_run_seconds": seconds, "room": room}


def peak_in_fresh_process(setting: Setting, name: str, size: int, most_seconds: float = 240.0) -> dict[str, Any]:
    """`peak_of_step` in a process of its own, which gives up after `most_seconds`: "timed_out"."""
    request = {"setting": asdict(setting), "name": name, "size": size, "most_seconds": most_seconds}
    return json.loads(measure.in_fresh_process("step", json.dumps(request)))


def main() -> None:
    request = json.loads(sys.argv[1])

    def give_up() -> None:
        print(json.dumps({"timed_out": True}), flush=True)
        os._exit(0)  # a backward pass in another thread listens to nothing else

    timer = threading.Timer(request["most_seconds"], give_up)
    timer.daemon = True
    timer.start()
    found = peak_of_step(Setting(**request["setting"]), request["name"], request["size"])
    timer.cancel()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
