"""What may go wrong in a fake worker, and when: for tests of what is above the executor's seam.

Faults are planned before they strike and counted over all workers that share one plan, because the worker that dies of
a fault is replaced. It refuses to know what a fault does; the fake executor does.
Invariant: equal plans and equal calls strike at the same places.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import StrEnum

from treadle.domain.ids import ModelId


class Moment(StrEnum):
    """When a fault can strike; the name says what has just happened."""

    # Nothing of the cycle ran.
    CYCLE_TAKEN = "cycle taken"
    # A run is about to be rebuilt.
    RESTORE_TAKEN = "restore taken"
    # An op of the cycle ran, others may be left.
    OP_DONE = "op done"
    # All of the cycle ran, and nobody was told.
    CYCLE_DONE = "cycle done"
    # A run's state is about to be written.
    SNAPSHOT_TAKEN = "snapshot taken"
    # Its blob is durable, and nobody was told.
    SNAPSHOT_DURABLE = "snapshot durable"


class Fault(StrEnum):
    """What goes wrong. The last two: only for what can fail by itself, a restore or a snapshot that was taken."""

    DEATH = "death"
    # The call never ends by itself: only `FakeExecutor.die` ends it, as hang detection does.
    HANG = "hang"
    UNREADABLE = "unreadable"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """`fault` at the `moment`s of one run (None: of any) number skip + 1 to skip + times."""

    moment: Moment
    fault: Fault
    model_id: ModelId | None = None
    skip: int = 0
    times: int = 1

    def __post_init__(self) -> None:
        can_fail = {Moment.RESTORE_TAKEN: {Fault.UNREADABLE, Fault.FAILED}, Moment.SNAPSHOT_TAKEN: {Fault.FAILED}}
        assert self.fault in {Fault.DEATH, Fault.HANG} | can_fail.get(self.moment, set()), self
        assert self.skip >= 0, self
        assert self.times >= 1, self


class Faults:
    """The faults to come. One at a time strikes: the first planned whose turn it is."""

    def __init__(self, *planned: PlannedFault) -> None:
        self._planned = list(planned)

    def plan(self, *planned: PlannedFault) -> None:
        """Add faults behind those that are planned."""
        self._planned += planned

    @property
    def num_left(self) -> int:
        """How many faults have not struck yet."""
        return sum(one.times for one in self._planned)

    def strike(self, moment: Moment, model_ids: Collection[ModelId] = ()) -> Fault | None:
        """What goes wrong at this moment, which concerns these runs."""
        struck: Fault | None = None
        left: list[PlannedFault] = []
        for one in self._planned:
            is_meant = one.moment is moment and (one.model_id is None or one.model_id in model_ids)
            if is_meant and one.skip > 0:
                left.append(replace(one, skip=one.skip - 1))
            elif is_meant and struck is None:
                struck = one.fault
                if one.times > 1:
                    left.append(replace(one, times=one.times - 1))
            else:
                left.append(one)
        self._planned = left
        return struck
