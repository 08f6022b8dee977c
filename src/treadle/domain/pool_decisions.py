"""What operators decided about pools while servers run, over what these were started with. One immutable picture.

It refuses to know how a pool is served. Invariant: a picture never changes; a newer one has a higher version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from treadle.domain.ids import PoolName
from treadle.domain.roles import Scale


class PoolState(StrEnum):
    """What an operator lets a pool do. SERVING: everything, as without any decision.

    PAUSED: requests are admitted and wait. DRAINING: what exists goes on, no run and no sampling session comes new.
    REMOVED: no server has it; its runs and its queued requests stay stored.
    """

    SERVING = "serving"
    PAUSED = "paused"
    DRAINING = "draining"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class PoolDecision:
    """The newest decision about one pool.

    source: the directory or hub name of a pool that was added at run time, None for one of the servers' settings.
    reason: what users are told, "" when none was given. decided_at: seconds since the epoch. num_workers, num_samplers:
    how many are wanted; None: as the servers' settings say.
    """

    pool: PoolName
    state: PoolState
    source: str | None = None
    revision: str | None = None
    reason: str = ""
    decided_at: float = 0.0
    num_workers: int | None = None
    num_samplers: int | None = None


@dataclass(frozen=True, slots=True)
class PoolDecisions:
    """The picture: pools that nothing was decided about are not in it, and serve."""

    version: int = 0
    pools: Mapping[PoolName, PoolDecision] = field(default_factory=dict)

    def state_of(self, pool: PoolName) -> PoolState:
        """What the pool may do."""
        decision = self.pools.get(pool)
        return PoolState.SERVING if decision is None else decision.state

    def scale_of(self, pool: PoolName, otherwise: Scale) -> Scale:
        """How many workers it should have. otherwise: by the settings, for what operators said nothing about."""
        decision = self.pools.get(pool)
        if decision is None:
            return otherwise
        return Scale(
            workers=otherwise.workers if decision.num_workers is None else decision.num_workers,
            samplers=otherwise.samplers if decision.num_samplers is None else decision.num_samplers,
        )
