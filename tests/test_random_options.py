"""Options drawn at random, in combinations nobody thought of: every engine against the reference, in float64."""

import random

import pytest
import torch
from cases import copy, gradients, make, relative, student, teacher

from kdfast import JSD, fused_kd_loss


def draw(seed):
    """(case, kind, labels, head options, loss options)."""
    rng = random.Random(seed)
    kind = rng.choice(["projected", "hidden", "head", "none"])
    vocab = rng.choice([1, 2, 7, 101, 257])
    case = make(n=rng.choice([0, 1, 2, 17, 23]), v=vocab, seed=seed, weight_std=rng.choice([0.05, 0.5, 5.0]))
    options = {
        "temperature": rng.choice([0.1, 0.5, 1.0, 2.0, 10.0]),
        "divergence": rng.choice(["forward_kl", "reverse_kl", "jsd", JSD(0.1)]),
        "kd_weight": rng.choice([0.0, 0.7]),
        "ce_weight": rng.choice([0.0, 0.5]),
        "reduction": rng.choice(["mean", "sum", "none"]),
        "teacher_grad": rng.choice(["full", "projector", "none"]),
        "token_weights": rng.choice([None, case.weights]),
        "kd_token_weights": rng.choice([None, None, case.weights.flip(0)]),
        "num_items_in_batch": rng.choice([None, None, 3]),
        "valid_vocab": rng.choice([None, max(1, vocab - 1)]),
        "temperature_squared": rng.choice([True, False]),
        "return_metrics": rng.choice([True, False]),
    }
    if kind in ("projected", "hidden"):
        options["anchor_weight"] = rng.choice([0.0, 0.3])
    case.labels.clamp_(max=(options["valid_vocab"] or vocab) - 1)
    needed = kind == "none" or options["ce_weight"] or options.get("anchor_weight")
    labels = case.labels if needed else rng.choice([case.labels, None])
    head = {"softcap": rng.choice([None, 3.0]), "logit_scale": rng.choice([1.0, 0.7])}
    return case, kind, labels, head, options, rng.choice([None, 1, 10_000])


def agree(seed, engine):
    case, kind, labels, head, options, scratch = draw(seed)
    results = []
    for name in ("reference", engine):
        own = copy(case)
        result = fused_kd_loss(
            student(own, **head), teacher(own, kind), labels, engine=name, scratch_bytes=scratch, **options
        )
        loss, metrics = result if options["return_metrics"] else (result, None)
        if loss.requires_grad:
            loss.sum().backward()
        results.append((loss.detach(), metrics, gradients(own)))
    (expected, expected_metrics, expected_gradients), (loss, metrics, computed) = results
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-12)
    if metrics is not None:
        torch.testing.assert_close(tuple(metrics), tuple(expected_metrics), equal_nan=True)
    size = max(float(gradient.norm()) for gradient in expected_gradients.values())
    for name, gradient in computed.items():
        # a gradient that cancels to nothing (V = 1, say) is compared with the others' size
        close = float((gradient - expected_gradients[name]).norm()) <= 1e-10 * size + 1e-13
        assert close or relative(gradient, expected_gradients[name]) < 1e-8, name


# the interpreter takes half a second a case
CASES = [("torch", range(60)), ("triton_chunked", range(100, 125)), ("triton_tiled", range(200, 225))]


@pytest.mark.parametrize(("engine", "seed"), [(engine, seed) for engine, seeds in CASES for seed in seeds])
def test_engines_agree(engine, seed):
    agree(seed, engine)


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "seeds"),
    [
        ("torch", range(1000, 6000)),
        ("triton_chunked", range(6000, 6300)),
        ("triton_tiled", range(7000, 7300)),
    ],
)
def test_engines_agree_long(engine, seeds):
    for seed in seeds:
        try:
            agree(seed, engine)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {draw(seed)[1:]}") from error
