"""What a case came to, and the count of many."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    what: str
    repeat: str  # how to see it again, beside its kind and seed


@dataclass(frozen=True)
class Outcome:
    case: str  # what was tried, in a few words that many cases share
    came_to: str
    finding: Finding | None = None
    unforeseen: str | None = None  # what a command said of an error that nobody has thought of


@dataclass
class Tally:
    """Of one kind."""

    first_seed: int
    cases: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    unforeseen: dict[str, int] = field(default_factory=dict)  # → the first seed

    def add(self, seed: int, outcome: Outcome) -> None:
        self.cases += 1
        self.outcomes[f"{outcome.case}: {outcome.came_to}"] += 1
        if outcome.finding is not None:
            self.findings.append({"seed": seed, **asdict(outcome.finding)})
        if outcome.unforeseen is not None:
            self.unforeseen.setdefault(outcome.unforeseen, seed)

    def summary(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "seeds": [self.first_seed, self.first_seed + self.cases],
            "seconds": round(self.seconds),
            "outcomes": dict(sorted(self.outcomes.items())),
            "findings": self.findings,
            "unforeseen": self.unforeseen,
        }
