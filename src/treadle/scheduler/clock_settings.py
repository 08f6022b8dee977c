"""How the clock beats, as an operator set it. It refuses to know what beats."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.domain import limits


@dataclass(frozen=True, slots=True)
class CycleSettings:
    """How the clock beats.

    gather_window_s: how long ready work waits for company. budget_tokens: 0 follows target_cycle_s and the measured
    speed. cap_fraction: of the budget, per tenant, when several wait. max_replay_s: worker seconds of one run that a
    death may cost, as far as snapshots for that stay cheap.
    """

    gather_window_s: float
    target_cycle_s: float
    budget_tokens: int
    cap_fraction: float
    gap_wait_s: float
    max_replay_s: float = limits.MAX_REPLAY_S
