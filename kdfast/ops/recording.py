"""Collect what is noted while somebody listens: products of `ops.matmul`, collectives of `ops.collectives`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Call = TypeVar("Call")


class Recorder(Generic[Call]):
    """`with recorder.record() as calls: …`. For tests and benchmarks; not thread-safe."""

    def __init__(self) -> None:
        self._calls: list[Call] | None = None

    @contextmanager
    def record(self) -> Iterator[list[Call]]:
        """Collect the calls made inside."""
        before, self._calls = self._calls, []
        try:
            yield self._calls
        finally:
            self._calls = before

    def note(self, call: Call) -> None:
        if self._calls is not None:
            self._calls.append(call)
