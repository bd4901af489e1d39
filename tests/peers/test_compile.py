"""`torch.compile(fullgraph=True)` of every loss that runs on a CPU."""

import sys

import pytest
import torch
from methods.torchtune import kd_losses
from side_by_side import DEVICE, fault, fresh, logits, ours, peer
from test_torchtune import torchtune


def trl(case):
    function = peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    return lambda: function.apply(case.hs, case.W, case.b, case.ht, case.Wt, case.bt, 0.5, 2.0)[0].mean()


def liger(case):
    loss = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(compiled=False)
    return lambda: loss(case.hs, case.W, case.ht, case.Wt, case.labels, case.b, case.bt)


def reverse_kl(case):
    loss = torchtune("ReverseKLLoss")()
    return lambda: loss(*logits(case), case.labels)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(trl, marks=fault("trl")),
        pytest.param(liger, marks=fault("liger_kernel")),
        pytest.param(reverse_kl, marks=fault("torchtune")),
    ],
)
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_not_in_one_graph(make, monkeypatch):
    """TRL writes products to columns of a buffer, Liger's function has a signature that dynamo cannot bind, torchtune
    asks the host whether any row counts."""
    loss = make(fresh())
    if make is reverse_kl:
        monkeypatch.setitem(sys.modules, "torchtune_kd_losses", kd_losses())  # where dynamo looks for it
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, fullgraph=True, backend="aot_eager")()


def test_ours_is():
    case = fresh()
    torch._dynamo.reset()
    loss = torch.compile(lambda: ours(case, "jsd", case.labels), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(loss, ours(case, "jsd", case.labels))
    assert loss.device.type == DEVICE
