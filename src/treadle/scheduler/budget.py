"""How many tokens one cycle may hold, from the measured speed of the worker and the target cycle time.

The budget moves work between cycles; it never changes a result, because whole quanta move.
"""

from __future__ import annotations

from treadle.domain.limits import QUANTUM_TOKENS
from treadle.domain.outcome import PoolFacts

# Weight of the newest cycle in the moving average of tokens per second.
SMOOTHING = 0.2
# Before anything was measured: a few quanta.
INITIAL_TOKENS = 4 * QUANTUM_TOKENS
# Operations per parameter and token of a pass with its gradient.
OPS_PER_PARAMETER = 6.0
# What a slow device does in a second. A guess is all that tells a first cycle of a large model from one that hangs.
SLOW_CPU_OPS_PER_S = 5e10
SLOW_ACCELERATOR_OPS_PER_S = 1e13


class TokenBudget:
    """A moving average of tokens per second times the target cycle time."""

    def __init__(self, *, target_cycle_s: float, fixed_tokens: int = 0) -> None:
        """`fixed_tokens` > 0 switches measuring off."""
        assert target_cycle_s > 0
        self._target_cycle_s = target_cycle_s
        self._fixed_tokens = fixed_tokens
        self._tokens_per_s: float | None = None
        self._guessed_tokens_per_s: float | None = None

    def expect(self, tokens_per_s: float) -> None:
        """A guess at the speed, good for predictions until something was measured."""
        assert tokens_per_s > 0
        self._guessed_tokens_per_s = tokens_per_s

    @property
    def tokens(self) -> int:
        """The budget of the next cycle; at least one quantum."""
        if self._fixed_tokens:
            return self._fixed_tokens
        if self._tokens_per_s is None:
            return INITIAL_TOKENS
        return max(QUANTUM_TOKENS, int(self._tokens_per_s * self._target_cycle_s))

    def predict_s(self, num_tokens: int) -> float:
        """How long a cycle of so many tokens should take; 0.0 when nothing was measured or guessed."""
        tokens_per_s = self._tokens_per_s or self._guessed_tokens_per_s
        return 0.0 if tokens_per_s is None else num_tokens / tokens_per_s

    def observe(self, *, num_tokens: int, compute_s: float) -> None:
        """Learn from a cycle. Cycles too short to say anything about speed are ignored."""
        if num_tokens < 64 or compute_s <= 0:
            return
        speed = num_tokens / compute_s
        old = self._tokens_per_s
        self._tokens_per_s = speed if old is None else (1 - SMOOTHING) * old + SMOOTHING * speed


def guessed_tokens_per_s(facts: PoolFacts) -> float:
    """The least speed that a worker of this kind can be expected to have."""
    ops_per_s = SLOW_CPU_OPS_PER_S if facts.device == "cpu" else SLOW_ACCELERATOR_OPS_PER_S
    return ops_per_s / (OPS_PER_PARAMETER * max(1, facts.num_parameters))
