"""Every divergence with every teacher on every engine, once: value, metrics and gradients against the definition.

`make quick` answers in a minute whether a change to a divergence, a teacher or an engine is right. The definition is
helpers/oracle.py, in float64 and whole logits; what options, shapes, dtypes and chunks add stands in the other rooms.
"""

import oracle
import pytest
import torch
from cases import copy, gradients, make, relative, student
from problems import INFINITE_ON_A_SUPPORT
from teachers import KINDS, PROJECTED, sources

from kdfast import JSD, AlphaBeta, SkewKL, SkewReverseKL, SymmetricKL, fused_kd_loss

DIVERGENCES = [
    "forward_kl", "reverse_kl", SymmetricKL(0.9), JSD(0.3), SkewKL(0.2), SkewReverseKL(0.3), "total_variation",
    AlphaBeta(0.2, 0.7),
]  # fmt: skip
# no multiple of any block: two blocks of the interpreter's 64 ids; two chunks of tokens, slabs of one tile
SIZES = {"n": 9, "v": 70, "hs": 5, "ht": 7}
SCRATCH = 5 * 2 * 128 * 8


def check(engine, kind, divergence, scratch=SCRATCH, **options):
    case = make(**SIZES)
    source, own = sources(case, kind)
    options = {"temperature": 2.0, "divergence": divergence, "kd_weight": 0.7, "ce_weight": 0.5} | own | options
    if kind in PROJECTED:
        options.setdefault("anchor_weight", 0.3)
    expected = oracle.solve(student(case), source, case.labels, **options)
    expected.loss.backward()

    ours = copy(case)
    loss, metrics = fused_kd_loss(
        student(ours), sources(ours, kind, case)[0], ours.labels, engine=engine, scratch_bytes=scratch,
        return_metrics=True, **options,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-9, atol=1e-11)
    for name, value in metrics._asdict().items():
        assert float(value) == pytest.approx(expected.metrics[name], rel=1e-5, nan_ok=True), name
    for name, gradient in gradients(ours).items():
        assert relative(gradient, gradients(case)[name]) < 1e-9, name


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_teacher(divergence, kind, engine):
    if kind in ("renormalize", "weights") and divergence in INFINITE_ON_A_SUPPORT:
        with pytest.raises(ValueError, match="tail="):
            check(engine, kind, divergence)
    else:
        check(engine, kind, divergence)


@pytest.mark.parametrize("engine", ["triton_chunked", "triton_tiled"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_kernels_by_divergence(divergence, engine):
    check(engine, "projected", divergence)


@pytest.mark.parametrize("engine", ["triton_chunked", "triton_tiled"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "projected"])
def test_kernels_by_teacher(kind, engine):
    check(engine, kind, SkewKL(0.2))


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize("teacher_grad", ["projector", "none"])
def test_a_teacher_whose_gradient_stops(teacher_grad, engine):
    check(engine, "projected", JSD(0.3), teacher_grad=teacher_grad)
