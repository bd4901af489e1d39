"""The public loss: `fused_kd_loss` and `FusedKDLoss`.

Flow: `localize` (plain tensors) → `check` → `build_problem` → an engine → loss and KDMetrics.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdfast import engines
from kdfast.divergences import Divergence, get_divergence
from kdfast.frontend.agreement import raise_on_all_ranks
from kdfast.frontend.build import build_problem
from kdfast.frontend.checks import check, check_kinds, check_transforms
from kdfast.frontend.vocab_parallel import localize
from kdfast.inputs import Head, Options, Teacher
from kdfast.ops.problem import Problem


class KDMetrics(NamedTuple):
    """Metrics of one loss: detached fp32 0-d tensors, NaN where there is nothing to average.

    Each is a mean over rows, weighted as its own term is. Entropies and agreement use the KD term's weights, or the
    cross entropy's without a teacher."""

    kd: Tensor  # the divergence in nats, without τ² and kd_weight
    ce: Tensor  # the student's cross entropy at τ = 1, in nats
    anchor: Tensor  # the projected teacher's cross entropy at τ = 1, in nats
    student_entropy: Tensor  # at τ = 1, in nats
    teacher_entropy: Tensor  # at τ = 1, in nats; NaN for a sparse teacher
    agreement: Tensor  # fraction of rows where student and teacher have the same argmax
    tokens: Tensor  # number of rows whose weight is not zero


def fused_kd_loss(
    student: Head,
    teacher: Teacher | None,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 2.0,
    divergence: str | Divergence = "forward_kl",
    kd_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    anchor_weight: float | Tensor = 0.0,
    anchor_targets: Tensor | None = None,
    teacher_grad: Literal["full", "projector", "none"] = "full",
    token_weights: Tensor | None = None,
    kd_token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items_in_batch: int | Tensor | None = None,
    temperature_squared: bool = True,
    valid_vocab: int | None = None,
    vocab: Literal["error", "truncate"] = "error",
    kd_vocab_mask: Tensor | None = None,
    process_group: Any = None,
    vocab_start: int | None = None,
    engine: str = "auto",
    scratch_bytes: int | None = None,
    return_metrics: bool | Literal["terms"] = False,
) -> Any:  # a tensor or a pair, depending on return_metrics; callers would have to narrow a union every time
    r"""Return the distillation loss over a large vocabulary without holding the full logits or their gradients.

    `kd_weight·τ²·D(teacher, student) + ce_weight·CE(student, labels) + anchor_weight·CE(projected teacher)`.
    Forward KL is KL(teacher‖student). τ² *is* applied (`temperature_squared`). Labels are *not* shifted: the caller
    aligns them. The mean divides each term by the sum of its own weights, so ignored rows don't enter the divisor.
    With a `Projected` teacher and `teacher_grad="full"`, W also gets the gradient through the teacher's logits.

    The same in plain torch, for `Projected(hidden_t, P, p)` and the defaults (over rows whose label is not ignored):

        z_s, z_t = F.linear(hidden_s, W, b), F.linear(F.linear(hidden_t, P, p), W, b)
        loss = τ**2 * F.kl_div((z_s/τ).log_softmax(-1), (z_t/τ).log_softmax(-1), reduction="batchmean", log_target=True)

    Args:
        student: `Head` with hidden (*, Hs), weight (V, Hs), bias (V,) or None, logit_scale and softcap.
        teacher: `Projected` (hidden states through a projector and the student's head), `Head` (the teacher's own),
            `Logits` (dense), `SparseLogits` (K log-probabilities per token), or None (no KD term).
        labels: (*,) integer ids, or None. Rows whose label is `ignore_index` don't count.
        temperature: τ > 0, a number or 0-d tensor. Divides both sides' logits in the KD term; CE and anchor are at 1.
        divergence: "forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation",
            "alpha_beta", or an instance such as `JSD(beta=0.1)`. Your own subclass works too (CONTRIBUTING.md), but
            not on the Triton engines. docs/choosing.md says which to choose.
        kd_weight, ce_weight, anchor_weight: ≥ 0, numbers or 0-d tensors.
        anchor_targets: (*,) ids for the anchor, the projected teacher's cross entropy; None = `labels`. The anchor's
            gradient never reaches W.
        teacher_grad: how far the KD term's gradient goes on the side of a `Projected` teacher: "full" (as in plain
            autograd), "projector" (not to W), "none".
        token_weights: (*,) ≥ 0; multiplies every term of its row.
        kd_token_weights: (*,) ≥ 0; the KD term then uses these alone, neither token_weights nor the label mask.
        reduction: "mean", "sum", or "none" for the weighted rows (*,).
        num_items_in_batch: with "mean", the divisor of every term, for gradient accumulation and data parallelism; may
            be 0 only if no row counts.
        valid_vocab: number of real ids; later rows of the embedding are padding, with probability 0 and no gradient.
        vocab: what to do when teacher and student have vocabularies of different sizes: "error", or "truncate": both
            sides of the KD term end where the smaller one does, CE keeps the student's whole vocabulary, and a sparse
            teacher's ids beyond it are dropped. A `valid_vocab` that fits in both is never an error.
        kd_vocab_mask: (V,) bool over the student's ids, or None; for two tokenizers, True at the strings they share.
            Both sides of the KD term are normalized over the True ids; CE and anchor keep the whole vocabulary. A
            teacher's `Head` or `Logits` must be in the student's order; its values at False ids are not used. A sparse
            teacher's entries there are dropped, and tail="bucket" needs a `log_tail`, over the True ids not given. The
            metrics kd, agreement and, unless the teacher is `Projected`, teacher_entropy cover the True ids only.
        process_group, vocab_start: vocabulary-parallel. `weight` (and bias) are this process's contiguous slice of the
            head, of any size, starting at id `vocab_start`; or DTensors sharded on dim 0 of the 1-D DeviceMesh (or its
            group) that is passed. Every process calls with the same rows and options and gets the same loss and
            metrics, the gradient of its slice, and complete gradients of hidden states and projector: don't sum those
            over the group again. A `Projected` teacher uses the same slices, and `kd_vocab_mask` is cut like `weight`.
            A teacher's `Head` or `Logits` is cut at the same ids or whole on every process. Labels and sparse entries
            hold ids of the whole vocabulary. A DTensor without process_group, such as an FSDP-sharded head, is an
            error. The first call with a set of slices compares the processes' arguments, every call under
            KDFAST_CHECK=1. For each chunk of tokens (all at once with "triton_tiled") the processes gather 60 to 108
            bytes per token and process, 28 more unless the divergence is forward or reverse KL, and sum dX once
            (docs/distributed.md).
        engine: "auto", "reference" (eager, full logits), "torch" (chunks of tokens, any device), "triton_chunked"
            (GPU, fewest operations) or "triton_tiled" (GPU, least memory). An explicit choice never falls back.
        scratch_bytes: memory for one chunk's logits and their gradients, or for one slab's gradients. None =
            KDFAST_SCRATCH_BYTES, or by default 128 MiB on a CPU and for "triton_tiled", and elsewhere 512 MiB or 1024
            to 1536 tokens (as fills the GPU's waves), whichever is larger.
        return_metrics: True also returns `KDMetrics`. "terms" returns only those that cost nothing beside the loss:
            entropies and agreement are NaN, and so are ce and anchor where their weight is the number 0.

    Returns:
        The loss in nats, fp32 (float64 for float64 inputs), 0-d or (*,) for reduction="none"; with `return_metrics`, a
        pair of loss and KDMetrics. If all rows are ignored or there are none, it is 0 with zero gradients.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. Tensor values (label range, negative or NaN
            weights) are checked on the CPU; on a GPU a bad row becomes NaN, unless KDFAST_CHECK=1, which raises.
        RuntimeError: second derivatives on a fused engine; as NotImplementedError, forward mode, torch.func's
            transforms, `is_grads_batched=True` and make_fx. engine="reference" supports them all.

    Tensors made under `torch.inference_mode()` are accepted; with `reduction="none"` don't write to them before the
    backward, since autograd cannot notice.
    torch.compile: one graph for all tensor values, 0-d options included. An option given as a number recompiles once,
    when it first changes.
    CUDA graphs, without process_group: run once before the capture, to compile the kernels. Nothing waits for the host.
    Numbers are captured as constants, so anything that changes between replays must be a CUDA tensor written in place.
    0-d CPU tensors cannot be options there (they would be copied from pageable memory), and KDFAST_CHECK=1 cannot be
    captured.

    Source: Hinton et al. 2015, arXiv:1503.02531, for τ²; each divergence names its own.
    """
    options = Options(
        temperature=temperature,
        divergence=get_divergence(divergence),
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        anchor_weight=anchor_weight,
        anchor_targets=anchor_targets,
        teacher_grad=teacher_grad,
        token_weights=token_weights,
        kd_token_weights=kd_token_weights,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        temperature_squared=temperature_squared,
        valid_vocab=valid_vocab,
        vocab=vocab,
        kd_vocab_mask=kd_vocab_mask,
        process_group=process_group,
        vocab_start=vocab_start,
        engine=engine,
        scratch_bytes=scratch_bytes,
        return_metrics=return_metrics,
    )
    check_kinds(student, teacher)
    check_transforms(student, teacher, labels, options)
    arguments = localize(student, teacher, labels, options)
    with raise_on_all_ranks(arguments):
        check(arguments)
    problem, weights = build_problem(arguments)
    loss, stats = engines.run(problem)
    if reduction == "none":
        loss = loss.reshape(student.hidden.shape[:-1])
    return (loss, _metrics(problem, stats, weights)) if return_metrics else loss


class FusedKDLoss(nn.Module):
    """`fused_kd_loss` as a module: options at construction, tensors at the call.

        criterion = FusedKDLoss(temperature=2.0, ce_weight=1.0)
        loss = criterion(Head(h_s, W), Projected(h_t, P), labels)

    Any option can also be passed at the call and wins there, which suits schedules and per-batch tensors
    (`kd_weight`, `token_weights`, `num_items_in_batch`, …). Raises TypeError for an unknown option.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(Options.names()))
        if unknown:
            raise TypeError(f"FusedKDLoss: unknown option {unknown[0]!r}; expected one of {', '.join(Options.names())}")
        get_divergence(options.get("divergence", "forward_kl"))
        self.options = options

    def forward(self, student: Head, teacher: Teacher | None, labels: Tensor | None = None, **options: Any) -> Any:
        return fused_kd_loss(student, teacher, labels, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _metrics(problem: Problem, stats: Tensor, weights: Tensor) -> KDMetrics:
    """Return the means of `stats` (6, N), weighted by `weights` (3, N), which are zero for terms that don't exist."""
    kd, ce, anchor = weights
    main = kd if problem.has_teacher else ce
    rows = kd, ce, anchor, main, kd, kd  # the weights of each row of `stats`
    known = problem.has_teacher, problem.use_ce, problem.use_anchor, *[problem.want_metrics] * 3
    w = torch.stack([row if there else torch.zeros_like(row) for row, there in zip(rows, known, strict=True)])
    means = ((w * stats).masked_fill_(w == 0, 0.0).sum(dim=1) / w.sum(dim=1)).float()  # 0/0 gives the promised NaN
    metrics = KDMetrics._make([*means.unbind(), (main != 0).sum(dtype=torch.float32)])
    return metrics._replace(teacher_entropy=metrics.teacher_entropy * float("nan")) if problem.sparse else metrics
