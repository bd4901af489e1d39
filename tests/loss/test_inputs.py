"""Sources are pytrees: their tensors are seen by hooks, and by what moves or casts a module's arguments."""

import pytest
import torch
from cases import make, student, teacher
from teachers import KINDS, own_logits, sources, sparse
from torch.utils import _pytree as pytree

from kdfast import FusedKDLoss, Head, Logits, Projected


def every(case):
    """Each source with its tensors by name, and its other fields."""
    return [
        (Head(case.hs, case.W, case.b, logit_scale=0.5, softcap=3.0), ["hidden", "weight", "bias"]),
        (Head(case.hs, case.W), ["hidden", "weight"]),
        (Projected(case.ht, case.P, case.p), ["hidden", "projector_weight", "projector_bias"]),
        (Projected(case.hs), ["hidden"]),
        (Logits(own_logits(case)), ["logits"]),
        (sparse(case, "renormalize"), ["indices", "log_probs"]),
        (sparse(case, "log_tail"), ["indices", "log_probs", "log_tail"]),
    ]


def tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_round_trip():
    for source, names in every(make()):
        leaves, spec = pytree.tree_flatten_with_path(source)
        present = {path[0].name: leaf for path, leaf in leaves if leaf is not None}
        assert list(present) == names
        assert all(leaf is getattr(source, name) for name, leaf in present.items())
        again = pytree.tree_unflatten([None if leaf is None else leaf.detach() for _, leaf in leaves], spec)
        assert type(again) is type(source)
        for name, value in vars(source).items():
            same = getattr(again, name)
            assert torch.equal(same, value) if isinstance(value, torch.Tensor) else same == value, name
        assert not any(tensor.requires_grad for tensor in tensors(again))


def test_a_structure_tells_options_apart():
    """What compiles anew, and what may be mapped over together."""
    case = make()
    one, same, other = (pytree.tree_structure(Head(case.hs, case.W, softcap=cap)) for cap in (3.0, 3.0, 4.0))
    assert one == same != other
    assert pytree.tree_structure(sparse(case, "bucket")) != pytree.tree_structure(sparse(case, "none"))


def test_round_trip_of_the_cxx_pytree():
    pytest.importorskip("optree")
    from torch.utils import _cxx_pytree

    for source, names in every(make()):
        leaves, spec = _cxx_pytree.tree_flatten(source)
        assert sum(leaf is not None for leaf in leaves) == len(names)
        assert vars(_cxx_pytree.tree_unflatten(leaves, spec)) == vars(source)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_hooks_see_the_tensors(kind):
    case, seen = make(n=6), {}
    criterion = FusedKDLoss(ce_weight=0.5)
    criterion.register_forward_pre_hook(lambda m, args, kwargs: seen.update(before=(args, kwargs)), with_kwargs=True)
    criterion.register_forward_hook(lambda m, args, kwargs, out: seen.update(after=(args, kwargs)), with_kwargs=True)
    source, own = sources(case, kind)
    criterion(student(case), source, labels=case.labels, **own)
    expected = [id(x) for x in (*tensors((student(case), source)), case.labels, *tensors(own))]
    assert {id(x) for x in tensors(seen["before"])} == set(expected)
    assert {id(x) for x in tensors(seen["after"])} == set(expected)


def test_a_forward_pre_hook_may_replace_them():
    """As mixed precision does that casts a module's arguments."""
    case, criterion = make(torch.float32), FusedKDLoss()
    expected = criterion(student(case), teacher(case, "head"), case.labels)

    def cast(module, args):
        return pytree.tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, args)

    criterion.register_forward_pre_hook(cast)
    loss = criterion(student(case), teacher(case, "head"), case.labels)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), expected)


def test_full_backward_hooks_see_the_losss_gradient_alone():
    """PyTorch's look at a module's own tensor arguments, not into pytrees, and say so."""
    case, seen = make(), {}
    criterion = FusedKDLoss()
    criterion.register_full_backward_hook(lambda module, inputs, outputs: seen.update(inputs=inputs, outputs=outputs))
    with pytest.warns(UserWarning, match="no inputs require gradients"):
        criterion(student(case), teacher(case, "head"), case.labels).backward()
    assert not any(gradient is not None for gradient in seen["inputs"])
    assert [float(gradient) for gradient in seen["outputs"]] == [1.0]
    assert case.W.grad.any()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_distributed_wrappers_find_and_cast_the_tensors():
    """DDP searches what a module returns, FSDP casts what it is given: dataclasses, field by field."""
    from torch.distributed.utils import _apply_to_tensors
    from torch.nn.parallel.distributed import _find_tensors

    for source, names in every(make()):
        assert {id(x) for x in _find_tensors([source])} == {id(getattr(source, name)) for name in names}
        cast = _apply_to_tensors(lambda x: x.to(torch.float16), source)
        assert type(cast) is type(source)
        for name, value in vars(source).items():
            assert getattr(cast, name).dtype == torch.float16 if name in names else getattr(cast, name) == value


@pytest.fixture
def process_group():
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.criterion = FusedKDLoss()

    def forward(self, head, source, labels):
        self.seen = [tensor.dtype for tensor in tensors((head, source)) if tensor.is_floating_point()]
        return self.criterion(Head(head.hidden * self.scale, head.weight, head.bias), source, labels)


@pytest.mark.parametrize("kind", ["projected", "bucket"])
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP"])
def test_arguments_of_a_wrapped_module(wrapper, kind, process_group):
    """FSDP's mixed precision casts the tensors in sources; gradients go back through the cast."""
    case, module = make(torch.float32), Scaled()
    source, _ = sources(case, kind)
    expected = module(student(case), source, case.labels)
    if wrapper == "DDP":
        wrapped = torch.nn.parallel.DistributedDataParallel(module)
    else:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
        wrapped = fully_shard(module, mesh=mesh, mp_policy=policy)
    loss = wrapped(student(case), source, case.labels)
    loss.backward()
    assert set(module.seen) == {torch.float32 if wrapper == "DDP" else torch.bfloat16}
    torch.testing.assert_close(loss, expected, rtol=1e-2 if wrapper == "FSDP" else 1e-6, atol=0)
    assert case.W.grad.dtype == torch.float32
    assert module.scale.grad is not None
