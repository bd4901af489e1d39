# ruff: noqa: E501  (one line a case reads better)
"""Every wrong argument gets an error that names it, what came, what was expected, and what to do."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import HS, N, V, make, student, teacher

from kdfast import Head, Logits, Projected, SparseLogits, fused_kd_loss
from kdfast.frontend import checks

CASE = make(torch.float32)
NAN_WEIGHTS = torch.full((N,), torch.nan)


def call(student_=None, teacher_=None, labels=CASE.labels, **options):
    student_ = student(CASE) if student_ is None else student_
    teacher_ = teacher(CASE, "projected") if teacher_ is None else teacher_
    return fused_kd_loss(student_, teacher_, labels, **options)


def head(**changed):
    return Head(**({"hidden": CASE.hs, "weight": CASE.W, "bias": CASE.b} | changed))


def own(**changed):
    return Head(**({"hidden": CASE.ht, "weight": CASE.Wt, "bias": CASE.bt} | changed))


def projected(**changed):
    return Projected(**({"hidden": CASE.ht, "projector_weight": CASE.P, "projector_bias": CASE.p} | changed))


def sparse(indices=None, log_probs=None, **options):
    indices = torch.arange(2).expand(N, 2) if indices is None else indices
    return SparseLogits(indices, torch.full((N, 2), -1.0) if log_probs is None else log_probs, **options)


WRONG = {
    "student kind": (TypeError, "student is Tensor; expected kdfast.Head", {"student_": CASE.hs}),
    "teacher kind": (TypeError, "teacher is Tensor; expected kdfast.Projected", {"teacher_": CASE.ht}),
    "hidden width": (ValueError, r"student: Head.hidden is \(23, 11\).*same width", {"student_": head(hidden=CASE.hs[:, 1:])}),
    "transposed head": (ValueError, "Transpose the weight", {"student_": head(weight=CASE.W.detach().T, bias=None)}),
    "logits for hidden states": (ValueError, "Are these logits", {"student_": head(hidden=torch.randn(N, V), bias=None)}),
    "logits of a teacher for hidden states": (ValueError, r"teacher: Head.hidden is .* Are these logits", {"teacher_": own(hidden=torch.randn(N, V), bias=None)}),
    "weight rank": (ValueError, r"Head.weight has shape \(101,\)", {"student_": head(weight=CASE.b)}),
    "sparse weight": (TypeError, "Head.weight is a torch.sparse_coo tensor.*to_dense", {"student_": head(weight=CASE.W.detach().to_sparse())}),
    "bias shape": (ValueError, r"Head.bias is \(100,\); expected \(V,\) = \(101,\)", {"student_": head(bias=CASE.b[1:])}),
    "integer weight": (TypeError, "Head.weight has dtype torch.int64", {"student_": head(weight=CASE.W.long())}),
    "list weight": (TypeError, "Head.weight is list; expected a tensor", {"student_": head(weight=[1.0])}),
    "dtypes in a head": (ValueError, "within one head dtypes must agree", {"student_": head(weight=CASE.W.double())}),
    "a bias of 64 bits": (ValueError, "Head.bias is torch.float64 .* but for a bias that is not float64", {"student_": head(bias=CASE.b.double())}),
    "projector's bias of 64 bits": (ValueError, "Projected.projector_bias is torch.float64", {"teacher_": projected(projector_bias=CASE.p.double())}),
    "a projector beside hidden states of 16 bits": (ValueError, "Projected.projector_weight is torch.float32 and .* torch.bfloat16.*autocast", {"teacher_": projected(hidden=CASE.ht.bfloat16())}),
    "devices in a head": (ValueError, "Head.weight is on meta .*one device", {"student_": head(weight=CASE.W.to("meta"))}),
    "softcap": (ValueError, "Head.softcap=0.0; expected a finite number > 0", {"student_": head(softcap=0.0)}),
    "logit_scale": (TypeError, "logit_scale is Tensor.*multiply them", {"student_": head(logit_scale=torch.ones(()))}),
    "projector transposed": (
        ValueError,
        r"Projected.projector_weight is \(20, 12\); with student width Hs=12 and teacher width Ht=20 it must be "
        r"\(Hs, Ht\) = \(12, 20\), as nn.Linear\(20, 12\).weight is. Transpose it\?",
        {"teacher_": projected(projector_weight=CASE.P.t())},
    ),
    "projector bias": (ValueError, "projector_bias is", {"teacher_": projected(projector_bias=CASE.p[1:])}),
    "bias alone": (ValueError, "projector_bias is given without", {"teacher_": projected(projector_weight=None)}),
    "no projector": (ValueError, "must have the student's width 12", {"teacher_": Projected(CASE.ht)}),
    "rows differ": (ValueError, "leading shape must be the same", {"teacher_": projected(hidden=CASE.ht[1:])}),
    "teacher device": (ValueError, "Projected.hidden is on meta", {"teacher_": Projected(torch.empty(N, HS, device="meta"))}),
    "vocabularies differ": (
        ValueError, "vocabulary of 100 and the student's head 101", {"teacher_": own(weight=CASE.Wt[1:], bias=None)},
    ),
    "teacher hidden wants grad": (
        ValueError, "Projected.hidden requires grad.*detach", {"teacher_": projected(hidden=CASE.ht.clone().requires_grad_())},
    ),
    "teacher weight wants grad": (
        ValueError, r"Head.weight requires grad.*detach.*requires_grad_\(False\)", {"teacher_": own(weight=CASE.Wt.clone().requires_grad_())},
    ),
    "teacher bias wants grad": (
        ValueError, "Head.bias requires grad.*detach", {"teacher_": own(bias=CASE.bt.clone().requires_grad_())},
    ),
    "label range": (ValueError, "labels contains 101; expected ids from 0 to 100", {"labels": torch.full((N,), V)}),
    "label negative": (ValueError, "labels contains -1; expected", {"labels": torch.full((N,), -1)}),
    "label in padding": (ValueError, "from 0 to 49", {"labels": torch.full((N,), 50), "valid_vocab": 50}),
    "label dtype": (TypeError, "labels has dtype torch.float32.*long", {"labels": torch.zeros(N)}),
    "label list": (TypeError, "labels is list", {"labels": [1]}),
    "label of 64 bits without a sign": (TypeError, "labels has dtype torch.uint64", {"labels": torch.zeros(N, dtype=torch.uint64)}),
    "label shape": (ValueError, r"labels is \(22,\); expected \(23,\)", {"labels": CASE.labels[1:]}),
    "label device": (ValueError, "labels is on meta", {"labels": CASE.labels.to("meta")}),
    "anchor range": (ValueError, "anchor_targets contains 101", {"anchor_targets": torch.full((N,), V), "anchor_weight": 1.0}),
    "temperature zero": (ValueError, "temperature=0; expected a finite number > 0", {"temperature": 0}),
    "temperature negative": (ValueError, "temperature=-1.0; expected", {"temperature": torch.tensor(-1.0)}),
    "temperature nan": (ValueError, "temperature=nan", {"temperature": float("nan")}),
    "temperature shape": (ValueError, r"temperature is a tensor of shape \(1,\)", {"temperature": torch.ones(1)}),
    "projected temperature grad": (
        ValueError, r"Projected.temperature requires grad, but [^;]* gets no gradient; pass it detached \(.detach\(\)\)$",
        {"teacher_": projected(temperature=torch.ones((), requires_grad=True))},
    ),
    "temperature grad": (ValueError, "temperature requires grad", {"temperature": torch.ones((), requires_grad=True)}),
    "temperature tiny": (ValueError, "temperature=1e-300; expected a finite number > 0 in float32", {"temperature": 1e-300}),
    "temperature bool tensor": (ValueError, r"temperature is a tensor of shape \(\), torch.bool", {"temperature": torch.tensor(True)}),
    "temperature text": (TypeError, "temperature is str", {"temperature": "2"}),
    "kd_weight negative": (ValueError, "kd_weight=-0.1; expected a finite number ≥ 0", {"kd_weight": -0.1}),
    "kd_weight nan": (ValueError, "kd_weight=nan", {"kd_weight": torch.tensor(torch.nan)}),
    "kd_weight grad": (ValueError, "kd_weight requires grad", {"kd_weight": torch.ones((), requires_grad=True)}),
    "kd_weight huge": (ValueError, "kd_weight=an int of 1329 bits", {"kd_weight": 10**400}),
    "kd_weight meta": (ValueError, "kd_weight is a tensor .* on meta", {"kd_weight": torch.ones((), device="meta")}),
    "ce_weight infinite": (ValueError, "ce_weight=inf", {"ce_weight": float("inf")}),
    "anchor_weight bool": (TypeError, "anchor_weight is bool", {"anchor_weight": True}),
    "token_weights nan": (ValueError, "token_weights contains a negative, infinite or NaN", {"token_weights": NAN_WEIGHTS}),
    "token_weights negative": (ValueError, "token_weights contains", {"token_weights": -torch.ones(N)}),
    "kd_token_weights shape": (ValueError, r"kd_token_weights is \(1,\)", {"kd_token_weights": torch.ones(1)}),
    "token_weights fp8": (TypeError, "token_weights has dtype torch.float8", {"token_weights": torch.ones(N).to(torch.float8_e4m3fn)}),
    "token_weights grad": (ValueError, "token_weights requires grad", {"token_weights": torch.ones(N, requires_grad=True)}),
    "num_items negative": (ValueError, "num_items_in_batch=-3", {"num_items_in_batch": -3}),
    "num_items zero": (ValueError, "num_items_in_batch=0 with 18 rows that count; expected how many", {"num_items_in_batch": 0}),
    "num_items zero tensor": (ValueError, "num_items_in_batch=0 with 18 rows", {"num_items_in_batch": torch.tensor(0)}),
    "num_items zero float": (ValueError, "num_items_in_batch=0 with 18 rows", {"num_items_in_batch": torch.tensor(0.0)}),
    "num_items nan": (ValueError, "num_items_in_batch=nan; expected", {"num_items_in_batch": torch.tensor(torch.nan)}),
    "num_items bool": (TypeError, "num_items_in_batch is bool", {"num_items_in_batch": True}),
    "num_items shape": (ValueError, r"num_items_in_batch is a tensor of shape \(1,\)", {"num_items_in_batch": torch.ones(1)}),
    "divergence": (ValueError, "divergence='kl' is unknown; expected one of forward_kl", {"divergence": "kl"}),
    "teacher_grad": (ValueError, "teacher_grad='all' is unknown; expected one of 'full'", {"teacher_grad": "all"}),
    "reduction": (ValueError, "reduction='avg' is unknown; expected one of 'mean'", {"reduction": "avg"}),
    "engine": (ValueError, "engine='cuda' is unknown; expected one of 'auto'", {"engine": "cuda"}),
    "engine array": (ValueError, "engine=array.* is unknown; expected one of", {"engine": np.ones(3)}),
    "vocab": (ValueError, "vocab='pad' is unknown", {"vocab": "pad"}),
    "reduction of another kind": (ValueError, r"reduction=\[1.0\] is unknown", {"reduction": [1.0]}),
    "reduction array": (ValueError, r"reduction=array\(\[1., 1.\]\) is unknown", {"reduction": np.ones(2)}),
    "return_metrics": (TypeError, "return_metrics is str; expected True, False or 'terms'", {"return_metrics": "no"}),
    "temperature_squared": (TypeError, "temperature_squared is Tensor", {"temperature_squared": torch.tensor(False)}),
    "process_group": (TypeError, "process_group is Tensor; expected a torch.distributed", {"process_group": torch.ones(3)}),
    "ignore_index range": (ValueError, "ignore_index is past what 64 bits hold", {"ignore_index": 2**63}),
    "ignore_index": (TypeError, "ignore_index is float", {"ignore_index": -100.0}),
    "valid_vocab": (ValueError, "valid_vocab=102; expected 1 to the head's 101 rows", {"valid_vocab": 102}),
    "valid_vocab type": (TypeError, "valid_vocab is float", {"valid_vocab": 5.0}),
    "scratch_bytes": (ValueError, "scratch_bytes=0; expected a positive int", {"scratch_bytes": 0}),
    "scratch_bytes huge": (ValueError, "scratch_bytes=9223372036854775808; expected", {"scratch_bytes": 2**63}),
    "ce without labels": (ValueError, "ce_weight=1.0 without labels", {"labels": None, "ce_weight": 1.0}),
    "anchor without targets": (ValueError, "without anchor_targets or labels", {"labels": None, "anchor_weight": 1.0}),
    "anchor of a head": (ValueError, "anchor_weight=1.0 with teacher=Head", {"teacher_": own(), "anchor_weight": 1.0}),
    "logits kind": (TypeError, "teacher: Logits.logits is list", {"teacher_": Logits([1.0])}),
    "logits shape": (ValueError, r"Logits.logits is \(22, 101\) .* leading shape", {"teacher_": Logits(torch.randn(N - 1, V))}),
    "logits rank": (ValueError, r"Logits.logits has shape \(\)", {"teacher_": Logits(torch.ones(()))}),
    "logits vocabulary": (ValueError, "Logits.logits has a vocabulary of 102", {"teacher_": Logits(torch.randn(N, V + 1))}),
    "logits past valid": (
        ValueError, "vocabulary of 80 and the student's head 101", {"teacher_": Logits(torch.randn(N, 80)), "valid_vocab": 90},
    ),
    "logits grad": (ValueError, "Logits.logits requires grad.*detach", {"teacher_": Logits(torch.randn(N, V, requires_grad=True))}),
    "sparse tail": (ValueError, "SparseLogits.tail='drop' is unknown; expected 'renormalize', .* or 'renormalize_both'", {"teacher_": sparse(tail="drop")}),
    "sparse index dtype": (TypeError, "SparseLogits.indices has dtype torch.float32.*long", {"teacher_": sparse(indices=torch.ones(N, 2))}),
    "sparse shapes": (ValueError, r"indices is \(23, 3\) and .log_probs \(23, 2\); expected \(\*, K\)", {"teacher_": sparse(indices=torch.ones(N, 3).long())}),
    "sparse K": (ValueError, "K from 1 to 1024", {"teacher_": SparseLogits(torch.zeros(N, 1025).long(), torch.zeros(N, 1025))}),
    "sparse rows": (ValueError, "SparseLogits.indices is .*leading shape", {"teacher_": SparseLogits(torch.zeros(2, 1).long(), torch.zeros(2, 1))}),
    "sparse range": (ValueError, "SparseLogits.indices contains 101; expected ids from 0 to 100", {"teacher_": sparse(indices=torch.full((N, 2), V))}),
    "sparse negative id": (ValueError, "SparseLogits.indices contains -1", {"teacher_": sparse(indices=torch.full((N, 2), -1))}),
    "sparse nan": (ValueError, "log_probs contains NaN", {"teacher_": sparse(log_probs=torch.full((N, 2), torch.nan))}),
    "sparse tempered": (TypeError, "SparseLogits.tempered is float; expected True or False", {"teacher_": sparse(tempered=2.0)}),
    "sparse logits": (ValueError, "log_probs contains 3.0, more than all.*log_softmax", {"teacher_": sparse(log_probs=torch.full((N, 2), 3.0), tail="bucket")}),
    "sparse log_tail": (TypeError, "SparseLogits.log_tail is float; expected a tensor", {"teacher_": sparse(log_tail=-2.0, tail="bucket")}),
    "sparse log_tail dtype": (TypeError, "SparseLogits.log_tail has dtype torch.int64", {"teacher_": sparse(log_tail=torch.zeros(N).long(), tail="bucket")}),
    "sparse log_tail shape": (ValueError, r"SparseLogits.log_tail is \(23, 1\); expected \(23,\)", {"teacher_": sparse(log_tail=torch.zeros(N, 1) - 2, tail="bucket")}),
    "sparse log_tail device": (ValueError, "SparseLogits.log_tail is on meta", {"teacher_": sparse(log_tail=torch.zeros(N, device="meta"), tail="bucket")}),
    "sparse log_tail grad": (ValueError, "log_tail requires grad", {"teacher_": sparse(log_tail=(torch.zeros(N) - 2).requires_grad_(), tail="bucket")}),
    "sparse log_tail tail": (ValueError, "log_tail with tail='renormalize', which has no use for it; pass tail='bucket'", {"teacher_": sparse(log_tail=torch.zeros(N) - 2)}),
    "sparse log_tail nan": (ValueError, "log_tail and .log_probs hold a mass of nan; expected 1", {"teacher_": sparse(log_tail=torch.full((N,), torch.nan), tail="bucket")}),
    "sparse mass for its log": (ValueError, "log_tail and .log_probs hold a mass of 1.7.*Is log_tail the log", {"teacher_": sparse(log_tail=torch.full((N,), 1e-6), tail="bucket")}),
    "sparse grad": (ValueError, "log_probs requires grad", {"teacher_": sparse(log_probs=torch.zeros(N, 2, requires_grad=True))}),
    "sparse temperature": (ValueError, "temperature=2.0 with teacher: SparseLogits.tail='none'", {"teacher_": sparse(tail="none")}),
    "sparse temperature tensor": (ValueError, "temperature=3.0 with", {"teacher_": sparse(tail="none"), "temperature": torch.tensor(3.0)}),
    "sparse reverse": (ValueError, "divergence='reverse_kl' with .*infinite.*bucket", {"teacher_": sparse(), "divergence": "reverse_kl"}),
    "anchor kind": (TypeError, "anchor_targets is Projected; expected", {"anchor_targets": projected(), "anchor_weight": 1.0}),
    "anchor head": (TypeError, "anchor_targets is Head; expected an integer tensor of token ids, or None", {"anchor_targets": own(), "anchor_weight": 1.0}),
    "anchor logits": (TypeError, "anchor_targets is Logits; expected", {"anchor_targets": Logits(CASE.hs @ CASE.W.T), "anchor_weight": 1.0}),
    "anchor sparse": (TypeError, "anchor_targets is SparseLogits; expected", {"anchor_targets": sparse(), "anchor_weight": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name):
    error, message, arguments = WRONG[name]
    with pytest.raises(error, match=message):
        call(**arguments)


def test_a_nested_tensor_has_no_shape_to_speak_of():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        nested = torch.nested.nested_tensor([CASE.hs.detach(), CASE.hs.detach()])
    with pytest.raises(TypeError, match=r"Head.hidden is a nested tensor.*to_padded_tensor"):
        call(student_=head(hidden=nested))
    with pytest.raises(TypeError, match=r"Head\.weight is a nested tensor"):
        call(student_=head(weight=nested))


@pytest.mark.parametrize("flag", [True, False, np.True_])
def test_flags_may_be_numpys(flag):
    assert isinstance(call(return_metrics=flag), tuple) == bool(flag)


def test_hidden_states_of_one_token_have_a_width():
    one = Head(CASE.hs[0], CASE.W)
    with pytest.raises(ValueError, match=r"Projected.hidden is \(\) and student: Head.hidden \(12,\); the leading"):
        fused_kd_loss(one, Projected(torch.tensor(1.0)))


def test_nothing_to_compute():
    with pytest.raises(ValueError, match="nothing to compute"):
        fused_kd_loss(student(CASE), None)


def test_a_dtensor_head_is_refused():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match=r"Head.weight is a DTensor.*unsharded"):
        call(student_=head(weight=torch.randn(V, HS).as_subclass(DTensor)))


def test_grad_is_no_error_without_grad_mode():
    with torch.no_grad():
        loss = call(teacher_=projected(hidden=CASE.ht.clone().requires_grad_()))
    assert not loss.requires_grad


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_unchecked_values_become_nan_without_touching_bad_addresses(engine, monkeypatch):
    """What a GPU or a compiled graph does, where looking would cost a synchronisation."""
    monkeypatch.setattr(checks, "can_read", lambda tensor: False)
    labels = CASE.labels.clone()
    labels[3], labels[4] = V + 1_000_000_000, -7
    loss = call(labels=labels, ce_weight=1.0, reduction="none", engine=engine)
    assert loss[3:5].isnan().all()
    assert loss[5:].isfinite().all()
    assert call(labels=labels, engine=engine).isnan()
    weights = torch.ones(N)
    weights[2] = -1
    assert call(token_weights=weights, reduction="none", engine=engine)[2].isnan()
    wild = sparse(indices=torch.full((N, 2), 1_000_000_000))
    assert call(teacher_=wild, engine=engine).isnan()
    assert call(teacher_=sparse(tail="none"), temperature=torch.tensor(3.0), engine=engine).isnan()
    for options in ({"temperature": torch.tensor(-1.0)}, {"kd_weight": torch.tensor(-1.0)}):
        assert call(engine=engine, **options).isnan()


@pytest.mark.parametrize("engine", ["reference", "torch", "triton_chunked", "triton_tiled"])
@pytest.mark.parametrize("items", [0, torch.tensor(0), torch.tensor(0.0)])
def test_no_items_divide_no_rows(items, engine, monkeypatch):
    """As where no process has a label in a step. Rows that count become NaN where nobody looks, on a GPU."""
    none, one = torch.full((N,), -100), torch.full((N,), -100)
    one[3] = 5
    for read in (True, False):
        if not read:
            monkeypatch.setattr(checks, "can_read", lambda tensor: False)
        hidden = CASE.hs.detach().clone().requires_grad_()
        options = {"ce_weight": 0.5, "anchor_weight": 0.1, "num_items_in_batch": items, "engine": engine}
        loss = call(student_=head(hidden=hidden), labels=none, **options)
        loss.backward()
        assert loss == 0
        assert not hidden.grad.any()
        # a term that is not asked for divides nothing
        unasked = {"kd_weight": 0.0, "anchor_weight": 0.0, "kd_token_weights": torch.ones(N)}
        assert call(labels=none, **options | unasked) == 0
    assert call(labels=one, **options).isnan()
    assert call(labels=one, engine=engine, ce_weight=0.5, num_items_in_batch=torch.tensor(-2)).isnan()


def test_values_are_read_on_a_device_only_where_asked_for(monkeypatch):
    on_device = SimpleNamespace(device=torch.device("cuda"))
    assert checks.can_read(torch.ones(1))
    assert not checks.can_read(on_device)
    monkeypatch.setenv("KDFAST_CHECK", "1")
    assert checks.can_read(on_device)
