"""What the demo does and what came out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from treadle.config import BUNDLED_MODEL


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train. The defaults fit the bundled model."""

    model: str = BUNDLED_MODEL
    steps: int = 40
    learning_rate: float = 6e-3
    rank: int = 32
    seed: int = 0


@dataclass(slots=True)
class Report:
    """What was checked, in words, and what failed."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def check(self, is_right: bool, claim: str) -> None:
        (self.passed if is_right else self.failed).append(claim)
