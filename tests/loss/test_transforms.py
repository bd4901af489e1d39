"""Forward mode, torch.func's transforms, batched upstream gradients and make_fx: right on the reference, refused by
name on the fused engines, whose operators would return zeros or lose gradients.
"""

from functools import partial

import pytest
import torch
from cases import make
from teachers import ENGINES, entries
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from kdfast import Head, Logits, Projected, SparseLogits, fused_kd_loss

FUSED = ENGINES[1:]
F64 = torch.float64
# what each kind of teacher has that a derivative can be taken by, beside the student's head and the options
TEACHERS = {
    "projected": ("ht", "P", "p", "tau_t"),
    "hidden": ("h_p",),
    "head": ("ht", "Wt", "bt"),
    "logits": ("z",),
    "renormalize": ("log_probs",),
    "bucket": ("log_probs",),
    "log_tail": ("log_probs", "log_tail"),
    "renormalize_both": ("log_probs",),
}
HEAD = ("hs", "W", "b")
OPTIONS = ("temperature", "kd_weight", "ce_weight", "anchor_weight", "token_weights", "kd_token_weights", "items")
EVERY = [(kind, name) for kind, own in TEACHERS.items() for name in (*HEAD, *own, *OPTIONS)]
EVERY = [(kind, name) for kind, name in EVERY if name != "anchor_weight" or kind in ("projected", "hidden")]


def inputs(kind):
    """Every tensor of a call, by name, none of which requires grad."""
    case = make(n=5, v=17, hs=4, ht=6)
    x = {name: tensor.detach() for name, tensor in vars(case).items()}
    x["indices"], x["log_probs"] = entries(case, kind="padded")
    x["log_probs"] = x["log_probs"] - 0.2
    x["log_tail"] = (1 - x["log_probs"].exp().sum(-1)).clamp_min(0.05).log()
    x["z"], x["h_p"] = torch.nn.functional.linear(x["ht"], x["Wt"], x["bt"]), torch.randn(5, 4, dtype=F64)
    x |= {"kd_weight": torch.tensor(0.8), "ce_weight": torch.tensor(0.5), "items": torch.tensor(3.5)}
    x |= {"tau_t": torch.tensor(2.5), "temperature": torch.tensor(1.5)}
    x |= {"token_weights": case.weights, "kd_token_weights": case.weights.flip(0)}
    x["anchor_weight"] = torch.tensor(0.3 if kind in ("projected", "hidden") else 0.0)
    return {name: t.double() if t.is_floating_point() else t for name, t in x.items()}


def loss(x, kind, engine, reduction="mean"):
    teacher = {
        "projected": lambda: Projected(x["ht"], x["P"], x["p"], temperature=x["tau_t"]),
        "hidden": lambda: Projected(x["h_p"]),
        "head": lambda: Head(x["ht"], x["Wt"], x["bt"]),
        "logits": lambda: Logits(x["z"]),
        "log_tail": lambda: SparseLogits(x["indices"], x["log_probs"], log_tail=x["log_tail"], tail="bucket"),
    }.get(kind, lambda: SparseLogits(x["indices"], x["log_probs"], tail=kind))()
    options = {name: x[name] for name in OPTIONS[:-1] if name != "anchor_weight" or isinstance(teacher, Projected)}
    if reduction == "mean":
        options["num_items_in_batch"] = x["items"]
    head = Head(x["hs"], x["W"], x["b"], softcap=5.0)
    return fused_kd_loss(head, teacher, x["labels"], engine=engine, reduction=reduction, divergence="jsd", **options)


def by(name, kind, engine, reduction="mean"):
    """The loss as a function of one of its inputs, and that input."""
    x = inputs(kind)
    if name in ("W", "b"):
        x["anchor_weight"] *= 0  # its gradient never reaches the head
    return lambda value: loss(x | {name: value}, kind, engine, reduction), x[name]


def dual(function, x, direction):
    """Return the directional derivative by dual numbers; None where the output has none."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


def jvp(function, x, direction):
    return torch.func.jvp(function, (x,), (direction,))[1]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_forward_mode_of_the_reference_is_the_difference_quotient(kind, name):
    for reduction in ("mean", "none"):
        if reduction == "none" and name == "items":
            continue
        function, x = by(name, kind, "reference", reduction)
        direction, step = torch.randn_like(x), 1e-6
        expected = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
        for way in (jvp, dual):
            torch.testing.assert_close(way(function, x, direction), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["token_weights", "kd_weight"])
def test_forward_mode_by_a_weight_of_zero_says_so(name):
    """What a weight of 0 leaves out of the loss is not computed, and its derivative would be 0."""
    function, x = by(name, "logits", "reference")
    with pytest.raises(ValueError, match=f"{name} is differentiated in forward mode and contains a 0"):
        jvp(function, x * (torch.arange(x.numel()).view(x.shape) > 0), torch.ones_like(x))


NAMES = {
    "hs": "student: Head.hidden", "W": "student: Head.weight", "b": "student: Head.bias", "ht": "hidden",
    "P": "teacher: Projected.projector_weight", "p": "teacher: Projected.projector_bias", "h_p": "Projected.hidden",
    "Wt": "teacher: Head.weight", "bt": "teacher: Head.bias", "z": "teacher: Logits.logits",
    "log_probs": "teacher: SparseLogits.log_probs", "log_tail": "teacher: SparseLogits.log_tail",
    "items": "num_items_in_batch", "tau_t": "teacher: Projected.temperature",
}  # fmt: skip


@pytest.mark.parametrize("engine", [*FUSED, "auto"])
@pytest.mark.parametrize("way", [jvp, dual])
def test_forward_mode_is_refused_by_name(engine, way):
    used = "torch.func.jvp" if way is jvp else "torch.autograd.forward_ad"
    for kind, name in EVERY:
        for reduction in ("mean", "none") if name != "items" else ("mean",):
            function, x = by(name, kind, engine, reduction)
            for value in (x, x.clone().requires_grad_()) if name in HEAD else (x,):
                with pytest.raises(NotImplementedError, match=f"{NAMES.get(name, name)} .*{used}.* engine='reference'"):
                    way(function, value, torch.ones_like(x))


def upstream(function, x, **options):
    """The loss's backward, as a function of its upstream gradient."""
    x = x.clone().requires_grad_()
    value = function(x)
    return lambda v: torch.autograd.grad(value, x, v, retain_graph=True, **options)[0]


UPSTREAM = torch.tensor([1.0, -0.5, 2.0], dtype=F64)


def batched(function, x):
    return upstream(function, x, is_grads_batched=True)(UPSTREAM)


TRANSFORMS = {
    "torch.func.grad": lambda f, x: torch.func.grad(f)(x),
    "torch.func.grad, vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones((), dtype=F64))[0],
    "vjp or jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp or jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "torch.func.vmap, torch.func.jvp": lambda f, x: torch.func.hessian(f)(x),
    "torch.func.vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "torch.func.vmap, torch.func.grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "forward_ad, and": lambda f, x: torch.func.linearize(f, x)[1](x),
    "is_grads_batched=True": batched,
    "forward_ad": lambda f, x: dual(upstream(f, x), torch.ones((), dtype=F64), torch.ones((), dtype=F64)),
    "torch.func.jvp": lambda f, x: jvp(upstream(f, x), torch.ones((), dtype=F64), torch.ones((), dtype=F64)),
    "make_fx": lambda f, x: make_fx(lambda x: f(x))(x)(2 * x),
    "make_fx is": lambda f, x: make_fx(lambda x: upstream(f, x)(torch.ones((), dtype=F64)))(x)(2 * x),
}
WITH_OPTIONS = ("labels", "temperature", "token_weights", "kd_weight")  # whose values are checked


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused_by_name_and_right_on_the_reference(name):
    for kind, by_what in (("projected", "hs"), ("logits", "W")):
        for engine in FUSED:
            with pytest.raises(NotImplementedError, match=rf"{name}.* engine='reference'"):
                TRANSFORMS[name](*by(by_what, kind, engine))
        f, x = by(by_what, kind, "reference")
        found, twice = TRANSFORMS[name](f, x), 2 * x
        hessian = torch.autograd.functional.hessian(f, x) if "torch.func.vmap, torch.func.jvp" in name else None
        ones = torch.ones((), dtype=F64)
        expected = {
            "torch.func.vmap, torch.func.jvp": hessian,
            "torch.func.vmap": torch.stack([f(x), f(twice)]),
            "torch.func.vmap, torch.func.grad": torch.stack([upstream(f, x)(ones), upstream(f, twice)(ones)]),
            "forward_ad, and": (upstream(f, x)(ones) * x).sum(),
            "is_grads_batched=True": UPSTREAM[:, None, None] * upstream(f, x)(ones),
            "make_fx": f(twice),
            "make_fx is": upstream(f, twice)(ones),
        }.get(name, upstream(f, x)(ones))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [*WITH_OPTIONS, "kd_token_weights", "log_probs", "indices", "items", "log_tail"])
def test_vmap_over_what_is_checked_by_value(name):
    kind = "log_tail" if name in ("log_probs", "indices", "log_tail") else "logits"
    f, x = by(name, kind, "reference")
    others = {"indices": torch.where(x < 0, x, (x + 1) % 17), "log_probs": x - 0.1, "log_tail": x - 0.1}
    several = torch.stack([x, others.get(name, x.flip(-1) if x.dim() else x * 2)])
    torch.testing.assert_close(torch.func.vmap(f)(several), torch.stack([f(each) for each in several]))
    match = rf"{NAMES.get(name, name)} .*torch.func.vmap.* engine='reference'"
    for engine in FUSED:
        with pytest.raises(NotImplementedError, match=match):
            torch.func.vmap(by(name, kind, engine)[0])(several)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("engine", FUSED)
def test_batched_upstream_gradients_of_rows_are_right(engine):
    f, x = by("hs", "projected", engine, "none")
    v = torch.rand(3, 5, dtype=F64)
    expected = torch.stack([upstream(f, x)(each) for each in v])
    torch.testing.assert_close(upstream(f, x, is_grads_batched=True)(v), expected)
    torch.testing.assert_close(torch.func.vmap(upstream(f, x))(v), expected)


@pytest.mark.parametrize("engine", FUSED)
def test_what_a_transform_does_not_reach_is_left_alone(engine):
    f, x = by("hs", "projected", engine)
    torch.testing.assert_close(torch.func.grad(lambda y: f(x) * y)(torch.ones((), dtype=F64)), f(x))
    torch.testing.assert_close(torch.func.vmap(lambda y: f(x) * y)(torch.ones(2, dtype=F64)), f(x).expand(2))
    with forward_ad.dual_level():
        torch.testing.assert_close(upstream(f, x)(None), upstream(f, x)(torch.ones((), dtype=F64)))
    torch.testing.assert_close(torch.func.functionalize(f)(x), f(x))
    program = torch.export.export(_Module(f), (x,))
    torch.testing.assert_close(program.module()(2 * x), f(2 * x))


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("before", [False, True])
def test_compiled_forward_mode_is_refused(backend, before):
    torch._dynamo.reset()
    f, x = by("hs", "projected", "torch")
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    if before:
        torch.testing.assert_close(compiled(x), f(x))
    for run in (partial(dual, compiled), torch.compile(partial(jvp, f), backend=backend, fullgraph=True)):
        with pytest.raises(Exception, match="engine='reference'"):
            run(x, x)
    torch.testing.assert_close(compiled(x), f(x))
