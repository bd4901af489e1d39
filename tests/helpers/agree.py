"""Whether an engine's loss, metrics and gradients of a `Problem` are right: see `agree`."""

import math
from functools import cache
from types import SimpleNamespace

import oracle
import pytest
import torch
from problems import BF16, F16, F32, F64, ROUNDING

from kdfast import fused_kd_loss


def run(problem, engine, **how):
    """engine: or "oracle". The loss, metrics, gradients by leaf; the oracle's also all it knows, and `errors`."""
    c = problem.case(**how)
    solved = None
    if engine == "oracle":
        solved = oracle.solve(c.student, c.teacher, c.labels, **c.options)
        loss, metrics = solved.loss, solved.metrics
    else:
        result = fused_kd_loss(
            c.student, c.teacher, c.labels, engine=engine, scratch_bytes=c.scratch, return_metrics=problem.metrics,
            **c.options,
        )  # fmt: skip
        loss, metrics = result if problem.metrics else (result, None)
        metrics = {} if metrics is None else {name: float(value) for name, value in metrics._asdict().items()}
    leaves = {name: leaf for name, leaf in c.leaves.items() if leaf.requires_grad}

    def gradients():
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}

    def errors(relative, absolute):
        """By leaf, the norm of what `Solved.rounding_errors` may come to."""
        for leaf in leaves.values():
            leaf.grad = None
        solved.rounding_errors(upstream, relative, absolute)
        return {name: float(gradient.norm()) for name, gradient in gradients().items()}

    upstream = c.upstream.to(loss.dtype)
    if loss.requires_grad:
        loss.backward(upstream, retain_graph=solved is not None)
    return SimpleNamespace(loss=loss.detach(), metrics=metrics, gradients=gradients(), solved=solved, errors=errors)


def agree(problem, engine, ours=None, single=2e-6):
    """ours: an answer as `run` gives; None = `engine`'s. single: the tolerance of float32.

    |ours − expected| ≤ tolerance + |theirs − expected|, of the loss, each metric and each gradient, by its norm.

    In float64 expected is the reference's, or, where that is ours, the oracle's; there is no theirs. Else expected is
    the truth, of the same numbers in float64, and theirs the reference's in their own dtype, or, where that is ours,
    the oracle's, which is eager's: no worse than that.

    Tolerances are relative. In float64 1e-8; else `single`, 2e-6 being thirty-two roundings, of whose sums that is the
    length, or two roundings of 16 bits where the result is of those. A gradient's are of the absolute values it is the
    sum of, and some roundings of the probabilities that those are differences of. Divergences are sums of such, too, so
    that a loss below a tenth is no measure of its own rounding, τ² times that with the factor τ².

    Where that does not do, four times what moving all inputs by one rounding makes of the oracle in float32 (float64),
    the most of three times: some problems make much of any rounding, and theirs, which is one number, may be lucky.
    """
    exact = problem.dtype == F64
    truth = run(problem, "oracle", dtype=F64)
    ours = ours or run(problem, engine)
    reference = run(problem, "oracle" if engine == "reference" else "reference", dtype=F64 if exact else None)
    expected, theirs = (reference, None) if exact else (truth, reference)

    @cache
    def moved():
        return [run(problem, "oracle", dtype=F64 if exact else F32, moved=i) for i in (1, 2, 3)]

    def check(name, value, tolerance):
        """value: of an answer."""

        def distance(answer):
            return float((value(answer).double() - value(expected).double()).norm())

        allowed = tolerance + (0.0 if theirs is None else distance(theirs))
        if not math.isfinite(allowed):  # eager overflows where others must not
            allowed = tolerance
        if not distance(ours) <= allowed:
            allowed += 4 * max(distance(answer) for answer in moved())
        assert distance(ours) <= allowed, f"{name}: {value(ours)}, expected {value(expected)}; {allowed} are allowed"

    finite = expected.loss.isfinite()
    assert not expected.loss.isnan().any()
    if theirs is not None and theirs.loss[~finite].isfinite().any():
        return  # infinite for a probability that a float32 does not have: it is 0 there
    assert torch.equal(ours.loss[~finite], expected.loss[~finite].to(ours.loss.dtype))
    assert ours.loss.dtype == problem.loss_dtype

    narrow = {dtype: 2 * ROUNDING[dtype] for dtype in (F16, BF16)}
    of_losses = 1e-8 if exact else narrow.get(problem.narrow, single)
    of_gradients = 1e-8 if exact else max(narrow.get(dtype, single) for dtype in problem.dtypes)
    squared = problem.options["temperature"] ** 2 if problem.options["temperature_squared"] else 1.0
    least = max(1.0, problem.options["kd_weight"] * squared) * (1e-12 if exact else 0.1 * of_losses)
    check("loss", lambda answer: answer.loss[finite], of_losses * float(expected.loss[finite].norm()) + least)
    for name, value in ours.metrics.items():
        if name == "agreement" and (problem.narrow or truth.solved.margin < (1e-9 if exact else 1e-2)):
            continue  # rounding may decide it
        if math.isfinite(expected.metrics[name]):
            tolerance = max(of_losses, 2e-6) * (abs(value) + 0.1)  # metrics are float32
            check(name, lambda answer, name=name: torch.tensor(answer.metrics[name]), tolerance)
        else:
            assert value == pytest.approx(expected.metrics[name], nan_ok=True), name

    tie = truth.solved.tie < 1e-3 or problem.narrow  # rounding may break it either way
    if not finite.all() or (problem.options["divergence"] == "total_variation" and tie and not exact):
        return
    tolerances = truth.errors(of_gradients, 1e-13 if exact else 8 * ROUNDING[F32])
    for name, gradient in ours.gradients.items():
        assert expected.gradients[name].isfinite().all(), name
        smallest = 2.0**-24 if gradient.dtype == F16 else 1e-30  # that a gradient can hold
        tolerance = tolerances[name] + smallest * gradient.numel() ** 0.5
        check(name, lambda answer, name=name: answer.gradients[name], tolerance)
