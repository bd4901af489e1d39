"""pytest-benchmark times one function's rounds in a row; contenders are to take turns. So they are timed first, and
pytest-benchmark is given those rounds through a clock that goes on by what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Replay:
    """`@pytest.mark.benchmark(timer=Replay())`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, seconds: Sequence[float]) -> Callable[[], None]:
        """A function to benchmark: each call takes the next of these times."""
        left = iter(seconds)

        def run() -> None:
            self.now += next(left)

        return run
