"""torchtune's losses: dense logits."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from cases import V, relative
from methods.torchtune import kd_losses
from side_by_side import DEVICE, FLOAT32, agree, entropy, fault, fresh, gradients, logits, ours

from kdfast import Head, Logits, Projected, SymmetricKL, fused_kd_loss


def torchtune(name):
    """A class of torchtune/modules/loss/kd_losses.py."""
    if importlib.util.find_spec("torchtune") is None:
        pytest.skip("could not import 'torchtune'")
    return getattr(kd_losses(), name)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_torchtune_forward_kl_is_a_cross_entropy(temperature):
    """ForwardKLLoss is −Σ p·log q: the teacher's entropy more than KL(p‖q), and towards the student the same gradient.
    It has no temperature: the logits are divided beforehand."""
    case = fresh()
    z_s, z_t = (z / temperature for z in logits(case))
    theirs = torchtune("ForwardKLLoss")()(z_s, z_t, case.labels)
    constant = entropy(z_t)[case.labels != -100].mean()
    assert constant > 1
    mine = ours(case, labels=case.labels, temperature=temperature)
    agree(theirs - constant, mine, case.hs, case.W, case.b)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_torchtune_reverse_kl(temperature):
    """ReverseKLLoss: KL(q‖p), the mean over rows that count; normalize=False is the sum."""
    case = fresh()
    z_s, z_t = (z / temperature for z in logits(case))
    for normalize, reduction in ((True, "mean"), (False, "sum")):
        theirs = torchtune("ReverseKLLoss")()(z_s, z_t, case.labels, normalize)
        mine = ours(case, "reverse_kl", case.labels, temperature=temperature, reduction=reduction)
        agree(theirs, mine, case.hs, case.W, case.b)


@pytest.mark.parametrize(
    ("ratio", "divergence"),
    [(0.0, "reverse_kl"), (0.3, SymmetricKL(0.7)), (0.5, "symmetric_kl"), (1.0, "forward_kl")],
)
def test_torchtune_symmetric_kl(ratio, divergence):
    """SymmetricKLLoss: sym_kd_ratio of the forward one, as above with the teacher's entropy, and the rest of the
    reverse: our 1 − λ."""
    case = fresh()
    z_s, z_t = logits(case)
    theirs = torchtune("SymmetricKLLoss")(sym_kd_ratio=ratio)(z_s, z_t, case.labels)
    constant = ratio * entropy(z_t)[case.labels != -100].mean()
    agree(theirs - constant, ours(case, divergence, case.labels), case.hs, case.W, case.b)


@pytest.mark.parametrize("kind", ["Forward", "Reverse", "Symmetric"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_torchtune_chunked_output(kind, chunks):
    """ForwardKLWithChunkedOutputLoss and the others: lists of logits, whole all the same; the losses above."""
    case = fresh(leading=(4, 6))
    z_s, z_t = logits(case)
    loss = torchtune(f"{kind}KLWithChunkedOutputLoss")(num_output_chunks=chunks)
    theirs = loss(list(z_s.chunk(chunks, 1)), list(z_t.chunk(chunks, 1)), case.labels)
    share = {"Forward": 1.0, "Reverse": 0.0, "Symmetric": 0.5}[kind]
    constant = share * entropy(z_t)[case.labels != -100].mean()
    agree(theirs - constant, ours(case, f"{kind.lower()}_kl", case.labels), case.hs, case.W, case.b)


@pytest.mark.parametrize("kind", ["Forward", "Reverse"])
def test_torchtune_and_a_teacher_that_learns(kind):
    """A projected teacher through ForwardKLLoss gets the gradient of the cross entropy, which is the KL's less that of
    its entropy: far from it. Through ReverseKLLoss it is right."""
    case = fresh()
    projected = F.linear(case.ht, case.P, case.p)
    z_s, z_t = F.linear(case.hs, case.W, case.b), F.linear(projected, case.W, case.b)
    theirs = torchtune(f"{kind}KLLoss")()(z_s, z_t, case.labels)
    mine = ours(case, f"{kind.lower()}_kl", case.labels, teacher=Projected(case.ht, case.P, case.p))
    leaves = (case.hs, case.W, case.b, case.P, case.p)
    if kind == "Forward":
        difference = relative(gradients(theirs, [case.P])[0], gradients(mine, [case.P])[0])
        assert difference > 0.1
        theirs = theirs - entropy(z_t)[case.labels != -100].mean()
    agree(theirs, mine, *leaves)


@fault("torchtune")
def test_torchtune_of_ignored_rows_alone():
    """A constant without a graph, whose backward is an error; NaN from the reverse and symmetric chunked ones. Ours
    is 0 with gradients of 0."""
    case = fresh(leading=(4, 6))
    nothing = torch.full_like(case.labels, -100)
    z_s, z_t = logits(case)
    for kind in ("Forward", "Reverse", "Symmetric"):
        loss = torchtune(f"{kind}KLLoss")()(z_s.flatten(0, 1), z_t.flatten(0, 1), nothing.flatten())
        assert loss == 0
        assert not loss.requires_grad
        chunked = torchtune(f"{kind}KLWithChunkedOutputLoss")(num_output_chunks=1)([z_s], [z_t], nothing)
        assert chunked.isnan() == (kind != "Forward")
    mine = ours(case, "symmetric_kl", nothing)
    assert mine == 0
    assert all((g == 0).all() for g in gradients(mine, [case.hs, case.W]))


@fault("torchtune")
def test_torchtune_and_ids_without_mass():
    """ForwardKLLoss, ReverseKLLoss: a term that has an infinite logit is left out. So an id the teacher has and the
    student cannot produce costs nothing, where KL(p‖q) is infinite; and where it is masked on both sides the reverse
    loss is right and its gradient NaN."""
    case = fresh()
    masked = torch.zeros(V, device=DEVICE)
    masked[-5:] = -torch.inf
    z_s, z_t = logits(case, bias=False)
    student = Head(case.hs, case.W, masked)
    assert torchtune("ForwardKLLoss")()(z_s + masked, z_t, case.labels).isfinite()
    assert fused_kd_loss(student, Logits(z_t), case.labels).isposinf()
    theirs = torchtune("ReverseKLLoss")()(z_s + masked, z_t + masked, case.labels)
    mine = fused_kd_loss(student, Logits(z_t + masked), case.labels, divergence="reverse_kl", temperature=1.0)
    assert relative(theirs, mine) < FLOAT32
    assert gradients(theirs, [case.hs])[0].isnan().any()
    assert gradients(mine, [case.hs])[0].isfinite().all()


@fault("torchtune")
def test_torchtune_drops_chunks():
    """The chunked ones zip their lists: of logits in fewer chunks than num_output_chunks, here three of eight, the
    rest of the tokens is left out of the sum, not of the divisor."""
    case = fresh(leading=(2, 16))
    z_s, z_t = logits(case)
    loss = torchtune("ReverseKLWithChunkedOutputLoss")(num_output_chunks=8)
    theirs = loss(list(z_s.chunk(8, 1))[:3], list(z_t.chunk(8, 1))[:3], case.labels)
    part = case.labels.clone()
    part[:, 6:] = -100
    mine = ours(case, "reverse_kl", part, num_items_in_batch=int((case.labels != -100).sum()))
    assert relative(theirs, mine) < FLOAT32
