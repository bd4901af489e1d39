"""`fused_kd_loss` and `FusedKDLoss`: the public loss.

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
    """Detached fp32 0-d tensors. Means over rows with the weights of their own term (entropies and agreement: the
    KD term's, or the cross entropy's without a teacher); NaN where there is nothing to compute one from."""

    kd: Tensor  # divergence, without τ² and kd_weight, in nats
    ce: Tensor  # student's cross entropy at τ = 1, nats
    anchor: Tensor  # projected teacher's cross entropy at τ = 1, nats
    student_entropy: Tensor  # τ = 1, nats
    teacher_entropy: Tensor  # τ = 1, nats
    agreement: Tensor  # fraction of rows whose argmax is the same
    tokens: Tensor  # rows that count (weight not zero)


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
) -> Any:  # what depends on return_metrics; a union would have to be narrowed at every call
    r"""Return the distillation loss over a large vocabulary; neither logits nor their gradients ever exist whole.

    `kd_weight·τ²·D(teacher, student) + ce_weight·CE(student, labels) + anchor_weight·CE(projected teacher)`.
    Forward KL is KL(teacher‖student). τ² *is* applied (`temperature_squared`). Labels are *not* shifted: the caller
    aligns them. The mean divides each term by the sum of its own weights, so ignored rows are not in the divisor.
    For a `Projected` teacher with `teacher_grad="full"` the gradient also reaches W through the teacher's logits.

    In plain torch, for `Projected(hidden_t, P, p)` and the defaults (on rows whose label is not ignored):

        z_s, z_t = F.linear(hidden_s, W, b), F.linear(F.linear(hidden_t, P, p), W, b)
        loss = τ**2 * F.kl_div((z_s/τ).log_softmax(-1), (z_t/τ).log_softmax(-1), reduction="batchmean", log_target=True)

    Args:
        student: `Head` with hidden (*, Hs), weight (V, Hs), bias (V,) or None, logit_scale and softcap.
        teacher: `Projected` (through the student's own head), `Head` (the teacher's own), `Logits` (dense, given),
            `SparseLogits` (K log-probabilities per token), or None (no KD term).
        labels: (*,) integer ids, or None. Rows equal to `ignore_index` count for nothing.
        temperature: τ > 0, number or 0-d tensor, on both sides of the KD term; CE and anchor are at τ = 1.
        divergence: "forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation",
            "alpha_beta" or an instance, e.g. `JSD(beta=0.1)`, also of a subclass of your own (CONTRIBUTING.md; no
            Triton engine takes that). Which to choose when: docs/choosing.md.
        kd_weight, ce_weight, anchor_weight: ≥ 0, number or 0-d tensor.
        anchor_targets: (*,) ids that the projected teacher is anchored to; None = `labels`. The anchor's gradient
            never reaches W.
        teacher_grad: Projected only, where the KD term's gradient goes on the teacher's side: "full" (plain
            autograd), "projector" (not to W), "none".
        token_weights: (*,) ≥ 0, multiplies every term of a row.
        kd_token_weights: (*,) ≥ 0; given, the KD term uses these alone, without token_weights or the label mask.
        reduction: "mean", "sum", or "none" for (*,) weighted rows.
        num_items_in_batch: with "mean", the divisor of every term (gradient accumulation, data parallel); 0 only where
            no row counts.
        valid_vocab: ids ≥ this are padding rows of the embedding: probability 0, no gradient.
        vocab: teacher's and student's vocabulary differ in size: "error", or "truncate": both sides of the KD term end
            at the shared first ids, CE keeps the student's whole vocabulary, and a sparse teacher's other ids are
            dropped. (With `valid_vocab` within both there is no difference: only their padding differs.)
        kd_vocab_mask: (V,) bool over the student's ids (of two tokenizers: the strings they share), or None. Both sides
            of the KD term are normalized over the True ids; cross entropy and anchor keep the whole vocabulary. A
            teacher's `Head` or `Logits` has the student's order; what it holds at False ids is not used. A sparse
            teacher's entries there are dropped, and a bucket needs a `log_tail`: that of the True ids not given. Of the
            metrics, kd, agreement and the entropy of any teacher but a `Projected` are of the True ids.
        process_group, vocab_start: vocabulary-parallel. `weight` (and bias) are this process's contiguous slice of the
            head, of any size, starting at id `vocab_start`; or DTensors sharded on dim 0 of the 1-D DeviceMesh (or its
            group) that is passed. Every process of the group calls with the same rows and options and gets the same
            loss and metrics, the gradient of its slice, and complete gradients of hidden states and projector: they
            are not to be summed over the group again. A `Projected` teacher shares the slices, `kd_vocab_mask` is cut
            like `weight`; a `Head` or `Logits` are cut at the same ids, or whole on every process; ids (labels, sparse
            entries) are those of the whole vocabulary. A DTensor without process_group, such as an FSDP-sharded head,
            is an error. The first call with a set of slices compares what the processes call with; KDFAST_CHECK=1
            compares every call.
            Collectives: for each chunk of tokens (all of them with "triton_tiled") a gather of 60 to 124 bytes per
            token and process, two for a divergence that is neither forward nor reverse KL, and one sum of dX.
            docs/distributed.md.
        engine: "auto", "reference" (eager, whole logits), "torch" (chunks of tokens, any device), "triton_chunked" (a
            GPU; fewest operations) or "triton_tiled" (a GPU; least memory). An explicit choice never falls back.
        scratch_bytes: memory for one chunk's logits and their gradients, or one slab's gradients; None =
            KDFAST_SCRATCH_BYTES or the default, 128 MiB on a CPU and for "triton_tiled", else
            max(512 MiB, 1024 to 1536 tokens, as the GPU's waves fill).
        return_metrics: also return `KDMetrics`; "terms": those of the loss's own terms, which take no work beside it,
            with NaN for entropies, agreement, and ce and anchor where their weight is the number 0.

    Returns:
        The loss, fp32 (float64 for float64 inputs), 0-d or (*,) for reduction="none"; with `return_metrics` a pair.
        All rows ignored, or no rows: 0, with zero gradients.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. Values of tensors (label range, negative
            or NaN weights) are checked on the CPU; on a GPU a bad row becomes NaN, and KDFAST_CHECK=1 raises.
        RuntimeError: second derivatives on a fused engine, and as NotImplementedError forward mode, torch.func's
            transforms, `is_grads_batched=True` and make_fx (use engine="reference").

    Tensors made under `torch.inference_mode()` are taken as they are; with `reduction="none"` leave them as they are
    until the backward, for autograd cannot notice a write.
    torch.compile: one graph, whatever values the tensors have, 0-d ones among the options too. A number that changes
    compiles once more, for all its later values.
    CUDA graphs: run once before the capture (kernels are compiled then). Nothing waits for the host; numbers are
    captured as they are, so what changes between replays must be a CUDA tensor written in place, and a 0-d CPU tensor,
    which would be copied from pageable memory, is no option there. KDFAST_CHECK=1 cannot be captured.

    Source: Hinton et al. 2015, arXiv:1503.02531, for τ²; the divergences name theirs.
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
    """Compute `fused_kd_loss` as a module: options at construction, tensors at the call.

        criterion = FusedKDLoss(temperature=2.0, ce_weight=1.0)
        loss = criterion(Head(h_s, W), Projected(h_t, P), labels)

    Any option can also be given at the call, where it wins: schedules and per-batch tensors
    (`kd_weight`, `token_weights`, `num_items_in_batch`, …) belong there. Raises TypeError for an unknown option.
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
    """Return means of `stats` (6, N) weighted by `weights` (3, N), whose rows are zero for terms that do not exist."""
    kd, ce, anchor = weights
    main = kd if problem.has_teacher else ce
    rows = kd, ce, anchor, main, kd, kd  # of each row of `stats`
    known = problem.has_teacher, problem.use_ce, problem.use_anchor, *[problem.want_metrics] * 3
    w = torch.stack([row if there else torch.zeros_like(row) for row, there in zip(rows, known, strict=True)])
    means = ((w * stats).masked_fill_(w == 0, 0.0).sum(dim=1) / w.sum(dim=1)).float()  # 0/0 is the NaN we promise
    metrics = KDMetrics._make([*means.unbind(), (main != 0).sum(dtype=torch.float32)])
    return metrics._replace(teacher_entropy=metrics.teacher_entropy * float("nan")) if problem.sparse else metrics
