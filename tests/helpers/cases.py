"""Random problems for the tests: tensors by name, sources built from them, gradients read back."""

from types import SimpleNamespace

import torch

from kdfast import Head, Projected

# V=101 is prime and odd; widths are no multiples of 16; N=23 is no multiple of any chunk
N, V, HS, HT = 23, 101, 12, 20
LEAVES = ("hs", "W", "b", "P", "p")


def make(dtype=torch.float64, *, n=N, v=V, hs=HS, ht=HT, seed=0, weight_std=0.5, leading=None):
    """Normal inputs; the leaves require grad. labels has an ignored row in every five."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    rows = (n,) if leading is None else leading
    case = SimpleNamespace(
        hs=normal(*rows, hs),
        W=normal(v, hs, std=weight_std),
        b=normal(v, std=weight_std),
        ht=normal(*rows, ht),
        P=normal(hs, ht, std=ht**-0.5),
        p=normal(hs, std=0.1),
        Wt=normal(v, ht, std=weight_std * (hs / ht) ** 0.5),
        bt=normal(v, std=weight_std),
        labels=torch.randint(0, v, rows, generator=generator),
        weights=torch.rand(rows, generator=generator, dtype=torch.float64).to(dtype),
    )
    case.labels.view(-1)[::5] = -100
    for name in LEAVES:
        getattr(case, name).requires_grad_()
    return case


def copy(case, dtype=torch.float64):
    """The same numbers in another dtype, as new leaves."""
    new = SimpleNamespace(**vars(case))
    for name, tensor in vars(case).items():
        if tensor.is_floating_point():
            setattr(new, name, tensor.detach().to(dtype, copy=True).requires_grad_(name in LEAVES))
    return new


def student(case, **options):
    return Head(case.hs, case.W, case.b, **options)


def teacher(case, kind, **options):
    """kind: "projected", "hidden" (already of the student's width), "head" or "none"."""
    return {
        "projected": lambda: Projected(case.ht, case.P, case.p),
        "hidden": lambda: Projected(torch.nn.functional.linear(case.ht, case.P, case.p)),
        "head": lambda: Head(case.ht, case.Wt, case.bt, **options),
        "none": lambda: None,
    }[kind]()


def gradients(case):
    """By leaf; a leaf that got none counts as zero."""
    return {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in ((name, getattr(case, name)) for name in LEAVES)
    }


def relative(a, b):
    """‖a − b‖ / ‖b‖ in float64; 0/0 is 0."""
    a, b = a.detach(), b.detach()
    difference, size = (a.double() - b.double()).norm(), b.double().norm()
    return float(difference / size) if size > 0 else float(difference)
