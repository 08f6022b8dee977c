"""What clients draw: lengths of sequences and pauses between requests. Seeded, and nothing else.

Invariant: a drawer has no state; all chance is in the generator that the caller passes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a sequence: lognormal, cut off at `longest`. sigma 0: always exp(mu)."""

    mu: float
    sigma: float
    longest: int

    def draw(self, rng: random.Random) -> int:
        """At least one token."""
        return max(1, min(self.longest, round(rng.lognormvariate(self.mu, self.sigma))))

    @staticmethod
    def always(num_tokens: int) -> Lengths:
        """Every sequence of this length."""
        return Lengths(math.log(num_tokens), 0.0, num_tokens)


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds between two things: gamma with this mean and coefficient of variation. cv 0: always the mean."""

    mean_s: float
    cv: float = 1.0

    def draw(self, rng: random.Random) -> float:
        if not self.cv or not self.mean_s:
            return self.mean_s
        shape = self.cv**-2
        return rng.gammavariate(shape, self.mean_s / shape)


# Tokens per sequence: medians 453, 877 and 1,610. Cut at the context of the benchmarks' models.
LENGTH_MIXES: Final[Mapping[str, Lengths]] = {
    "short": Lengths(6.115, 0.593, 4_096),
    "medium": Lengths(6.776, 0.472, 4_096),
    "long": Lengths(7.384, 0.472, 4_096),
}
