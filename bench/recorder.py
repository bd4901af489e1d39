"""What a run multiplies and communicates, noted by patching `kdfast.ops.matmul` and `kdfast.ops.collectives`.

Products that a Triton kernel keeps in registers are not seen. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

from kdfast.ops import collectives, matmul

PRODUCTS = {  # function of ops.matmul → kind, and which of its arguments is of shape (V, H)
    "logits": ("logits", 1),
    "input_gradient": ("input_gradient", 1),
    "weight_gradient": ("weight_gradient", 2),
}


class Product(NamedTuple):
    """One product with the vocabulary: its kind and sizes."""

    kind: str  # "logits" | "input_gradient" | "weight_gradient"
    rows: int
    vocab: int
    width: int

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.vocab * self.width


class Collective(NamedTuple):
    """One collective: its kind, the bytes a process puts in, the processes."""

    kind: str  # "all_gather" | "all_reduce"
    size: int
    ranks: int

    @property
    def received(self) -> float:
        """Bytes a process receives: of everyone else's part; of a ring's two rounds for a sum."""
        others = self.ranks - 1
        return others * self.size if self.kind == "all_gather" else 2 * others / self.ranks * self.size


@contextmanager
def products(note: Callable[[Product], None] | None = None) -> Iterator[list[Product]]:
    """Collect the products made inside, and call `note` with each where it is given."""
    found: list[Product] = []

    def recorded(name: str) -> Callable[..., Any]:
        function, (kind, head) = getattr(matmul, name), PRODUCTS[name]

        def call(*args: Any, **how: Any) -> Any:
            found.append(Product(kind, args[0].shape[0], *args[head].shape))
            if note is not None:
                note(found[-1])
            return function(*args, **how)

        return call

    with ExitStack() as patches:
        for name in PRODUCTS:
            patches.enter_context(mock.patch.object(matmul, name, recorded(name)))
        yield found


@contextmanager
def communication() -> Iterator[list[Collective]]:
    """Collect the collectives started inside, `exchange` of a few numbers apart."""
    found: list[Collective] = []

    def recorded(kind: str) -> Callable[..., Any]:
        function = getattr(collectives, kind)

        def call(x: Any, group: str) -> Any:
            found.append(Collective(kind, x.numel() * x.element_size(), collectives.size(group)))
            return function(x, group)

        return call

    with ExitStack() as patches:
        for kind in ("all_gather", "all_reduce"):
            patches.enter_context(mock.patch.object(collectives, kind, recorded(kind)))
        yield found
